"""A candidate made real: the compressed copy of a traced model."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .blocks import Grouped, Separable, build_block
from .cluster import SharedConv2d, SharedLinear, share, worth_sharing
from .lowrank import Extent, LowRank, Rank, factorise, fit_rank
from .moments import Moments, layer_moments, restate_batch_norms
from .propose import Proposal, extent_of
from .prune import Group, choose_channels, kept_channels, narrow, read_channels
from .quantize import Quantized, Range, input_ranges
from .space import Candidate, Kind, Option
from .trace import TracedModel, reason_of

Kept = Sequence[tuple[Group, Tensor]]


class ApplyError(ValueError):
    """A candidate gives a model that does not compute what its shape promises."""


def apply(
    candidate: Candidate, traced: TracedModel, proposal: Proposal, calibration: Tensor | None = None
) -> nn.Module:
    """The compressed model, a new module in eval mode; the traced model stays as it is.

    Channels go first, because a block is fitted to the convolution that is left; then blocks, ranks, codebooks and
    bits. Every option of the space can be combined with every other: what no longer fits is done as far as it can be,
    by rules that depend on widths alone, and `notes(module)` says so.

    - PRUNE removes the channels of all members of a group.
    - BLOCK replaces the convolution with what is left of it; see `build_block`.
    - RANK factorises the layer, or the 1x1 convolution of a separable block; ranks are capped to the widths that are
      left, and a factorisation that would not save MACs is left undone.
    - CLUSTER and BITS treat every convolution and linear layer that now stands at the site.

    Args:
        calibration: Inputs (n, ...) that the closed forms, the batch norms and the input ranges are fitted to; without
            them weights alone decide. 64-256 are enough.

    Raises:
        ValueError: the candidate is not of this space, or it has BITS and no calibration was given.
        ApplyError: the result's output is not finite or not of the original's shape.
    """
    if calibration is None and Kind.BITS in _chosen(candidate, proposal):
        raise ValueError("the candidate quantises inputs, so apply needs calibration inputs to find their range")
    return _build(candidate, traced, proposal, calibration)


def rebuild(
    candidate: Candidate, traced: TracedModel, proposal: Proposal, saved: Mapping[str, Tensor]
) -> nn.Module:
    """The compressed model with the weights of `state`; needs no calibration, because they hold what it found."""
    module = _build(candidate, traced, proposal, None)
    restore(module, saved)
    return module


def state(module: nn.Module) -> dict[str, Tensor]:
    """Everything that training or calibration may have changed: contiguous copies that share no memory."""
    return {name: tensor.detach().clone().contiguous() for name, tensor in module.state_dict().items()}


def restore(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Loads what `state` returned, in place.

    Raises:
        ValueError: a name or a shape is not the module's; one line that names the first few.
    """
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in saved]
    wrong += [f"{name} is not in the model" for name in saved if name not in own]
    wrong += [
        f"{name} has shape {tuple(saved[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in saved and saved[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the weights are of another candidate: {', '.join(wrong[:3])}{more}")
    module.load_state_dict(dict(saved), strict=True)


def notes(module: nn.Module) -> tuple[str, ...]:
    """What `apply` did otherwise than the candidate's options say, as `site: reason`."""
    return tuple(getattr(module, "planish_notes", ()))


def _build(candidate: Candidate, traced: TracedModel, proposal: Proposal, calibration: Tensor | None) -> nn.Module:
    chosen = _chosen(candidate, proposal)
    module = copy.deepcopy(traced.module).eval()
    extents = {layer.name: extent_of(layer) for layer in traced.layers if layer.op in ("conv2d", "linear")}
    structural = [kind for kind in chosen if kind is not Kind.BITS]
    moments: Mapping[str, Moments] = {}
    if calibration is not None and {Kind.PRUNE, Kind.BLOCK, Kind.RANK} & set(structural):
        moments = layer_moments(traced, proposal.pixels, calibration)
    remarks: list[str] = []
    kept = _prune(module, chosen.get(Kind.PRUNE, {}), proposal, moments)
    if kept:
        moments = {name: m.select(read_channels(kept, name, len(m.mean))) for name, m in moments.items()}
    for site, option in chosen.get(Kind.BLOCK, {}).items():
        _replace_block(module, site, str(option), proposal.lanes, kept, moments.get(site), remarks)
    for site, option in chosen.get(Kind.RANK, {}).items():
        _factorise(module, site, Rank.parse(str(option)), extents[site], moments.get(site), remarks)
    for site, option in chosen.get(Kind.CLUSTER, {}).items():
        _share(module, site, int(option or 0), remarks)
    _check(module, traced)
    if calibration is not None and structural:
        restate_batch_norms(module, calibration)
    if Kind.BITS in chosen:
        _quantise(module, chosen[Kind.BITS], calibration, remarks)
    module.eval()
    module.planish_notes = tuple(remarks)  # type: ignore[assignment]
    _check(module, traced)
    return module


