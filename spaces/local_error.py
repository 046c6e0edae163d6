"""What every option of a space would spoil, to first order: two passes over the original, no candidate built."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .moments import Moments, batches, first_input, fit
from .propose import Proposal, extent_of
from .prune import Group, choose_channels, kept_channels, narrow
from .quantize import Range, input_ranges
from .reconstruct import LEAST_VARIANCE
from .space import Choice, Kind, Option
from .stages import factorise_site, quantised, replace_site, share_site
from .trace import TracedModel, reason_of

PROBES = 4  # random directions of the output in which every image's change is looked at
_VALUES = 2**24  # activations that are held at once


@dataclass(frozen=True)
class LocalErrors:
    """The error of every option, by the choice's name and in the order of its options.

    The first option's is 0; infinite where the option cannot be built, with the reason in `failed` by
    `choice=option`.
    """

    errors: Mapping[str, tuple[float, ...]]
    failed: Mapping[str, str]


def local_errors(
    traced: TracedModel, proposal: Proposal, calibration: Tensor, choices: Sequence[Choice] | None = None, seed: int = 0
) -> LocalErrors:
    """How far every option alone would move the model's outputs.

    An option changes what its layer computes by d, on the original's own inputs. The output then moves by J d to first
    order, J the Jacobian of the outputs in the layer's output, and the error is the mean over images of |J d|^2, over
    the mean of |outputs - their mean|^2. |J d|^2 is estimated as the mean of (v J d)^2 over random signs v (Hutchinson
    1990), so that one backward pass for each v serves every layer and option. What correcting a batch norm behind the
    layer takes back, a shift and a scale of every channel that are the same for all images, does not count.

    Args:
        traced: The original.
        proposal: Its space.
        calibration: Inputs (n, ...) that closed forms are fitted to and errors are seen on; 64-256 are enough.
        choices: Those of the space's that are asked for; all by default.
        seed: Of the random directions.
    """
    asked = proposal.space.choices if choices is None else choices
    moments = fit(traced, proposal.pixels, calibration).moments
    module = copy.deepcopy(traced.module)
    failed: dict[str, str] = {}
    changes: dict[tuple[str, int], list[_Change]] = {}
    ranges = input_ranges(module, {c.site: 8 for c in asked if c.kind is Kind.BITS}, calibration)
    builder = _Builder(traced, proposal, moments, module)
    for choice in asked:
        for level, option in enumerate(choice.options):
            if option is None:
                continue
            try:
                if choice.kind is Kind.PRUNE:
                    changes[choice.name, level] = builder.pruned(proposal.groups[choice.site], float(option))
                else:
                    changes[choice.name, level] = [builder.replaced(choice, option, ranges)]
            except (ValueError, RuntimeError) as error:
                failed[f"{choice.name}={option}"] = reason_of(error)
    sums, total = _seen(traced, module, changes, calibration, seed)
    errors = {
        choice.name: tuple(
            0.0 if option is None else sums.get((choice.name, level), float("inf")) / total
            for level, option in enumerate(choice.options)
        )
        for choice in asked
    }
    return LocalErrors(errors, failed)


@dataclass(frozen=True)
class _Change:
    """A layer's replacement, and the positions of its input that it still reads (None: all), on dimension `dim`."""

    layer: str
    compute: nn.Module
    positions: Tensor | None = None
    dim: int = 1

    def of(self, x: Tensor) -> Tensor:
        """What the replacement gives for the layer's input."""
        return self.compute(x if self.positions is None else x.index_select(self.dim, self.positions))  # type: ignore[no-any-return]


