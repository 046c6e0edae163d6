"""Reads pickles that hold numpy arrays and plain containers, and nothing that could run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np


class PickleError(ValueError):
    """The file is not a pickle of arrays and plain containers; the message is one line."""


def load_arrays(path: Path) -> object:
    """The object in a pickle, text of Python 2 read as bytes.

    Only the numpy functions that rebuild an array are ever called: any other name in the file is an error
    before anything runs.

    Raises:
        PickleError: the file names something else, or is damaged.
    """
    with path.open("rb") as file:
        try:
            return _ArrayUnpickler(file, encoding="bytes").load()
        except PickleError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise PickleError(f"it is damaged ({type(error).__name__}: {error}); download it again") from None


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("numpy") and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _reconstruct
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise PickleError(
            f"it names {module}.{name}, and only numpy arrays and plain containers are read; "
            "if you trust the file, convert it to npz"
        )


def _reconstruct(cls: type, shape: tuple[int, ...], dtype: bytes | str) -> np.ndarray[Any, Any]:
    # What numpy's own function does for plain arrays, without letting the file choose the class.
    if cls is not np.ndarray:
        raise PickleError(f"it rebuilds a {cls!r}; only numpy arrays are read")
    kind = dtype.decode() if isinstance(dtype, bytes) else dtype
    if np.dtype(kind).hasobject:
        raise PickleError("it holds an array of Python objects; only arrays of numbers are read")
    return np.ndarray.__new__(np.ndarray, shape, kind)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # Protocol 2 writes bytes of Python 3 as encoded text.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise PickleError(f"it encodes text as {encoding!r}; only latin1 is read")
    return text.encode("latin1")
