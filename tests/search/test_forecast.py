"""What a search is expected to cost: images that are trained on, and a line that says so."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from planish.search.config import load_spec
from planish.search.forecast import forecast, training_passes


def spec(**keys: Any) -> Any:
    return load_spec(None, {"model": "digits-resnet", "data": "digits32", **keys})


@pytest.mark.parametrize(("limit", "images"), [(0, 1000), (300, 300), (5000, 1000)])
def test_every_epoch_of_every_survivor_counts_once(limit: int, images: int) -> None:
    keys = {"distill.rungs": (1, 3, 10), "distill.survivors": (6, 4, 2), "distill.train_limit": limit}
    # Six train one epoch, four of them two more, two of those seven more.
    assert training_passes(spec(**keys), 1000) == (6 * 1 + 4 * 2 + 2 * 7) * images


class _Train:
    def __len__(self) -> int:
        return 100

    def batch(self, which: slice) -> torch.Tensor:
        return torch.arange(400.0).reshape(100, 4)[which]


def evaluator(teacher: nn.Module, **own: str) -> Any:
    keys = {"distill.rungs": (2, 6), "distill.survivors": (3, 2), "search.trials": 8, **own}
    data = SimpleNamespace(train=_Train())
    return SimpleNamespace(spec=spec(**keys), teacher=teacher, task=SimpleNamespace(data=data))


def test_the_line_says_who_is_trained_how_long_and_leaves_the_model_alone() -> None:
    teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(), nn.BatchNorm1d(3)).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    line = forecast(evaluator(teacher), 2)
    assert line.startswith("expected: 8 candidates to score, of which are trained 3 to epoch 2, 2 to epoch 6; up to ")
    assert "on 2 workers" in line
    assert not teacher.training
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_training_is_timed_in_the_precision_that_it_will_have() -> None:
    seen = set()
    teacher = nn.Sequential(nn.Linear(4, 3)).eval()
    teacher[0].register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    assert "up to" in forecast(evaluator(teacher, **{"distill.precision": "bfloat16"}), 2)
    assert seen == {torch.bfloat16}


def test_a_model_that_cannot_be_trained_has_a_line_without_a_time() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                raise RuntimeError("no training")
            return x

    assert forecast(evaluator(Broken()), 2).endswith("2 to epoch 6")


def test_of_training_on_a_gpu_no_time_is_told() -> None:
    line = forecast(evaluator(nn.Sequential(nn.Linear(4, 3)).eval()), 2, on_gpu=True)
    assert line.endswith("which are trained 3 to epoch 2, 2 to epoch 6 on a GPU")
