"""The steps of `apply`, one for each kind of choice; each changes a module in place and says what it did otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .aliases import put
from .bfloat16 import Bfloat16, pairs
from .bit_widths import BFLOAT16, WEIGHT_ONLY
from .blocks import Grouped, Separable, build_block
from .cluster import share, worth_sharing
from .compensate import compensate
from .lowrank import Extent, Rank, factorise, fit_rank
from .mean_shift import keep_mean
from .moments import Moments
from .prune import Group, choose_channels, kept_channels, narrow
from .quantize import Quantized, Range, input_ranges
from .space import Kind, Option
from .weight_only import WeightQuantized

Kept = Sequence[tuple[Group, Tensor]]


@dataclass(frozen=True)
class Remark:
    """An option that was read differently, because of the other options; `ignored` if it changed nothing."""

    site: str
    kind: Kind
    text: str
    ignored: bool


def prune_sites(
    module: nn.Module, options: Mapping[str, Option], groups: Mapping[str, Group], moments: Mapping[str, Moments]
) -> Kept:
    """Removes the fractions of channels given by site; returns what each group keeps."""
    kept = []
    for site, fraction in options.items():
        keep = kept_channels(groups[site].width, float(fraction or 0))
        kept.append((groups[site], choose_channels(module, groups[site], keep, moments)))
    narrow(module, kept, moments)
    return kept


def replace_site(
    module: nn.Module, site: str, option: str, lanes: int, kept: Kept, moments: Moments | None
) -> list[Remark]:
    """Puts a block in the place of the convolution."""
    conv = module.get_submodule(site)
    assert isinstance(conv, nn.Conv2d)
    block, text = build_block(conv, option, lanes, _same_channels(site, kept), moments)
    if block is not conv and not isinstance(block, Grouped):  # which took the mean up with what it leaves out
        keep_mean(conv, block, moments)
    put(module, site, block)
    return [Remark(site, Kind.BLOCK, text, block is conv)] if text else []


def factorise_site(module: nn.Module, site: str, option: str, extent: Extent, moments: Moments | None) -> list[Remark]:
    """Factorises the layer, or the 1x1 convolution of a separable block."""
    rank = Rank.parse(option)
    layer, target = module.get_submodule(site), site
    if isinstance(layer, Separable):
        target, moments, extent = f"{site}.pointwise", None, Extent(extent.writes, extent.writes)
        layer = module.get_submodule(target)
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        kind = "grouped" if isinstance(layer, Grouped) else "identity"
        text = f"rank {rank} is ignored, the {kind} block has nothing to factorise"
        return [Remark(site, Kind.RANK, text, True)]
    fitted = fit_rank(rank, layer, extent)
    if fitted is None:
        return [Remark(site, Kind.RANK, f"rank {rank} is ignored, it would not save MACs in what is left", True)]
    factors = factorise(layer, fitted, moments)
    keep_mean(layer, factors, moments)
    put(module, target, factors)
    if fitted == rank:
        return []
    return [Remark(site, Kind.RANK, f"rank {rank} became {fitted} in what is left", False)]


def share_site(
    module: nn.Module, site: str, entries: int, fitted: bool = True, moments: Moments | None = None
) -> list[Remark]:
    """Shares the weights of every layer at the site that is large enough to gain from it; `fitted` as in `share`.

    With the moments of the site's input, a layer that stands there as it did is fitted by what its weights multiply.
    """
    small = []
    names = _layers_at(module, site)
    for name in names:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        if worth_sharing(layer.weight.numel(), entries):
            known = moments if name == site else None
            shared = share(layer, entries, fitted, _importance(layer, known))
            keep_mean(layer, shared, known)
            put(module, name, shared)
        else:
            small.append(name)
    if not names:
        return [Remark(site, Kind.CLUSTER, "there is no weight left to share", True)]
    text = f"{entries} shared values would not save storage in {', '.join(small)}"
    return [Remark(site, Kind.CLUSTER, text, len(small) == len(names))] if small else []


def _importance(layer: nn.Conv2d | nn.Linear, moments: Moments | None) -> Tensor | None:
    """The variance of the input that every weight multiplies, in a shape that broadcasts to the weight's."""
    if moments is None or (isinstance(layer, nn.Conv2d) and layer.groups > 1):
        return None
    variances = moments.covariance.diagonal()
    if isinstance(layer, nn.Conv2d):
        return variances[None, :, None, None]
    return variances.repeat_interleave(layer.in_features // len(variances))[None]


def quantise_sites(
    module: nn.Module,
    options: Mapping[str, Option],
    calibration: Tensor | None,
    moments: Mapping[str, Moments] | None = None,
) -> list[Remark]:
    """Quantises every layer at the sites; without calibration their input ranges are placeholders to be loaded.

    With moments of the sites' inputs, layers that stand there as they did are rounded by them (`quantised`).
    """
    found = {name: option for site, option in options.items() for name in _layers_at(module, site)}
    bits = {name: option for name, option in found.items() if option != BFLOAT16 and option not in WEIGHT_ONLY}
    empty = [site for site in options if not _layers_at(module, site)]
    ranges: Mapping[str, Range] = {} if calibration is None else input_ranges(module, bits, calibration)
    for name, option in found.items():
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        known = (moments or {}).get(name)
        put(module, name, quantised(layer, option, ranges.get(name, Range(0.0, 1.0)), known))
    return [Remark(site, Kind.BITS, "there is no weight left to quantise", True) for site in empty]


def quantised(layer: nn.Conv2d | nn.Linear, option: Option, seen: Range, moments: Moments | None = None) -> nn.Module:
    """The layer with an option of BITS; `seen` are the values of its input, where that is quantised too.

    Whole weights of 4 bits are rounded so that the outputs are near, where the moments of the input are known
    (`compensate`); of 8 bits rounding to the nearest is as near.
    The depthwise convolution of a separable block is left in float32 where the option is bfloat16.
    """
    if option == BFLOAT16:
        return Bfloat16(layer) if pairs(layer) else layer
    if option in WEIGHT_ONLY:
        assert isinstance(layer, nn.Linear)  # `propose` offers it to no other
        found: Quantized | WeightQuantized = WeightQuantized(layer, WEIGHT_ONLY[str(option)])
    else:
        found = Quantized(layer, int(option or 0), seen)
    if moments is not None and found.bits == 4 and type(layer) in (nn.Conv2d, nn.Linear):
        compensate(found, moments)
    return found


def _same_channels(site: str, kept: Kept) -> bool:
    """Whether a layer's input and output lost the same channels, whichever those were."""
    sides: dict[str, list[tuple[int, tuple[tuple[int, ...], ...]]]] = {"in": [], "out": []}
    for number, (group, _) in enumerate(kept):
        for member in group.members:
            if member.name == site:
                sides[member.role].append((number, member.indices))
    return sides["in"] == sides["out"]


def _layers_at(module: nn.Module, site: str) -> list[str]:
    """The convolutions and linear layers that stand at the site, by full name."""
    return [
        f"{site}.{name}".rstrip(".")
        for name, layer in module.get_submodule(site).named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
