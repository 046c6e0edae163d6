"""A run that has been searched: its front, and what can be taken from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .front import choose
from .how_predicted import how_predicted
from .json_text import mapping
from .objective import parse_budget
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


class FrontEntry(dict[str, object]):
    """An entry of front.json, whose metrics and options are attributes, too."""

    @property
    def metrics(self) -> Mapping[str, object]:
        """See `metrics` in front.json."""
        return mapping(self.get("metrics"))

    @property
    def options(self) -> Mapping[str, object]:
        """The candidate's option for every choice."""
        return mapping(self.get("options"))


@dataclass(frozen=True)
class Run:
    """A run's folder."""

    path: Path

    @property
    def front(self) -> list[FrontEntry]:
        """The entries of front.json."""
        entries = RunDirectory.open(self.path).front()["front"]
        assert isinstance(entries, list)
        return [FrontEntry(entry) for entry in entries]

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
            **({"latency": how_predicted(front)} if predicted else {}),
            "trials": ", ".join(f"{count} {state}" for state, count in sorted(states.items())),
            "hypervolume": front.get("hypervolume"),
            **({"nearest_miss": f"trial {miss['trial']}; no model keeps the budget"} if isinstance(miss, dict) else {}),
        }

    def _chosen(self, entry: Mapping[str, object]) -> Chosen:
        metrics, options = entry["metrics"], entry["options"]
        assert isinstance(metrics, Mapping)
        assert isinstance(options, Mapping)
        return Chosen(self.path, int(str(entry["trial"])), metrics, options)
