"""Which layers must lose channels together, found by Torch-Pruning's dependency graph and checked by running them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from .prune import Group, Member, Role, narrow
from .trace import TracedModel, reason_of

_SLICED = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.PReLU,
)
# What autograd calls the operations that can tie a layer to the number or the order of its channels.
_TELLING = {
    "ConstantPadNd": "F.pad",
    "Slice": "a slice",
    "View": "a view",
    "UnsafeView": "a view",
    "Reshape": "a reshape",
    "Split": "a split",
    "SplitWithSizes": "a split",
    "Unbind": "an unbind",
    "Expand": "an expand",
    "Permute": "a permute",
    "Transpose": "a transpose",
    "Mean": "a mean",
    "Sum": "a sum",
}

_USUAL = {"a view", "a reshape"}  # before most classifiers: named only where nothing else is


@dataclass(frozen=True)
class Coupling:
    """The groups that can be pruned, in order of execution, and why every other layer's channels must stay."""

    groups: tuple[Group, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class Probe:
    """A disturbed model and an input on which groups are tried."""

    module: nn.Module
    example: Tensor

    def difference(self, groups: Sequence[Group]) -> str:
        """Why the model without half the channels of the groups is not the one that reads zeros there, or ""."""
        try:
            error, effect = self._compare(self.module, self.example, groups)
        except Exception as failure:
            return f"removing half of them fails: {reason_of(failure)}"
        if max(error, 1e-4) > effect / 100 and error < 1e-2:  # float32 leaves a doubt
            with suppress(Exception):  # a model may run in float32 only
                wide = copy.deepcopy(self.module).double()
                error, effect = self._compare(wide, self.example.double(), groups)
        if not error <= 1e-4:
            return "removing half of them does not equal setting them to zero"
        return "" if effect > 10 * error + 1e-7 else "the output does not depend on them"

    def _compare(self, module: nn.Module, example: Tensor, groups: Sequence[Group]) -> tuple[float, float]:
        """How far the pruned model is from the masked one, and the masked one from the whole, relative to its size."""
        kept = _half(groups)
        smaller = _twin(module, ())
        masked = _twin(module, {f"{member.name}.weight" for group in groups for member in group.consumers()})
        narrow(smaller, kept, {})
        for group, keep in kept:
            gone = sorted(set(range(group.width)) - set(keep.tolist()))
            for member in group.consumers():
                weight = masked.get_submodule(member.name).get_parameter("weight")
                weight[:, [position for c in gone for position in member.indices[c]]] = 0
        with torch.no_grad():
            full, want, got = module(example), masked(example), smaller(example)
        size = float(want.abs().max())
        if got.shape != want.shape or not size > 0:
            return float("inf"), 0.0
        return float((got - want).abs().max()) / size, float((full - want).abs().max()) / size


def couple(traced: TracedModel) -> Coupling:
    """Finds the groups of channels that can only be removed together.

    A group is kept if the model without half of its channels computes what the original computes when the layers that
    read these channels are given zeros instead. That is run for every group and for all of them at once, on a copy
    whose weights are disturbed, because a batch norm scaled by zero would make any two models equal.
    """
    order = {layer.name: position for position, layer in enumerate(traced.layers)}
    refused: dict[str, str] = {}
    found: dict[str, tuple[Group, str]] = {}
    for members, group_or_reason, through in _candidates(traced, order):
        if isinstance(group_or_reason, str):
            refused.update(dict.fromkeys(members, group_or_reason))
        else:
            found[group_or_reason.site] = (group_or_reason, through)
    probe = _disturbed(traced)
    accepted: list[Group] = []
    for group, through in sorted(found.values(), key=lambda pair: order[pair[0].site]):
        reason = probe.difference([group])
        if reason:
            where = f"its channels pass through {through}, and " if through else ""
            refused.update({member.name: where + reason for member in group.members if member.role == "out"})
        else:
            accepted.append(group)
    if len(accepted) > 1 and probe.difference(accepted):
        accepted, refused = _jointly(probe, accepted, refused)
    return Coupling(tuple(accepted), refused)


def _jointly(probe: Probe, groups: Sequence[Group], refused: dict[str, str]) -> tuple[list[Group], dict[str, str]]:
    accepted: list[Group] = []
    for group in groups:
        reason = probe.difference([*accepted, group])
        if reason:
            refused.update({m.name: f"together with other groups: {reason}" for m in group.members if m.role == "out"})
        else:
            accepted.append(group)
    return accepted, refused


def _candidates(traced: TracedModel, order: Mapping[str, int]) -> list[tuple[list[str], Group | str, str]]:
    """Every group of the dependency graph: its producing layers, the group or a reason, and what lies on the way."""
    import torch_pruning

    module = copy.deepcopy(traced.module)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    producers = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) and name in order
    ]
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            graph = torch_pruning.DependencyGraph()
            graph.build_dependency(module, traced.example.clone(), verbose=False)
    except Exception as error:
        reason = f"Torch-Pruning cannot follow the model: {reason_of(error)}"
        return [([name], reason, "") for name in producers]
    names = {layer: name for name, layer in module.named_modules()}
    names.update({parameter: name for name, parameter in module.named_parameters()})
    result: list[tuple[list[str], Group | str, str]] = []
    seen: set[str] = set()

    def followed(name: str) -> dict[tuple[Any, Role], tuple[tuple[int, ...], ...]] | str:
        try:
            return _items(graph, module.get_submodule(name))
        except Exception as error:  # whatever Torch-Pruning's handlers raise: what it does not know it indexes wrongly
            return f"Torch-Pruning cannot follow its channels: {reason_of(error)}"

    for name in sorted(producers, key=lambda producer: (_width(module.get_submodule(producer)), order[producer])):
        if name in seen:
            continue
        if module.get_submodule(name) not in graph.module2node:
            result.append(([name], "Torch-Pruning does not see where its channels go", ""))
            continue
        items = followed(name)
        if isinstance(items, str):
            result.append(([name], items, ""))
            continue
        produced = [names[layer] for layer, role in items if role in ("out", "both") and layer in names]
        producing = [other for other in produced if other in producers] or [name]
        first = min(producing, key=lambda p: (_width(module.get_submodule(p)), order[p]))
        if first != name:
            items = followed(first)
            if isinstance(items, str):
                result.append((producing, items, ""))
                seen.update([name, *producing])
                continue
        seen.update([name, *producing])
        kinds = [str(layer._grad_fn) for layer, _ in items if hasattr(layer, "_grad_fn")]
        kinds += [type(layer).__name__.strip("_").removesuffix("Op") for layer, _ in items if layer not in names]
        telling = {_TELLING[kind] for text in kinds if (kind := _plain(text)) in _TELLING}
        through = " and ".join(sorted(telling - _USUAL or telling))
        result.append((producing, _group(first, items, names), through))
    return result


