"""What every epoch of a training shows: inputs, moved at random, and what the teacher says of them.

Both go by a seed that all students of a run have in common, and by the epoch. The teacher is therefore asked once for
all of them: its logits are kept on the disk. It costs as much as a large part of the training of a small student.
"""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from .data import Split
from .data_augment import Moves
from .distill_teacher import Targets, Teacher
from .errors import UserError
from .tensor_file import TensorFileError, read_tensors, write_tensors

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)

# Always of the same samples together, so that every process computes the same bits.
_BATCH = 256
# Samples of a file: where several students begin an epoch at once, each computes other files and reads the rest.
_CHUNK = 2048
# Beyond these the teacher is asked for every batch: of inputs that never move, in memory; of an epoch, on the disk.
_MEMORY_BYTES = 512 * 2**20
_DISK_BYTES = 64 * 2**20
# What an epoch shows is on a GPU beforehand up to so many bytes, else it goes there batch by batch.
_GPU_BYTES = 2**30


class Lessons:
    """The batches of one training, epoch by epoch."""

    def __init__(
        self,
        train: Split,
        teacher: Teacher | None,
        *,
        moves: bool,
        seed: int,
        samples: int = 0,
        own: int = 0,
        folder: Path | None = None,
        device: torch.device = _CPU,
    ) -> None:
        """Nothing is computed before `begin`.

        Args:
            train: What is shown.
            teacher: None: there is nothing to imitate.
            moves: Whether the split's augmentation is used.
            seed: Of the augmentation, and of which samples an epoch shows; students of one seed share a folder.
            samples: In an epoch, every epoch others until all were shown; 0 stands for all.
            own: The student's own seed, by which those that begin an epoch at once share the work.
            folder: Where logits are kept for the other students; None keeps nothing.
            device: Where batches are to be.
        """
        self._train, self._teacher, self._seed, self._own, self._folder = train, teacher, seed, own, folder
        self.samples = min(samples, len(train)) or len(train)
        self._augments = moves and bool(train.augment)
        self._device = device
        self._shown = self._near(train)
        self._moves: Moves | None = None
        self._known: Targets | None = None
        self._warned = False
        # The targets of two samples; their size tells what can be kept.
        self._sample: Targets | None = None

    def begin(self, epoch: int) -> None:
        """Chooses what an epoch shows (0 is the first) and how it moves; reads or computes the teacher's logits."""
        whole = self.samples == len(self._train)
        if not whole:
            self._shown = self._near(self._train.take(self._chosen(epoch)))
        if self._augments:
            moves = self._train.augment.draw(self.samples, generator(self._seed, epoch, "moves"))
            self._moves = moves.to(self._shown.inputs.device)
        same = whole and not self._augments
        if self._teacher is None or (same and self._known is not None):
            return
        self._known = None
        if self._folder is not None and self._bytes() <= _DISK_BYTES and not self._teacher.stages + self._teacher.hints:
            logits = self._shared("still" if same else f"{epoch:05}", self._folder)
            self._known = Targets(logits.to(self._device))
        elif same and self._bytes() <= _MEMORY_BYTES:
            self._known = self._all()

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Targets | None]:
        """Normalised inputs (n, ...) of some of the epoch's samples, their classes, and what the teacher says of them.

        Args:
            indices: Each below `samples`.
        """
        inputs, targets = self._inputs(indices), self._shown.targets[indices.to(self._shown.targets.device)]
        targets = targets.to(self._device)
        if self._teacher is None:
            return inputs, targets, None
        if self._known is None:
            return inputs, targets, self._teacher.answer(inputs)
        return inputs, targets, self._known.take(indices.to(self._device))

    def _near(self, shown: Split) -> Split:
        """The split on the device, where that has room for it: every step would wait for its copies otherwise."""
        size = shown.inputs.numel() * shown.inputs.element_size()
        return shown.to(self._device) if self._device.type != "cpu" and size <= _GPU_BYTES else shown

    def _chosen(self, epoch: int) -> Tensor:
        """The samples of an epoch: the next ones in a random order of all, which is drawn anew when it has ended."""
        places = torch.arange(epoch * self.samples, (epoch + 1) * self.samples)
        count = len(self._train)
        parts = []
        for number in range(int(places[0]) // count, int(places[-1]) // count + 1):
            order = torch.randperm(count, generator=generator(self._seed, number, "samples"))
            parts.append(order[places[places // count == number] % count])
        return torch.cat(parts)

    def _inputs(self, indices: Tensor) -> Tensor:
        shown = self._shown
        indices = indices.to(shown.inputs.device)
        inputs = shown.inputs[indices].to(self._device)
        if self._moves is not None:
            inputs = shown.augment.move(inputs, self._moves.take(indices))
        return shown.normalise(inputs)

    def _bytes(self) -> float:
        """What the targets of all samples take."""
        assert self._teacher is not None
        if self._sample is None:
            self._sample = self._teacher.answer(self._train.batch(slice(0, 2)))
        return self._sample.bytes / len(self._sample.logits) * self.samples

    @property
    def _row(self) -> tuple[int, ...]:
        """The shape of one sample's logits."""
        return () if self._sample is None else tuple(self._sample.logits.shape[1:])

    def _all(self) -> Targets:
        parts = [self._answers(start, min(start + _BATCH, self.samples)) for start in range(0, self.samples, _BATCH)]
        maps, features = zip(*(p.maps for p in parts), strict=True), zip(*(p.features for p in parts), strict=True)
        return Targets(
            torch.cat([part.logits for part in parts]),
            tuple(torch.cat(part) for part in maps),
            tuple(torch.cat(part) for part in features),
        )

    def _answers(self, start: int, end: int) -> Targets:
        assert self._teacher is not None
        return self._teacher.answer(self._inputs(torch.arange(start, end)))

    def _shared(self, name: str, folder: Path) -> Tensor:
        """The logits of all samples, on the CPU, from the folder or put there."""
        count = math.ceil(self.samples / _CHUNK)
        # Every student in an order of its own: what one computes, those beside it find.
        order = torch.randperm(count, generator=generator(self._own, 0, "files")).tolist()
        parts = {n: self._chunk(folder / f"{name}-{n:04}.safetensors", name, n * _CHUNK) for n in order}
        return torch.cat([parts[n] for n in range(count)])

    def _chunk(self, path: Path, name: str, start: int) -> Tensor:
        end = min(start + _CHUNK, self.samples)
        note = {"seed": self._seed, "epoch": name, "start": start, "end": end, "samples": self.samples}
        try:
            tensors, found = read_tensors(path)
            logits = tensors.get("logits")
            if found == note and logits is not None and logits.shape == (end - start, *self._row):
                return logits
        except FileNotFoundError:
            pass
        except TensorFileError as error:
            _log.info("%s; computed again", error)
        parts = [self._answers(at, min(at + _BATCH, end)).logits.cpu() for at in range(start, end, _BATCH)]
        logits = torch.cat(parts)
        try:
            write_tensors(path, {"logits": logits}, note)
        except UserError as error:
            # The next student computes them again; this one has them.
            if not self._warned:
                _log.warning("the teacher's logits are not kept: %s", error)
            self._warned = True
        return logits


def generator(seed: int, epoch: int, what: str = "") -> torch.Generator:
    """Draws for one epoch and purpose, the same in every process."""
    digest = hashlib.sha256(f"{seed}:{epoch}{':' if what else ''}{what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
