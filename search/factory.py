"""Callables that the user names: `file.py:name` and `package.module:name`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from .task_error import TaskError

# What the modules of users' files are called, with the file's name and a digest of its path.
USER_MODULE = "planish_user_"


def is_factory(name: str) -> bool:
    """Whether `name` has the form `file.py:callable` or `package.module:callable`."""
    place, colon, attribute = name.rpartition(":")
    if not colon or not attribute.isidentifier():
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def module_exists(name: str) -> bool:
    """Whether the file or module before the colon is there; a file is left to `call_factory` to miss."""
    place = name.rpartition(":")[0]
    if place.endswith(".py"):
        return True
    with _first_on_path(Path.cwd()):
        try:
            return importlib.util.find_spec(place) is not None
        except (ImportError, ValueError):
            return False
        except (Exception, SystemExit):  # of the package's own code: `call_factory` tells
            return True


def call_factory(what: str, name: str) -> Any:
    """Calls the callable that `name` names, without arguments.

    A file may import its neighbours, and a package may lie in the current folder, as with `python file.py`.

    Args:
        what: What is being loaded ("model", "data"), for the error.

    Raises:
        TaskError: the file, module or callable does not exist, or raised.
    """
    place, _, attribute = name.rpartition(":")
    is_file = place.endswith(".py")
    path = Path(os.path.expanduser(place))
    if is_file and not path.is_file():
        raise TaskError(f"{what} {name!r}: there is no file {path}; give its path from here or from the root")
    with _first_on_path(path.resolve().parent if is_file else Path.cwd()):
        module = _run(what, name, lambda: _load_file(path.resolve()) if is_file else importlib.import_module(place))
        factory = getattr(module, attribute, None)
        if factory is None:
            known = ", ".join(sorted(key for key, value in vars(module).items() if callable(value) and key[0] != "_"))
            raise TaskError(f"{what} {name!r}: {place} has no {attribute!r}; it has {known or 'nothing callable'}")
        if not callable(factory):
            raise TaskError(f"{what} {name!r} is a {type(factory).__name__}; it needs to be a callable")
        return _run(what, name, factory)


def _run(what: str, name: str, step: Any) -> Any:
    try:
        return step()
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())
        if isinstance(error, FileNotFoundError) and error.filename and not Path(error.filename).is_absolute():
            text += f"; relative paths are looked for in the current folder, {Path.cwd()}"
        raise TaskError(f"{what} {name!r} raised {type(error).__name__}: {text}") from error


def _load_file(path: Path) -> ModuleType:
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"{USER_MODULE}{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered so that dataclasses and torch.export find the classes of the file by their module's name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _first_on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))
