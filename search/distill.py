"""Trains a student to imitate the original model, so that it can be stopped and carried on without a trace."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .data import Split
from .distill_attention import AttentionTap, stage_ends
from .distill_loss import losses
from .distill_recipe import Recipe as Recipe
from .distill_recipe import build_optimiser, learning_rate
from .distill_state import CheckpointError, capture, load_checkpoint, restore, save_checkpoint, trainable
from .distill_teacher import Teacher
from .score import device_of

_log = logging.getLogger(__name__)


class DistillError(RuntimeError):
    """Training went astray: a loss or gradient is not finite. The student is spoilt."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of training; the losses are means over samples, before their weights.

    Attributes:
        number: 1 is the first.
        loss: The weighted sum; `ce`, `kl` (with T^2) and `attention` its parts, 0 where their weight is 0.
        learning_rate: That of the last step.
    """

    number: int
    loss: float
    ce: float
    kl: float
    attention: float
    learning_rate: float


@dataclass(frozen=True)
class History:
    """The epochs of a training from its very first, also those before a restart."""

    epochs: tuple[Epoch, ...]


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    train: Split,
    *,
    to_epoch: int,
    total_epochs: int,
    seed: int,
    from_epoch: int = 0,
    recipe: Recipe | None = None,
    checkpoint: Path | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> History:
    """Trains the student in place from one epoch to another, on the device it is on; it ends in eval mode.

    All that is random in an epoch comes from (seed, epoch). Training to epoch 3, ending the process and training
    on to epoch 10 from the checkpoint therefore gives bit for bit the student of one training to epoch 10 (on the
    CPU with the same number of threads).

    Args:
        student: Trained in place, fake quantisation included; parameters without gradient stay as they are.
        teacher: Not changed, on the student's device. None trains on labels (alpha and attention have to be 0).
        from_epoch: What the caller knows to be done. The checkpoint may be ahead of it (the process was killed), then
            training carries on from there.
        to_epoch: Where to stop now.
        total_epochs: What the learning rate is planned for.
        checkpoint: Read at the start if it is there, written after every epoch.
        on_epoch: Called after every epoch, the checkpoint written; what it raises ends the training.

    Raises:
        DistillError: a loss or a gradient is NaN or infinite.
        CheckpointError: the checkpoint is damaged, missing, or of another training.
        ValueError: the epochs are out of order, or the student and teacher do not fit each other.
    """
    recipe = recipe or Recipe()
    if not 0 <= from_epoch <= to_epoch <= total_epochs or total_epochs < 1:
        raise ValueError(f"epochs {from_epoch} to {to_epoch} of {total_epochs} are out of order")
    if teacher is None and (recipe.alpha > 0 or recipe.attention > 0):
        raise ValueError(f"alpha {recipe.alpha} and attention {recipe.attention} need a teacher; set both to 0")
    if student is teacher:
        raise ValueError("the student is the teacher itself; train a copy")
    training = _Training(student, teacher, train, total_epochs, seed, recipe)
    done = training.resume(checkpoint, from_epoch, to_epoch)
    try:
        for epoch in range(done, to_epoch):
            record = training.run(epoch)
            if checkpoint is not None:
                training.save(checkpoint)
            _log.debug("epoch %d of %d: loss %.4f", record.number, total_epochs, record.loss)
            if on_epoch is not None:
                on_epoch(record)
    finally:
        student.eval()
    return History(tuple(training.epochs))


class _Training:
    """A student with its optimiser and what it imitates."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, train: Split, total_epochs: int, seed: int, recipe: Recipe
    ) -> None:
        self.student, self.train, self.recipe, self.seed = student, train, recipe, seed
        self.device = device_of(student)
        self.steps_per_epoch = math.ceil(len(train) / recipe.batch)
        self.total_steps = self.steps_per_epoch * total_epochs
        self.optimiser = build_optimiser(student, recipe)
        self.epochs: list[Epoch] = []
        self.identity = {"seed": seed, "total_epochs": total_epochs, "samples": len(train), "recipe": asdict(recipe)}
        self.moves = recipe.augment and bool(train.augment)
        self.stages: tuple[str, ...] = ()
        self.teacher: Teacher | None = None
        if teacher is not None:
            self.teacher = self._prepare(teacher)

    def resume(self, path: Path | None, from_epoch: int, to_epoch: int) -> int:
        """Restores the checkpoint and returns the number of epochs that are done."""
        if path is None or not path.exists():
            if from_epoch == 0:
                return 0
            raise CheckpointError(
                f"training is to go on from epoch {from_epoch} and there is no checkpoint {path or ''}; start from 0"
            )
        found = load_checkpoint(path)
        if found.note.get("identity") != self.identity:
            raise CheckpointError(
                f"checkpoint {path} is of another training ({found.note.get('identity')}, this one is "
                f"{self.identity}); delete it to start afresh"
            )
        if not from_epoch <= found.epoch <= to_epoch:
            raise CheckpointError(
                f"checkpoint {path} is of epoch {found.epoch}, outside {from_epoch}..{to_epoch}; "
                "delete it to start afresh"
            )
        restore(path, found, self.student, self.optimiser)
        history = found.note.get("history")
        self.epochs = [Epoch(**record) for record in history] if isinstance(history, list) else []
        return found.epoch

    def save(self, path: Path) -> None:
        """Writes the checkpoint after the last epoch."""
        note = {"identity": self.identity, "history": [asdict(epoch) for epoch in self.epochs]}
        save_checkpoint(path, capture(self.student, self.optimiser, len(self.epochs), note))

    def run(self, epoch: int) -> Epoch:
        """Trains one epoch; 0 is the first."""
        seed = _epoch_seed(self.seed, epoch)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator)
        sums = torch.zeros(4, dtype=torch.float64)
        devices = [self.device] if self.device.type == "cuda" else []
        self.student.train()
        tap = AttentionTap(self.student, self.stages) if self.stages else nullcontext()
        with torch.random.fork_rng(devices), tap:
            torch.manual_seed(seed)  # for dropout, and whatever else draws without a generator
            for step, indices in enumerate(order.tensor_split(self.steps_per_epoch)):
                number = epoch * self.steps_per_epoch + step
                parts = self._step(indices, generator, tap if isinstance(tap, AttentionTap) else None, number)
                sums += parts * len(indices)
        means = (sums / len(self.train)).tolist()
        loss, ce, kl, attention = means
        self.epochs.append(Epoch(epoch + 1, loss, ce, kl, attention, self.optimiser.param_groups[0]["lr"]))
        return self.epochs[-1]

    def _step(self, indices: Tensor, generator: torch.Generator, tap: AttentionTap | None, number: int) -> Tensor:
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.recipe, number, self.total_steps)
        raw = self.train.training_batch(indices, generator) if self.moves else self.train.batch(indices)
        inputs = raw.to(self.device)
        wanted = self.teacher.targets(inputs, indices) if self.teacher is not None else None
        logits = self.student(inputs)
        maps = tap.maps if tap is not None else ()
        parts = losses(self.recipe, logits, maps, self.train.targets[indices].to(self.device), wanted)
        loss = parts[0]
        self._check("loss", loss.detach(), number)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_([p for _, p in trainable(self.student)], self.recipe.clip)
        self._check("norm of the gradient", norm, number)
        self.optimiser.step()
        return parts.detach().cpu().to(torch.float64)

    def _check(self, what: str, value: Tensor, step: int) -> None:
        if not bool(value.isfinite()):
            epoch, inside = divmod(step, self.steps_per_epoch)
            raise DistillError(
                f"the {what} is {float(value)} in epoch {epoch + 1}, step {inside + 1}; "
                f"the learning rate {self.recipe.learning_rate} may be too high, or the student broken from the start"
            )

    def _prepare(self, teacher: nn.Module) -> Teacher:
        example = self.train.batch(slice(0, 2)).to(self.device)
        if self.recipe.attention > 0:
            self.stages = stage_ends(self.student, teacher, example)
            if not self.stages:
                _log.info("student and teacher share no image-shaped module; attention is not transferred")
        prepared = Teacher(teacher, self.stages, self.device)
        if not self.moves:
            prepared.remember(self.train, max(self.recipe.batch, 256))
        return prepared


def _epoch_seed(seed: int, epoch: int) -> int:
    digest = hashlib.sha256(f"{seed}:{epoch}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
