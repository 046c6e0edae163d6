"""CIFAR-10 from a folder: the official python batches, or the packed npz files."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from .data import Data, Normalise
from .data_augment import Augment
from .data_files import numpy_member, read_npz
from .data_options import normalise_from, official_splits
from .data_pickle import PickleError, load_arrays
from .task_error import TaskError

_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
# The constants that the published ResNets were trained with (ImageNet's, not CIFAR's own).
_NORMALISE = Normalise(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def load_cifar10(folder: Path, options: Mapping[str, str]) -> Data:
    """45000 train, 5000 validation (500 a class, taken from train by a fixed seed) and 10000 test images.

    Published weights have usually seen all of train, so that they look better on such a validation split than they
    are. With `?validation=test` it is half of test: 50000 train, 5000 validation and 5000 test images.

    Raises:
        TaskError: the folder has neither form of the files, or one of them is damaged.
    """
    train, test = (
        (torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))) for images, labels in _read(folder)
    )
    normalise = normalise_from(options, _NORMALISE)
    return official_splits(train, test, options, normalise, Augment(shift=4, flip=True), _CLASSES)


Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def _read(folder: Path) -> tuple[Arrays, Arrays]:
    nested = folder / "cifar-10-batches-py"
    official = nested if nested.is_dir() else folder
    if (official / _BATCHES[0]).exists():
        missing = [name for name in (*_BATCHES, "test_batch") if not (official / name).exists()]
        if missing:
            raise TaskError(f"{official} lacks {', '.join(missing)}; unpack cifar-10-python.tar.gz again")
        parts = [_official(official / name) for name in _BATCHES]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return (images, labels), _official(official / "test_batch")
    train, test = folder / "cifar10_train.npz", folder / "cifar10_test.npz"
    if train.exists() and test.exists():
        with ThreadPoolExecutor(2) as pool:  # unpacking takes seconds, and leaves Python to others
            first, second = pool.map(_packed, (train, test))
        return first, second
    raise TaskError(
        f"{folder} holds no CIFAR-10; it needs data_batch_1 .. data_batch_5 and test_batch "
        "(cifar-10-python.tar.gz unpacked), or cifar10_train.npz and cifar10_test.npz"
    )


def _official(path: Path) -> Arrays:
    try:
        batch = load_arrays(path)
    except PickleError as error:
        raise TaskError(f"{path} is not a CIFAR-10 batch: {error}") from None
    if not isinstance(batch, dict):
        raise TaskError(f"{path} holds a {type(batch).__name__}; a CIFAR-10 batch is a dictionary")
    named = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
    pixels, labels = named.get("data"), named.get("labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (3072,):
        raise TaskError(f"{path} has no uint8 'data' of shape (n, 3072); download cifar-10-python.tar.gz again")
    if not isinstance(labels, list) or len(labels) != len(pixels):
        raise TaskError(f"{path} has no list of {len(pixels)} 'labels'; download cifar-10-python.tar.gz again")
    return pixels.reshape(-1, 3, 32, 32), np.array(labels, dtype=np.int64)


def _packed(path: Path) -> Arrays:
    members = read_npz(path)
    labels = numpy_member(path, members, "labels", np.uint8, (None,))
    if "images" in members:
        images = numpy_member(path, members, "images", np.uint8, (len(labels), 3, 32, 32))
    else:
        residual = numpy_member(path, members, "residual", np.uint8, (len(labels), 3, 32, 32))
        images = _undo_filter(residual)
    return images, labels.astype(np.int64)


def _undo_filter(residual: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # R-G and B-G, then differences to the left and up, all modulo 256: what made the file a third smaller.
    images = residual.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
    images[:, 0] += images[:, 1]
    images[:, 2] += images[:, 1]
    return images
