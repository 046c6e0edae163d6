"""Fashion-MNIST from a folder: the IDX files under their official names, or the packed npz file."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .data import Data, Normalise
from .data_augment import Augment
from .data_files import numpy_member, read_npz
from .data_options import normalise_from, official_splits
from .task_error import TaskError

_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_PACKED = "fashion_mnist_small.npz"
_NORMALISE = Normalise(1 / 255, (0.2865,), (0.3532,))


def load_fashion_mnist(folder: Path, options: Mapping[str, str]) -> Data:
    """1x28x28 images; a tenth of train, every class alike, is the validation split; or `?validation=test`.

    Raises:
        TaskError: the folder has neither form of the files, or one of them is damaged.
    """
    arrays = _read(folder)
    train, test = (
        (
            torch.from_numpy(arrays[f"{split}_images"].copy())[:, None],
            torch.from_numpy(arrays[f"{split}_labels"].astype(np.int64)),
        )
        for split in ("train", "test")
    )
    normalise = normalise_from(options, _NORMALISE)
    return official_splits(train, test, options, normalise, Augment(shift=2, flip=True), _CLASSES)


def _read(folder: Path) -> dict[str, NDArray[Any]]:
    official = {
        f"{split}_{kind}": _idx_file(folder, f"{prefix}-{kind}-idx{dimensions}-ubyte")
        for split, prefix in (("train", "train"), ("test", "t10k"))
        for kind, dimensions in (("images", 3), ("labels", 1))
    }
    found = {name: path for name, path in official.items() if path is not None}
    if len(found) == len(official):
        return {name: _read_idx(path, 3 if name.endswith("images") else 1) for name, path in found.items()}
    packed = folder / _PACKED
    if packed.exists():
        members = read_npz(packed)
        shapes: dict[str, tuple[int | None, ...]] = {"images": (None, 28, 28), "labels": (None,)}
        return {name: numpy_member(packed, members, name, np.uint8, shapes[name.split("_")[1]]) for name in official}
    missing = [name for name, path in official.items() if path is None]
    raise TaskError(
        f"{folder} lacks the {', '.join(missing)} of Fashion-MNIST; it needs train-images-idx3-ubyte, "
        f"train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (.gz or not), or {_PACKED}"
    )


def _idx_file(folder: Path, name: str) -> Path | None:
    # Both spellings of the last dot are in circulation.
    for candidate in (name, f"{name}.gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"):
        if (folder / candidate).exists():
            return folder / candidate
    return None


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """One IDX file of bytes: 00 00 08 and the number of dimensions, their sizes (big-endian), the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise TaskError(f"{path} cannot be unpacked ({error}); download it again") from None
    header = 4 + 4 * dimensions
    if len(raw) < header or raw[:4] != bytes((0, 0, 8, dimensions)):
        raise TaskError(
            f"{path} begins with {raw[:4].hex(' ')}; an IDX file of {dimensions} dimensions of bytes "
            f"begins with 00 00 08 {dimensions:02x}"
        )
    shape = struct.unpack(f">{dimensions}I", raw[4:header])
    if len(raw) - header != math.prod(shape):
        raise TaskError(f"{path} has {len(raw) - header} values for shape {shape}; it is cut short, download it again")
    return np.frombuffer(raw, np.uint8, offset=header).reshape(shape)
