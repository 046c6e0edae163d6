"""Reads pickles that hold numpy arrays and plain containers, and nothing that could run code."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


class PickleError(ValueError):
    """The file is not a pickle of arrays and plain containers; the message is one line."""


def load_arrays(path: Path) -> object:
    """The object in a pickle, text of Python 2 read as bytes.

    No callable of the file's choosing is ever looked up: where it names the numpy functions that rebuild an array, ours
    stand in, and any other name is an error before anything runs.

    Raises:
        PickleError: the file names something else, or is damaged.
    """
    with path.open("rb") as file:
        try:
            return _plain(_ArrayUnpickler(file, encoding="bytes").load())
        except PickleError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            raise PickleError(f"it is damaged ({type(error).__name__}: {error}); download it again") from None


class _Dtype:
    """Stands for numpy.dtype while the pickle is read."""

    def __init__(self, name: str) -> None:
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        dtype = np.dtype(self.name)
        if dtype.kind not in "biuf":
            raise PickleError(f"it holds an array of {self.name!r}; only arrays of numbers are read")
        return dtype.newbyteorder("=" if self.order == "|" else self.order)  # type: ignore[arg-type]


class _Array:
    """Stands for an array until its values are known."""

    def __init__(self) -> None:
        self.value: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, data = state
        self.set(data, dtype, shape, "F" if fortran else "C")

    def set(self, data: object, dtype: object, shape: Any, order: str) -> None:
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise PickleError("it holds an array that is not one of plain numbers")
        self.value = np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if order == "F" else "C").copy()


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., object]:
        stand_in = _stand_ins().get((module.replace("numpy._core", "numpy.core"), name))
        if stand_in is None:
            raise PickleError(
                f"it names {module}.{name}, and only numpy arrays and plain containers are read; "
                "if you trust the file, convert it to npz"
            )
        return stand_in


def _stand_ins() -> dict[tuple[str, str], Callable[..., object]]:
    # Made anew for every name, so that a pickle that sets attributes on one changes nothing that lasts.
    def ndarray() -> object:
        raise PickleError("it makes an array without values")

    def reconstruct(cls: object, shape: object, kind: object) -> _Array:
        return _Array()

    def from_buffer(data: object, dtype: object, shape: object, order: str) -> _Array:
        array = _Array()
        array.set(data, dtype, shape, order)
        return array

    def dtype(name: str | bytes, align: object = 0, copy: object = 1) -> _Dtype:
        return _Dtype(_text(name))

    def encode(text: str, encoding: str) -> bytes:
        # How Python 3 writes bytes in the protocol of Python 2.
        return text.encode("latin1")

    return {
        ("numpy", "ndarray"): ndarray,
        ("numpy", "dtype"): dtype,
        ("numpy.core.multiarray", "_reconstruct"): reconstruct,
        ("numpy.core.numeric", "_frombuffer"): from_buffer,
        ("_codecs", "encode"): encode,
    }


def _plain(value: object) -> object:
    """The value with arrays in place of what stood for them, inside lists, tuples and dictionaries."""
    if isinstance(value, _Array):
        if value.value is None:
            raise PickleError("it holds an array without values")
        return value.value
    if isinstance(value, dict):
        return {key: _plain(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    if isinstance(value, tuple):
        return tuple(_plain(member) for member in value)
    return value


def _text(value: str | bytes) -> str:
    return value.decode("ascii") if isinstance(value, bytes) else str(value)
