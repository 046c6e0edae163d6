"""Builds the latency table of a model's space on a device: plans candidates, times their kernels and a few networks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from ..compilers.compiler import CompileError
from ..hwmodels.corrector import LEAST, Corrector
from ..hwmodels.held_out import HeldOut, held_out
from ..hwmodels.kernel_database import DatabaseError, KernelDatabase, KernelTime, NetworkTime
from ..hwmodels.latency import Prediction
from ..hwmodels.load import BusyMachine, LoadWatch, wait_for_quiet
from ..hwmodels.quiet import settled
from ..hwmodels.regression import LEAST as LEAST_KERNELS
from ..hwmodels.regression import KernelRegression
from ..hwmodels.table import TableModel
from ..spaces.apply import skeleton
from ..spaces.quantize import deploy
from .sampler import strongest, uniform_policies

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..compilers.tvm_workloads import KernelWork, Plan
    from ..hwmodels.device import Device
    from ..spaces.space import Candidate
    from .evaluate import Evaluator
    from .progress import Progress

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class TableLimits:
    """How much is measured: candidates whose kernels are looked at, kernels, whole networks, and seconds of each."""

    candidates: int
    kernels: int
    networks: int
    kernel_s: float
    network_s: float


# A device that was never seen, and one whose kernels of another model are known: under five minutes, and under one.
FIRST = TableLimits(candidates=28, kernels=220, networks=12, kernel_s=45.0, network_s=40.0)
AGAIN = TableLimits(candidates=12, kernels=50, networks=6, kernel_s=10.0, network_s=12.0)
# Kernels of a device that are known from other models make it a known one.
_KNOWN = 150
# What the virtual machine adds to a call.
_CALL_S = 1e-6
REFERENCE_INPUT = (1, 32, 16, 16)


@dataclass(frozen=True)
class LatencyTable:
    """A latency model of one device, and how it came about.

    Attributes:
        model: Predicts the latency of a plan's calls.
        held_out: Its error on the measured networks, each predicted without itself.
        measured: Kernels that were timed for this table; `known` that were in the database before.
        left: Kernels of the planned candidates that are predicted from the others.
        quiet: The share of the times that were taken on a quiet machine.
        failed: Kernels and networks that could not be timed, with the reason.
        notes: What went wrong and did not stop it.
        seconds: It took.
    """

    model: TableModel
    held_out: HeldOut | None
    measured: int
    known: int
    left: int
    quiet: float
    failed: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float


def plan_of(evaluator: Evaluator, label: str, candidate: Candidate) -> Plan:
    """What the compiled candidate will call on a device, without compiling it.

    Raises:
        ValueError: the candidate cannot be built.
        CompileError: it cannot be compiled.
    """
    import torch

    from ..compilers.tvm_workloads import plan

    module = deploy(skeleton(candidate, evaluator.traced, evaluator.proposal))
    return plan(torch.export.export(module, (evaluator.traced.example,)), evaluator.devices[label])


def predict(table: LatencyTable, evaluator: Evaluator, label: str, candidate: Candidate) -> Prediction:
    """The latency of a candidate on a device, before anything is compiled."""
    return table.model.predict(plan_of(evaluator, label, candidate).calls)


def build_table(
    evaluator: Evaluator,
    label: str,
    database: KernelDatabase,
    progress: Progress,
    *,
    seed: int = 0,
    limits: TableLimits | None = None,
    more: Sequence[Candidate] = (),
) -> LatencyTable:
    """Measures what is missing for a table of the evaluator's space on a device, and fits the model to it.

    Args:
        evaluator: Its compiler of the device must be TVM's.
        label: Of the device.
        database: Where times are kept.
        progress: Told of every step.
        seed: Of the random candidates.
        limits: By default `AGAIN` where the database knows the device, else `FIRST`.
        more: Candidates whose kernels are to be in the table too.

    Raises:
        DatabaseError: the database is damaged.
        RunError: the original cannot be run.
        BusyMachine: others use the cores that measuring needs.
    """
    from ..compilers.tvm_workloads import plan

    start = time.monotonic()
    device = evaluator.devices[label]
    known = database.times()
    limits = limits or (AGAIN if len(known) >= _KNOWN else FIRST)
    notes: list[str] = []
    space = evaluator.proposal.space
    rng = np.random.default_rng(seed)
    original = space.original()
    chosen = [original, *more, *strongest(space), *_spread(uniform_policies(space), limits.candidates // 3)]
    while len(chosen) < limits.candidates:
        chosen.append(space.sample(rng))
    unique = list({candidate.key(): candidate for candidate in chosen}.values())
    progress.begin(f"plan candidates for {device.name}", len(unique))
    plans: dict[str, Plan] = {}
    candidates: dict[str, Candidate] = {}
    for candidate in unique:
        try:
            plans[candidate.key()] = plan_of(evaluator, label, candidate)
            candidates[candidate.key()] = candidate
        except (ValueError, RuntimeError) as error:
            if candidate is original:
                raise
            notes.append(f"a candidate cannot be planned: {str(error).splitlines()[0]}")
        progress.advance()
    works = {key: work for plan in plans.values() for key, work in plan.kernels.items()}
    reference = plan(reference_program(), device)
    works |= reference.kernels
    first = [*reference.kernels, *plans[original.key()].kernels]
    wanted = [key for key in _by_weight(plans.values(), works, first) if key not in known][: limits.kernels]
    wait_for_quiet(device.threads)
    before = set(known)
    failed = _measure_kernels(wanted, works, reference, device, database, known, limits, progress, notes)
    networks = _measure_networks(
        evaluator, label, plans, candidates, _quiet_s(reference, known), database, limits, progress, failed, notes
    )
    model = fitted(device, known, networks, seed)
    times = [*(t.time for t in known.values()), *(n.time for n in networks)]
    return LatencyTable(
        model=model,
        held_out=cross_validated(model, networks),
        measured=len(known.keys() - before),
        known=len(before),
        left=sum(key not in known for key in works),
        quiet=float(np.mean([time.quiet for time in times])) if times else 0.0,
        failed=failed,
        notes=tuple(dict.fromkeys(notes)),
        seconds=time.monotonic() - start,
    )


def fitted(
    device: Device, times: Mapping[str, KernelTime], networks: Sequence[NetworkTime], seed: int = 0
) -> TableModel:
    """The model of a device's measured kernels and networks."""
    regression = KernelRegression.fit(list(times.values()), seed) if len(times) >= LEAST_KERNELS else None
    model = TableModel(device, times, regression)
    if regression is None or len(networks) < LEAST:
        return model
    chosen = _trusted(networks)
    calls = [network.workloads for network in chosen]
    sums = [float(model.kernels(network)[0].sum()) for network in calls]
    return replace(model, corrector=Corrector.fit(sums, calls, [network.time.median_s for network in chosen]))


