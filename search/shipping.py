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

from .factory import USER_MODULE

if TYPE_CHECKING:
    from .tasks import Task

_PARTS = ("spaces", "hwmodels", "compilers", "search")


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
    """
    import ray
    from ray import cloudpickle

    own = [module for name, module in sys.modules.items() if name.startswith(USER_MODULE)]
    for module in own:
        cloudpickle.register_pickle_by_value(module)
    try:
        return ray.put(task)
    finally:
        for module in own:
            cloudpickle.unregister_pickle_by_value(module)
