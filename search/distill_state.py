"""The state of a training between two epochs, on disk: tensors and JSON, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .tensor_file import TensorFileError, read_tensors, write_tensors

_FORMAT = 2


class CheckpointError(ValueError):
    """A checkpoint that is damaged or belongs to another training; one line says why and what to do."""


class OtherVersion(CheckpointError):
    """A checkpoint that another version of planish wrote: hours of training, which that version can carry on with."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A training after `epoch` epochs.

    Attributes:
        student: The student's state dict.
        optimiser: The optimiser's tensors by parameter name, then by their own name.
        note: JSON: what the training was (`identity`) and how it went (`history`).
    """

    epoch: int
    student: Mapping[str, Tensor]
    optimiser: Mapping[str, Mapping[str, Tensor]]
    note: Mapping[str, object] = field(default_factory=dict)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Replaces the file atomically.

    Raises:
        UserError: the disk is full or the folder is read-only.
        CheckpointError: the student keeps state that is not a tensor.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in checkpoint.student.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the student's {name} is a {type(value).__name__}; only tensors can be saved")
        tensors[f"student/{name}"] = value
    for parameter, state in checkpoint.optimiser.items():
        for name, value in state.items():
            tensors[f"optimiser/{name}/{parameter}"] = value
    write_tensors(path, tensors, {"format": _FORMAT, "epoch": checkpoint.epoch, **checkpoint.note})


def load_checkpoint(path: Path) -> Checkpoint:
    """What `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: it is damaged.
        OtherVersion: it is of another version of planish.
    """
    try:
        tensors, note = read_tensors(path)
    except TensorFileError as error:
        raise CheckpointError(f"checkpoint {error}") from None
    epoch = note.get("epoch")
    if note.get("format") == _FORMAT and not isinstance(epoch, int):
        raise CheckpointError(f"checkpoint {path} is of epoch {epoch!r}; delete it to start afresh")
    if note.get("format") != _FORMAT or not isinstance(epoch, int):
        raise OtherVersion(
            f"checkpoint {path} has the format {note.get('format')!r}, this planish reads {_FORMAT}; "
            "delete it to start afresh"
        )
    student: dict[str, Tensor] = {}
    optimiser: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        kind, _, rest = key.partition("/")
        if kind == "student":
            student[rest] = tensor
        else:
            name, _, parameter = rest.partition("/")
            optimiser.setdefault(parameter, {})[name] = tensor
    return Checkpoint(epoch, student, optimiser, {k: v for k, v in note.items() if k not in ("format", "epoch")})


def epoch_of(path: Path) -> int | None:
    """The epochs that an undamaged checkpoint has; None where there is none.

    Raises:
        OtherVersion: it is of another version of planish.
    """
    try:
        return load_checkpoint(path).epoch
    except OtherVersion:
        raise
    except (FileNotFoundError, CheckpointError):
        return None


def capture(student: nn.Module, optimiser: torch.optim.Optimizer, epoch: int, note: Mapping[str, object]) -> Checkpoint:
    """The present state; it shares memory with the training, so save it before going on."""
    state = {
        name: {key: value for key, value in optimiser.state[parameter].items() if isinstance(value, Tensor)}
        for name, parameter in trainable(student)
        if parameter in optimiser.state
    }
    return Checkpoint(epoch, student.state_dict(), state, note)


def restore(path: Path, checkpoint: Checkpoint, student: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's state into the student and its optimiser, in place.

    Raises:
        CheckpointError: it is of another student.
    """
    own = student.state_dict()
    wrong = sorted(own.keys() ^ checkpoint.student.keys())
    wrong += [n for n in own if n in checkpoint.student and own[n].shape != checkpoint.student[n].shape]
    named = dict(trainable(student))
    wrong += sorted(checkpoint.optimiser.keys() - named.keys())
    if wrong:
        raise CheckpointError(f"checkpoint {path} is of another student: {wrong[0]} differs; delete it to start afresh")
    student.load_state_dict(dict(checkpoint.student))
    for name, state in checkpoint.optimiser.items():
        parameter = named[name]
        # A step counter stays on the CPU, moments go where the parameter is.
        optimiser.state[parameter] = {
            key: value.clone() if value.ndim == 0 else value.to(parameter.device, copy=True)
            for key, value in state.items()
        }


def trainable(student: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name, shared ones once."""
    return [(name, parameter) for name, parameter in student.named_parameters() if parameter.requires_grad]
