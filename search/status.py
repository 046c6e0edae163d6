"""How far a run is, from its folder alone: works while another process searches, and after it was killed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from .errors import UserError
from .front import choose, improves, keeps
from .how_predicted import how_predicted
from .lock import holder
from .objective import Objective
from .replay import History, Phase, Record
from .rundir import FRONT, RunDirectory
from .trial import State, Trial


def status(path: Path) -> dict[str, object]:
    """The state of a run.

    Keys: `run`, `phase` (`new` before the first, `done` after the last), `done`, `total`, `eta_s` (None where nothing
    runs or nothing was done in this session), `controller` (who works on it, or None), `trials` (count by state),
    `best` ({"trial", "metrics", "final"}: of the front, else of the one-shot scores), `front` (its length),
    `hypervolume`, `nearest_miss`, `latency` (how it is predicted; None where it is measured).

    Raises:
        UserError: there is no run in the folder, or its journal is corrupt.
    """
    run = RunDirectory.open(path)
    history, controller = run.history(), holder(path)
    phase = history.phases[-1] if history.phases else Phase("new", 0, "end", 0.0)
    times = done_times(history, phase)
    front = run.front() if (path / FRONT).exists() else {}
    listed = front.get("front")
    return {
        "run": str(path),
        "phase": phase.name,
        "done": phase.total if phase.name == "done" else min(len(times), phase.total),
        "total": phase.total,
        "eta_s": _eta_s(history, phase, times) if controller else None,
        "controller": controller,
        "trials": dict(Counter(trial.state.value for trial in history.trials())),
        "best": _best_of_front(front) or _best_of_scores(run, history),
        "front": len(listed) if isinstance(listed, list) else 0,
        "hypervolume": front.get("hypervolume"),
        "nearest_miss": front.get("nearest_miss"),
        "latency": how_predicted(front) if run.spec().measure.latency == "predicted" else None,
    }


def done_times(history: History, phase: Phase) -> list[float]:
    """When every item of a phase was done, in order of time (seconds since 1970), earlier sessions included."""
    begun_s = min((p.time_s for p in history.phases if p.name == phase.name), default=0.0)
    times = [time for record in history.records.values() for time in _times(record, phase.unit)]
    return sorted(time for time in times if time >= begun_s)


def original_metrics(run: RunDirectory, history: History) -> Mapping[str, object]:
    """The original model's metrics from the journal; empty until it was evaluated."""
    if not (run.path / "space.json").exists():
        return {}
    key = run.space().original().key()
    return next((t.metrics for t in history.trials() if t.candidate.key() == key), {})


def _times(record: Record, unit: str) -> list[float]:
    # A candidate that fails is done with, whatever it was counted by.
    failed = [record.ended_s] if record.ended_s is not None and record.trial.state is State.FAILED else []
    if unit == "rung":
        return [rung.time_s for rung in record.rungs.values()] + failed
    if unit == "score":
        return failed if record.scored_s is None else [record.scored_s]
    if unit == "rescore":
        return failed if record.rescored_s is None else [record.rescored_s]
    if unit == "measure":
        return list(record.measured_s) or failed
    return [] if record.ended_s is None else [record.ended_s]


def _eta_s(history: History, phase: Phase, times: list[float]) -> float | None:
    """From the pace since the phase began or the run was resumed: the time that a run stood still does not count."""
    begun_s = max([phase.time_s, *history.sessions])
    session = [time for time in times if time >= begun_s]
    left = phase.total - len(times)
    if not session or left <= 0:
        return 0.0 if left <= 0 else None
    return (session[-1] - begun_s) / len(session) * left


def _best_of_front(front: Mapping[str, object]) -> dict[str, object] | None:
    try:
        entry = choose(front, ())
    except UserError:
        return None
    return {"trial": entry.get("trial"), "metrics": entry.get("metrics"), "final": True}


def _best_of_scores(run: RunDirectory, history: History) -> dict[str, object] | None:
    original = original_metrics(run, history)
    if not original:
        return None
    spec, accuracy = run.spec(), Objective("accuracy", "maximize")
    try:
        bounds = [budget.resolve(original) for budget in spec.budgets()]
    except UserError:  # it is being timed
        return None
    alive = [trial for trial in history.trials() if trial.state in (State.RUNNING, State.COMPLETE, State.STOPPED)]
    able = [t for t in alive if improves(spec.targets(), _complete(t), original) and keeps(bounds, t.metrics)]
    best = min(able, key=lambda trial: accuracy.loss(accuracy.value(trial.metrics)), default=None)
    return {"trial": best.number, "metrics": dict(best.metrics), "final": False} if best else None


def _complete(trial: Trial) -> Trial:
    return Trial(trial.number, trial.candidate, State.COMPLETE, trial.metrics, None, trial.seed, trial.batch)