def _items(graph: Any, layer: nn.Module) -> dict[tuple[Any, Role], tuple[tuple[int, ...], ...]]:
    """The members of a layer's full group with their positions by channel, as Torch-Pruning sees them."""
    from torch_pruning.ops import OPTYPE

    width = _width(layer)
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    items: dict[tuple[Any, Role], tuple[tuple[int, ...], ...]] = {}
    for item in graph.get_pruning_group(layer, prune, list(range(width))).items:
        target = item.dep.target
        role: Role = "both"
        if target.type in (OPTYPE.CONV, OPTYPE.LINEAR):
            role = "out" if graph.is_out_channel_pruning_fn(item.dep.handler) else "in"
        elif target.type == OPTYPE.PARAMETER:
            role = "parameter"
        positions: list[list[int]] = [[] for _ in range(width)]
        for position, channel in zip(item.idxs, item.root_idxs or (), strict=False):
            if channel is not None:
                positions[channel].append(position)
        items[target.module, role] = tuple(tuple(sorted(part)) for part in positions)
        if role == "parameter":
            target.module.planish_dim = target.pruning_dim
    return items


def _group(
    site: str, items: Mapping[tuple[Any, Role], tuple[tuple[int, ...], ...]], names: Mapping[Any, str]
) -> Group | str:
    """The group as members by name, or why it cannot be one."""
    members: list[Member] = []
    for (layer, role), positions in items.items():
        kind = type(layer).__name__
        if kind == "_OutputOp":
            return "its channels are the model's output"
        if layer not in names:
            continue
        name = names[layer]
        if role != "parameter" and not isinstance(layer, _SLICED):
            return f"its channels go into {name}, a {kind}, which would compute something else with fewer of them"
        if role != "parameter" and is_parametrized(layer):
            return f"the weight of {name} is computed from other parameters ({kind})"
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and layer.groups > 1:
            if not layer.groups == layer.in_channels == layer.out_channels:
                return f"{name} is a grouped convolution: its channels can only go in equal numbers from each group"
            role = "both"
        if len({len(part) for part in positions}) != 1 or not positions[0]:
            return f"only a part of its channels reaches {name}"
        dim = getattr(layer, "planish_dim", 0) if role == "parameter" else 0
        members.append(Member(name, role, positions, dim))
    if not any(member.role == "in" for member in members):
        return "nothing but the model's output reads its channels"
    return Group(site, len(members[0].indices), tuple(members))


def _disturbed(traced: TracedModel) -> Probe:
    """A copy with other weights, and a random input."""
    generator = torch.Generator().manual_seed(0)
    module = copy.deepcopy(traced.module).requires_grad_(False)
    for parameter in module.parameters():
        if parameter.is_floating_point():
            fan_in = max(1, parameter[0].numel()) if parameter.ndim > 1 else 4
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=fan_in**-0.5)
    return Probe(module, _shuffled(traced.example, generator))


def _shuffled(example: Tensor, generator: torch.Generator) -> Tensor:
    """The example's own values at random places: what they count (tokens) or may be (above zero) they still are."""
    values = example.flatten()
    if bool((values == values[0]).all()):
        return torch.randn(example.shape, generator=generator)
    return values[torch.randint(len(values), (len(values),), generator=generator)].reshape(example.shape)


def _half(groups: Sequence[Group]) -> list[tuple[Group, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(g, torch.randperm(g.width, generator=generator)[: -(-g.width // 2)].sort().values) for g in groups]


def _twin(module: nn.Module, apart: Collection[str]) -> nn.Module:
    """A copy that shares all tensors but the named parameters: narrowing replaces some, masking writes into these."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for name, tensor in named if name not in apart})


def _width(layer: nn.Module) -> int:
    return int(getattr(layer, "out_channels", 0) or getattr(layer, "out_features", 0))


def _plain(name: str) -> str:
    """SliceBackward0 -> Slice."""
    return name.rstrip("0123456789").removesuffix("Backward")
