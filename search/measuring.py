"""Times trials on the search's devices, beside the original in the same processes."""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from ..compilers.compiler import RunError
from ..compilers.remote import DeviceLost
from ..hwmodels.measurement import Measurement, MeasureProtocol
from ..hwmodels.rapl import ROOT
from .errors import UserError, file_mistakes
from .json_text import mapping
from .workers import Failure

if TYPE_CHECKING:
    from .evaluate import Evaluator, Metrics

_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)
# Artifacts in one child process: they share its start and the original's runs.
_TOGETHER = 8
_ORIGINAL = "original"
# While the search goes on: some processes run small models slower than most do (benchmarks/process_spread.py).
_PROCESSES, _LEAST_RUNS = 3, 3
# A device that does not answer is waited for: so often, with a pause that doubles up to so many seconds.
_TRIES, _BETWEEN_S = 20, 15.0
# What ends a process from outside (no memory, a signal) says nothing of the artifact that was being timed.
_CHANCES = 2
_KEPT = "what was recorded is kept: once that is put right, give the same command again"


class Timer(Protocol):
    """Times artifacts on one device."""

    def measure(self, artifacts: Mapping[str, Path], protocol: MeasureProtocol) -> Mapping[str, Measurement]:
        """See `Compiler.measure`; DeviceLost where the device does not answer."""
        ...

    def site_times(
        self, artifacts: Mapping[str, Path], protocol: MeasureProtocol
    ) -> Mapping[str, list[tuple[str, str, float]]]:
        """(kernel, site, seconds) of every kernel call of every artifact; DeviceLost where it does not answer."""
        ...


