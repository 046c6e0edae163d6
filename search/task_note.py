"""`task.json` in a run's folder: what an exported model says of its inputs and classes, without the data at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .atomic import write_json
from .errors import UserError
from .json_text import parsed

if TYPE_CHECKING:
    from .config import Spec
    from .data import Data
    from .tasks import Task

NAME = "task.json"


@dataclass(frozen=True)
class TaskNote:
    """A task by name, what turns a sample into the model's input (`Data.preprocessing`), and the classes in order."""

    name: str
    metric: str
    preprocessing: Mapping[str, object]
    classes: tuple[str, ...]


def write_task(run: Path, task: Task) -> None:
    """Writes `task.json`, unless it is there."""
    if not (run / NAME).exists():
        write_json(run / NAME, {"name": task.name, "metric": task.metric, **_data_note(task.data)})


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
