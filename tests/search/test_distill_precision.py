"""Training in bfloat16: what is computed in it, what is not, and that it is float32's training but for rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.distill import Epoch, distill
from planish.search.distill_recipe import Recipe
from planish.search.evaluate import Evaluator
from planish.search.tasks import Task
from planish.spaces import Candidate, Kind

TOGETHER = 32


def network() -> nn.Module:
    torch.manual_seed(0)
    stages = [
        part
        for c, o in ((8, 32), (32, 32), (32, 32))
        for part in (nn.Conv2d(c, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())
    ]
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)).eval()


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    inputs = torch.randn(4 * TOGETHER, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    split = Split(inputs, torch.arange(len(inputs)) % 5)
    data = Data(split, split, split, tuple("abcde"))
    return Evaluator(load_spec(None, {"model": "own", "data": "own"}), Task(network(), data))


def trained(student: nn.Module, teacher: nn.Module, split: Split, **changes: object) -> Epoch:
    recipe = Recipe(batch=TOGETHER, **changes)  # type: ignore[arg-type]
    return distill(student, teacher, split, to_epoch=1, total_epochs=2, seed=3, recipe=recipe).epochs[0]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_convolutions_and_products_alone_are_computed_in_it(evaluator: Evaluator, precision: str) -> None:
    seen: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set()}

    def watch(name: str, module: nn.Module) -> nn.Module:
        for layer in module.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.register_forward_hook(lambda _, __, output: seen[name].add(output.dtype))
        return module

    student, teacher = watch("student", network()), watch("teacher", network())
    trained(student, teacher, evaluator.task.data.train, precision=precision, hints=1.0)
    wanted = torch.float32 if precision == "float32" else torch.bfloat16
    # The student also runs in float32 once: to see which of its features are the teacher's.
    assert wanted in seen["student"]
    assert wanted in seen["teacher"]
    assert torch.bfloat16 not in (seen["student"] | seen["teacher"]) or precision == "bfloat16"
    assert {value.dtype for value in student.state_dict().values()} == {torch.float32, torch.int64}


def single_options(evaluator: Evaluator) -> list[tuple[Kind, Candidate]]:
    """Every option of every layer but the first, alone."""
    space = evaluator.proposal.space
    original = space.original().options
    return [
        (choice.kind, Candidate({**original, choice.name: option}))
        for choice in space.choices
        if not choice.name.startswith("0:")
        for option in choice.options[1:]
    ]


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])


def test_every_option_trains_as_in_float32_but_for_rounding(evaluator: Evaluator) -> None:
    candidates = single_options(evaluator)
    assert {kind for kind, _ in candidates} == set(Kind)
    for _, candidate in candidates:
        begun = evaluator.build(candidate)
        found, moved = [], []
        for precision in ("float32", "bfloat16"):
            student = copy.deepcopy(begun)
            found.append(trained(student, evaluator.teacher, evaluator.task.data.train, precision=precision))
            moved.append(parameters(student) - parameters(begun))
        name = {n: o for n, o in candidate.options.items() if o != evaluator.proposal.space.original().options[n]}
        assert found[1].loss == pytest.approx(found[0].loss, rel=0.005), name
        assert torch.cosine_similarity(moved[0], moved[1], dim=0) > 0.99, name
