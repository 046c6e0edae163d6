"""Writes a run's front from what its ledger knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .errors import UserError
from .front import Entry, choose, front_document
from .ledger import Ledger
from .left_alone import LEFT_ALONE
from .progress import Progress
from .steps import SLOW_SITES
from .trial import State, Trial

if TYPE_CHECKING:
    from .evaluate import Metrics


class FrontWriter:
    """front.json and front.csv of a run."""

    def __init__(self, ledger: Ledger, devices: Sequence[str], progress: Progress) -> None:
        """`devices` are the labels that trials are timed on; `progress` is told the best."""
        self._ledger, self._devices, self._progress = ledger, tuple(devices), progress

    def write(self, tested: Mapping[int, Metrics] | None = None) -> list[int]:
        """Writes the front of the trials that are complete, with what is known of the test split.

        Returns:
            The numbers of the trials on it.
        """
        ledger = self._ledger
        complete = [n for n in sorted(ledger.records) if ledger.state(n) is State.COMPLETE]
        entries = [self._entry(number, (tested or {}).get(number, {})) for number in complete]
        front = front_document(ledger.objectives, ledger.bounds(), entries[0], entries[1:])
        ledger.folder.write_front(front)
        self._show_best(front)
        listed = front["front"]
        assert isinstance(listed, list)
        return [int(entry["trial"]) for entry in listed]

    def _entry(self, number: int, tested: Mapping[str, object]) -> Entry:
        ledger = self._ledger
        trial = ledger.records[number].trial
        metrics = {**trial.metrics, **tested}
        whole = Trial(number, trial.candidate, trial.state, metrics, trial.error, trial.seed, trial.batch)
        artifact = f"trials/{number:04d}/artifact" if len(self._devices) == 1 else f"trials/{number:04d}"
        recipe = {**ledger.recipe(), "seed": trial.seed} if number else None
        slow, left = (
            {site: str(why) for site, why in (ledger.folder.trial_file(number, name) or {}).items()}
            for name in (SLOW_SITES, LEFT_ALONE)
        )
        measured = ledger.spec.measure.latency == "measured"
        return Entry(whole, measured=measured, recipe=recipe, artifact=artifact, slow_sites=slow, left_alone=left)

    def _show_best(self, front: Mapping[str, object]) -> None:
        try:
            best = choose(front, ())
        except UserError:
            return
        metrics = best["metrics"]
        assert isinstance(metrics, Mapping)
        ratio = metrics.get("latency_ratio")
        speeds = [f"{float(r):.2f}x" for r in ratio.values()] if isinstance(ratio, Mapping) else []
        self._progress.best(f"{100 * float(metrics['accuracy']):.1f} %{' at ' if speeds else ''}{', '.join(speeds)}")
