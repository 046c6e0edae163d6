"""Prometheus counters of a search, on a cluster whose Ray exports metrics (`pip install "ray[default]"`)."""

from __future__ import annotations

from collections.abc import Mapping


class Counters:
    """Counts a run's events where the cluster's nodes export what they count; elsewhere nobody reads them."""

    def __init__(self, run: str) -> None:
        """Registers the counters for a run of that name; Ray must be connected."""
        from ray.util.metrics import Counter

        self._run = run
        self._events = Counter("planish_events", "Events of a run's journal by kind", tag_keys=("run", "event"))
        self._trials = Counter("planish_trials", "Trials that ended by their state", tag_keys=("run", "state"))

    def event(self, event: Mapping[str, object]) -> None:
        """Counts an event of the journal."""
        self._events.inc(1, {"run": self._run, "event": str(event["event"])})
        if event["event"] == "end":
            self._trials.inc(1, {"run": self._run, "state": str(event["state"])})
