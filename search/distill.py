"""Trains a student to imitate the original model, so that it can be stopped and carried on without a trace."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from .data import Split
from .distill_attention import FeatureTap, stage_ends
from .distill_layout import channels_last, contiguous
from .distill_lessons import Lessons, generator
from .distill_loss import losses
from .distill_recipe import Recipe as Recipe
from .distill_recipe import build_optimiser, learning_rate
from .distill_state import CheckpointError, capture, load_checkpoint, restore, save_checkpoint, trainable
from .distill_teacher import Teacher
from .heap import kept_memory
from .score import device_of, recalibrate

_log = logging.getLogger(__name__)
# Inputs that batch norms are settled on.
_SETTLING = 2048


class DistillError(RuntimeError):
    """Training went astray: a loss or gradient is not finite. The student is spoilt."""


@dataclass(frozen=True)
class Epoch:
    """One epoch of training; the losses are means over samples, before their weights.

    Attributes:
        number: 1 is the first.
        loss: The weighted sum; `ce`, `kl` (with T^2), `attention` and `hints` its parts, 0 where their weight is 0.
        learning_rate: That of the last step.
    """

    number: int
    loss: float
    ce: float
    kl: float
    attention: float
    hints: float
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
    samples: int = 0,
    shared_seed: int | None = None,
    lessons: Path | None = None,
    restarts: Sequence[int] = (),
) -> History:
    """Trains the student in place from one epoch to another, on the device it is on; it ends in eval mode.

    All that is random in an epoch comes from (seed, epoch), and which samples it shows and how they are moved from
    (shared_seed, epoch). Training to epoch 3, ending the process and training on to epoch 10 from the checkpoint
    therefore gives bit for bit the student of one training to epoch 10 (on the CPU with the same number of threads).

    Args:
        student: Trained in place, fake quantisation included; parameters without gradient stay as they are.
        teacher: Not changed, on the student's device. None trains on labels (alpha, attention and hints have to be 0).
        from_epoch: What the caller knows to be done. The checkpoint may be ahead of it (the process was killed), then
            training carries on from there.
        to_epoch: Where to stop now.
        total_epochs: What the learning rate is planned for: it has fallen to 0 then.
        checkpoint: Read at the start if it is there, written after every epoch.
        on_epoch: Called after every epoch, the checkpoint written; what it raises ends the training.
        samples: In an epoch, every epoch others until all were shown; 0 stands for all of `train`.
        shared_seed: The seed where it is None. Students that share one and a teacher can share `lessons`.
        lessons: The folder where the teacher's logits are kept from epoch to epoch and from student to student.
        restarts: Epochs in between at which it has fallen to 0, too, and rises anew (Loshchilov and Hutter 2017): a
            student is what it can be there, and students can be compared.

    Raises:
        DistillError: a loss or a gradient is NaN or infinite.
        CheckpointError: the checkpoint is damaged, missing, or of another training.
        ValueError: the epochs are out of order, or the student and teacher do not fit each other.
    """
    recipe = recipe or Recipe()
    if not 0 <= from_epoch <= to_epoch <= total_epochs or total_epochs < 1:
        raise ValueError(f"epochs {from_epoch} to {to_epoch} of {total_epochs} are out of order")
    ends = [*restarts, total_epochs]
    if ends[0] < 1 or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(f"restarts at {list(restarts)} of {total_epochs} epochs must rise, from 1 on")
    if teacher is None and (recipe.alpha > 0 or recipe.attention > 0 or recipe.hints > 0):
        raise ValueError(
            f"alpha {recipe.alpha}, attention {recipe.attention} and hints {recipe.hints} need a teacher; set all to 0"
        )
    if student is teacher:
        raise ValueError("the student is the teacher itself; train a copy")
    training = _Training(student, teacher, train, ends, seed, recipe)
    training.share(seed if shared_seed is None else shared_seed, samples, lessons)
    done = training.resume(checkpoint, from_epoch, to_epoch)
    channels_last(student, training.example())
    try:
        with kept_memory():
            for epoch in range(done, to_epoch):
                record = training.run(epoch)
                if epoch + 1 in training.ends:
                    training.settle()
                if checkpoint is not None:
                    training.save(checkpoint)
                _log.debug("epoch %d of %d: loss %.4f", record.number, total_epochs, record.loss)
                if on_epoch is not None:
                    on_epoch(record)
    finally:
        contiguous(student)
        student.eval()
    return History(tuple(training.epochs))


class _Training:
    """A student with its optimiser and what it imitates."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        train: Split,
        ends: Sequence[int],
        seed: int,
        recipe: Recipe,
    ) -> None:
        self.student, self.train, self.recipe, self.seed = student, train, recipe, seed
        # Of the learning rate's cycles.
        self.ends = tuple(ends)
        self.device = device_of(student)
        self.optimiser = build_optimiser(student, recipe)
        self.epochs: list[Epoch] = []
        self.identity: dict[str, object] = {
            "seed": seed,
            "ends": list(ends),
            "recipe": recipe.described(),
        }
        self.stages: tuple[str, ...] = ()
        self.hints: tuple[str, ...] = ()
        self.teacher = None if teacher is None else self._prepare(teacher)

    def share(self, seed: int, samples: int, folder: Path | None) -> None:
        """What an epoch shows, and where the teacher's logits are kept; before anything else."""
        self.lessons = Lessons(
            self.train,
            self.teacher,
            moves=self.recipe.augment,
            seed=seed,
            samples=samples,
            own=self.seed,
            folder=folder,
            device=self.device,
        )
        self.steps_per_epoch = math.ceil(self.lessons.samples / self.recipe.batch)
        self.identity |= {"shared_seed": seed, "samples": self.lessons.samples}

    def example(self) -> Tensor:
        """Two normalised inputs on the student's device."""
        return self.train.batch(slice(0, 2)).to(self.device)

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

    def settle(self) -> None:
        """Batch norms get the statistics of what the student is now, at the end of a cycle of the learning rate.

        What a small momentum or few steps leave in them is of before: at 0.01 and 16 steps an epoch 85 % (0.99^16).
        Training does not read them.
        """
        recalibrate(self.student, self.train.calibration(min(_SETTLING, len(self.train))))

    def run(self, epoch: int) -> Epoch:
        """Trains one epoch; 0 is the first."""
        draws = generator(self.seed, epoch)
        self.lessons.begin(epoch)
        order = torch.randperm(self.lessons.samples, generator=draws).to(self.device)
        # The parts of the loss, and the norm of the gradient.
        sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        self.student.train()
        names = (*self.stages, *self.hints)
        tap = FeatureTap(self.student, names) if names else nullcontext()
        with torch.random.fork_rng(devices), tap:
            torch.manual_seed(draws.initial_seed())  # for dropout, and whatever else draws without a generator
            for step, indices in enumerate(order.tensor_split(self.steps_per_epoch)):
                number = epoch * self.steps_per_epoch + step
                parts = self._step(indices, tap if isinstance(tap, FeatureTap) else None, number)
                sums += parts * len(indices)
        self._check("loss", sums[0], epoch)
        self._check("norm of the gradient", sums[5], epoch)
        loss, ce, kl, attention, hints, _ = (sums / self.lessons.samples).tolist()
        self.epochs.append(Epoch(epoch + 1, loss, ce, kl, attention, hints, self.optimiser.param_groups[0]["lr"]))
        return self.epochs[-1]

    def _step(self, indices: Tensor, tap: FeatureTap | None, number: int) -> Tensor:
        for group in self.optimiser.param_groups:
            group["lr"] = self._rate(number)
        inputs, targets, wanted = self.lessons.batch(indices)
        with self.recipe.computing(self.device):
            logits = self.student(inputs).float()
        found = tuple(feature.float() for feature in tap.features) if tap is not None else ()
        features = found[: len(self.stages)], found[len(self.stages) :]
        parts = losses(self.recipe, logits, features, targets, wanted)
        loss = parts[0]
        waits = self.device.type == "cpu"  # a GPU goes on meanwhile, and is asked after the epoch
        if waits:
            self._check("loss", loss.detach(), *divmod(number, self.steps_per_epoch))
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_([p for _, p in trainable(self.student)], self.recipe.clip)
        if waits:
            self._check("norm of the gradient", norm, *divmod(number, self.steps_per_epoch))
        self.optimiser.step()
        return torch.cat((parts.detach(), norm.detach()[None])).to(torch.float64)

    def _rate(self, step: int) -> float:
        """The learning rate of a step of the whole training."""
        epoch = step // self.steps_per_epoch
        end = next(end for end in self.ends if end > epoch)
        start = max((before for before in self.ends if before <= epoch), default=0)
        return learning_rate(self.recipe, step - start * self.steps_per_epoch, (end - start) * self.steps_per_epoch)

    def _check(self, what: str, value: Tensor, epoch: int, step: int | None = None) -> None:
        if not bool(value.isfinite()):
            where = "" if step is None else f", step {step + 1}"
            raise DistillError(
                f"the {what} is {float(value)} in epoch {epoch + 1}{where}; "
                f"the learning rate {self.recipe.learning_rate} may be too high, or the student broken from the start"
            )

    def _prepare(self, teacher: nn.Module) -> Teacher:
        example = self.example()
        if self.recipe.attention > 0:
            self.stages = stage_ends(self.student, teacher, example)
            if not self.stages:
                _log.info("student and teacher share no image-shaped module; attention is not transferred")
        if self.recipe.hints > 0:
            self.hints = stage_ends(self.student, teacher, example, channels=True)
            if not self.hints:
                _log.info("student and teacher share no image-shaped module of as many channels; no hints are given")
        return Teacher(teacher, self.device, self.stages, self.hints, self.recipe.computing(self.device))
