"""What the nodes of a Ray cluster get from the machine that a search is launched on: this planish, and the task."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .factory import USER_MODULE

if TYPE_CHECKING:
    from .tasks import Task

_ROOM = "start Ray with a larger --object-store-memory, or give the disk of /tmp/ray room"
_PARTS = ("spaces", "hwmodels", "compilers", "search")


def fetched(reference: Any) -> Task:
    """The task that `stored` stored, in a worker.

    Raises:
        UserError: it cannot be read.
    """
    import ray

    try:
        task: Task = ray.get(reference)
    except ray.exceptions.RayTaskError:
        raise
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a node cannot read the task from Ray's object store: {first_line(error)}; {_ROOM}; then give the same "
            "command again"
        ) from error
    return task


def first_line(error: BaseException) -> str:
    """Of what an error says; its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def own_code() -> Iterator[dict[str, Any]]:
    """Ray's `runtime_env` that gives every worker the planish that is running here, whatever its node has installed."""
    with TemporaryDirectory(prefix="planish-code-") as folder:
        package = Path(folder, "planish")
        for part in _PARTS:
            with resources.as_file(resources.files(f"planish.{part}")) as source:
                shutil.copytree(source, package / part, ignore=shutil.ignore_patterns("__pycache__"))
        yield {"py_modules": [str(package)]}


def stored(task: Task) -> Any:
    """A reference to the task in Ray's object store, where a node's workers read it from: one copy a node.

    The classes and functions of the user's file travel with it, so that a node needs neither the file nor the data.

    Raises:
        UserError: it cannot be pickled, or neither the store nor the disk that Ray spills it to has room.
    """
    import pickle

    import ray
    from ray import cloudpickle

    own = [module for name, module in sys.modules.items() if name.startswith(USER_MODULE)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(task)
    except ray.exceptions.RayError as error:
        raise UserError(f"the task does not fit into Ray's object store: {first_line(error)}; {_ROOM}") from error
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise UserError(
            f"the model or data cannot be sent to the workers: {first_line(error.__cause__ or error)}; a factory in a "
            "file or in a package that every node has installed can be"
        ) from error
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
