"""A run goes on with the weights and the data that it began with, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.errors import UserError
from planish.search.task_note import NAME, builtin, write_task
from planish.search.tasks import Task


def task(weight: float = 0.5, pixel: float = 0.0) -> Task:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, weight)
    inputs = torch.zeros(8, 3, 2, 2)
    inputs[3, 1, 0, 1] = pixel
    split, other = Split(torch.zeros(8, 3, 2, 2), torch.arange(8) % 4), Split(inputs, torch.arange(8) % 4)
    return Task(model, Data(split, split, other, ("a", "b", "c", "d")))


def test_the_same_weights_and_data_go_on(tmp_path: Path) -> None:
    write_task(tmp_path, task())
    written = (tmp_path / NAME).read_bytes()
    write_task(tmp_path, task())
    assert (tmp_path / NAME).read_bytes() == written


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (task(weight=0.25), "the weights of"),
        (task(pixel=1.0), "the data of"),
        (task(0.25, 1.0), "the data and the weights of"),
    ],
)
def test_other_weights_or_data_are_refused_and_named(tmp_path: Path, other: Task, what: str) -> None:
    write_task(tmp_path, task())
    with pytest.raises(UserError, match=rf"{what}.* not those that the run in .* began with.* another --out") as error:
        write_task(tmp_path, other)
    assert "\n" not in str(error.value)


def test_a_model_that_planish_trains_for_every_user_may_differ_and_its_data_may_not(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "mine.py").touch()
    assert builtin(load_spec(None, {"model": "digits-resnet", "data": "digits32"}))
    assert not builtin(
        load_spec(None, {"model": "digits-resnet", "data": "digits32", "weights": str(tmp_path / "w.safetensors")})
    )
    assert not builtin(load_spec(None, {"model": f"{tmp_path / 'mine.py'}:make", "data": "digits32"}))
    write_task(tmp_path, task(), weights=False)
    write_task(tmp_path, task(weight=0.25), weights=False)
    with pytest.raises(UserError, match="the data of this search"):
        write_task(tmp_path, task(pixel=1.0), weights=False)


def test_a_run_of_before_they_were_noted_goes_on(tmp_path: Path) -> None:
    write_task(tmp_path, task())
    note = json.loads((tmp_path / NAME).read_text())
    del note["digests"]
    (tmp_path / NAME).write_text(json.dumps(note))
    write_task(tmp_path, task(weight=0.25))


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"digests": 3}'])
def test_a_damaged_note_is_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / NAME).write_text(text)
    with pytest.raises(UserError, match=rf"{NAME} is no task's note"):
        write_task(tmp_path, task())
