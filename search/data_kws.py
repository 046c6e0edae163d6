"""Keyword spotting: the MFCC features of a thousand spoken words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from .data import Data, Normalise, Split
from .data_files import numpy_member, read_npz
from .data_split import stratified
from .task_error import TaskError

_CLASSES = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes", "silence", "unknown")
_FILE = "kws01_features.npz"
_STEP, _ZERO = 0.5847029, 83


def load_kws(folder: Path, options: Mapping[str, str]) -> Data:
    """1x49x10 int8 features; the file has no official split, so 60 % train, 20 % validation, 20 % test by class.

    Raises:
        TaskError: the file is missing or damaged.
    """
    path = folder / _FILE
    if not path.exists():
        raise TaskError(f"{folder} holds no {_FILE}; give the folder that does")
    members = read_npz(path)
    targets = torch.from_numpy(numpy_member(path, members, "labels", np.uint8, (None,)).astype(np.int64))
    features = numpy_member(path, members, "mfcc_int8", np.int8, (len(targets), 49, 10))
    inputs = torch.from_numpy(features)[:, None]
    normalise = Normalise(_STEP, (_STEP * _ZERO,), (1.0,))
    train, validation, test = (
        Split(inputs[part], targets[part], normalise) for part in stratified(targets, (0.6, 0.2, 0.2))
    )
    return Data(train, validation, test, _CLASSES)
