"""The `mean`, `std` and `validation` of a data name's `?key=value` part."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .data import Data, Normalise, Split
from .data_augment import Augment
from .data_split import stratified
from .task_error import TaskError


def normalise_from(options: Mapping[str, str], default: Normalise) -> Normalise:
    """The default with the user's mean and std, given as numbers of pixels scaled to 0..1.

    Raises:
        TaskError: something is not a number, or mean and std do not fit each other.
    """
    return Normalise(default.scale, _numbers("mean", options, default.mean), _numbers("std", options, default.std))


def official_splits(
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    options: Mapping[str, str],
    normalise: Normalise,
    augment: Augment,
    classes: tuple[str, ...],
) -> Data:
    """Three splits of a data set that is published as two.

    With `validation=train`, the default, a tenth of train is the validation split. Weights that somebody trained on
    all of train have seen those images and look better on them than they are; `validation=test` takes the validation
    split from test instead, half of it, and leaves all of train for training. Every class has its share of each part.

    Args:
        train: Inputs (n, ...) as stored and their classes (n,); `test` likewise.

    Raises:
        TaskError: the option is neither of the two.
    """
    source = options.get("validation", "train")
    if source not in ("train", "test"):
        raise TaskError(f"validation={source} is not known; allowed are validation=train and validation=test")
    everything = slice(None)
    of_train: Tensor | slice = everything
    of_test: Tensor | slice = everything
    if source == "train":
        of_train, of_validation = stratified(train[1], (0.9, 0.1))
        validated = train
    else:
        validated = test
        of_validation, of_test = stratified(test[1], (0.5, 0.5))
    return Data(
        Split(train[0][of_train], train[1][of_train], normalise, augment),
        Split(validated[0][of_validation], validated[1][of_validation], normalise),
        Split(test[0][of_test], test[1][of_test], normalise),
        classes,
    )


def _numbers(key: str, options: Mapping[str, str], default: tuple[float, ...]) -> tuple[float, ...]:
    text = options.get(key)
    if text is None:
        return default
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise TaskError(f"{key}={text} is not numbers with commas between them, as in {key}=0.49,0.48,0.45") from None
