"""scikit-learn's digits as 32x32 images: a real data set that needs no download."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

from .data import Data, Normalise, Split
from .data_augment import Augment
from .data_split import stratified


def load_digits32(folder: Path, options: Mapping[str, str]) -> Data:
    """1797 digits of 8x8 pixels, enlarged bilinearly to 1x32x32 uint8; 60 % train, 20 % validation, 20 % test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = torch.from_numpy(digits.images).to(torch.float32)[:, None] / 16
    large = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    inputs = (large * 255).round().to(torch.uint8)
    targets = torch.from_numpy(digits.target).to(torch.int64)
    normalise = Normalise(1 / 255, (0.305,), (0.324,))
    train, validation, test = (
        Split(inputs[part], targets[part], normalise) for part in stratified(targets, (0.6, 0.2, 0.2))
    )
    train = replace(train, augment=Augment(shift=2))
    return Data(train, validation, test, tuple(str(digit) for digit in range(10)))
