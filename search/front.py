"""The front as front.json and front.csv hold it, and the choice of one of its entries."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .errors import UserError
from .json_text import mapping
from .objective import Budget, Objective, number, split_metric
from .pareto import ParetoFront
from .trial import State, Trial, finite


@dataclass(frozen=True)
class Entry:
    """A trial that may stand on the front.

    `measured`: by running the compiled artifact. `recipe`: fine-tuning epochs, teacher, seed. `artifact`: its folder,
    relative to the run's. `slow_sites`: why a compressed site did not get faster; `left_alone`: why one with options
    stayed as it is.
    """

    trial: Trial
    measured: bool
    recipe: Mapping[str, object] | None = None
    artifact: str | None = None
    slow_sites: Mapping[str, str] | None = None
    left_alone: Mapping[str, str] | None = None

    def to_json(self, meets_budget: bool) -> dict[str, object]:
        """The entry by the schema of front.json."""
        return {
            "trial": self.trial.number,
            "options": dict(self.trial.candidate.options),
            "metrics": finite(self.trial.metrics),
            "measured": self.measured,
            "meets_budget": meets_budget,
            "recipe": finite(self.recipe),
            "artifact": self.artifact,
            "slow_sites": dict(self.slow_sites or {}),
            "left_alone": dict(self.left_alone or {}),
        }


def front_document(
    objectives: Sequence[Objective], bounds: Sequence[Objective], original: Entry, entries: Sequence[Entry]
) -> dict[str, object]:
    """What front.json holds.

    `front` are the entries that keep every bound and that no other such entry beats. Where none keeps them, whether the
    original does or not, it is the front without bounds, and `nearest_miss` the entry that exceeds its worst bound by
    the smallest share. The original stands on the front too where nothing beats it, and always under `original`. Of
    several devices `devices` has each one's own front: the numbers of the entries that no other beats where the other
    devices do not count.

    Args:
        objectives: What is traded off, without bounds.
        bounds: The resolved budgets.
        original: The original model.
        entries: The others; those that did not complete, or that are no improvement (`improves`), are left out.
    """
    base = original.trial.metrics
    able = [entry for entry in entries if improves(objectives, entry.trial, base)]
    keeping = [entry for entry in able if keeps(bounds, entry.trial.metrics)]
    competing = [original, *(keeping or able)]
    if keeping and not keeps(bounds, base):
        competing = keeping
    front = ParetoFront(tuple(objectives), tuple(entry.trial for entry in competing))
    by_number = {entry.trial.number: entry for entry in competing}
    members = [by_number[trial.number] for trial in front.members()]
    by_device = device_fronts(objectives, [entry.trial for entry in members], original.trial)
    miss = None if keeping else min(able, key=lambda e: _excess(bounds, e.trial.metrics), default=None)
    return {
        "objectives": [{"metric": o.metric, "goal": o.goal} for o in objectives],
        "budget": [{"metric": o.metric, "bound": o.bound} for o in bounds],
        "original": original.to_json(keeps(bounds, base)),
        "front": [entry.to_json(keeps(bounds, entry.trial.metrics)) for entry in members],
        **({"devices": by_device} if len(by_device) > 1 else {}),
        "nearest_miss": miss.to_json(False) if miss else None,
        "hypervolume": front.hypervolume(base),
    }


def device_fronts(objectives: Sequence[Objective], trials: Sequence[Trial], original: Trial) -> dict[str, list[int]]:
    """By device the numbers of the trials on the front of its own latency and the objectives that are no latencies.

    What is slower than the original on a device is not on that device's front, however fast it is on another.
    """
    labels = {o.metric: label for o in objectives if (label := split_metric(o.metric)[1]) is not None}
    fronts = {}
    for metric, label in labels.items():
        own = tuple(o for o in objectives if o.metric == metric or o.metric not in labels)
        faster = (t for t in trials if t.number == original.number or cheaper(own, t.metrics, original.metrics))
        fronts[label] = [trial.number for trial in ParetoFront(own, tuple(faster)).members()]
    return fronts


def improves(objectives: Sequence[Objective], trial: Trial, original: Mapping[str, object]) -> bool:
    """Whether a trial may be offered: complete, every objective known, and faster than the original on a device.

    Where latency is no objective, it must be below the original in at least one cost instead.
    """
    if trial.state is not State.COMPLETE or any(math.isnan(o.value(trial.metrics)) for o in objectives):
        return False
    return cheaper(objectives, trial.metrics, original)


def cheaper(objectives: Sequence[Objective], metrics: Mapping[str, object], original: Mapping[str, object]) -> bool:
    """Whether metrics are faster than the original's on at least one device; without latencies, below it in a cost.

    Where nothing is made cheaper (accuracy alone is an objective), nothing can be offered.
    """
    costs = [objective for objective in objectives if objective.goal == "minimize"]
    latencies = [objective for objective in costs if objective.metric.startswith("latency[")]
    return any(o.ratio(metrics, original) < 1 for o in latencies or costs)


def keeps(bounds: Sequence[Objective], metrics: Mapping[str, object]) -> bool:
    """Whether metrics keep every bound; an unknown metric keeps none."""
    return all(bound.allows(bound.value(metrics)) for bound in bounds)


def choose(front: Mapping[str, object], budgets: Sequence[Budget]) -> Mapping[str, object]:
    """The most accurate entry of a front document that keeps the budgets; of equals the fastest, then the smallest.

    Of several devices one that is slower than the original on any of them is chosen only where no other keeps them.

    Args:
        front: front.json.
        budgets: Empty: the budget that the run was launched with, where an entry keeps it.

    Raises:
        UserError: no entry keeps them; the nearest value of each budget is named.
    """
    original = _metrics(mapping(front.get("original")))
    base_trial = mapping(front.get("original")).get("trial")
    listed = front.get("front")
    entries = [mapping(entry) for entry in listed] if isinstance(listed, list) else []
    entries = [entry for entry in entries if entry.get("trial") != base_trial]
    bounds = [budget.resolve(original) for budget in budgets]
    fitting = [entry for entry in entries if keeps(bounds, _metrics(entry))]
    if not fitting:
        misses = ", ".join(_nearest_text(b, o, entries) for b, o in zip(budgets, bounds, strict=True))
        detail = f"no entry of the front keeps {misses}" if misses else "the front is empty but for the original"
        raise UserError(f"{detail}; relax the budget, or name a trial with --trial")
    accuracy = Objective("accuracy", "maximize")
    devices = [Objective(f"latency[{name}]", "minimize") for name in mapping(front.get("devices"))]
    faster = [e for e in fitting if all(o.ratio(_metrics(e), original) < 1 for o in devices)] or fitting
    promised = [entry for entry in faster if entry.get("meets_budget")] or faster
    return min(
        promised, key=lambda entry: (accuracy.loss(accuracy.value(_metrics(entry))), *_cheapness(_metrics(entry)))
    )


def front_csv(front: Mapping[str, object]) -> str:
    """The front as a table: one row an entry, the original first; metrics by device get a column each."""
    listed = front.get("front")
    original = mapping(front.get("original"))
    others = [mapping(e) for e in listed if e.get("trial") != original.get("trial")] if isinstance(listed, list) else []
    rows = [_row(entry) for entry in [original, *others]]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    # Options last, in the order of the space, so that the numbers stand side by side.
    columns.sort(key=lambda name: name.startswith("option "))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cheapness(metrics: Mapping[str, object]) -> tuple[float, float]:
    """Seconds on the slowest device and the size, infinite where they are not known; less is better."""
    latency, size = metrics.get("latency_s"), metrics.get("size_bytes")
    by_device = latency.values() if isinstance(latency, Mapping) else ()
    seconds = [number(entry.get("value")) if isinstance(entry, Mapping) else math.nan for entry in by_device]
    slowest = math.inf if any(map(math.isnan, seconds)) else max(seconds, default=math.inf)
    return slowest, math.inf if math.isnan(number(size)) else number(size)


def _excess(bounds: Sequence[Objective], metrics: Mapping[str, object]) -> float:
    """By what share of itself the worst bound is exceeded; infinite where a metric is unknown."""
    worst = 0.0
    for objective in bounds:
        assert objective.bound is not None
        over = objective.loss(objective.value(metrics)) - objective.loss(objective.bound)
        worst = max(worst, math.inf if math.isnan(over) else over / max(abs(objective.bound), 1e-12))
    return worst


def _nearest_text(budget: Budget, bound: Objective, entries: Sequence[Mapping[str, object]]) -> str:
    values = [bound.value(_metrics(entry)) for entry in entries]
    known = sorted((value for value in values if not math.isnan(value)), key=bound.loss)
    return (
        f"{budget.text} ({bound.metric} reaches {known[0]:.4g} and the bound is {bound.bound:.4g})"
        if known
        else budget.text
    )


def _row(entry: Mapping[str, object]) -> dict[str, object]:
    row: dict[str, object] = {key: entry.get(key) for key in ("trial", "measured", "meets_budget")}
    for name, value in _metrics(entry).items():
        if isinstance(value, Mapping):
            for device, item in value.items():
                fields = item if isinstance(item, Mapping) else {"value": item}
                row[f"{name}[{device}]"] = fields.get("value")
                row |= _interval(f"{name}[{device}]", fields.get("ci95"))
        elif isinstance(value, list):
            row |= _interval(name.removesuffix("_ci95"), value)
        else:
            row[name] = value
    row["artifact"] = entry.get("artifact")
    return row | {f"option {name}": option for name, option in mapping(entry.get("options")).items()}


def _interval(name: str, value: object) -> dict[str, object]:
    return {f"{name} low": value[0], f"{name} high": value[1]} if isinstance(value, list) and len(value) == 2 else {}


def _metrics(entry: Mapping[str, object]) -> Mapping[str, object]:
    return mapping(entry.get("metrics"))
