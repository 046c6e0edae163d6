"""The default search space of a traced model: which choices each layer gets, and why the others get none."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .aliases import put
from .bfloat16 import pairs
from .bit_widths import BFLOAT16, MEMORY_BOUND
from .blocks import block_options
from .cluster import worth_sharing
from .coupling import Coupling, couple
from .lowrank import Extent, rank_options
from .prune import Group, consumer_pixels, kept_channels
from .space import Choice, Kind, Option, SearchSpace
from .trace import Layer, TracedModel, reason_of

FRACTIONS = (0.25, 0.5, 0.75)  # of the channels, before they are rounded to whole lanes
CODEBOOKS = (256, 64, 16)
WIDTHS = (8, 4)
FEW_CHANNELS = 8  # a convolution that reads fewer is an image's first layer: cheap, and the rest depends on it
_CHOSEN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # what loses channels by itself or can be replaced
WIDEST_COVARIANCE = 1024  # channels; more would take minutes to decompose


@dataclass(frozen=True)
class Proposal:
    """A search space and what `apply` needs beside it.

    `groups` holds the coupled channels of every PRUNE site; `pixels` the layers whose inputs have moments, with the
    number of input features that make one channel.
    """

    space: SearchSpace
    groups: Mapping[str, Group]
    pixels: Mapping[str, int]
    lanes: int


def propose(
    traced: TracedModel, *, lanes: int = 16, families: Collection[Kind] = tuple(Kind), bfloat16: bool = False
) -> Proposal:
    """The choices of every layer, in order of execution, each list from the original to the strongest option.

    Options: BLOCK "grouped", "separable", "pointwise", "identity"; PRUNE the fraction of channels removed, such that
    what stays is a multiple of `lanes`; RANK "svd:R", "spatial:R", "tucker:RIxRO" with fewer MACs than the layer;
    CLUSTER the number of codebook entries, for storage only; BITS 8 (weights and inputs) or 4 (weights on a 4-bit
    grid, read as bytes: sums that fit into 16 bits, fewer instructions where a CPU has none for products of bytes), and
    for linear layers of one row whose weights take the time to read, "w8" or "w4" (weights alone) and "bf16" (weights
    and inputs); with `bfloat16`, where a device multiplies those, "bf16" for all but depthwise convolutions.
    None leaves the layer as it is.

    Every layer with parameters has a choice or a reason in `left_out`, under its name or, if it has choices of other
    kinds, under `name:kind`.
    """
    if lanes < 1:
        raise ValueError(f"lanes is {lanes}; it is the number of channels that are computed at once, at least 1")
    layers = [layer for layer in traced.layers if ":" not in layer.name]
    modules = {layer.name: traced.module.get_submodule(layer.name) for layer in layers}
    fixed = {layer.name: _obstacle(layer, modules[layer.name]) for layer in layers}
    fixed.update(_entangled(traced, [name for name, reason in fixed.items() if not reason]))
    coupling = couple(traced) if Kind.PRUNE in families else Coupling((), {})
    groups = {group.site: group for group in coupling.groups}
    covered = {m.name: group.site for group in coupling.groups for m in group.members if m.role in ("out", "both")}
    choices: list[Choice] = []
    left_out: dict[str, str] = {}
    for layer in layers:
        if not isinstance(modules[layer.name], _CHOSEN):
            left_out[layer.name] = fixed[layer.name]
            continue
        reasons: dict[Kind, str] = {}
        before = len(choices)
        for kind in (kind for kind in Kind if kind in families):
            options: list[Option] | str
            if kind is Kind.PRUNE:
                options = _prune_options(layer, groups, covered, coupling.refused, lanes)
            else:
                options = fixed[layer.name] or _options(kind, modules[layer.name], layer, lanes, bfloat16)
            if isinstance(options, str):
                reasons[kind] = options
            elif options:
                choices.append(Choice(layer.name, kind, (None, *options)))
        if len(choices) == before and not _pruned_with_another(layer.name, covered, choices):
            text = "; ".join(dict.fromkeys(reason for reason in reasons.values() if reason))
            left_out[layer.name] = text or "no family was asked for"
        else:
            left_out.update({f"{layer.name}:{kind.value}": reason for kind, reason in reasons.items() if reason})
    chosen = {choice.site for choice in choices if choice.kind is Kind.PRUNE}
    groups = {site: group for site, group in groups.items() if site in chosen}
    return Proposal(SearchSpace(tuple(choices), left_out), groups, _pixels(modules, fixed, groups), lanes)


def _options(kind: Kind, module: nn.Module, layer: Layer, lanes: int, bfloat16: bool) -> list[Option] | str:
    """The options of a replaceable layer besides None, or why it has none."""
    assert isinstance(module, nn.Conv2d | nn.Linear)
    if kind is Kind.BITS:
        if (
            isinstance(module, nn.Linear)
            and module.weight.numel() >= MEMORY_BOUND
            and extent_of(layer).writes == (1, 1)
        ):
            return [BFLOAT16, "w8", 8, "w4", 4]
        return [BFLOAT16, *WIDTHS] if bfloat16 and pairs(module) else list(WIDTHS)
    if kind is Kind.CLUSTER:
        books = [entries for entries in CODEBOOKS if worth_sharing(module.weight.numel(), entries)]
        return list(books) or f"{module.weight.numel()} weights are fewer than a codebook and its indices would save"
    grouped = isinstance(module, nn.Conv2d) and module.groups > 1
    if grouped:
        return "its groups are already cheaper than a dense convolution"
    if kind is Kind.RANK:
        ranks = rank_options(module, extent_of(layer), lanes)
        return list(ranks) or f"no factorisation with ranks in multiples of {lanes} needs fewer MACs"
    if not isinstance(module, nn.Conv2d) or min(module.kernel_size) < 3:
        return ""  # there is nothing to explain: block types replace k x k convolutions
    if module.in_channels < FEW_CHANNELS:
        return f"it reads only {module.in_channels} channel(s): a cheaper block would save next to nothing"
    return list(block_options(module, lanes))


def extent_of(layer: Layer) -> Extent:
    """The pixels of a layer; a linear layer with more than one row, as in attention, writes (rows, 1)."""
    if layer.op == "conv2d":
        return Extent((layer.in_shape[1], layer.in_shape[2]), (layer.out_shape[1], layer.out_shape[2]))
    rows = 1
    for size in layer.out_shape[:-1]:
        rows *= size
    return Extent((rows, 1), (rows, 1))


def _prune_options(
    layer: Layer,
    groups: Mapping[str, Group],
    covered: Mapping[str, str],
    refused: Mapping[str, str],
    lanes: int,
) -> list[Option] | str:
    if layer.name not in groups:
        if layer.name in covered:
            return ""  # it loses channels with another layer
        return refused.get(layer.name, "Torch-Pruning does not see it in the graph")
    width = groups[layer.name].width
    if width <= lanes:
        fill = "fill" if width == lanes else "do not even fill"
        return f"{width} channels {fill} one vector of {lanes} lanes; fewer would not be faster"
    kept = [max(lanes, round(width * (1 - fraction) / lanes) * lanes) for fraction in FRACTIONS]
    options: list[Option] = []
    for keep in dict.fromkeys(keep for keep in kept if keep < width):
        fraction = (width - keep) / width
        assert kept_channels(width, fraction) == keep
        options.append(fraction)
    return options


def _pruned_with_another(name: str, covered: Mapping[str, str], choices: Collection[Choice]) -> bool:
    site = covered.get(name)
    return any(choice.site == site and choice.kind is Kind.PRUNE for choice in choices)


def _obstacle(layer: Layer, module: nn.Module) -> str:
    """Why the layer cannot be replaced by another module, or ""."""
    kind = type(module).__name__
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return f"a {kind} has no choices of its own: it goes with the layer that it follows"
    if type(module) not in (nn.Conv2d, nn.Linear):
        base = next((b.__name__ for b in (nn.Conv2d, nn.Linear) if isinstance(module, b)), "")
        return f"a {kind} may compute something else than a {base}" if base else f"there is nothing to put for a {kind}"
    assert isinstance(module, nn.Conv2d | nn.Linear)
    if layer.obstacle:
        return layer.obstacle
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which a replacement would lose"
    if module.weight.dtype != torch.float32:
        return f"its weights are {module.weight.dtype}, not float32"
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return f"its padding is {module.padding_mode} {module.padding!r}, not equal zeros on both sides"
    return ""


class _Wrapped(nn.Module):
    """What stands in a layer's place takes one input, by position, as all that compression puts there."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


