"""Searching from Python: what the commands do, with a model and data that are at hand."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from .config import load_spec
from .controller import PYTHON_MODEL, resume_run, search_run
from .exporting import export_run
from .progress import Progress
from .run import Run
from .tasks import Task


def launch(
    task: Task,
    *,
    out: str | Path,
    device: str | Sequence[str] = "cpu",
    budget: str | Sequence[str] = (),
    preset: str = "default",
    seed: int = 0,
    settings: Mapping[str, object] | None = None,
    quiet: bool = False,
) -> Run:
    """Searches for compressed models of a task; carries on with the run that is in the folder already.

    Args:
        task: The trained model and its data.
        out: The run's folder.
        device: One or more devices, as on the command line.
        budget: One or more budgets, such as `latency<=0.5x`.
        preset: `quick`, `default` or `thorough`.
        seed: Of every random choice.
        settings: Any other key of a specification, such as `{"search.trials": 64}`.
        quiet: Show no progress.

    Raises:
        UserError: a value is wrong, a device is not usable, or a budget is out of reach.
    """
    given: dict[str, object] = {
        **(settings or {}),
        "model": f"{PYTHON_MODEL}{task.name}",
        "data": f"{PYTHON_MODEL}{task.name}",
        "device": [device] if isinstance(device, str) else list(device),
        "budget": [budget] if isinstance(budget, str) else list(budget),
        "preset": preset,
        "seed": seed,
    }
    progress = _progress(quiet)
    try:
        return search_run(load_spec(None, given), Path(out), progress, "planish.search.launch", task)
    finally:
        progress.close()


def resume(
    path: str | Path,
    *,
    task: Task | None = None,
    workers: int | None = None,
    train_only: bool = False,
    quiet: bool = False,
) -> Run:
    """Carries on with a run.

    Args:
        path: The run's folder.
        task: The task that the run was launched with from Python; None where it was launched by names.
        workers: Another number of workers.
        train_only: Train what is left to train, on whatever processor; nothing is timed.
        quiet: Show no progress.

    Raises:
        UserError: there is no run, another controller works on it, or the task is needed.
    """
    progress = _progress(quiet)
    try:
        return resume_run(Path(path), progress, workers, task, train_only=train_only)
    finally:
        progress.close()


def export(path: str | Path, out: str | Path, *, pick: str | None = None, trial: int | None = None) -> Path:
    """Writes one compiled model of a run's front into a new folder.

    Args:
        path: The run's folder.
        out: The new folder.
        pick: A budget; the most accurate model that keeps it is taken.
        trial: This trial instead.

    Raises:
        UserError: no model keeps the budget, there is no such trial, or the folder is not empty.
    """
    export_run(Path(path), pick, trial, Path(out))
    return Path(out)


def _progress(quiet: bool) -> Progress:
    return Progress(None if quiet else sys.stderr)
