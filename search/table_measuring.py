"""What a latency table needs to know of a device: its kernels' times, and those of a few whole networks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..compilers.compiler import CompileError
from ..hwmodels.kernel_database import DatabaseError, KernelDatabase, KernelTime, NetworkTime
from ..hwmodels.load import BusyMachine, LoadWatch
from ..hwmodels.quiet import settled
from ..spaces.apply import skeleton
from ..spaces.quantize import deploy

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..compilers.tvm_workloads import KernelWork, Plan
    from ..hwmodels.device import Device
    from ..spaces.space import Candidate
    from .evaluate import Evaluator
    from .progress import Progress

# What the virtual machine adds to a call.
_CALL_S = 1e-6
REFERENCE_INPUT = (1, 32, 16, 16)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class TableLimits:
    """How much is measured: candidates whose kernels are looked at, kernels, whole networks, and seconds of each."""

    candidates: int
    kernels: int
    networks: int
    kernel_s: float
    network_s: float


def measure_kernels(
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
    if new:
        _kept(notes, lambda: database.add(new, {name: timed.reference_s}))
    return dict(timed.failed)


def measure_networks(
    evaluator: Evaluator,
    label: str,
    plans: Mapping[str, Plan],
    candidates: Mapping[str, Candidate],
    quiet_reference_s: float | None,
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
    chosen = [keys[0], *spread(sorted(keys[1:], key=estimates.__getitem__), limits.networks - 1)]
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
                artifacts, reference.path, device, known_reference_s=database.reference_s(name) or quiet_reference_s,
                limit_s=limits.network_s, advance=_advancer(progress),
            )  # fmt: skip
    _refuse(watch, device)
    failed |= {f"network {key}": reason for key, reason in timed.failed.items()}
    new = [NetworkTime(plans[key].calls, settled(s, timed.reference_s)) for key, s in timed.samples.items()]
    found |= {network.key(): network for network in new}
    if new:
        _kept(notes, lambda: database.add(new, {name: timed.reference_s}))
    return list(found.values())


def quiet_s(reference: Plan, known: Mapping[str, KernelTime]) -> float | None:
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


def by_weight(plans: Iterable[Plan], works: Mapping[str, KernelWork], first: Sequence[str]) -> list[str]:
    """Keys of kernels: those of `first`, then those that the most time of the plans is estimated to go to."""
    weights: dict[str, float] = dict.fromkeys(works, 0.0)
    for plan in plans:
        total = sum(work.cycles for work in plan.calls)
        for work in plan.calls:
            weights[work.key()] += work.cycles / total
    order = dict.fromkeys(first, -1.0)
    return sorted(works, key=lambda key: (order.get(key, 0.0), -weights[key]))


def spread(items: Sequence[_Item], count: int) -> list[_Item]:
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
    if reason and not device.rpc:
        raise BusyMachine(f"{reason}; what was measured meanwhile is not kept")


def _kept(notes: list[str], keep: Callable[[], None]) -> None:
    """What was measured counts even where it cannot be kept."""
    try:
        keep()
    except DatabaseError as error:
        notes.append(f"times are not kept: {error}")