class _Builder:
    """Builds single layers as `apply` would, were theirs the only option."""

    def __init__(
        self, traced: TracedModel, proposal: Proposal, moments: Mapping[str, Moments], module: nn.Module
    ) -> None:
        self._proposal, self._moments, self._module = proposal, moments, module
        self._extents = {layer.name: extent_of(layer) for layer in traced.layers if layer.op in ("conv2d", "linear")}

    def replaced(self, choice: Choice, option: Option, ranges: Mapping[str, Range]) -> _Change:
        """The layer with an option of any kind but PRUNE."""
        site = choice.site
        holder = nn.Module()
        holder.layer = copy.deepcopy(self._module.get_submodule(site))
        if choice.kind is Kind.BLOCK:
            replace_site(holder, "layer", str(option), self._proposal.lanes, (), self._moments.get(site))
        elif choice.kind is Kind.RANK:
            factorise_site(holder, "layer", str(option), self._extents[site], self._moments.get(site))
        elif choice.kind is Kind.CLUSTER:
            share_site(holder, "layer", int(option or 0), moments=self._moments.get(site))
        else:
            layer = holder.layer
            assert isinstance(layer, nn.Conv2d | nn.Linear)
            holder.layer = quantised(layer, option, ranges[site], self._moments.get(site))
        compute = holder.layer
        assert isinstance(compute, nn.Module)
        return _Change(site, compute.eval())

    def pruned(self, group: Group, fraction: float) -> list[_Change]:
        """The layers that read a group of channels, without a fraction of them."""
        keep = choose_channels(self._module, group, kept_channels(group.width, fraction), self._moments)
        smaller = nn.Module()
        names = {}
        for number, member in enumerate(group.consumers()):
            names[member.name] = f"c{number}"
            smaller.add_module(f"c{number}", copy.deepcopy(self._module.get_submodule(member.name)))
        alone = Group(
            group.site,
            group.width,
            tuple(replace(member, name=names[member.name]) for member in group.consumers()),
        )
        found = {names[name]: moments for name, moments in self._moments.items() if name in names}
        narrow(smaller, [(alone, keep)], found)
        gone = set(range(group.width)) - set(keep.tolist())
        changes = []
        for member in group.consumers():
            layer = self._module.get_submodule(member.name)
            width = layer.in_features if isinstance(layer, nn.Linear) else layer.get_parameter("weight").shape[1]
            lost = {position for channel in gone for position in member.indices[channel]}
            positions = torch.tensor([p for p in range(width) if p not in lost])
            compute = smaller.get_submodule(names[member.name]).eval()
            changes.append(_Change(member.name, compute, positions, -1 if isinstance(layer, nn.Linear) else 1))
        return changes


def _seen(
    traced: TracedModel,
    module: nn.Module,
    changes: Mapping[tuple[str, int], Sequence[_Change]],
    inputs: Tensor,
    seed: int,
) -> tuple[dict[tuple[str, int], float], float]:
    """The mean over images and probes of (v J d)^2 for every change, and the mean of |outputs - mean|^2."""
    layers = sorted({change.layer for parts in changes.values() for change in parts})
    corrections = _corrections(traced, module, changes, inputs)
    generator = torch.Generator().manual_seed(seed)
    sums = dict.fromkeys(changes, 0.0)
    outputs = []
    for batch in _batches(traced, inputs, 3 + PROBES):
        calls, output = _watched(module, layers, batch)
        outputs.append(output.detach().flatten(1))
        if not calls:
            continue
        probes = [_signs(output, generator) for _ in range(PROBES)]
        wanted = [y for pairs in calls.values() for _, y in pairs]
        slopes = [torch.autograd.grad((output * probe).sum(), wanted, retain_graph=True) for probe in probes]
        by_layer: dict[str, list[list[Tensor]]] = {}
        for slope in slopes:
            parts = iter(slope)
            for name, pairs in calls.items():
                by_layer.setdefault(name, []).append([next(parts) for _ in pairs])
        with torch.no_grad():
            for key, parts_of in changes.items():
                moved = torch.zeros(PROBES, len(batch))
                for place, change in enumerate(parts_of):
                    correct = corrections.get((key, place), _as_it_is)
                    for number, (x, y) in enumerate(calls[change.layer]):
                        d = correct(change.of(x)) - y
                        slope_of = torch.stack([probe[number] for probe in by_layer[change.layer]])
                        moved += (slope_of * d).flatten(2).sum(2)
                sums[key] += float(moved.square().mean(0).sum())
    flat = torch.cat(outputs)
    total = float((flat - flat.mean(0)).square().sum())
    return sums, max(total, 1e-30)


