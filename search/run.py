"""A run that has been searched: its front, and what can be taken from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, nan
from pathlib import Path

from .front import choose
from .json_text import mapping
from .objective import number, parse_budget
from .rundir import RunDirectory


@dataclass(frozen=True)
class Chosen:
    """One model of a front."""

    path: Path
    trial: int
    metrics: Mapping[str, object]
    options: Mapping[str, object]

    def export(self, out: str | Path) -> Path:
        """Writes the compiled model into a new folder."""
        from .exporting import export_run

        export_run(self.path, None, self.trial, Path(out))
        return Path(out)


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    path: Path

    @property
    def front(self) -> list[Mapping[str, object]]:
        """The entries of front.json."""
        entries = RunDirectory.open(self.path).front()["front"]
        assert isinstance(entries, list)
        return entries

    @property
    def trials(self) -> list[Chosen]:
        """The front's models, the most accurate first."""
        return [self._chosen(entry) for entry in self.front]

    def best(self, budget: str | None = None) -> Chosen:
        """The most accurate model that keeps the budget, by default the one that the run was launched with.

        Raises:
            UserError: no model of the front keeps it.
        """
        folder = RunDirectory.open(self.path)
        budgets = parse_budget(budget, folder.spec().labels()) if budget else ()
        return self._chosen(choose(folder.front(), budgets))

    def summary(self) -> dict[str, object]:
        """Trials by state, hypervolume, and the nearest miss where no model keeps the budget."""
        folder = RunDirectory.open(self.path)
        front = folder.front()
        states = Counter(trial.state.value for trial in folder.trials())
        miss = front.get("nearest_miss")
        predicted = folder.spec().measure.latency == "predicted"
        return {
            **({"latency": _how_predicted(front)} if predicted else {}),
            "trials": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
            "hypervolume": front.get("hypervolume"),
            **({"nearest_miss": f"trial {miss['trial']}; no model keeps the budget"} if isinstance(miss, dict) else {}),
        }

    def _chosen(self, entry: Mapping[str, object]) -> Chosen:
        metrics, options = entry["metrics"], entry["options"]
        assert isinstance(metrics, Mapping)
        assert isinstance(options, Mapping)
        return Chosen(self.path, int(str(entry["trial"])), metrics, options)


def _how_predicted(front: Mapping[str, object]) -> str:
    """That latency is predicted, and how far the original's may be off on each device."""
    latencies = mapping(mapping(mapping(front.get("original")).get("metrics")).get("latency_s"))
    spans = []
    for label, entry in latencies.items():
        value, interval = number(mapping(entry).get("value")), mapping(entry).get("ci95")
        high = number(interval[1]) if isinstance(interval, list) and len(interval) == 2 else nan
        if value and isfinite(high / value):
            spans.append(f"{label} within {high / value - 1:.0%}")
    text = f" ({', '.join(spans)}, with 95 % confidence)" if spans else ""
    return f"predicted by the device's latency model, not measured{text}"
