"""What a latency table needs to know of a device: its kernels' times, and those of a few whole networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..hwmodels.kernel_database import DatabaseError, KernelDatabase, KernelTime, NetworkTime, network_key
from ..hwmodels.load import BusyMachine, LoadWatch
from ..hwmodels.quiet import Samples, best_reference_s, settled, steadily_slower
from ..spaces.quantize import deploy
from .errors import UserError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..compilers.compiler import Artifact, RunError
    from ..compilers.kernel_timer import Timed
    from ..compilers.tvm_workloads import KernelWork, Plan
    from ..hwmodels.device import Device
    from ..hwmodels.regression import KernelRegression
    from ..spaces.space import Candidate
    from .evaluate import Evaluator
    from .progress import Progress

REFERENCE_INPUT = (1, 32, 16, 16)
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class TableLimits:
    """How much is measured.

    Attributes:
        candidates: That are planned, compiled and timed as whole networks.
        least: Of them, however long it takes.
        build_s: Seconds after which no further one is planned and compiled.
        kernels: That are timed alone.
        kernel_s: Seconds of timing them; `network_s` likewise of whole networks.
        total_s: Of everything: what is left goes to what met no quiet machine.
    """

    candidates: int
    least: int
    build_s: float
    kernels: int
    kernel_s: float
    network_s: float
    total_s: float = 0.0


@dataclass
class Networks:
    """Candidates by key as they are planned, and the artifacts of those that have to be timed.

    Attributes:
        made: Plans and artifacts that are there already, of some that may be asked for.
    """

    plans: dict[str, Plan] = field(default_factory=dict)
    artifacts: dict[str, Path] = field(default_factory=dict)
    made: Mapping[str, tuple[Plan, Path]] = field(default_factory=dict)


@dataclass
class TableMeasuring:
    """Measures for one device's table, and remembers what is known and what went wrong.

    Attributes:
        known: Kernel times by key; those that are measured join them.
        timed: The keys of those.
        timed_networks: Whole networks that were measured, by key.
        failed: Why kernels and networks could not be timed.
        notes: What went wrong and did not stop it.
        reference: What networks are timed beside, once it is compiled.
        slower: That the machine is slower than it was, and what to do; "" where it is not.
        reference_kernel: What kernels are timed beside, and its seconds on a quiet machine, once it was timed.
    """

    device: Device
    database: KernelDatabase
    limits: TableLimits
    progress: Progress
    known: dict[str, KernelTime]
    timed: set[str] = field(default_factory=set)
    timed_networks: dict[str, NetworkTime] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reference: Artifact | None = None
    slower: str = ""
    reference_kernel: tuple[KernelWork, float] | None = None

    def asks(self, key: str) -> bool:
        """Whether a kernel is to be timed: it was not, or met no quiet machine and was not tried again by now."""
        return key not in self.known or (key not in self.timed and not self.known[key].time.quiet)

    def kernels(
        self, wanted: Sequence[str], works: Mapping[str, KernelWork], reference_plan: Plan, limit_s: float
    ) -> None:
        """Times kernels for so many seconds, and keeps them in the database."""
        from ..compilers.kernel_timer import time_kernels

        if not wanted:
            return
        self.progress.begin(f"time kernels on {self.device.name}", len(wanted))
        reference, name = _kernel_of(reference_plan)
        with LoadWatch() as watch:
            timed = time_kernels(
                {key: works[key] for key in wanted}, reference, self.device,
                known_reference_s=self.database.reference_s(name), limit_s=limit_s, advance=_advancer(self.progress),
            )  # fmt: skip
        refuse_loaded(watch, self.device)
        if timed.reference_s:
            self.reference_kernel = reference, timed.reference_s
        new = [KernelTime(works[key].workload, settled(s, timed.reference_s)) for key, s in timed.samples.items()]
        self.known |= {time.workload.key(): time for time in new}
        self.timed |= {time.workload.key() for time in new}
        if self._keep(new, name, timed.samples.values()):
            self.known |= {key: time for key, time in self.database.times().items() if key not in self.timed}
        self.failed |= timed.failed
        self._go_on(timed)

    def build(
        self, evaluator: Evaluator, label: str, candidates: Sequence[Candidate], networks: Networks, folder: Path
    ) -> None:
        """Plans candidates, and compiles those of which no time on a quiet machine is known, until the limits end it.

        Those that were tried before are passed over. The first one of all must succeed.
        """
        from ..compilers.tvm_workloads import plan

        known = {network.key() for network in self.known_networks() if network.time.quiet}
        self.progress.begin(f"compile networks for {self.device.name}", self.limits.candidates, len(networks.plans))
        start = time.monotonic()
        for candidate in candidates:
            key, done = candidate.key(), len(networks.plans)
            late = time.monotonic() - start > self.limits.build_s
            if done >= self.limits.candidates or (late and done >= self.limits.least):
                break
            if key in networks.plans or f"network {key}" in self.failed:
                continue
            try:
                if key in networks.made:
                    networks.plans[key], artifact = networks.made[key]
                else:
                    program, artifact = program_of(evaluator, candidate), None
                    networks.plans[key] = plan(program, self.device)
                if network_key(networks.plans[key].calls) not in known:
                    networks.artifacts[key] = artifact or compiled(evaluator, label, program, folder / key)
            except (ValueError, RuntimeError) as error:
                if candidate is candidates[0]:
                    raise
                self.failed[f"network {key}"] = (str(error).splitlines() or [type(error).__name__])[0]
            self.progress.advance()

    def networks(
        self,
        evaluator: Evaluator,
        label: str,
        networks: Networks,
        folder: Path,
        reference_plan: Plan,
        limit_s: float = 0.0,
    ) -> list[NetworkTime]:
        """Times the compiled candidates, for `network_s` or as long as it may take; all networks that are known."""
        from ..compilers.network_timer import time_networks

        if not networks.artifacts:
            return self.known_networks()
        if self.reference is None:
            self.reference = compiled_reference(evaluator, label, folder / "reference")
        reference = self.reference
        name = f"network {reference.manifest.kernels[0][0]}"
        self.progress.begin(f"time networks on {self.device.name}", len(networks.artifacts))
        with LoadWatch() as watch:
            kept_s = self.database.reference_s(name)
            known_s, sure = (kept_s, True) if kept_s else self._quiet_s(reference, reference_plan)
            timed = time_networks(
                networks.artifacts, reference.path, self.device, known_reference_s=known_s,
                limit_s=max(limit_s, self.limits.network_s), advance=_advancer(self.progress),
            )  # fmt: skip
            quiet_s = timed.reference_s
            if not sure and timed.samples and timed.lost is None:  # by now the machine may be quiet for a moment
                known_s, sure = self._quiet_s(reference, reference_plan)
                if sure:
                    quiet_s = min(known_s or inf, best_reference_s(list(timed.samples.values())))
        refuse_loaded(watch, self.device)
        ratio = kept_s and steadily_slower(list(timed.samples.values()), kept_s)
        if ratio:
            self.slower = (
                f"; {self.device.name} takes {ratio:.2f} times as long as when its times were first measured: if it is "
                f"to stay so (battery, a limit of power), move {self.database.path} away"
            )
        self.failed |= {f"network {key}": reason for key, reason in timed.failed.items()}
        plans = networks.plans
        new = [NetworkTime(plans[key].calls, settled(s, quiet_s)) for key, s in timed.samples.items()]
        self.timed_networks |= {network.key(): network for network in new}
        self._keep(new, name, timed.samples.values())
        self._go_on(timed)
        return self.known_networks()

    def _quiet_s(self, reference: Artifact, reference_plan: Plan) -> tuple[float | None, bool]:
        """What the reference takes as a network on a quiet machine, and whether that is more than a guess.

        None where its kernel was never timed. Without it a phase in which the machine is never quiet would take its own
        best for quiet.
        """
        from ..compilers.reference_timer import quiet_network_s
        from ..compilers.remote import DeviceLost

        kernel, name = _kernel_of(reference_plan)
        if self.reference_kernel is None and (known_s := self.database.reference_s(name)):
            self.reference_kernel = kernel, known_s
        if self.reference_kernel is None:
            return None, True
        try:
            return quiet_network_s(reference.path, *self.reference_kernel, self.device) or (None, True)
        except DeviceLost as lost:
            raise _given_up(lost, self.device) from None

    def known_networks(self) -> list[NetworkTime]:
        """Those of the database, and what was timed here, whether it could be kept or not."""
        kept = {network.key(): network for network in self.database.networks()}
        for key, network in self.timed_networks.items():
            if key not in kept or network.time.quiet or not kept[key].time.quiet:
                kept[key] = network
        return list(kept.values())

    def _keep(self, new: Sequence[KernelTime | NetworkTime], reference: str, samples: Iterable[Samples]) -> bool:
        """What was measured counts even where it cannot be kept; whether earlier times count as quiet no more.

        Of the reference what was seen is kept: an estimate that was too low would make nothing quiet for ever.
        """
        if not new:
            return False
        try:
            questioned = self.database.add(new, {reference: best_reference_s(list(samples))})
        except DatabaseError as error:
            self.notes.append(f"times are not kept: {error}")
            return False
        if questioned:
            self.notes.append(
                f"{questioned} earlier times were taken while {self.device.name} was slower than it can be; they are "
                "measured again"
            )
        return questioned > 0

    def _go_on(self, timed: Timed) -> None:
        """Raises UserError where the device was lost or the reference does not run; what was timed before is kept."""
        if timed.lost is not None:
            raise _given_up(timed.lost, self.device)


def _given_up(reason: RunError, device: Device) -> UserError:
    from ..compilers.remote import DeviceLost

    when = f"once {device.name} answers, " if isinstance(reason, DeviceLost) else ""
    return UserError(f"{reason}; what was timed is kept: {when}give the same command again")


def _kernel_of(reference_plan: Plan) -> tuple[KernelWork, str]:
    """What of a reference's kernels others are timed beside, and what the database calls it."""
    kernel = max(reference_plan.kernels.values(), key=lambda work: work.workload.macs)
    return kernel, f"kernel {kernel.workload.key()}"


