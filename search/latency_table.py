"""Builds the latency table of a model's space on a device: plans candidates, times their kernels and a few networks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..hwmodels.held_out import HeldOut
from ..hwmodels.kernel_database import KernelDatabase
from ..hwmodels.latency import Prediction
from ..hwmodels.load import wait_for_quiet
from ..hwmodels.regression import LEAST as LEAST_KERNELS
from ..hwmodels.regression import KernelRegression
from ..hwmodels.table import TableModel
from ..hwmodels.transfer import TransferModel
from ..spaces.apply import skeleton
from ..spaces.quantize import deploy
from .fitted import fitted
from .sampler import strongest, uniform_policies
from .table_measuring import TableLimits, TableMeasuring, by_error, by_weight, quiet_s, reference_program, spread
from .transferred import ENOUGH, carried_over, source_of

if TYPE_CHECKING:
    from ..compilers.tvm_workloads import Plan
    from ..spaces.space import Candidate
    from .evaluate import Evaluator
    from .progress import Progress


# A device that was never seen, and one whose kernels of another model are known: under five minutes, and under one.
FIRST = TableLimits(candidates=28, kernels=220, networks=12, kernel_s=45.0, network_s=40.0)
AGAIN = TableLimits(candidates=12, kernels=50, networks=6, kernel_s=10.0, network_s=12.0)
# One of whose processor another number of threads has a table: networks alone, and the kernels where that fails.
PROBES = TableLimits(candidates=28, kernels=0, networks=20, kernel_s=0.0, network_s=40.0)


@dataclass(frozen=True)
class LatencyTable:
    """A latency model of one device, and how it came about.

    Attributes:
        model: Predicts the latency of a plan's calls.
        source: What it is from, where it was carried over from another number of threads.
        held_out: Its error on the measured networks, each predicted without itself.
        measured: Kernels that were timed for this table; `known` that were in the database before.
        left: Kernels of the planned candidates that are predicted from the others.
        quiet: The share of the times that were taken on a quiet machine.
        failed: Kernels and networks that could not be timed, with the reason.
        notes: What went wrong and did not stop it.
        seconds: It took.
    """

    model: TableModel | TransferModel
    source: str
    held_out: HeldOut | None
    measured: int
    known: int
    left: int
    quiet: float
    failed: Mapping[str, str]
    notes: tuple[str, ...]
    seconds: float

    @property
    def error(self) -> float:
        """The standard deviation of log(predicted / measured) of networks."""
        return self.model.corrector.error if isinstance(self.model, TableModel) else self.model.error

    @property
    def kernel_error(self) -> float | None:
        """The same of kernels that were not measured; None where none is predicted."""
        table = self.model if isinstance(self.model, TableModel) else self.model.source
        return None if table.regression is None else table.regression.error


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
        limits: By default `AGAIN` where the database knows the device, else `FIRST`. Where it knows the processor with
            another number of threads, that table is carried over if a few networks say that it can be.
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
    carries = limits is None and len(known) < ENOUGH and source_of(device, database) is not None
    limits = limits or (AGAIN if len(known) >= ENOUGH else FIRST)
    notes: list[str] = []
    space = evaluator.proposal.space
    rng = np.random.default_rng(seed)
    original = space.original()
    chosen = [original, *more, *strongest(space), *spread(uniform_policies(space), limits.candidates // 3)]
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
    measuring = TableMeasuring(device, database, limits, progress, known, notes=notes)
    if not device.rpc:
        wait_for_quiet(device.threads)
    before = set(known)

    def finished(model: TableModel | TransferModel, found: HeldOut | None, source: str = "") -> LatencyTable:
        times = [*(t.time for t in known.values()), *(n.time for n in networks)]
        return LatencyTable(
            model=model,
            source=source,
            held_out=found,
            measured=len(known.keys() - before),
            known=len(before),
            left=sum(key not in known for key in works),
            quiet=float(np.mean([time.quiet for time in times])) if times else 0.0,
            failed=measuring.failed,
            notes=tuple(dict.fromkeys(notes)),
            seconds=time.monotonic() - start,
        )

    if carries:
        measuring.limits = PROBES
        measuring.kernels([key for key in reference.kernels if key not in known], works, reference, 1.0)
        networks = measuring.networks(evaluator, label, plans, candidates, quiet_s(reference, known))
        carried, origin = carried_over(device, database, networks)
        if carried is not None and carried.trusted:
            return finished(carried, carried.probes, origin)
        reached = "" if carried is None else f": {carried.probes.within_10:.0%} of the probes are within 10 %"
        notes.append(f"{origin} is not carried over{reached}; kernels are measured")
        measuring.limits = limits
    # Half by the time that goes to them, half by how uncertain what the first half tells of them is.
    wanted = [key for key in by_weight(plans.values(), works, first) if key not in known]
    half = limits.kernels // 2 if len(known) + limits.kernels // 2 >= LEAST_KERNELS else limits.kernels
    measuring.kernels(wanted[:half], works, reference, limits.kernel_s * half / limits.kernels)
    left = [key for key in wanted[half:] if key not in known]
    if left and len(known) >= LEAST_KERNELS:
        left = by_error(plans.values(), left, KernelRegression.fit(list(known.values()), seed))
    measuring.kernels(left[: limits.kernels - half], works, reference, limits.kernel_s / 2)
    networks = measuring.networks(evaluator, label, plans, candidates, quiet_s(reference, known))
    model = fitted(device, known, networks, seed)
    return finished(model, model.corrector.held_out)
