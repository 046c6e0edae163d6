"""Data by name: `digits32`, `cifar10:DIR`, `fashion-mnist:DIR`, `kws:DIR`, `images:DIR`, or the user's own factory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from .data import Data
from .data_cifar import load_cifar10
from .data_digits import load_digits32
from .data_fashion import load_fashion_mnist
from .data_images import load_images
from .data_kws import load_kws
from .data_user import load_user_data
from .errors import nearest
from .factory import is_factory, module_exists
from .task_error import TaskError


@dataclass(frozen=True)
class Source:
    """One kind of data: what it is, whether it needs a folder, and which `?key=value` it takes."""

    description: str
    load: Callable[[Path, Mapping[str, str]], Data]
    folder: bool = True
    options: tuple[str, ...] = ("mean", "std")


_PUBLISHED = ("mean", "std", "validation")

SOURCES: Mapping[str, Source] = {
    "digits32": Source("scikit-learn's 1797 digits, 1x32x32, no download", load_digits32, folder=False, options=()),
    "cifar10": Source(
        "60000 photographs of 10 classes, 3x32x32; DIR holds the python batches", load_cifar10, options=_PUBLISHED
    ),
    "fashion-mnist": Source(
        "clothing in 10 classes, 1x28x28; DIR holds the IDX files", load_fashion_mnist, options=_PUBLISHED
    ),
    "kws": Source("spoken words as MFCC, 1x49x10; DIR holds kws01_features.npz", load_kws, options=()),
    "images": Source(
        "a folder per class, cut to ?size=64", load_images, options=("mean", "std", "size", "shift", "flip")
    ),
}


def load_data(name: str) -> Data:
    """Loads what `name` names.

    Args:
        name: A source, for most with a folder and options: `cifar10:DIR`, `images:DIR?size=64&mean=0.5&std=0.5`; or
            `file.py:factory`, `package.module:factory`.

    Raises:
        TaskError: the name, an option or a file is not usable; one line says which and what to do.
    """
    body, _, query = name.partition("?")
    kind, _, folder = body.partition(":")
    source = SOURCES.get(kind)
    if source is None:
        if is_factory(name) and module_exists(name):
            return load_user_data(name)
        raise TaskError(f"data {name!r} is unknown: {nearest(kind, SOURCES)}, file.py:factory, package.module:factory")
    if source.folder and not folder:
        raise TaskError(f"data {name!r} needs a folder; write {kind}:DIR")
    if folder and not source.folder:
        raise TaskError(f"data {name!r} takes no folder; write {kind}")
    path = Path(os.path.expanduser(folder))
    if source.folder and not path.is_dir():
        raise TaskError(f"data {name!r}: {folder} is not a folder; give the one that holds the files")
    return source.load(path, _options(name, query, source.options))


def _options(name: str, query: str, allowed: tuple[str, ...]) -> dict[str, str]:
    options = {}
    for part in query.split("&") if query else []:
        key, equals, value = part.partition("=")
        if key not in allowed or not equals or not value:
            takes = ", ".join(f"{option}=..." for option in allowed) or "none"
            raise TaskError(f"data {name!r} has the option {part!r}; allowed: {takes}")
        options[key] = value
    return options