def measure_trials(
    evaluator: Evaluator,
    folders: Mapping[int, Path],
    original: Path,
    name: str,
    *,
    final: bool,
    original_s: Mapping[str, float] | None = None,
    energy_measured: bool | None = None,
) -> dict[int, Metrics | Failure]:
    """Latency (median, 95 % interval) and its ratio to the original of every trial, on every device that can be timed.

    The interval is that of the ratio, times the original's seconds.

    Where energy is asked for and every device is this machine's processor, whose counters may be read, also what a run
    uses, the highest of all devices (`energy_j` with `energy_measured`). What is modelled does not compare with it.

    A machine's speed moves between measurements; the ratio within one does not. So the seconds are the ratio times what
    the original took when it was measured, and comparisons by seconds and by ratio agree.

    Args:
        evaluator: Knows devices, compilers and the protocol.
        folders: The trials' folders by number.
        original: The original's folder, whose artifact is `artifact`.
        name: Which artifact of the trials.
        final: Time in as many fresh processes, each with as many runs, as the specification says; else with a third of
            the runs in each of three.
        original_s: The original's recorded latency by device; None while it is what is being measured.
        energy_measured: Whether the original's energy was; None likewise.

    Raises:
        UserError: a device is lost and does not come back, or the counters cannot be read any more; no trial is to
            blame.
    """
    keys = evaluator.spec.measure
    protocol = MeasureProtocol(
        runs=keys.runs if final else max(_LEAST_RUNS, -(-keys.runs // _PROCESSES)),
        processes=keys.processes if final else _PROCESSES,
        warmup_s=keys.warmup_s,
        time_limit_s=keys.time_limit_s,
        drift=keys.drift,
        retries=1,
    )
    results: dict[int, Metrics | Failure] = {number: {} for number in folders}
    for label, device in evaluator.devices.items():
        if not device.timed:
            continue
        reference = evaluator.artifact_folder(original, label, "artifact")
        paths = {number: evaluator.artifact_folder(folder, label, name) for number, folder in folders.items()}
        for number, measured in _on_device(
            evaluator, label, paths, reference, protocol, (original_s or {}).get(label)
        ).items():
            before = results[number]
            if isinstance(before, Failure) or isinstance(measured, Failure):
                results[number] = before if isinstance(before, Failure) else measured
                continue
            for metric, value in measured.items():
                earlier = before.get(metric)
                both = isinstance(earlier, dict) and isinstance(value, dict)
                before[metric] = {**earlier, **value} if both else value  # type: ignore[dict-item]
    for result in results.values():
        if not isinstance(result, Failure):
            watts = mapping(result.pop("watts", None))
            if evaluator.asks_energy and energy_measured is not False:
                result |= _energy(watts, mapping(result.get("latency_s")), evaluator.devices, bool(energy_measured))
    return results


def _energy(
    watts: Mapping[str, object], latencies: Mapping[str, object], devices: Iterable[str], needed: bool
) -> dict[str, object]:
    joules = [
        power * float(str(mapping(latencies[label])["value"]))
        for label, power in watts.items()
        if isinstance(power, float)
    ]
    if len(joules) == len(list(devices)):
        return {"energy_j": max(joules), "energy_measured": True}
    if needed:
        raise UserError(
            "the original's energy was measured, and the processor's counters cannot be read now: give the same "
            f"command again as a user who may read {ROOT}/*/energy_uj; what was recorded is kept"
        )
    return {}


def _on_device(
    evaluator: Evaluator,
    label: str,
    paths: Mapping[int, Path],
    reference: Path,
    protocol: MeasureProtocol,
    original_s: float | None,
) -> dict[int, Metrics | Failure]:
    timer = evaluator.timers[label]
    results: dict[int, Metrics | Failure] = {}
    blamed: Counter[int] = Counter()
    numbers = list(paths)
    groups = [numbers[start : start + _TOGETHER] for start in range(0, len(numbers), _TOGETHER)]
    while groups:
        group = groups.pop(0)
        artifacts = {_ORIGINAL: reference, **{str(n): paths[n] for n in group if paths[n] != reference}}
        try:
            measured = waiting_for(label, lambda: timer.measure(artifacts, protocol))  # noqa: B023
        except RunError as error:
            culprit = None if error.artifact in (None, _ORIGINAL) else int(str(error.artifact))
            if culprit is None and len(group) > 1:
                # One of them may have broken the process that the original was timed in: each is timed by itself.
                groups = [[number] for number in group] + groups
                continue
            # The others are timed again without the one that crashed, and that one last.
            guilty = group[0] if culprit is None else culprit
            blamed[guilty] += 1
            rest = [number for number in group if number != guilty]
            if error.crashed and blamed[guilty] < _CHANCES:
                groups.append([guilty])
            elif culprit is None and paths[guilty] != reference:
                _check_original(evaluator, label, reference, protocol)
                results[guilty] = Failure(str(error))
            else:
                results[guilty] = Failure(str(error))
            groups = [rest, *groups] if rest else groups
            continue
        base = measured[_ORIGINAL]
        for number in group:
            own = base if paths[number] == reference else measured[str(number)]
            results[number] = _latency(label, own, base, original_s)
    return results


def _check_original(evaluator: Evaluator, label: str, reference: Path, protocol: MeasureProtocol) -> None:
    """Whether it is the original that cannot be run any more, and not who was timed beside it.

    Raises:
        UserError: it is.
    """
    timer = evaluator.timers[label]
    try:
        waiting_for(label, lambda: timer.measure({_ORIGINAL: reference}, protocol))
    except RunError as error:
        raise UserError(
            f"the original, {reference}, is what candidates are timed beside, and cannot be timed any more ({error}); "
            f"{_KEPT}"
        ) from error


def waiting_for(label: str, measure: Callable[[], _Result]) -> _Result:
    """What a measurement gives, once the device of that label answers.

    Raises:
        UserError: it does not come back.
    """
    for tried in range(_TRIES):
        try:
            with file_mistakes(f"to {tempfile.gettempdir()} what is measured", _KEPT):
                return measure()
        except DeviceLost as error:
            last = error
            _log.warning("%s; trying again (%d of %d)", error, tried + 1, _TRIES - 1)
            if tried < _TRIES - 1:
                time.sleep(min(_BETWEEN_S, 2.0**tried))
    raise UserError(
        f"{last}, {_TRIES} times in a row; what was recorded is kept: once {label} answers, give the same command again"
    ) from last


def _latency(label: str, own: Measurement, base: Measurement, original_s: float | None) -> dict[str, object]:
    """Seconds are the ratio times the original's, and their interval is the ratio's: both times spread."""
    value = own.latency_s * (original_s / base.latency_s if original_s else 1.0)
    both = (own,) if own is base else (own, base)
    # Of the quotient of two: the ratio is low where the one is low or the other high.
    below = [own.latency_s / own.ci95[0] - 1, *(one.ci95[1] / one.latency_s - 1 for one in both[1:])]
    above = [own.ci95[1] / own.latency_s - 1, *(one.latency_s / one.ci95[0] - 1 for one in both[1:])]
    interval = [value / (1 + math.hypot(*below)), value * (1 + math.hypot(*above))]
    return {
        "latency_s": {label: {"value": value, "ci95": interval}},
        "latency_ratio": {label: own.latency_s / base.latency_s},
        "watts": {label: own.watts},
        **({"drifted": True} if own.drifted else {}),
    }
