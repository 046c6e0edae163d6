"""Channel pruning: which channels go, how coupled layers lose them, and what the next layer does about it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .moments import Moments, taps_of

STEPS = 32  # in which channels are chosen for removal: one at a time up to so many
Role = Literal["out", "in", "both", "parameter"]


@dataclass(frozen=True)
class Member:
    """A layer that loses channels when its group does.

    `role` says which side of the layer: what it produces, what it reads, both at once (depthwise convolutions, norms),
    or `dim` of a bare parameter. `indices[c]` are the layer's positions that belong to channel c of the group: one, or
    one for every pixel of a linear layer behind a flatten.
    """

    name: str
    role: Role
    indices: tuple[tuple[int, ...], ...]
    dim: int = 0


@dataclass(frozen=True)
class Group:
    """Channels that can only be removed together from all members; the site is the first layer that produces them."""

    site: str
    width: int
    members: tuple[Member, ...]

    def consumers(self) -> tuple[Member, ...]:
        """The members that read the channels."""
        return tuple(member for member in self.members if member.role == "in")


def consumer_pixels(groups: Iterable[Group]) -> dict[str, int]:
    """The number of input features that make one channel, for every consumer in which that is one and the same."""
    sizes: dict[str, set[int]] = {}
    for group in groups:
        for member in group.consumers():
            size = len(member.indices[0])
            in_order = all(p[0] % size == 0 and p == tuple(range(p[0], p[0] + size)) for p in member.indices)
            sizes.setdefault(member.name, set()).add(size if in_order else 0)
    return {name: size for name, found in sizes.items() if len(found) == 1 and (size := found.pop()) > 0}


def kept_channels(width: int, fraction: float) -> int:
    """The number of channels that stay when a fraction is removed; exact for the fractions that `propose` writes."""
    return width - round(width * fraction)


def choose_channels(module: nn.Module, group: Group, keep: int, moments: Mapping[str, Moments]) -> Tensor:
    """The `keep` channels of the group that matter most, ascending, int64 (keep,).

    With moments of every consumer's input, channels are removed one at a time, always the one whose loss the remaining
    channels make up for best (optimal brain surgeon, Hassibi and Stork 1993, on whole channels). Without, by the
    squared norm of the group's weights, each member scaled to a mean of 1 (group norm, Fang et al. 2023).
    """
    pixels = consumer_pixels([group])
    if all(member.name in moments and member.name in pixels for member in group.consumers()):
        return _most_needed(module, group, moments, group.width - keep)
    ranking = torch.argsort(_group_norm(module, group), descending=True, stable=True)
    return ranking[:keep].sort().values


def narrow(module: nn.Module, kept: Sequence[tuple[Group, Tensor]], moments: Mapping[str, Moments]) -> None:
    """Removes all channels of the groups but those to keep (ascending, int64) from every member, in place.

    All groups go at once, because a layer behind a concatenation is a member of several and `indices` count its
    original positions. Where moments of a consumer's input are given, its weights are first changed so that the
    channels that stay replace those that go as well as a linear map of them can: least squares, W_K += W_R M with
    M = C_RK C_KK^-1, C the covariance of the channels (interpolative pruning, Chee et al. 2022).
    """
    removed: dict[tuple[str, Role], set[int]] = {}
    dims: dict[str, int] = {}
    for group, keep in kept:
        gone = sorted(set(range(group.width)) - set(keep.tolist()))
        for member in group.members:
            positions = removed.setdefault((member.name, member.role), set())
            positions.update(position for channel in gone for position in member.indices[channel])
            dims[member.name] = member.dim
    pixels = consumer_pixels([group for group, _ in kept])
    with torch.no_grad():
        for (name, role), positions in removed.items():
            if role == "in" and name in moments and name in pixels and positions:
                channels = sorted({position // pixels[name] for position in positions})
                _compensate(module.get_submodule(name), channels, moments[name], pixels[name])
        for (name, role), positions in removed.items():
            _slice(module, name, role, dims[name], positions)


def left_channels(kept: Sequence[tuple[Group, Tensor]], name: str, role: Role, width: int) -> Tensor:
    """The channels on one side of a layer, of `width` once, that are left after `narrow`; ascending, int64."""
    pixels = consumer_pixels([group for group, _ in kept]).get(name, 1) if role == "in" else 1
    gone: set[int] = set()
    for group, keep in kept:
        for member in group.members:
            if (member.name, member.role) == (name, role):
                lost = set(range(group.width)) - set(keep.tolist())
                gone.update(position // pixels for channel in lost for position in member.indices[channel])
    return torch.tensor([channel for channel in range(width) if channel not in gone], dtype=torch.int64)


def absorb(weight: Tensor, keep: Tensor, gone: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Least-squares weights on the channels `keep` of a layer that reads keep and gone, and the missing mean output.

    Args:
        weight: (o, c, ...), any number of taps behind the channels.

    Returns:
        (o, len(keep), ...) and (o,).
    """
    reads = moments.of_reads()
    if reads is not None and weight[0, 0].numel() == moments.taps.numel():
        mean, covariance = reads
        taps = moments.taps.numel()
        stay, lost = taps_of(keep, taps), taps_of(gone, taps)
        flat = weight.detach().double().flatten(1)
        mix = torch.linalg.solve(covariance[stay][:, stay], covariance[stay][:, lost])
        fitted = flat[:, stay] + flat[:, lost] @ mix.T
        missed = flat[:, lost] @ (mean[lost] - mean[stay] @ mix)
        return fitted.reshape(len(weight), len(keep), *weight.shape[2:]).to(weight.dtype), missed.to(weight.dtype)
    covariance = moments.ridge()
    inside = covariance[keep][:, keep]
    mix = torch.linalg.solve(inside, covariance[keep][:, gone])  # (keep, gone): how the kept predict the removed
    change = torch.einsum("og...,kg->ok...", weight[:, gone], mix)
    missing = moments.mean[gone] - moments.mean[keep] @ mix
    return weight[:, keep] + change, weight[:, gone].flatten(2).sum(2) @ missing


