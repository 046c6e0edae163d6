"""What the training of a search will take, told before it begins."""

from __future__ import annotations

import copy
import time
from typing import TYPE_CHECKING

import torch

from .evaluate import Evaluator, recipe_of
from .progress import duration

if TYPE_CHECKING:
    from .config import Spec

_IMAGES = 32
_TURNS = 3


def training_passes(spec: Spec, images: int) -> int:
    """Images that all rungs together train on, each counted as often as it is seen.

    Args:
        spec: Of the search.
        images: Of the training split.
    """
    limit = spec.distill.train_limit
    images = min(limit, images) if limit else images
    before, passes = 0, 0
    for epochs, survivors in zip(spec.distill.rungs, spec.distill.survivors, strict=True):
        passes += survivors * (epochs - before) * images
        before = epochs
    return passes


def seconds_an_image(evaluator: Evaluator) -> float:
    """What distilling the original into a student as large as itself takes an image, on one thread."""
    train = evaluator.task.data.train
    inputs = train.batch(slice(0, min(_IMAGES, len(train))))
    student = copy.deepcopy(evaluator.teacher).train()
    computing = recipe_of(evaluator.spec.distill).computing(inputs.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Dropout draws numbers; none of those that the search draws may be gone.
        with torch.random.fork_rng([]):
            return min(_step_s(student, evaluator.teacher, inputs, computing) for _ in range(_TURNS)) / len(inputs)
    finally:
        torch.set_num_threads(threads)


def forecast(evaluator: Evaluator, workers: int, on_gpu: bool = False) -> str:
    """One line: how many candidates are scored and trained, and how long training takes at most on the CPU."""
    spec = evaluator.spec
    distill = spec.distill
    steps = [f"{count} to epoch {until}" for until, count in zip(distill.rungs, distill.survivors, strict=True)]
    most = min(workers, distill.survivors[0])
    line = f"expected: {spec.search.trials} candidates to score, of which are trained {', '.join(steps)}"
    if on_gpu:
        return f"{line} on a GPU"
    try:
        seconds = training_passes(spec, len(evaluator.task.data.train)) * seconds_an_image(evaluator) / most
    except (RuntimeError, ValueError):
        return line  # what cannot be trained says so when it is trained
    on = f"{most} worker{'s' if most > 1 else ''}"
    return f"{line}; up to {duration(seconds)} of training on {on}, less for smaller models"


def _step_s(
    student: torch.nn.Module, teacher: torch.nn.Module, inputs: torch.Tensor, computing: torch.autocast
) -> float:
    start = time.perf_counter()
    with torch.no_grad(), computing:
        teacher(inputs)
    with computing:
        outputs = student(inputs)
    outputs.float().square().mean().backward()
    return time.perf_counter() - start
