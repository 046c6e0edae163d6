"""Members of npz files, checked: nothing is unpickled, and what is wrong is named."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .task_error import TaskError


def read_npz(path: Path) -> dict[str, NDArray[Any]]:
    """Every member of an npz file.

    Raises:
        TaskError: the file is damaged, or holds Python objects.
    """
    try:
        with np.load(path, allow_pickle=False) as members:
            return {name: members[name] for name in members.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, AttributeError) as error:
        raise TaskError(f"{path} cannot be read as an npz file ({error}); copy it again") from None


def numpy_member(
    path: Path,
    members: Mapping[str, NDArray[Any]],
    name: str,
    dtype: DTypeLike,
    shape: tuple[int | None, ...],
) -> NDArray[Any]:
    """The member `name`, of this type and shape (None is any size).

    Raises:
        TaskError: it is missing or something else.
    """
    if name not in members:
        raise TaskError(f"{path} has no member {name!r}; it has {', '.join(sorted(members)) or 'none'}")
    array = members[name]
    fits = array.ndim == len(shape) and all(want in (None, have) for want, have in zip(shape, array.shape, strict=True))
    if array.dtype != np.dtype(dtype) or not fits:
        raise TaskError(f"{path} member {name!r} is {array.dtype} {array.shape}; it needs {np.dtype(dtype)} {shape}")
    return array