def reference_program() -> ExportedProgram:
    """A 3x3 convolution of some 30 microseconds: what tells quiet times is timed beside everything else."""
    import torch

    conv = torch.nn.Conv2d(REFERENCE_INPUT[1], 32, 3, padding=1).eval()
    return torch.export.export(conv, (torch.zeros(REFERENCE_INPUT),))


def compiled_reference(evaluator: Evaluator, label: str, folder: Path) -> Artifact:
    """The artifact of `reference_program` for a device."""
    import torch

    inputs = torch.zeros(1, *REFERENCE_INPUT)
    return evaluator.compilers[label].compile(
        reference_program(), evaluator.devices[label], folder, inputs, tolerance=1e-3
    )


def program_of(evaluator: Evaluator, candidate: Candidate) -> ExportedProgram:
    """A candidate's structure, whose weights nothing was fitted to, as it is compiled.

    Raises:
        ValueError: it cannot be built.
    """
    import torch

    module = deploy(evaluator.skeleton(candidate))
    return torch.export.export(module, (evaluator.traced.example,))


def compiled_skeleton(evaluator: Evaluator, label: str, candidate: Candidate, folder: Path) -> Path:
    """The artifact of `program_of`.

    Raises:
        ValueError: the candidate cannot be built.
        CompileError: it cannot be compiled.
    """
    return compiled(evaluator, label, program_of(evaluator, candidate), folder)