def cross_validated(model: TableModel, networks: Sequence[NetworkTime]) -> HeldOut | None:
    """The model's error on measured networks, each predicted by a corrector that was fitted to the others."""
    if model.regression is None or len(networks) <= LEAST:
        return None
    chosen = _trusted(networks)
    calls = [network.workloads for network in chosen]
    sums = [float(model.kernels(network)[0].sum()) for network in calls]
    measured = [network.time.median_s for network in chosen]
    predicted = []
    for left_out, own in enumerate(calls):
        others = [place for place in range(len(calls)) if place != left_out]
        corrector = Corrector.fit(
            [sums[place] for place in others], [calls[place] for place in others], [measured[place] for place in others]
        )
        predicted.append(corrector.apply(sums[left_out], own))
    return held_out(predicted, measured)


def _trusted(networks: Sequence[NetworkTime]) -> list[NetworkTime]:
    """The networks that were timed on a quiet machine, where those are enough; else all."""
    quiet = [network for network in networks if network.time.quiet]
    return quiet if len(quiet) > LEAST else list(networks)


def _measure_kernels(
    wanted: Sequence[str],
    works: Mapping[str, KernelWork],
    reference_plan: Plan,
    device: Device,
    database: KernelDatabase,
    known: dict[str, KernelTime],
    limits: TableLimits,
    progress: Progress,
    notes: list[str],
) -> dict[str, str]:
    """Times kernels, adds them to `known` and to the database; why some could not be timed, by their key."""
    from ..compilers.kernel_timer import time_kernels

    if not wanted:
        return {}
    progress.begin(f"time kernels on {device.name}", len(wanted))
    reference = max(reference_plan.kernels.values(), key=lambda work: work.workload.macs)
    name = f"kernel {reference.workload.key()}"
    with LoadWatch() as watch:
        timed = time_kernels(
            {key: works[key] for key in wanted}, reference, device, known_reference_s=database.reference_s(name),
            limit_s=limits.kernel_s, advance=_advancer(progress),
        )  # fmt: skip
    _refuse(watch, device)
    new = [KernelTime(works[key].workload, settled(s, timed.reference_s)) for key, s in timed.samples.items()]
    known |= {time.workload.key(): time for time in new}
    _kept(notes, lambda: database.add(new, {name: timed.reference_s}))
    return dict(timed.failed)


