"""Latency without running anything: a candidate's planned kernels, and a latency model that stays as it is for a run.

The times that a run's predictions come from are copied into its folder when it begins, so that what is measured
later changes no number of it: the same search gives the same front whatever the workers and however often it is
resumed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from ..compilers.tvm_workloads import Plan
    from ..hwmodels.latency import LatencyModel
    from ..spaces.space import Candidate
    from .evaluate import Evaluator, Metrics

KERNELS = "kernels.sqlite"
# Half of a 95 % interval, in standard deviations.
_HALF = 1.96


class Predictor:
    """The latency models of an evaluator's devices."""

    def __init__(self, evaluator: Evaluator) -> None:
        """Fits nothing yet; `evaluator` knows devices and compilers."""
        self._evaluator = evaluator
        self._models: dict[str, LatencyModel] = {}

    def model(self, label: str) -> LatencyModel:
        """The model of a device."""
        from .library import latency_model

        if label not in self._models:
            self._models[label] = latency_model(self._evaluator, label)
        return self._models[label]

    def use(self, label: str, model: LatencyModel) -> None:
        """Predicts a device by this model, such as the one that was just measured."""
        self._models[label] = model

    def metrics(self, program: ExportedProgram, energy: bool) -> Metrics:
        """Latency with its 95 % interval by device, the highest working memory, and if asked for the highest energy."""
        from ..compilers.tvm_workloads import plan
        from ..hwmodels.energy import energy_j

        latencies, peak, joules = {}, 0, 0.0
        for label, device in self._evaluator.devices.items():
            planned = plan(program, device)
            peak = max(peak, planned.working_bytes)
            joules = max(joules, energy_j(planned.calls)) if energy else 0.0
            latencies[label] = self._latency(label, planned)
        return {"peak_memory_bytes": peak, "latency_s": latencies, **({"energy_j": joules} if energy else {})}

    def error(self, label: str) -> float:
        """The relative standard deviation of the original's predicted latency."""
        from .latency_table import plan_of

        space = self._evaluator.proposal.space
        found = self.model(label).predict(plan_of(self._evaluator, label, space.original()).calls)
        return found.std_s / found.latency_s

    def calls(self, candidate: Candidate, label: str) -> list[tuple[str, str, float]]:
        """(kernel, site, seconds) as a profile has them, one entry a site."""
        from .latency_table import plan_of

        found = self.model(label).predict(plan_of(self._evaluator, label, candidate).calls)
        return [("", site, seconds) for site, seconds in found.site_s.items()]

    def _latency(self, label: str, planned: Plan) -> dict[str, object]:
        found = self.model(label).predict(planned.calls)
        half = _HALF * found.std_s
        return {"value": found.latency_s, "ci95": [max(0.0, found.latency_s - half), found.latency_s + half]}


def keep_times(evaluator: Evaluator, run: Path, scored: int = 0) -> Path:
    """Copies the kernel times that predictions come from into the run's folder, unless it has them; where they are.

    Args:
        evaluator: Knows devices and compilers.
        run: The run's folder.
        scored: Trials whose latency was predicted by what is there.

    Raises:
        UserError: they cannot be read or written, or nothing here plans the kernels of a device.
    """
    from ..compilers.kernel_times import database_of
    from ..hwmodels.kernel_database import DatabaseError

    for label in evaluator.devices:
        if evaluator.compilers[label].name != "tvm":
            raise UserError(
                f"the latency of {label} cannot be predicted: no kernels are planned for it; "
                'use measure.latency = "measured"'
            )
    kept = run / KERNELS
    if kept.exists():
        _check(evaluator, kept)
        return kept
    if scored:
        raise UserError(
            f"{kept} is lost: the latencies of {scored} trials were predicted by it, and others would not compare with "
            "them; restore it from a copy, or start anew with another --out"
        )
    half = kept.with_suffix(".part")
    half.unlink(missing_ok=True)
    try:
        for device in evaluator.devices.values():
            # One that holds nothing is kept as well: the run goes by what was known when it began.
            database_of(device, half).add([], {})
        user = database_of(device).path
        if user.exists():
            database_of(device, half).merge(user)
    except DatabaseError as error:
        raise UserError(f"the kernel times cannot be copied into {run}: {error}") from error
    half.rename(kept)
    return kept


def _check(evaluator: Evaluator, kept: Path) -> None:
    """Refuses times that the run's predictions cannot go on with: two models' figures would stand side by side."""
    from ..compilers.kernel_times import database_of
    from ..hwmodels.kernel_database import DatabaseError

    for label, device in evaluator.devices.items():
        database = database_of(device, kept)
        try:
            database.times()
            database.networks()
            known = database.knows_device()
        except DatabaseError as error:
            raise UserError(
                f"the kernel times that this run predicts by cannot be read: {error}; start anew with another --out"
            ) from error
        if not known:
            raise UserError(
                f"{kept} holds the times that this run predicts {label} by, and they are of other kernels than this "
                f"version of planish makes ({database.schedules}); carry on with the version that it began with, or "
                "start anew with another --out"
            )
