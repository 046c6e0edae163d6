"""A task: the trained model that is to become faster, the data and the metric that say what has to stay good."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..compilers.cache_folder import cache_folder
from .data import Data
from .data_sources import load_data
from .data_user import user_data
from .models import BUILTIN as BUILTIN
from .models import load_model
from .score import device_of, evaluating
from .task_error import TaskError
from .zoo_trained import trained

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Task:
    """A model with its data, checked to fit each other.

    Attributes:
        model: The original, trained; never changed by a search. May be given as a factory that takes no arguments.
        data: What is trained, validated and tested on. May be given as anything that a data factory may return (see
            `planish.search.data_user.load_user_data`), or as the factory.
        name: For people.

    Raises:
        TaskError: the model does not take the data's inputs, or does not return a logit for every class.
    """

    model: nn.Module
    data: Data
    name: str = "model"

    def __init__(self, model: nn.Module | Callable[[], nn.Module], data: Data | object, name: str = "model") -> None:
        """See the attributes."""
        made = model if isinstance(model, nn.Module) or not callable(model) else model()
        if not isinstance(made, nn.Module):
            raise TaskError(f"model {name!r} is a {type(made).__name__}; it needs to be an nn.Module")
        given = data if isinstance(data, Data) or not callable(data) else data()
        object.__setattr__(self, "model", made)
        object.__setattr__(self, "data", user_data(name, given))
        object.__setattr__(self, "name", name)
        _check_fit(self.name, self.model, self.data)

    @property
    def metric(self) -> str:
        """What is maximised: "accuracy", or the name of the user's metric."""
        return getattr(self.data.train.metric, "__name__", "metric")


def load_task(
    model: str, data: str | None = None, weights: str | None = None, *, seed: int = 0, cache: Path | None = None
) -> Task:
    """Loads a task by names.

    Args:
        model: A key of `BUILTIN`, `timm:NAME`, `hf:NAME`, `file.py:factory` or `package.module:factory`; a factory
            takes no arguments and returns an nn.Module.
        data: As for `load_data`; None for a built-in model that brings its own.
        weights: A safetensors file or a torch state dict; never unpickled.
        seed: For a factory that draws random numbers. Splits and built-in models do not depend on it.
        cache: Where built-in models are kept once trained; `cache_folder()` if None.

    Raises:
        TaskError: a name, a file or a shape is not usable; one line says which and what to do.
    """
    builtin = BUILTIN.get(model)
    if data is None:
        if builtin is None or "DIR" in builtin.data:
            wanted = f" {builtin.data}" if builtin else ""
            raise TaskError(f"model {model!r} needs data; give data{wanted or ', as cifar10:DIR or file.py:factory'}")
        data = builtin.data
    if builtin is None or weights is not None:
        module = load_model(model, weights, seed)
        task = Task(module, load_data(data), model)
        _warn_of_other_constants(model, module, task.data)
        return task
    if builtin.plan is None:
        raise TaskError(f"model {model!r} comes without weights; give a file with its state dict as weights")
    own = builtin.data.partition(":")[0]
    if data.partition(":")[0] != own:
        raise TaskError(f"model {model!r} is trained on {own}, not {data!r}; give weights, or data {builtin.data}")
    loaded = load_data(data)
    return Task(trained(model, builtin.make, loaded, builtin.plan, cache or cache_folder()), loaded, model)


def _warn_of_other_constants(name: str, model: nn.Module, data: Data) -> None:
    """timm's models carry the mean and std they were trained with; with others they quietly lose accuracy."""
    config = getattr(model, "pretrained_cfg", None)
    if not isinstance(config, Mapping) or not config.get("mean") or not config.get("std"):
        return
    given = data.train.normalise
    wanted = tuple(tuple(round(float(number), 4) for number in config[key]) for key in ("mean", "std"))
    if wanted != tuple(tuple(round(number, 4) for number in numbers) for numbers in (given.mean, given.std)):
        mean, std = (",".join(map(str, numbers)) for numbers in wanted)
        _log.warning("%s was trained with mean %s and std %s; give data ...?mean=%s&std=%s", name, mean, std, mean, std)


def _check_fit(name: str, model: nn.Module, data: Data) -> None:
    example = data.example(2)
    try:
        with evaluating(model), torch.no_grad():
            logits = model(example.to(device_of(model)))
    except Exception as error:  # whatever the model's own code raises
        reason = " ".join(str(error).split())[:300]
        raise TaskError(
            f"model {name!r} does not take the data's samples of shape {data.shape}: {type(error).__name__}: {reason}"
        ) from error
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        raise TaskError(f"model {name!r} returns a {type(logits).__name__}; it needs to return a tensor of logits")
    if tuple(logits.shape) != (len(example), len(data.classes)):
        raise TaskError(
            f"model {name!r} returns shape {tuple(logits.shape)} for {len(example)} samples, and the data has "
            f"{len(data.classes)} classes; it needs to return ({len(example)}, {len(data.classes)})"
        )
    if not bool(logits.isfinite().all()):
        raise TaskError(f"model {name!r} returns NaN or infinity on training samples; give trained weights")
    _check_training(name, model, example, logits.shape)


def _check_training(name: str, model: nn.Module, example: Tensor, shape: torch.Size) -> None:
    """Students are trained: some models return more then, others do not run."""
    student = copy.deepcopy(model).train()
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            found = student(example.to(device_of(model)))
    except Exception as error:  # whatever the model's own code raises
        reason = " ".join(str(error).split())[:300]
        raise TaskError(f"model {name!r} does not run in training mode: {type(error).__name__}: {reason}") from error
    if not isinstance(found, Tensor) or found.shape != shape:
        what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise TaskError(
            f"model {name!r} returns {what} in training mode; wrap it in a module that returns the logits alone, as "
            "it does in eval mode"
        )