def _measure_networks(
    evaluator: Evaluator,
    label: str,
    plans: Mapping[str, Plan],
    candidates: Mapping[str, Candidate],
    quiet_s: float | None,
    database: KernelDatabase,
    limits: TableLimits,
    progress: Progress,
    failed: dict[str, str],
    notes: list[str],
) -> list[NetworkTime]:
    """Compiles and times some of the planned candidates; all networks that are known of the device."""
    from ..compilers.network_timer import time_networks

    device = evaluator.devices[label]
    found = {network.key(): network for network in database.networks()}
    keys = list(plans)
    estimates = {key: sum(work.cycles for work in plans[key].calls) for key in keys}
    # The original, and the rest spread over the range of latencies.
    chosen = [keys[0], *_spread(sorted(keys[1:], key=estimates.__getitem__), limits.networks - 1)]
    chosen = list(dict.fromkeys(chosen))
    progress.begin(f"compile networks for {device.name}", len(chosen))
    with tempfile.TemporaryDirectory(prefix="planish-networks-") as folder:
        artifacts: dict[str, Path] = {}
        for key in chosen:
            try:
                artifacts[key] = compiled_skeleton(evaluator, label, candidates[key], Path(folder, key))
            except CompileError as error:
                if key == keys[0]:
                    raise
                failed[f"network {key}"] = str(error)
            progress.advance()
        import torch

        inputs = torch.zeros(1, *REFERENCE_INPUT)
        reference = evaluator.compilers[label].compile(
            reference_program(), device, Path(folder, "reference"), inputs, tolerance=1e-3
        )
        name = f"network {reference.manifest.kernels[0][0]}"
        progress.begin(f"time networks on {device.name}", len(artifacts))
        with LoadWatch() as watch:
            timed = time_networks(
                artifacts, reference.path, device, known_reference_s=database.reference_s(name) or quiet_s,
                limit_s=limits.network_s, advance=_advancer(progress),
            )  # fmt: skip
    _refuse(watch, device)
    failed |= {f"network {key}": reason for key, reason in timed.failed.items()}
    new = [NetworkTime(plans[key].calls, settled(s, timed.reference_s)) for key, s in timed.samples.items()]
    found |= {network.key(): network for network in new}
    _kept(notes, lambda: database.add(new, {name: timed.reference_s}))
    return list(found.values())


def _quiet_s(reference: Plan, known: Mapping[str, KernelTime]) -> float | None:
    """What the reference takes as a whole network on a quiet machine, by its kernels; None where one was not timed.

    Without it a phase in which the machine is never quiet would take its own best for quiet.
    """
    if not all(work.key() in known for work in reference.calls):
        return None
    return sum(known[work.key()].time.median_s for work in reference.calls) + _CALL_S * len(reference.calls)


def reference_program() -> ExportedProgram:
    """A 3x3 convolution of some 30 microseconds: what tells quiet times is timed beside everything else."""
    import torch

    conv = torch.nn.Conv2d(REFERENCE_INPUT[1], 32, 3, padding=1).eval()
    return torch.export.export(conv, (torch.zeros(REFERENCE_INPUT),))


def compiled_skeleton(evaluator: Evaluator, label: str, candidate: Candidate, folder: Path) -> Path:
    """The artifact of a candidate's structure, whose weights nothing was fitted to.

    Raises:
        CompileError: it cannot be compiled.
    """
    import torch

    from ..compilers.verify import INT8_TOLERANCE

    module = deploy(skeleton(candidate, evaluator.traced, evaluator.proposal))
    program = torch.export.export(module, (evaluator.traced.example,))
    inputs = evaluator.task.data.validation.batch(slice(0, 1)).unsqueeze(1)
    compiler, device = evaluator.compilers[label], evaluator.devices[label]
    return compiler.compile(program, device, folder, inputs, tolerance=INT8_TOLERANCE).path


def _by_weight(plans: Iterable[Plan], works: Mapping[str, KernelWork], first: Sequence[str]) -> list[str]:
    """Keys of kernels: those of `first`, then those that the most time of the plans is estimated to go to."""
    weights: dict[str, float] = dict.fromkeys(works, 0.0)
    for plan in plans:
        total = sum(work.cycles for work in plan.calls)
        for work in plan.calls:
            weights[work.key()] += work.cycles / total
    order = dict.fromkeys(first, -1.0)
    return sorted(works, key=lambda key: (order.get(key, 0.0), -weights[key]))


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """So many items, evenly spread over a sequence, ends included."""
    if count >= len(items):
        return list(items)
    if count < 2:
        return list(items[:count])
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def _advancer(progress: Progress) -> Callable[[int, int], None]:
    shown = 0

    def advance(done: int, total: int) -> None:
        nonlocal shown
        progress.advance(done - shown)
        shown = done

    return advance


def _refuse(watch: LoadWatch, device: Device) -> None:
    """Rather no table than a wrong one."""
    reason = watch.refusal(device.threads)
    if reason:
        raise BusyMachine(f"{reason}; what was measured meanwhile is not kept")


def _kept(notes: list[str], keep: Callable[[], None]) -> None:
    """What was measured counts even where it cannot be kept."""
    try:
        keep()
    except DatabaseError as error:
        notes.append(f"times are not kept: {error}")