def _entangled(traced: TracedModel, names: Collection[str]) -> dict[str, str]:
    """Layers of which the model uses more than their output, so that another module in their place breaks it."""
    with torch.no_grad():
        want = traced.module(traced.example)

    def broken(wrapped: Collection[str]) -> str:
        module = copy.deepcopy(traced.module)
        for name in wrapped:
            put(module, name, _Wrapped(module.get_submodule(name)))
        try:
            with torch.no_grad():
                got = module(traced.example)
        except Exception as error:
            return f"the model uses more of it than its output: {reason_of(error)}"
        return "" if torch.equal(got, want) else "the model computes something else when it is wrapped"

    if not names or not broken(names):
        return {}
    return {name: reason for name in names if (reason := broken([name]))}


def _pixels(modules: Mapping[str, nn.Module], fixed: Mapping[str, str], groups: Mapping[str, Group]) -> dict[str, int]:
    """The layers whose input moments are affordable and of use."""
    found = consumer_pixels(groups.values())
    result = {}
    for name, module in modules.items():
        if name not in found and (fixed[name] or not isinstance(module, nn.Conv2d | nn.Linear)):
            continue
        if isinstance(module, nn.Conv2d):
            channels = module.in_channels if module.groups == 1 else WIDEST_COVARIANCE + 1
        elif isinstance(module, nn.Linear):
            pixels = found.get(name, 1)
            # What it reads beside the pixels of channels is no part of them.
            channels = module.in_features // pixels if module.in_features % pixels == 0 else WIDEST_COVARIANCE + 1
        else:
            continue
        if channels <= WIDEST_COVARIANCE:
            result[name] = found.get(name, 1)
    return result
