"""An evaluator's training across damage, and its predictions beside what is compiled."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from planish.search.config import load_spec
from planish.search.data import Data, Split
from planish.search.errors import UserError
from planish.search.evaluate import CHECKPOINT, Evaluator, Job
from planish.search.task_error import TaskError
from planish.search.tasks import Task
from planish.search.zoo import SmallResNet
from planish.spaces.space import Candidate

pytestmark = pytest.mark.tvm


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return make(True)


def make(labelled: bool, **own: float) -> Evaluator:
    generator = torch.Generator().manual_seed(0)
    split = Split(torch.randn(16, 1, 16, 16, generator=generator), torch.arange(16) % 4)
    data = Data(replace(split, labelled=labelled), split, split, ("a", "b", "c", "d"))
    torch.manual_seed(0)
    task = Task(SmallResNet(widths=(16, 32), blocks=1, classes=4).eval(), data)
    keys = {"model": "own", "data": "own", "space.lanes": 8, "measure.latency": "predicted", "distill.batch_size": 8}
    return Evaluator(load_spec(None, {**keys, **own}), task)


def test_without_labels_only_the_teacher_can_be_learned_from() -> None:
    with pytest.raises(TaskError, match=r"no labels and distill\.alpha is 0\.8.*set distill\.alpha = 1"):
        make(False)
    make(False, **{"distill.alpha": 1.0})


@pytest.fixture(scope="module")
def candidate(evaluator: Evaluator) -> Candidate:
    space = evaluator.proposal.space
    chosen = {choice.name: choice.options[0] for choice in space.choices}
    bits = next(choice for choice in space.choices if choice.name.endswith("bits") and 8 in choice.options)
    return Candidate({**chosen, bits.name: 8})


@pytest.mark.parametrize("cut", [0, 100, -1])
def test_a_damaged_checkpoint_costs_its_training_and_changes_nothing(
    evaluator: Evaluator, candidate: Candidate, tmp_path: Path, cut: int
) -> None:
    sound, struck = Job(1, candidate, 7, tmp_path / "a"), Job(1, candidate, 7, tmp_path / "b")
    for job in (sound, struck):
        evaluator.train(job, 1, 2)
    checkpoint = struck.folder / CHECKPOINT
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[:cut] if cut >= 0 else content[:-1])
    assert evaluator.train(struck, 2, 2) == evaluator.train(sound, 2, 2)
    for ours, theirs in zip(
        evaluator.trained(sound).state_dict().values(), evaluator.trained(struck).state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_another_training_is_kept_and_told_and_no_fault_of_the_candidate(
    evaluator: Evaluator, candidate: Candidate, tmp_path: Path
) -> None:
    job = Job(1, candidate, 7, tmp_path)
    evaluator.train(job, 1, 2)
    before = (job.folder / CHECKPOINT).read_bytes()
    with pytest.raises(UserError, match=r"is of another training .* delete it to start afresh, or carry on"):
        evaluator.train(Job(1, candidate, 8, tmp_path), 2, 2)  # another seed
    assert (job.folder / CHECKPOINT).read_bytes() == before


def test_a_prediction_has_the_memory_and_size_of_the_compiled_model(
    evaluator: Evaluator, candidate: Candidate, tmp_path: Path
) -> None:
    job = Job(1, candidate, 7, tmp_path)
    predicted = evaluator.score(job)
    compiled = evaluator.compile(evaluator.build(candidate), job, "untrained")
    assert predicted["peak_memory_bytes"] == compiled["peak_memory_bytes"]
    latency = predicted["latency_s"]
    assert isinstance(latency, dict)
    low, high = latency["cpu"]["ci95"]
    assert 0 <= low <= latency["cpu"]["value"] <= high
    # The same in any process: nothing of it was timed.
    assert evaluator.score(job)["latency_s"] == latency
