"""`task.json` in a run's folder: what an exported model says of its inputs and classes, without the data at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import write_json
from .errors import UserError
from .json_text import parsed

if TYPE_CHECKING:
    from torch import Tensor

    from .config import Spec
    from .data import Data
    from .tasks import Task

NAME = "task.json"
# Values that are digested at a time.
_PART = 1 << 24


@dataclass(frozen=True)
class TaskNote:
    """A task by name, what turns a sample into the model's input (`Data.preprocessing`), and the classes in order."""

    name: str
    metric: str
    preprocessing: Mapping[str, object]
    classes: tuple[str, ...]


def builtin(spec: Spec) -> bool:
    """Whether the model is one that planish trains itself, for every user anew."""
    from .models import BUILTIN

    return spec.model in BUILTIN and not spec.weights


def write_task(run: Path, task: Task, *, weights: bool = True) -> None:
    """Writes `task.json`; where it is there, compares what it says of the weights and the data.

    Args:
        run: The run's folder.
        task: Of the run.
        weights: Whether those of the model have to stay as they are.

    Raises:
        UserError: the run began with others, or the file is damaged.
    """
    path = run / NAME
    digests = {"data": _digest_of_data(task.data), **({"weights": _digest_of_model(task)} if weights else {})}
    if not path.exists():
        write_json(path, {"name": task.name, "metric": task.metric, **_data_note(task.data), "digests": digests})
        return
    try:
        found = parsed(path.read_bytes())
        began = found.get("digests", {})  # a run of before they were kept has none
        other = [what for what, digest in digests.items() if what in began and began[what] != digest]
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no task's note: {error}; delete it to have it made again") from None
    if other:
        raise UserError(
            f"the {' and the '.join(other)} of this search are not those that the run in {run} began with: its scores "
            "would be of two models; give it what it began with, or start anew with another --out"
        )


def _digest_of_model(task: Task) -> str:
    tensors = task.model.state_dict()
    return _digest([(name, tensors[name]) for name in sorted(tensors)])


def _digest_of_data(data: Data) -> str:
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return _digest(
        [(f"{name} {kind}", getattr(s, kind)) for name, s in splits.items() for kind in ("inputs", "targets")]
    )


def _digest(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Of names, shapes, types and values; a part at a time, because images may be many."""
    import torch

    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        for start in range(0, len(flat), _PART):
            found.update(flat[start : start + _PART].view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def read_task(run: Path, spec: Spec) -> TaskNote:
    """The note of a run; a run that has none has its data loaded as the specification says.

    Raises:
        UserError: the file is not such a note.
        TaskError: there is none, and the data is not to be had.
    """
    path = run / NAME
    if not path.exists():
        return _note(_from_data(spec))
    try:
        return _note(parsed(path.read_bytes()))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no task's note: {error}; delete it to have it made from the data again") from None


def _note(found: Mapping[str, Any]) -> TaskNote:
    classes = tuple(str(name) for name in found["classes"])
    return TaskNote(str(found["name"]), str(found["metric"]), dict(found["preprocessing"]), classes)


def _from_data(spec: Spec) -> dict[str, Any]:
    from .data_sources import load_data
    from .models import BUILTIN

    builtin = BUILTIN.get(spec.model)
    data = load_data(spec.data or (builtin.data if builtin else ""))
    metric = getattr(data.train.metric, "__name__", "metric")
    return {"name": spec.model, "metric": metric, **_data_note(data)}


def _data_note(data: Data) -> dict[str, object]:
    rest = {key: value for key, value in data.preprocessing.items() if key != "classes"}
    return {"preprocessing": rest, "classes": list(data.classes)}
