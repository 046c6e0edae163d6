"""The `mean`, `std` and `size` of a data name's `?key=value` part."""

from __future__ import annotations

from collections.abc import Mapping

from .data import Normalise
from .task_error import TaskError


def normalise_from(options: Mapping[str, str], default: Normalise) -> Normalise:
    """The default with the user's mean and std, given as numbers of pixels scaled to 0..1.

    Raises:
        TaskError: something is not a number, or mean and std do not fit each other.
    """
    return Normalise(default.scale, _numbers("mean", options, default.mean), _numbers("std", options, default.std))


def _numbers(key: str, options: Mapping[str, str], default: tuple[float, ...]) -> tuple[float, ...]:
    text = options.get(key)
    if text is None:
        return default
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise TaskError(f"{key}={text} is not numbers with commas between them, as in {key}=0.49,0.48,0.45") from None
