"""What a model is worth on a split, with its uncertainty, and how near it is to its teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from .data import Split
from .data import accuracy as class_accuracy

_Z95 = 1.959963984540054
# Numbers that the bootstrap draws at a time.
_DRAWN = 10**7


@dataclass(frozen=True)
class Accuracy:
    """The mean score of a split's samples.

    Attributes:
        value: In 0..1; NaN outputs count as wrong.
        ci95: The Wilson interval (Wilson 1927) of `value`; for scores between 0 and 1 it is wider than needed.
        correct: Shape (n,), bool (or float for a user's metric), in the order of the evaluated samples.
    """

    value: float
    ci95: tuple[float, float]
    correct: Tensor = field(repr=False, compare=False)


def accuracy(module: nn.Module, split: Split, limit: int | None = None, batch: int = 256) -> Accuracy:
    """Scores the module with the split's metric.

    Args:
        module: Evaluated in eval mode on its own device; its mode is restored.
        limit: At most this many samples, chosen as in `Split.sample`: the same for every module.

    Raises:
        ValueError: the metric does not return one score in 0..1 for a sample.
    """
    return accuracy_and_divergence(module, split, limit, None, batch)[0]


def accuracy_and_divergence(
    module: nn.Module, split: Split, limit: int | None, teacher_logits: Tensor | None, batch: int = 256
) -> tuple[Accuracy, float | None]:
    """Accuracy, and the mean KL(teacher | module) in nats of the same outputs (None without the teacher's logits).

    Args:
        module: As for `accuracy`.
        split: As for `accuracy`.
        limit: As for `accuracy`.
        teacher_logits: Of the same samples in the same order, (n, classes).
        batch: Samples at once.
    """
    chosen = split.sample(limit)
    found = list(_outputs(module, chosen, batch))
    scores = [
        _score(split, outputs, targets) for outputs, (_, targets) in zip(found, chosen.batches(batch), strict=True)
    ]
    correct = torch.cat(scores)
    value = float(correct.to(torch.float64).mean())
    divergence = None if teacher_logits is None else _divergence(torch.cat(found), teacher_logits)
    return Accuracy(value, wilson(value, len(correct)), correct), divergence


def guessing(split: Split) -> float:
    """The accuracy of always naming the split's most frequent class; 0 under a metric of the user's own."""
    if split.metric is not class_accuracy:
        return 0.0
    return int(split.targets.bincount().max()) / len(split)


def outputs(module: nn.Module, inputs: Tensor, batch: int = 256) -> Tensor:
    """The module's outputs for normalised inputs (n, ...), in eval mode without gradients, on the CPU."""
    device = device_of(module)
    with evaluating(module), torch.no_grad():
        parts = [inputs[start : start + batch] for start in range(0, len(inputs), batch)]
        return torch.cat([module(part.to(device)).cpu() for part in parts])


def wilson(value: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share `value` of `count` samples: `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if count < 1 or not 0 <= value <= 1:
        raise ValueError(f"a share of {value} of {count} samples has no interval; give 0..1 and at least 1 sample")
    z2 = _Z95**2 / count
    centre = value + z2 / 2
    half = _Z95 * math.sqrt(value * (1 - value) / count + z2 / (4 * count))
    return max(0.0, (centre - half) / (1 + z2)), min(1.0, (centre + half) / (1 + z2))


def paired_bootstrap(correct_a: Tensor, correct_b: Tensor, seed: int, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of accuracy a minus accuracy b on the same samples in the same order.

    Resampling n pairs with replacement is drawing the counts of their distinct differences from a multinomial,
    which is what is done here: the same distribution without n x resamples indices.

    Args:
        correct_a: Shape (n,), as in `Accuracy.correct`; correct_b likewise.

    Raises:
        ValueError: the shapes differ, or there is no sample.
    """
    if correct_a.shape != correct_b.shape or correct_a.ndim != 1 or len(correct_a) == 0:
        raise ValueError(
            f"correct_a has shape {tuple(correct_a.shape)} and correct_b {tuple(correct_b.shape)}; "
            "they need the same samples, at least 1"
        )
    difference = (correct_a.to(torch.float64) - correct_b.to(torch.float64)).numpy()
    values, counts = np.unique(difference, return_counts=True)
    rng, shares, means = np.random.default_rng(seed), counts / len(difference), np.empty(resamples)
    # In parts, which draw what one draw would: a metric with as many values as samples would need gigabytes.
    part = max(1, _DRAWN // len(values))
    for start in range(0, resamples, part):
        drawn = rng.multinomial(len(difference), shares, size=min(part, resamples - start))
        means[start : start + part] = drawn @ values / len(difference)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def kl_to_teacher(module: nn.Module, teacher_logits: Tensor, inputs: Tensor, batch: int = 256) -> float:
    """The mean of KL(teacher | module) over normalised inputs, in nats; infinite or NaN outputs give infinity."""
    return _divergence(outputs(module, inputs, batch), teacher_logits)


def agreement(module: nn.Module, teacher_logits: Tensor, inputs: Tensor, batch: int = 256) -> float:
    """The share of normalised inputs for which module and teacher name the same class."""
    same = outputs(module, inputs, batch).argmax(1) == teacher_logits.argmax(1)
    return float(same.to(torch.float64).mean())


def recalibrate(module: nn.Module, inputs: Tensor, batch: int = 256) -> None:
    """Forgets the batch-norm statistics and estimates them again on these inputs, in place.

    Each becomes the plain average of the batches' means and variances (cumulative, so the order does not matter and
    nothing of the old is left). Momentum and modes are restored; a module without batch norm is not run.

    Args:
        inputs: Normalised, shape (n, ...); for a model that was trained with augmentation, `Split.calibration`.
        batch: The n inputs are cut into equal batches of at most this size, so that none weighs more.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    device = device_of(module)
    momenta = [norm.momentum for norm in norms]
    try:
        with evaluating(module), torch.no_grad():
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for the cumulative average
                norm.train()
            for part in inputs.tensor_split(math.ceil(len(inputs) / batch)):
                module(part.to(device))
    finally:
        # Left at None, later training averages over its whole past: 0.92 became 0.66.
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule's own mode comes back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def device_of(module: nn.Module) -> torch.device:
    """Where the module's tensors are; the CPU if it has none."""
    tensor = next(module.parameters(), next(module.buffers(), torch.empty(0)))
    return tensor.device


def _outputs(module: nn.Module, split: Split, batch: int) -> Iterator[Tensor]:
    device = device_of(module)
    with evaluating(module), torch.no_grad():
        for inputs, _ in split.batches(batch):
            yield module(inputs.to(device)).cpu()


def _divergence(logits: Tensor, teacher_logits: Tensor) -> float:
    student = functional.log_softmax(logits.to(torch.float64), 1)
    teacher = functional.log_softmax(teacher_logits.to(torch.float64), 1)
    value = float(functional.kl_div(student, teacher, reduction="batchmean", log_target=True))
    # Rounding can leave a hair below zero, and a NaN would sort as neither better nor worse.
    return max(0.0, value) if math.isfinite(value) else math.inf


def _score(split: Split, outputs: Tensor, targets: Tensor) -> Tensor:
    scores = split.metric(outputs, targets)
    if not isinstance(scores, Tensor) or scores.shape != targets.shape:
        what = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"the metric returned {what} for {len(targets)} samples; it needs a tensor ({len(targets)},)")
    # A NaN logit wins or loses argmax by accident.
    broken = ~outputs.flatten(1).isfinite().all(1)
    scores = torch.where(broken, torch.zeros_like(scores), scores)
    low, high = float(scores.min()), float(scores.max())
    if low < 0 or high > 1:
        raise ValueError(f"the metric returned scores from {low} to {high}; they need to be in 0..1")
    return scores
