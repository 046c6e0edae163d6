"""Times whole compiled models beside a reference, until the machine was quiet for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from math import inf
from pathlib import Path

from ..hwmodels.device import Device
from ..hwmodels.measurement import MeasureProtocol
from ..hwmodels.quiet import Samples, best_reference_s, open_samples, quiet_limit_s
from .compiler import RunError
from .kernel_timer import Timed
from .remote import DeviceLost
from .runner import device_lock, run_child

# Models in one child: they share its start and the reference's runs.
_TOGETHER = 16
_REFERENCE = "reference"
# How fast a model is differs from process to process, for as long as each lives (benchmarks/process_spread.py). So few
# runs count of each process, and quiet ones of six at least settle a time.
_RUNS, _ENOUGH = 3, 18
# Some differ by far more, those with more weights than caches hold most: they have more processes, until the standard
# error is this.
_EXACT = 0.02


def time_networks(
    artifacts: Mapping[str, Path],
    reference: Path,
    device: Device,
    protocol: MeasureProtocol | None = None,
    *,
    known_reference_s: float | None = None,
    rounds: int = 40,
    limit_s: float = 120.0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Timed:
    """Times artifacts in child processes, each sample between two of the reference.

    What is not settled after a round is measured again, up to `rounds` times or until `limit_s` seconds have passed;
    every artifact is measured once at least. One that crashes or gives other outputs is named in `failed`.

    Args:
        artifacts: By name.
        reference: The artifact that tells quiet times.
        device: Must be here.
        protocol: `runs` in a child, by default few, so that many processes have their say; and its limits.
        known_reference_s: What the reference took on a quiet machine before; None where that is not known.
        rounds: At most.
        limit_s: No round begins after so many seconds.
        advance: Told how many artifacts are settled, and of how many.

    Raises:
        RunError: the reference itself cannot be run, and nothing was timed before.
    """
    protocol = protocol or MeasureProtocol(runs=_RUNS)
    samples: dict[str, Samples] = {}
    failed: dict[str, str] = {}
    found: list[Samples] = []
    best = known_reference_s
    start = time.monotonic()
    for number in range(rounds):
        waiting = [
            name
            for name in artifacts
            if name not in failed and open_samples(samples.get(name), best, enough=_ENOUGH, exact=_EXACT)
        ]
        if not waiting or (number and time.monotonic() - start > limit_s):
            break
        groups = [waiting[first : first + _TOGETHER] for first in range(0, len(waiting), _TOGETHER)]
        while groups:
            group = groups.pop(0)
            try:
                with device_lock(device):
                    result = run_child(
                        {_REFERENCE: reference, **{n: artifacts[n] for n in group}}, device, protocol,
                        quiet_s=quiet_limit_s(best),
                    )  # fmt: skip
            except DeviceLost as lost:
                return Timed(samples, best or 0.0, failed, lost)
            except RunError as error:
                named = error.artifact in group
                if len(group) > 1 and (error.crashed or not named):
                    # Who is named may have been in the way of the system, or of another's doing: each half by itself.
                    groups[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
                    continue
                if not named and (broken := _broken(reference, device, protocol)) is not None:
                    if not samples and not isinstance(broken, DeviceLost):
                        raise broken from None
                    return Timed(samples, best or 0.0, failed, broken)
                failed[error.artifact if error.artifact in group else group[0]] = str(error)
                rest = [name for name in group if name not in failed]
                groups[:0] = [rest] if rest else []
                continue
            for name in group:
                new = Samples(tuple(result.run_s[name]), tuple(result.reference_s[name]))  # of one process
                samples[name] = samples.get(name, Samples()) + new
                found.append(new)
        if found:
            best = min(best_reference_s(found), known_reference_s or inf)
        advance(
            sum(not open_samples(value, best, enough=_ENOUGH, exact=_EXACT) for value in samples.values()),
            len(artifacts),
        )
    return Timed(samples, best or 0.0, failed)


def _broken(reference: Path, device: Device, protocol: MeasureProtocol) -> RunError | None:
    """Why the reference does not run by itself; None where it does."""
    try:
        with device_lock(device):
            run_child({_REFERENCE: reference}, device, protocol)
    except RunError as error:
        return error
    return None