def _watched(
    module: nn.Module, names: Sequence[str], batch: Tensor
) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], Tensor]:
    """The input and output of every call of the named layers, with the graph from there to the output."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor]:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> Tensor:
            # Copies: what follows may write its result in their place (an activation, a sum).
            calls[name].append((first_input(inputs, named).detach().clone(), output))
            return output.clone()

        return keep

    handles = [module.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        with torch.enable_grad():
            output = module(batch.clone().requires_grad_(batch.is_floating_point()))
    finally:
        for handle in handles:
            handle.remove()
    return {name: pairs for name, pairs in calls.items() if pairs}, output


def _as_it_is(value: Tensor) -> Tensor:
    return value


_Key = tuple[tuple[str, int], int]


def _corrections(
    traced: TracedModel,
    module: nn.Module,
    changes: Mapping[tuple[str, int], Sequence[_Change]],
    inputs: Tensor,
) -> dict[_Key, Callable[[Tensor], Tensor]]:
    """Of every change of a layer with a batch norm behind it what correcting that does to the layer's output.

    By the change's key and its place there. Of all inputs: the few that are held at once have means of their own, and
    what moves those is no shift that a batch norm takes back.
    """
    asked = {
        (key, place): change
        for key, parts in changes.items()
        for place, change in enumerate(parts)
        if _is_normed(traced, module, change.layer)
    }
    layers = sorted({change.layer for change in asked.values()})
    if not layers:
        return {}
    wanted = {name: _ChannelSums() for name in layers}
    given = {place: _ChannelSums() for place in asked}
    with torch.no_grad():
        for batch in _batches(traced, inputs, 4):
            calls, _ = _watched(module, layers, batch)
            for name, pairs in calls.items():
                for _, y in pairs:
                    wanted[name].add(y)
            for place, change in asked.items():
                for x, _ in calls.get(change.layer, ()):
                    given[place].add(change.of(x))
    return {place: given[place].moved_to(wanted[change.layer]) for place, change in asked.items()}


class _ChannelSums:
    """The sums of every channel's values and squares."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.zeros(1), torch.zeros(1)

    def add(self, value: Tensor) -> None:
        """Channels are dimension 1."""
        others = [dim for dim in range(value.ndim) if dim != 1]
        self._count += value.numel() // value.shape[1]
        self._sum = self._sum + value.sum(others, dtype=torch.float64)
        self._squares = self._squares + value.square().sum(others, dtype=torch.float64)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Means and variances (c,)."""
        mean = self._sum / max(1, self._count)
        return mean, (self._squares / max(1, self._count) - mean.square()).clamp_min(0)

    def moved_to(self, other: _ChannelSums) -> Callable[[Tensor], Tensor]:
        """Gives values like these the means and variances of the others."""
        (own_mean, own), (mean, variance) = self.moments(), other.moments()
        # As far as `correct_batch_norms` does.
        scale = (variance / torch.maximum(own, LEAST_VARIANCE * variance).clamp_min(1e-12)).sqrt()
        shift = mean - own_mean * scale

        def moved(value: Tensor) -> Tensor:
            shape = (-1, *[1] * (value.ndim - 2))
            return value * scale.to(value).reshape(shape) + shift.to(value).reshape(shape)

        return moved


def _is_normed(traced: TracedModel, module: nn.Module, name: str) -> bool:
    readers = traced.feeds()[name]
    return bool(readers) and all(
        ":" not in reader and isinstance(module.get_submodule(reader), _BatchNorm) for reader in readers
    )


def _signs(output: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs in the shape of the output, without the part that is the same in all outputs of an image.

    Logits that all move alike change no probability.
    """
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output.dtype) * 2 - 1
    return signs - signs.mean(-1, keepdim=True) if output.shape[-1] > 1 else signs


def _batches(traced: TracedModel, inputs: Tensor, times: int) -> tuple[Tensor, ...]:
    """Equal parts of the inputs, as small as it takes to hold the activations of every layer so many times."""
    held = sum(torch.Size(layer.out_shape).numel() * layer.calls for layer in traced.layers) * times
    size = max(1, min(64, _VALUES // max(1, held)))
    return tuple(part for small in batches(inputs) for part in torch.split(small, size))