def _chosen(candidate: Candidate, proposal: Proposal) -> dict[Kind, dict[str, Option]]:
    """The options that change something, by kind and site."""
    proposal.space.encode(candidate)  # raises on anything that the space does not have
    chosen: dict[Kind, dict[str, Option]] = {}
    for choice in proposal.space.choices:
        option = candidate.options[choice.name]
        if option is not None:
            chosen.setdefault(choice.kind, {})[choice.site] = option
    return chosen


def _prune(
    module: nn.Module, options: Mapping[str, Option], proposal: Proposal, moments: Mapping[str, Moments]
) -> Kept:
    kept = []
    for site, fraction in options.items():
        group = proposal.groups[site]
        keep = kept_channels(group.width, float(fraction or 0))
        kept.append((group, choose_channels(module, group, keep, moments)))
    narrow(module, kept, moments)
    return kept


def _replace_block(
    module: nn.Module, site: str, option: str, lanes: int, kept: Kept, moments: Moments | None, remarks: list[str]
) -> None:
    conv = module.get_submodule(site)
    assert isinstance(conv, nn.Conv2d)
    block, remark = build_block(conv, option, lanes, _same_channels(site, kept), moments)
    module.set_submodule(site, block)
    if remark:
        remarks.append(f"{site}: {remark}")


def _same_channels(site: str, kept: Kept) -> bool:
    """Whether a layer's input and output lost the same channels, whichever those were."""
    sides: dict[str, list[tuple[int, tuple[tuple[int, ...], ...]]]] = {"in": [], "out": []}
    for number, (group, _) in enumerate(kept):
        for member in group.members:
            if member.name == site:
                sides[member.role].append((number, member.indices))
    return sides["in"] == sides["out"]


def _factorise(
    module: nn.Module, site: str, rank: Rank, extent: Extent, moments: Moments | None, remarks: list[str]
) -> None:
    layer = module.get_submodule(site)
    target = site
    if isinstance(layer, Separable):
        target, moments, extent = f"{site}.pointwise", None, Extent(extent.writes, extent.writes)
        layer = module.get_submodule(target)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = "grouped" if isinstance(layer, Grouped) else "identity"
        remarks.append(f"{site}: rank {rank} is ignored, the {kind} block has nothing to factorise")
        return
    fitted = fit_rank(rank, layer, extent)
    if fitted is None:
        remarks.append(f"{site}: rank {rank} is ignored, it would not save MACs in what is left")
        return
    if fitted != rank:
        remarks.append(f"{site}: rank {rank} became {fitted} in what is left")
    module.set_submodule(target, factorise(layer, fitted, moments))


def _share(module: nn.Module, site: str, entries: int, remarks: list[str]) -> None:
    names = _layers_at(module, site)
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        if worth_sharing(layer.weight.numel(), entries):
            module.set_submodule(name, share(layer, entries))
        else:
            remarks.append(f"{site}: {entries} shared values would not save storage in {name}")
    if not names:
        remarks.append(f"{site}: there is no weight left to share")


def _quantise(module: nn.Module, options: Mapping[str, Option], calibration: Tensor | None, remarks: list[str]) -> None:
    bits = {name: int(option or 0) for site, option in options.items() for name in _layers_at(module, site)}
    remarks.extend(f"{site}: there is no weight left to quantise" for site in options if not _layers_at(module, site))
    ranges: Mapping[str, Range] = {} if calibration is None else input_ranges(module, bits, calibration)
    for name, width in bits.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        module.set_submodule(name, Quantized(layer, width, ranges.get(name, Range(0.0, 1.0))))


def _layers_at(module: nn.Module, site: str) -> list[str]:
    """The convolutions and linear layers that stand at the site, by full name."""
    found = [
        f"{site}.{name}".rstrip(".")
        for name, layer in module.get_submodule(site).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    assert found or not isinstance(module.get_submodule(site), LowRank | SharedConv2d | SharedLinear)
    return found


def _check(module: nn.Module, traced: TracedModel) -> None:
    with torch.no_grad():
        try:
            got = module(traced.example)
        except Exception as error:
            raise ApplyError(f"the compressed model does not run: {reason_of(error)}") from error
    if tuple(got.shape) != traced.output_shape:
        raise ApplyError(f"the compressed model returns {tuple(got.shape)}, the original {traced.output_shape}")
    if not bool(torch.isfinite(got).all()):
        raise ApplyError("the compressed model returns values that are not finite")
