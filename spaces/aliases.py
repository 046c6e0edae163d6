"""Modules that a model holds under several names, as `self.features = Sequential(*list(net.children())[:-1])` does."""

from __future__ import annotations

from torch import nn


def first_names(module: nn.Module) -> dict[str, str]:
    """Every name of every submodule, and the first that the same one has, as `named_modules` gives it."""
    own = {id(part): name for name, part in module.named_modules()}
    return {name: own[id(part)] for name, part in module.named_modules(remove_duplicate=False)}


def put(module: nn.Module, name: str, part: nn.Module) -> None:
    """Puts a part in the place of a submodule, under each of its names: the forward may go by any of them."""
    old = module.get_submodule(name)
    for other, found in list(module.named_modules(remove_duplicate=False)):
        if found is old:
            module.set_submodule(other, part)