def compiled(evaluator: Evaluator, label: str, program: ExportedProgram, folder: Path) -> Path:
    """The artifact of a candidate's program.

    Raises:
        CompileError: it cannot be compiled.
    """
    from ..compilers.verify import INT8_TOLERANCE

    inputs = evaluator.task.data.validation.batch(slice(0, 1)).unsqueeze(1)
    compiler, device = evaluator.compilers[label], evaluator.devices[label]
    return compiler.compile(program, device, folder, inputs, tolerance=INT8_TOLERANCE).path


def by_error(plans: Iterable[Plan], keys: Iterable[str], model: KernelRegression) -> list[str]:
    """Keys of kernels, those first of which the trees of the regression disagree by the most time of the plans."""
    wanted = set(keys)
    errors = dict.fromkeys(wanted, 0.0)
    for plan in plans:
        calls = [work for work in plan.calls if work.key() in wanted]
        if not calls:
            continue
        seconds, spreads = model.predict(calls), model.spread(calls)
        total = sum(work.cycles for work in plan.calls)
        scale = sum(work.cycles for work in calls) / total / float(seconds.sum())
        for work, one, spread_of in zip(calls, seconds, spreads, strict=True):
            errors[work.key()] += float(one * spread_of) * scale
    return sorted(wanted, key=lambda key: (-errors[key], key))


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


def refuse_loaded(watch: LoadWatch, device: Device) -> None:
    """Rather no table than a wrong one."""
    reason = watch.refusal(device.threads)
    if reason and not device.rpc:
        raise BusyMachine(f"{reason}; what was measured meanwhile is not kept")
