"""Builds the latency table of a model's space on a device: plans candidates, times their kernels and a few networks."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..hwmodels.corrector import LEAST as LEAST_NETWORKS
from ..hwmodels.held_out import HeldOut
from ..hwmodels.kernel_database import KernelDatabase, NetworkTime, network_key
from ..hwmodels.latency import Prediction
from ..hwmodels.load import BusyMachine, wait_for_quiet
from ..hwmodels.quiet import Settled
from ..hwmodels.regression import LEAST as LEAST_KERNELS
from ..hwmodels.table import DISTURBED, TableModel
from ..hwmodels.transfer import TransferModel
from .fitted import fitted, regression_of
from .model_choice import lower_error, own_table
from .sampler import strongest, uniform_policies
from .table_measuring import (
    Networks,
    TableLimits,
    TableMeasuring,
    by_error,
    by_weight,
    program_of,
    reference_program,
    spread,
)
from .transferred import carried_over, source_of

if TYPE_CHECKING:
    from ..compilers.tvm_workloads import KernelWork, Plan
    from ..spaces.space import Candidate, SearchSpace
    from .evaluate import Evaluator
    from .progress import Progress


# A device that was never seen, and one whose kernels of another model are known: under five minutes, and under one.
FIRST = TableLimits(candidates=32, least=12, build_s=170.0, kernels=400, kernel_s=50.0, network_s=50.0, total_s=230.0)
AGAIN = TableLimits(candidates=8, least=4, build_s=8.0, kernels=40, kernel_s=5.0, network_s=6.0, total_s=20.0)
# Shares of the choices that candidates near the original have made.
_NEAR = (1 / 12, 1 / 4, 1 / 24)
# Above this share of kernels that met no quiet machine whoever reads the table is told.
_NOTED = 0.2
# Kernels of other models from which on few of a further one have to be measured.
_KNOWN = 150
# One of whose processor another number of threads has a table: networks alone, and the kernels where that fails.
PROBES = TableLimits(candidates=20, least=12, build_s=100.0, kernels=0, kernel_s=0.0, network_s=40.0, total_s=150.0)


@dataclass(frozen=True)
class LatencyTable:
    """A latency model of one device, and how it came about.

    Attributes:
        model: Predicts the latency of a plan's calls.
        source: What it is from, where it was carried over from another number of threads.
        held_out: Its error on the measured networks of this space, each predicted without itself.
        measured: Kernels that were timed for this table; `known` that were in the database before.
        left: Kernels of the planned candidates that are predicted from the others.
        quiet: The share of the times that were taken on a quiet machine.
        failed: Kernels and networks that could not be timed, with the reason.
        notes: What went wrong and did not stop it.
        seconds: It took.
        timed: What candidates took as whole networks, by key.
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
    timed: Mapping[str, Settled]

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
    from ..compilers.tvm_workloads import plan

    return plan(program_of(evaluator, candidate), evaluator.devices[label])


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
    made: Mapping[str, tuple[Plan, Path]] | None = None,
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
        more: Candidates that are to be in the table too.
        made: Plans and artifacts of candidates that were compiled for the device before, by key.

    Raises:
        DatabaseError: the database is damaged.
        CompileError: the original cannot be compiled.
        RunError: the original cannot be run.
        BusyMachine: others use the cores that measuring needs, or used them while networks were timed.
    """
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="planish-networks-") as folder:
        planned = Networks(made=made or {})
        return _built(evaluator, label, database, progress, seed, limits, more, planned, Path(folder), start)


def table_candidates(space: SearchSpace, count: int, seed: int = 0, more: Sequence[Candidate] = ()) -> list[Candidate]:
    """What a table is made from: the original first, then such that any beginning of the list covers the space."""
    rng = np.random.default_rng(seed)
    uniform = spread(uniform_policies(space), count // 3)
    chosen = [space.original(), *more, *strongest(space)]
    near = iter([near_original(space, share, rng) for share in _NEAR])
    for number, policy in enumerate([*uniform[::2], *uniform[1::2]]):
        light = next(near, None) if number % 2 == 0 else None
        chosen += [policy, light or space.sample(rng)]
    chosen += [space.sample(rng) for _ in range(count)]
    return list({candidate.key(): candidate for candidate in chosen}.values())[: max(count, len(more) + 1)]


def near_original(space: SearchSpace, share: float, rng: np.random.Generator) -> Candidate:
    """The original with about such a share of its choices made at random.

    Random candidates are all far from it, with a fraction of its weights, and what large weights cost none of them
    tells; who asks for little loss of accuracy searches near it.
    """
    return space.decode(
        [int(rng.integers(len(choice.options))) if rng.random() < share else 0 for choice in space.choices]
    )


def refuse_disturbed(quiet: Sequence[bool], name: str, slower: str = "") -> None:
    """Refuses a table whose networks hardly ever met a quiet machine: it would be wrong by more than it states.

    Args:
        quiet: Of every network.
        name: Of the device.
        slower: What else to do, where the machine is slower than it was.

    Raises:
        BusyMachine: it is one.
    """
    count = sum(quiet)
    if quiet and count <= LEAST_NETWORKS and 2 * count < len(quiet):
        raise BusyMachine(
            f"only {count} of {len(quiet)} networks met a quiet machine on {name}; stop what else runs, or try later: "
            "what met one is kept, and only the rest is measured again (--no-table leaves the table out)" + slower
        )


def _built(
    evaluator: Evaluator,
    label: str,
    database: KernelDatabase,
    progress: Progress,
    seed: int,
    limits: TableLimits | None,
    more: Sequence[Candidate],
    planned: Networks,
    folder: Path,
    start: float,
) -> LatencyTable:
    from ..compilers.tvm_workloads import plan

    device = evaluator.devices[label]
    known = database.times()
    settled = sum(time.time.quiet for time in known.values())
    carries = limits is None and settled < _KNOWN and source_of(device, database) is not None
    # Of a profile that ended while networks were timed the kernels are known, and how to sum them up is not.
    summed = sum(network.time.quiet for network in database.networks()) > LEAST_NETWORKS
    # Where most kernels met no quiet machine the device is hardly known.
    again = settled >= _KNOWN and 2 * settled >= len(known) and summed
    limits = limits or (AGAIN if again else FIRST)
    notes: list[str] = []
    candidates = table_candidates(evaluator.proposal.space, limits.candidates, seed, more)
    measuring = TableMeasuring(device, database, PROBES if carries else limits, progress, known, notes=notes)
    measuring.build(evaluator, label, candidates, planned, folder)
    reference = plan(reference_program(), device)
    if not device.rpc:
        wait_for_quiet(device.threads)
    before = len(known)
    works: dict[str, KernelWork] = {}

    def look() -> None:
        works.update(item for one in (*planned.plans.values(), reference) for item in one.kernels.items())

    look()

    def left_s() -> float:
        return measuring.limits.total_s - (time.monotonic() - start)

    def own(networks: Sequence[NetworkTime]) -> list[NetworkTime]:
        """Those of this space: another model's say little of the error here."""
        keys = {network_key(one.calls) for one in planned.plans.values()}
        return [network for network in networks if network.key() in keys]

    def timed() -> dict[str, Settled]:
        found = {network.key(): network.time for network in networks}
        keys = {key: network_key(one.calls) for key, one in planned.plans.items()}
        return {key: found[known_as] for key, known_as in keys.items() if known_as in found}

    def finished(model: TableModel | TransferModel, found: HeldOut | None, source: str = "") -> LatencyTable:
        times = [*(t.time for t in known.values()), *(n.time for n in networks)]
        return LatencyTable(
            model=model,
            source=source,
            held_out=found,
            measured=len(measuring.timed),
            known=before,
            left=sum(key not in known for key in works),  # however noisy: it is what the model goes by
            quiet=float(np.mean([time.quiet for time in times])) if times else 0.0,
            failed=measuring.failed,
            notes=tuple(dict.fromkeys(notes)),
            seconds=time.monotonic() - start,
            timed=timed(),
        )

    if carries:
        measuring.kernels([key for key in reference.kernels if measuring.asks(key)], works, reference, 1.0)
        networks = measuring.networks(evaluator, label, planned, folder, reference, left_s())
        refuse_disturbed([network.time.quiet for network in own(networks)], device.name, measuring.slower)
        carried, origin = carried_over(device, database, own(networks))
        if carried is not None and carried.trusted:
            # Few kernels of its own, of tile contests or another model, may tell more all the same.
            better = lower_error(carried, own_table(device, database, own(networks)))
            if isinstance(better, TableModel):
                return finished(better, better.corrector.held_out)
            return finished(carried, carried.probes, origin)
        reached = "" if carried is None else f": {carried.probes.within_10:.0%} of the probes are within 10 %"
        notes.append(f"{origin} is not carried over{reached}; kernels are measured")
        measuring.limits = limits
        planned.artifacts.clear()  # they are timed
        measuring.build(evaluator, label, candidates, planned, folder)
        look()
    plans = planned.plans
    first = [*reference.kernels, *plans[candidates[0].key()].kernels]
    # Half by the time that goes to them, half by how uncertain what the first half tells of them is.
    wanted = [key for key in by_weight(plans.values(), works, first) if measuring.asks(key)]
    chooses = len(wanted) > limits.kernels and len(known) + limits.kernels // 2 >= LEAST_KERNELS
    half = limits.kernels // 2 if chooses else limits.kernels
    measuring.kernels(wanted[:half], works, reference, limits.kernel_s * half / limits.kernels)
    wanted = [key for key in by_weight(plans.values(), works, first) if measuring.asks(key)]
    left = [key for key in wanted if key not in measuring.failed]
    if left and len(known) >= LEAST_KERNELS:
        left = by_error(plans.values(), left, regression_of(known, seed))
    measuring.kernels(left[: limits.kernels - half], works, reference, limits.kernel_s / 2)
    disturbed = [key for key in works if key in measuring.timed and key in known and not known[key].time.quiet]
    if disturbed and left_s() > 0:
        measuring.kernels(disturbed, works, reference, left_s() / 2)
    networks = measuring.networks(evaluator, label, planned, folder, reference, left_s())
    refuse_disturbed([network.time.quiet for network in own(networks)], device.name, measuring.slower)
    disturbed = [key for key in works if key in known and not known[key].time.quiet]
    if len(disturbed) > _NOTED * len(works):
        notes.append(
            f"{len(disturbed)} of {len(works)} kernels met no quiet machine on {device.name}, so that each may be some "
            f"{DISTURBED:.0%} off: give the same command again once the machine is quieter"
        )
    model = fitted(device, known, networks, seed, {network.key() for network in own(networks)})
    return finished(model, model.corrector.held_out)
