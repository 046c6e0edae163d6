"""The search: tasks, controller, runs. `from planish.search import Task, launch, resume, export`.

The names are loaded when they are first used: importing this package loads neither torch nor TVM nor Ray.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .api import export as export
    from .api import launch as launch
    from .api import resume as resume
    from .data import Data as Data
    from .run import Run as Run
    from .tasks import Task as Task

__all__ = ["Data", "Run", "Task", "export", "launch", "resume"]

_HOMES = {"Data": "data", "Run": "run", "Task": "tasks", "export": "api", "launch": "api", "resume": "api"}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
