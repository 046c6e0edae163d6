"""Data from the user's own factory: a `Data`, or three sets with or without a metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .data import Data, Metric, Normalise, Split, accuracy
from .factory import call_factory
from .task_error import TaskError


def load_user_data(name: str) -> Data:
    """Calls `file.py:factory` or `package.module:factory` without arguments.

    The factory returns one of

    - a `Data`;
    - `(train, validation, test)` or `(train, validation, test, metric)`, each set being a `Split`, a tuple
      `(inputs, targets)` of arrays or tensors, or a torch `Dataset` (or list) with a length whose items
      are `(input, class)`.

    The targets of train may be None: then only the teacher is learned from, and `distill.alpha` has to be 1.

    Inputs are (samples, ...) with classes 0, 1, ... as targets. Float inputs go to the model as they are, uint8
    inputs divided by 255, any other type as float. The metric takes (outputs (n, ...), targets (n,)) and
    returns (n,) scores, bool or in [0, 1], more is better; without one it is accuracy. The number of classes is
    the largest target plus one; return a `Data` to name them.

    Raises:
        TaskError: the factory fails or returns something else.
    """
    return user_data(name, call_factory("data", name))


def user_data(name: str, made: object) -> Data:
    """What a factory returned (see `load_user_data`) as data.

    Raises:
        TaskError: it is something else.
    """
    if isinstance(made, Data):
        return made
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        what = f"{len(made)} things" if isinstance(made, tuple) else f"a {type(made).__name__}"
        raise TaskError(
            f"data {name!r} returned {what}; it needs to return a planish.search.data.Data, "
            "(train, validation, test) or (train, validation, test, metric)"
        )
    metric: Metric | None = made[3] if len(made) == 4 else None
    if len(made) == 4 and not callable(metric):
        raise TaskError(f"data {name!r} returned the metric {metric!r}; it needs to be callable")
    names = ("train", "validation", "test")
    train, validation, test = (_split(f"{name} {part}", made[i], metric) for i, part in enumerate(names))
    count = 1 + max(int(split.targets.max()) for split in (train, validation, test))
    return Data(train, validation, test, tuple(str(label) for label in range(count)))


def _split(name: str, given: Any, metric: Metric | None) -> Split:
    """With a metric of None a Split keeps its own."""
    if isinstance(given, Split):
        return given if metric is None else replace(given, metric=metric)
    metric = metric or accuracy
    labelled = not (isinstance(given, tuple) and len(given) == 2 and given[1] is None)
    if not labelled:
        inputs = _tensor(name, "inputs", given[0])
        targets = torch.zeros(inputs.shape[:1], dtype=torch.int64)
    elif isinstance(given, tuple) and len(given) == 2:
        inputs, targets = _tensor(name, "inputs", given[0]), _tensor(name, "targets", given[1])
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__") and not isinstance(given, Tensor):
        inputs, targets = _dataset(name, given)
    else:
        raise TaskError(
            f"data {name} is a {type(given).__name__}; it needs to be (inputs, targets), a Split, or a Dataset"
        )
    if len(inputs.shape) == 0 or len(inputs) == 0 or len(targets.shape) != 1 or len(targets) == 0:
        raise TaskError(
            f"data {name} has inputs of shape {tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}; "
            "they need to be (samples, ...) and (samples,), with at least 1 sample"
        )
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TaskError(f"data {name} has targets of {targets.dtype}; they need to be whole numbers, the classes")
    normalise = Normalise(1 / 255) if inputs.dtype == torch.uint8 else Normalise()
    if inputs.dtype != torch.uint8:
        inputs = inputs.to(torch.float32)
    return Split(inputs, targets.to(torch.int64), normalise, metric=metric, labelled=labelled)


def _dataset(name: str, items: Sequence[Any]) -> tuple[Tensor, Tensor]:
    inputs, targets = [], []
    for index in range(len(items)):
        try:
            item = items[index]
        except Exception as error:  # whatever the user's own code raises
            text = " ".join(str(error).split())
            raise TaskError(f"data {name} item {index} raised {type(error).__name__}: {text}") from error
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TaskError(f"data {name} item {index} is a {type(item).__name__}; it needs to be (input, class)")
        inputs.append(_tensor(name, f"input {index}", item[0]))
        targets.append(_class(name, index, item[1]))
        if inputs[-1].shape != inputs[0].shape:
            raise TaskError(
                f"data {name} item {index} has shape {tuple(inputs[-1].shape)} and item 0 {tuple(inputs[0].shape)}; "
                "all need one shape, resize them"
            )
    if not inputs:
        raise TaskError(f"data {name} is empty; it needs samples")
    return torch.stack(inputs), torch.tensor(targets)


def _class(name: str, index: int, value: Any) -> int:
    try:
        found = int(value)
    except (TypeError, ValueError, RuntimeError):
        found = -1
    if found < 0 or isinstance(value, str):
        raise TaskError(f"data {name} item {index} has the class {value!r}; classes are whole numbers: 0, 1, 2, ...")
    return found


def _tensor(name: str, what: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TaskError(
            f"data {name} {what}: a {type(values).__name__} is not an array or tensor of numbers ({error})"
        ) from None