def _compensate(layer: nn.Module, gone: list[int], moments: Moments, pixels: int) -> None:
    weight = layer.get_parameter("weight")
    by_channel = weight.reshape(weight.shape[0], -1, pixels) if weight.ndim == 2 else weight
    stay = torch.tensor(sorted(set(range(by_channel.shape[1])) - set(gone)), dtype=torch.int64)
    changed, missing = absorb(by_channel, stay, torch.tensor(gone, dtype=torch.int64), moments)
    by_channel[:, stay] = changed
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor):  # without one, the batch norm behind the layer takes the mean up
        bias += missing


def _most_needed(module: nn.Module, group: Group, moments: Mapping[str, Moments], count: int) -> Tensor:
    """The channels that stay when the `count` go whose removal costs all consumers least after each is refitted.

    For one consumer with Gram matrix G = W^T W of its weights (of a kernel's, W T W^T summed over its outputs, T how
    alike the pixels under its taps are) and P = C^-1, removing channel k costs G_kk / P_kk. When
    a set S goes, W loses W_S A with A = P_SS^-1 P_S, which changes G, and P loses P_S^T A. More than `STEPS` channels
    go several at a time.
    """
    pixels = consumer_pixels([group])
    grams, inverses = [], []
    for member in group.consumers():
        size = pixels[member.name]
        channels = torch.tensor([positions[0] // size for positions in member.indices])
        weight = module.get_submodule(member.name).get_parameter("weight").detach().double()
        columns = weight.reshape(weight.shape[0], -1, size) if weight.ndim == 2 else weight.flatten(2)
        own = columns[:, channels].transpose(0, 1)
        covariance = moments[member.name].select(channels).ridge().double()
        between = moments[member.name].between_taps()
        alike = own @ between if weight.ndim == 4 and len(between) == own.shape[2] else own
        gram = alike.flatten(1) @ own.flatten(1).T
        grams.append(gram / (gram * covariance).sum().abs().clamp_min(1e-30))  # every consumer's output counts alike
        inverses.append(torch.linalg.inv(covariance))
    alive = torch.arange(group.width)
    while (left := count - (group.width - len(alive))) > 0:
        cost = torch.stack([g.diagonal() / p.diagonal().clamp_min(1e-30) for g, p in zip(grams, inverses, strict=True)])
        order = torch.argsort(cost.sum(0), stable=True)
        taken = min(left, -(-count // STEPS))
        gone, stay = order[:taken], order[taken:].sort().values
        for consumer, (gram, inverse) in enumerate(zip(grams, inverses, strict=True)):
            ratio = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
            crossed = gram[stay][:, gone] @ ratio
            grams[consumer] = gram[stay][:, stay] + ratio.T @ gram[gone][:, gone] @ ratio - crossed - crossed.T
            inverses[consumer] = inverse[stay][:, stay] - inverse[stay][:, gone] @ ratio
        alive = alive[stay]
    return alive


def _group_norm(module: nn.Module, group: Group) -> Tensor:
    total = torch.zeros(group.width, dtype=torch.float64)
    for member in group.members:
        for tensor, dim in _tensors(module, member):
            # A single slope, of all channels, tells none from another.
            whole = tensor.shape[dim] > max((position for part in member.indices for position in part), default=0)
            if whole and tensor.is_floating_point() and tensor.requires_grad:
                flat = tensor.detach().double().movedim(dim, 0).reshape(tensor.shape[dim], -1)
                sums = flat.square().sum(1)
                norms = torch.stack([sums[list(positions)].sum() for positions in member.indices])
                total += norms / norms.mean().clamp_min(1e-30)
    return total


def _tensors(module: nn.Module, member: Member) -> list[tuple[Tensor, int]]:
    """The weights of a member and the dimension in which its channels lie."""
    if member.role == "parameter":
        return [(module.get_parameter(member.name), member.dim)]
    weight = getattr(module.get_submodule(member.name), "weight", None)
    return [(weight, 1 if member.role == "in" else 0)] if isinstance(weight, Tensor) else []


def _slice(module: nn.Module, name: str, role: Role, dim: int, removed: set[int]) -> None:
    if role == "parameter":
        parent, _, attribute = name.rpartition(".")
        owner = module.get_submodule(parent)
        owner.register_parameter(attribute, _take(owner.get_parameter(attribute), dim, removed))
        return
    layer = module.get_submodule(name)
    if isinstance(layer, nn.Linear):
        _slice_linear(layer, role, removed)
    elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        _slice_convolution(layer, role, removed)
    else:
        _slice_norm(layer, removed)


def _slice_linear(layer: nn.Linear, role: Role, removed: set[int]) -> None:
    layer.weight = _take(layer.weight, 1 if role == "in" else 0, removed)
    if role == "in":
        layer.in_features = layer.weight.shape[1]
        return
    layer.out_features = layer.weight.shape[0]
    if layer.bias is not None:
        layer.bias = _take(layer.bias, 0, removed)


def _slice_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, role: Role, removed: set[int]) -> None:
    if role == "in":
        layer.weight = _take(layer.weight, 1, removed)
        layer.in_channels = layer.weight.shape[1]
        return
    layer.weight = _take(layer.weight, 0, removed)
    layer.out_channels = layer.weight.shape[0]
    if layer.bias is not None:
        layer.bias = _take(layer.bias, 0, removed)
    if role == "both":  # depthwise: the weight has one input channel, so the groups go with the rows
        layer.in_channels = layer.groups = layer.out_channels


def _slice_norm(layer: nn.Module, removed: set[int]) -> None:
    """A batch norm, instance norm or PReLU: every tensor with one value a channel."""
    size = next(getattr(layer, name) for name in ("num_features", "num_parameters") if hasattr(layer, name))
    for name, parameter in list(layer.named_parameters(recurse=False)):
        if parameter.ndim == 1 and len(parameter) == size > 1:
            layer.register_parameter(name, _take(parameter, 0, removed))
    for name, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.ndim == 1 and len(buffer) == size:
            layer.register_buffer(name, _take_plain(buffer, 0, removed))
    for name in ("num_features", "num_parameters"):
        if getattr(layer, name, 1) == size > 1:
            setattr(layer, name, size - len(removed))


def _take(parameter: Tensor, dim: int, removed: set[int]) -> nn.Parameter:
    return nn.Parameter(_take_plain(parameter.detach(), dim, removed), parameter.requires_grad)


def _take_plain(tensor: Tensor, dim: int, removed: set[int]) -> Tensor:
    stay = [position for position in range(tensor.shape[dim]) if position not in removed]
    return tensor.index_select(dim, torch.tensor(stay, dtype=torch.int64)).contiguous()
