"""Models by name: the built-in ones, `timm:NAME`, `hf:NAME`, or the user's own factory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from . import zoo
from .distill import Recipe
from .errors import nearest
from .factory import call_factory, is_factory, module_exists
from .task_error import TaskError
from .weights import load_weights
from .zoo_hub import load_hugging_face, load_timm
from .zoo_trained import Plan


@dataclass(frozen=True)
class Builtin:
    """A model that planish brings.

    Attributes:
        description: One line for a person.
        make: Returns the untrained network.
        data: The data it is for, as `load_data` takes it; DIR stands for a folder that the user names.
        plan: How it is trained on first use; None: its weights are a file that the user names.
    """

    description: str
    make: Callable[[], nn.Module]
    data: str
    plan: Plan | None = None


_LABELS_ONLY = Recipe(alpha=0.0, attention=0.0, learning_rate=0.05)

BUILTIN: Mapping[str, Builtin] = {
    "digits-resnet": Builtin(
        "residual network for digits32, 26 M MACs; trained in half a minute on first use",
        zoo.digits_resnet,
        "digits32",
        Plan(10, _LABELS_ONLY),
    ),
    "fashion-resnet": Builtin(
        "the same network for fashion-mnist, 22 M MACs; trained in some minutes on first use",
        zoo.fashion_resnet,
        "fashion-mnist:DIR",
        Plan(6, _LABELS_ONLY),
    ),
    "cifar10-resnet20": Builtin("ResNet-20 for cifar10, 41 M MACs; needs weights", zoo.cifar10_resnet20, "cifar10:DIR"),
    "cifar10-resnet56": Builtin(
        "ResNet-56 for cifar10, 126 M MACs; needs weights", zoo.cifar10_resnet56, "cifar10:DIR"
    ),
    "kws-dscnn": Builtin("DS-CNN for keyword spotting, 2.7 M MACs; needs weights", zoo.kws_dscnn, "kws:DIR"),
}


def load_model(name: str, weights: str | None, seed: int) -> nn.Module:
    """A model with the weights of the file, or (not for built-in ones) with those it comes with; in eval mode.

    Args:
        seed: What a user's factory that draws random numbers starts from.

    Raises:
        TaskError: the name is unknown, the factory fails, or the weights do not fit.
    """
    kind, _, rest = name.partition(":")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in BUILTIN:
            module = BUILTIN[name].make()
        elif kind == "timm" and rest:
            module = load_timm(rest, pretrained=weights is None)
        elif kind == "hf" and rest:
            module = load_hugging_face(rest)
        elif is_factory(name) and module_exists(name):
            module = call_factory("model", name)
        else:
            raise TaskError(
                f"model {name!r} is unknown: {nearest(name, BUILTIN)}, timm:NAME, hf:NAME, file.py:factory, "
                "package.module:factory"
            )
    if not isinstance(module, nn.Module):
        raise TaskError(f"model {name!r} returned a {type(module).__name__}; it needs to return a torch.nn.Module")
    if weights is not None:
        load_weights(module, Path(weights))
    return module.eval()
