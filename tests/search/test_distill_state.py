from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from planish.search.distill_state import (
    Checkpoint,
    CheckpointError,
    OtherVersion,
    capture,
    epoch_of,
    load_checkpoint,
    restore,
    save_checkpoint,
)


def checkpoint() -> Checkpoint:
    return Checkpoint(
        3,
        {
            "a.weight": torch.arange(6.0).reshape(2, 3),
            "a.count": torch.tensor(7),
            "codes": torch.tensor([1, -2]).char(),
        },
        {"a.weight": {"momentum_buffer": torch.ones(2, 3)}},
        {"identity": {"seed": 1}, "history": [{"loss": 0.5}]},
    )


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.safetensors", checkpoint())
    loaded, saved = load_checkpoint(tmp_path / "c.safetensors"), checkpoint()
    assert (loaded.epoch, loaded.note) == (saved.epoch, saved.note)
    assert loaded.student.keys() == saved.student.keys()
    for name, value in saved.student.items():
        assert loaded.student[name].dtype == value.dtype
        assert torch.equal(loaded.student[name], value)
    assert torch.equal(loaded.optimiser["a.weight"]["momentum_buffer"], torch.ones(2, 3))


def test_a_checkpoint_is_safetensors_with_a_json_note(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "c.safetensors", checkpoint())
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["planish"])["epoch"] == 3


@pytest.mark.parametrize("keep", [0, 7, 60, -1])
def test_a_checkpoint_cut_short_says_what_to_do(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, checkpoint())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"checkpoint .*c\.safetensors cannot be read .*; delete it") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


def test_another_programs_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="no note of planish's"):
        load_checkpoint(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    "note", ["{", "[]", '{"format": 99, "epoch": 1}', '{"format": 1}', '{"format": 1, "epoch": "x"}']
)
def test_a_note_that_says_something_else_is_refused(tmp_path: Path, note: str) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "c.safetensors", {"planish": note})
    with pytest.raises(CheckpointError, match="delete it"):
        load_checkpoint(tmp_path / "c.safetensors")


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, checkpoint())
    old = path.read_bytes()

    def no_rename(*arguments: object) -> None:
        raise RuntimeError("power cut")

    monkeypatch.setattr("os.replace", no_rename)
    with pytest.raises(RuntimeError, match="power cut"):
        save_checkpoint(path, Checkpoint(4, {}, {}))
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"]


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="student's extra is a dict"):
        save_checkpoint(tmp_path / "c", Checkpoint(1, {"extra": {}}, {}))  # type: ignore[dict-item]


def tied() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    return module


def test_shared_parameters_are_saved_and_stay_shared(tmp_path: Path) -> None:
    student = tied()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    student(torch.ones(2, 3)).sum().backward()
    optimiser.step()
    save_checkpoint(tmp_path / "c", capture(student, optimiser, 1, {}))
    other = tied()
    again = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    restore(tmp_path / "c", load_checkpoint(tmp_path / "c"), other, again)
    assert other[0].weight is other[1].weight
    for a, b in zip(student.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimiser.state[a]["momentum_buffer"], again.state[b]["momentum_buffer"])


def test_a_checkpoint_of_another_version_is_not_taken_for_a_damaged_one(tmp_path: Path) -> None:
    """It is hours of training, which that version can carry on with."""
    path = tmp_path / "c.safetensors"
    assert epoch_of(path) is None
    save_checkpoint(path, checkpoint())
    assert epoch_of(path) == checkpoint().epoch
    path.write_bytes(path.read_bytes()[:100])
    assert epoch_of(path) is None
    save_file({"x": torch.ones(1)}, path, {"planish": '{"format": 99, "epoch": 1}'})
    with pytest.raises(OtherVersion, match="has the format 99"):
        epoch_of(path)
