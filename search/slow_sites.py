"""What each layer costs on a device, and why a compressed one did not get faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from ..hwmodels.device import Device
from ..hwmodels.roofline import Roofline
from ..hwmodels.workload import Workload
from ..spaces.space import Candidate, Kind

if TYPE_CHECKING:
    from ..spaces.trace import TracedModel

# Starting a kernel and its loops takes about this long; a kernel near it cannot get faster by doing less.
_LAUNCH_S = 1e-6
# Beyond the noise of one measurement.
_GAIN = 0.97


@dataclass(frozen=True)
class LayerCost:
    """One layer's work, its measured time, and the least time that the roofline permits."""

    site: str
    macs: int
    moved_bytes: int
    time_s: float
    bound_s: float
    bound_by: str


def layer_costs(traced: TracedModel, device: Device, calls: Sequence[tuple[str, str, float]]) -> list[LayerCost]:
    """The layers of the original that have kernels of their own, in order.

    Args:
        traced: The model.
        device: Gives the roofline.
        calls: (kernel, site, seconds) of the original's artifact.
    """
    times = times_by_site(calls)
    roofline = Roofline(device)
    rows = []
    for layer in traced.layers:
        if layer.name not in times:
            continue
        moved = 4 * (prod(layer.in_shape) + prod(layer.out_shape) + layer.parameters)
        arithmetic, traffic = roofline.bounds(Workload(layer.name, layer.op, {}, layer.macs, moved))
        bound_by = (
            "launch" if times[layer.name] < 2 * _LAUNCH_S else "arithmetic" if arithmetic >= traffic else "memory"
        )
        rows.append(LayerCost(layer.name, layer.macs, moved, times[layer.name], max(arithmetic, traffic), bound_by))
    return rows


def times_by_site(calls: Sequence[tuple[str, str, float]]) -> dict[str, float]:
    """Seconds by site, all calls together; kernels without a site are left out."""
    times: dict[str, float] = {}
    for _, site, seconds in calls:
        if site:
            times[site] = times.get(site, 0.0) + seconds
    return times


def slow_sites(
    candidate: Candidate,
    own: Sequence[tuple[str, str, float]],
    original: Sequence[tuple[str, str, float]],
) -> dict[str, str]:
    """The sites whose choices were to make them faster and did not, with the reason.

    Weight sharing only shrinks what is stored, so a site that is shared and nothing else is always among them.
    """
    before, after = times_by_site(original), times_by_site(own)
    reasons: dict[str, str] = {}
    for site, kinds in _compressed(candidate).items():
        if kinds == {Kind.CLUSTER}:
            reasons[site] = "weight sharing shrinks storage; the kernels compute with plain weights"
            continue
        old = before.get(site)
        new = sum(seconds for name, seconds in after.items() if name == site or name.startswith(f"{site}."))
        if old is None or new < _GAIN * old:
            continue
        calls = sum(1 for _, name, _ in own if name == site or name.startswith(f"{site}."))
        reasons[site] = f"{_microseconds(new)} instead of {_microseconds(old)}: {_cause(kinds, old, calls)}"
    return reasons


def _compressed(candidate: Candidate) -> Mapping[str, set[Kind]]:
    found: dict[str, set[Kind]] = {}
    for name, option in candidate.options.items():
        if option is not None:
            site, _, kind = name.rpartition(":")
            found.setdefault(site, set()).add(Kind(kind))
    return found


def _cause(kinds: set[Kind], old_s: float, calls: int) -> str:
    if old_s < 3 * _LAUNCH_S:
        return "the original kernel takes little more than its launch"
    if calls > 1:
        return f"the work saved is lost to {calls} kernels instead of one and to what they pass between them"
    if kinds <= {Kind.BITS, Kind.CLUSTER}:
        return "quantising its input costs what the integer arithmetic saves"
    return "what is left does not fill the device's vectors or caches better than before"


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"
