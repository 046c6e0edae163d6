"""A candidate made real: the compressed copy of a traced model."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .moments import Moments, NormMemory, correct_batch_norms, fit
from .propose import Proposal, extent_of
from .prune import left_channels
from .reconstruct import LEAST_VARIANCE, reconstruct, reference_of
from .space import Candidate, Kind, Option
from .stages import Kept, Remark, factorise_site, prune_sites, quantise_sites, replace_site, share_site
from .trace import TracedModel, reason_of

# What changes a layer's inputs so much that those behind it are fitted to theirs anew.
_REFITTED = {Kind.PRUNE, Kind.BLOCK, Kind.RANK}


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
    After these every layer is refitted to what it returned in the original, on what it reads now (`reconstruct`).

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


def skeleton(candidate: Candidate, traced: TracedModel, proposal: Proposal) -> nn.Module:
    """The compressed model's structure with weights that nothing was fitted to: what latency and memory depend on.

    Raises:
        ValueError: the candidate is not of this space.
        ApplyError: the result does not compute what its shape promises.
    """
    return _build(candidate, traced, proposal, None, fitted=False)


def rebuild(candidate: Candidate, traced: TracedModel, proposal: Proposal, saved: Mapping[str, Tensor]) -> nn.Module:
    """The compressed model with the weights of `state`; needs no calibration, because they hold what it found."""
    module = _build(candidate, traced, proposal, None, fitted=False)
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
    return tuple(f"{remark.site}: {remark.text}" for remark in _remarks(module))


def simplify(candidate: Candidate, traced: TracedModel, proposal: Proposal) -> Candidate:
    """The candidate with None for every option that `apply` ignores next to the others; it gives the same model."""
    module = _build(candidate, traced, proposal, None, fitted=False)
    ignored = {f"{remark.site}:{remark.kind.value}" for remark in _remarks(module) if remark.ignored}
    return Candidate({name: None if name in ignored else option for name, option in candidate.options.items()})


def _build(
    candidate: Candidate,
    traced: TracedModel,
    proposal: Proposal,
    calibration: Tensor | None,
    fitted: bool = True,
) -> nn.Module:
    chosen = _chosen(candidate, proposal)
    module = copy.deepcopy(traced.module).eval()
    extents = {layer.name: extent_of(layer) for layer in traced.layers if layer.op in ("conv2d", "linear")}
    seen = fit(traced, proposal.pixels, calibration) if calibration is not None and chosen else None
    moments: Mapping[str, Moments] = {} if seen is None else seen.moments
    remarks: list[Remark] = []
    kept = prune_sites(module, chosen.get(Kind.PRUNE, {}), proposal.groups, moments)
    moments = {name: m.select(left_channels(kept, name, "in", len(m.mean))) for name, m in moments.items()}
    memory = {} if seen is None else _remember(module, seen.norms, kept)
    for site, option in chosen.get(Kind.BLOCK, {}).items():
        remarks += replace_site(module, site, str(option), proposal.lanes, kept, moments.get(site))
    for site, option in chosen.get(Kind.RANK, {}).items():
        remarks += factorise_site(module, site, str(option), extents[site], moments.get(site))
    refitted = calibration is not None and bool(chosen.keys() & _REFITTED)
    least = LEAST_VARIANCE if refitted else 0.0
    if calibration is not None and refitted:
        reference = reference_of(traced, calibration)
        left = {n: left_channels(kept, n, "out", len(rows)) for n, rows in reference.outputs.items()}
        reconstruct(module, reference, left, _remember(module, reference.norms, kept))
    for site, option in chosen.get(Kind.CLUSTER, {}).items():
        remarks += share_site(module, site, int(option or 0), fitted, moments.get(site))
    _check(module, traced)
    if calibration is not None and chosen.keys() - {Kind.BITS}:
        correct_batch_norms(module, calibration, memory, least)
    if Kind.BITS in chosen:
        remarks += quantise_sites(module, chosen[Kind.BITS], calibration, moments)
        if calibration is not None:
            correct_batch_norms(module, calibration, memory, least)
    module.eval()
    module.planish_remarks = tuple(remarks)  # type: ignore[assignment]
    _check(module, traced)
    return module


def _remember(module: nn.Module, seen: Mapping[str, tuple[Tensor, Tensor]], kept: Kept) -> dict[str, NormMemory]:
    """What the batch norms of a pruned module were in the original, for the channels that are left."""
    memory = {}
    for name, (means, variances) in seen.items():
        left = left_channels(kept, name, "both", means.shape[1])
        own = [module.get_submodule(name).get_buffer(key).clone() for key in ("running_mean", "running_var")]
        memory[name] = NormMemory(own[0], own[1], means[:, left], variances[:, left])
    return memory


def _remarks(module: nn.Module) -> tuple[Remark, ...]:
    return tuple(getattr(module, "planish_remarks", ()))


def _chosen(candidate: Candidate, proposal: Proposal) -> dict[Kind, dict[str, Option]]:
    """The options that change something, by kind and site."""
    proposal.space.encode(candidate)  # raises on anything that the space does not have
    chosen: dict[Kind, dict[str, Option]] = {}
    for choice in proposal.space.choices:
        option = candidate.options[choice.name]
        if option is not None:
            chosen.setdefault(choice.kind, {})[choice.site] = option
    return chosen


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
