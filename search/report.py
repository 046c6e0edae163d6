"""report.html: one page that holds everything about a run and loads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .atomic import write_text
from .errors import UserError
from .how_predicted import how_predicted
from .json_text import mapping
from .objective import Objective, split_metric
from .page import page
from .pareto import ParetoFront
from .pictures import costs_of, front_svg, history_svg
from .quantities import metric_cells, metric_names
from .replay import History
from .rundir import FRONT, RunDirectory
from .status import original_metrics
from .trial import State, Trial

# Hypervolume is computed at no more points of the history than a picture can show.
_HISTORY_POINTS = 100


def write_report(run_dir: Path) -> Path:
    """Writes report.html into a run's folder and returns its path. Reads only the folder.

    Raises:
        UserError: there is no run in the folder, or it has no front yet.
    """
    run = RunDirectory.open(run_dir)
    if not (run_dir / FRONT).exists():
        raise UserError(f"{run_dir} has no front yet; carry on with: planish resume {run_dir}")
    path = run_dir / "report.html"
    write_text(path, report_html(run), f"the run is untouched; once that is put right: planish report {run_dir}")
    return path


def report_html(run: RunDirectory) -> str:
    """The page as text. Every text that comes from the run is escaped."""
    front, history = run.front(), run.history()
    spec = run.spec()
    states = Counter(trial.state.value for trial in history.trials())
    volumes = hypervolume_history(spec.targets(), history, original_metrics(run, history))
    left_out = run.space().left_out if (run.path / "space.json").exists() else {}
    parts = {
        "lead": escape(
            f"{_short(spec.model)} on {', '.join(spec.labels())}, data {_short(spec.data)}, seed {spec.seed}"
        ),
        "notice": _notice(front) + _predicted(front, spec.measure.latency == "predicted"),
        "front_picture": _front_pictures(front, history.trials()),
        "front_table": _front_table(front),
        "choices_table": _choices_table(front),
        "slow_table": _reasons_table(front, "slow_sites"),
        "left_alone_table": _reasons_table(front, "left_alone"),
        "left_out_table": _left_out_table(left_out),
        "history_picture": history_svg(volumes),
        "history_note": escape(
            f"Of the candidates as they were scored before fine-tuning. Trials: {len(history.records)}"
            + "".join(f", {count} {state}" for state, count in sorted(states.items()))
        ),
        "trials_table": _failures(history.trials()),
        "provenance_table": table(["", ""], _flat_rows(run.provenance())),
        "spec": escape((run.path / "spec.toml").read_text(encoding="utf-8")),
    }
    return page("report.html", f"Planish: {run.path.resolve().name}", parts)


def hypervolume_history(
    objectives: Sequence[Objective], history: History, original: Mapping[str, object]
) -> list[tuple[int, float]]:
    """(number of trials scored, hypervolume of what they were before fine-tuning), in the order of their scores.

    A trial that was never scored alone counts with its final metrics.
    """
    if not original:
        return []
    moments = []
    for record in history.records.values():
        moment = record.scored_s if record.scored_s is not None else record.ended_s
        if moment is not None:
            moments.append((moment, record.trial.number, record.before(0) or record.trial.metrics))
    moments.sort(key=lambda item: item[:2])
    scored = [Trial(n, history.records[n].trial.candidate, State.COMPLETE, m, None, 0) for _, n, m in moments]
    counts = sorted({round(i * len(scored) / _HISTORY_POINTS) for i in range(1, _HISTORY_POINTS + 1)} - {0})
    return [(count, ParetoFront(tuple(objectives), tuple(scored[:count])).hypervolume(original)) for count in counts]


def table(header: Sequence[str], rows: Sequence[Sequence[object]], classes: Sequence[Sequence[str]] = ()) -> str:
    """An HTML table; every cell is escaped.

    Args:
        classes: CSS classes of the cells where they are not the default (number or text), row by row.
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header) if any(header) else ""
    lines = ["<table>"] + ([f"<tr>{head}</tr>"] if head else [])
    for index, row in enumerate(rows):
        kinds = classes[index] if index < len(classes) else ["reason" if len(str(cell)) > 60 else "" for cell in row]
        cells = zip(row, kinds, strict=True)
        lines.append(
            "<tr>" + "".join(f'<td class="{escape(kind)}">{escape(str(cell))}</td>' for cell, kind in cells) + "</tr>"
        )
    return "\n".join([*lines, "</table>"])


def _notice(front: Mapping[str, object]) -> str:
    miss = front.get("nearest_miss")
    if not isinstance(miss, Mapping):
        return ""
    bounds = ", ".join(f"{b.get('metric')} {b.get('bound')}" for b in _entries(front, "budget"))
    text = f"No candidate keeps the budget ({bounds}). Below is the best so far; nearest is trial {miss.get('trial')}."
    return f'<p class="warn">{escape(text)}</p>'


def _predicted(front: Mapping[str, object], predicted: bool) -> str:
    return f'<p class="warn">{escape(f"Latency is {how_predicted(front)}.")}</p>' if predicted else ""


def _front_pictures(front: Mapping[str, object], trials: Sequence[Trial]) -> str:
    """Accuracy against the latency of every device, or against the first cost where there are not several."""
    latencies = [cost for cost in costs_of(front) if split_metric(cost.metric)[1] is not None]
    drawn = [trial for trial in trials if trial.state is not State.FAILED]
    if len(latencies) < 2:
        return front_svg(front, drawn)
    return "\n".join(front_svg(front, drawn, cost) for cost in latencies)


def _front_table(front: Mapping[str, object]) -> str:
    original = front.get("original")
    base = original if isinstance(original, Mapping) else {}
    entries = [base, *(entry for entry in _entries(front, "front") if entry.get("trial") != base.get("trial"))]
    names = metric_names([mapping(entry.get("metrics")) for entry in entries], every=True)
    devices = mapping(front.get("devices"))
    by_device = {name: numbers for name, numbers in devices.items() if isinstance(numbers, list)}
    header = ["trial", *names, "measured", "keeps budget", *(["on the front of"] if by_device else []), "artifact"]
    rows, classes = [], []
    for entry in entries:
        cells = metric_cells(mapping(entry.get("metrics")), mapping(base.get("metrics")), names)
        label = "original" if entry is base else str(entry.get("trial"))
        own = [", ".join(device for device, numbers in by_device.items() if entry.get("trial") in numbers)]
        ending = [_measured(entry), _yes(entry.get("meets_budget")), *(own if by_device else [])]
        rows.append([label, *cells, *ending, entry.get("artifact") or ""])
        classes.append(["", *("number" for _ in cells), *("" for _ in ending), ""])
    return table(header, rows, classes)


def _choices_table(front: Mapping[str, object]) -> str:
    original = front.get("original")
    base = original if isinstance(original, Mapping) else {}
    entries = [entry for entry in _entries(front, "front") if entry.get("trial") != base.get("trial")]
    unchanged = mapping(base.get("options"))
    names_by_site: dict[str, list[str]] = {}
    for name in unchanged:
        names_by_site.setdefault(name.rpartition(":")[0], []).append(name)
    rows, classes = [], []
    for site, names in names_by_site.items():
        cells = [_changes(mapping(entry.get("options")), unchanged, names) for entry in entries]
        rows.append([site, *(cell or "as it is" for cell in cells)])
        classes.append(["", *("" if cell else "same" for cell in cells)])
    return table(["site", *(f"trial {entry.get('trial')}" for entry in entries)], rows, classes)


def _changes(options: Mapping[str, object], unchanged: Mapping[str, object], names: Sequence[str]) -> str:
    """What a trial changes at a site: `prune 0.5, bits 8`; empty where it leaves the site as it is."""
    changed = [name for name in names if options.get(name) != unchanged[name]]
    return ", ".join(f"{name.rpartition(':')[2]} {options.get(name)}" for name in changed)


def _reasons_table(front: Mapping[str, object], key: str) -> str:
    rows = [
        [f"trial {entry.get('trial')}", site, reason]
        for entry in _entries(front, "front")
        for site, reason in mapping(entry.get(key)).items()
    ]
    return table(["", "site", "reason"], rows) if rows else "<p>None.</p>"


def _left_out_table(left_out: Mapping[str, str]) -> str:
    layers: dict[str, list[str]] = {}
    for layer, reason in left_out.items():
        layers.setdefault(reason, []).append(layer)
    rows = [[", ".join(names), reason] for reason, names in layers.items()]
    return (
        table(["layers", "reason"], rows) if rows else "<p>Every layer is in the space, with every kind of choice.</p>"
    )


def _failures(trials: Sequence[Trial]) -> str:
    failed = [[trial.number, trial.error or ""] for trial in trials if trial.state is State.FAILED]
    return table(["failed trial", "error"], failed) if failed else ""


def _flat_rows(value: object, name: str = "") -> list[list[object]]:
    """Nested JSON as rows of (dotted name, value)."""
    if isinstance(value, Mapping):
        return [row for key, item in value.items() for row in _flat_rows(item, f"{name}.{key}" if name else str(key))]
    if isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        return [row for index, item in enumerate(value, start=1) for row in _flat_rows(item, f"{name} {index}")]
    return [
        [name, ", ".join(str(item) for item in value) if isinstance(value, list) else "" if value is None else value]
    ]


def _entries(front: Mapping[str, object], key: str) -> list[Mapping[str, object]]:
    listed = front.get(key)
    return [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []


def _measured(entry: Mapping[str, object]) -> str:
    drifted = mapping(entry.get("metrics")).get("drifted")
    return _yes(entry.get("measured")) + (", the machine was not quiet" if drifted else "")


def _yes(value: object) -> str:
    return "yes" if value else "no"


def _short(text: str) -> str:
    """Without the folders of an absolute path: a report is passed on."""
    return "/".join(text.split("/")[-1:]) if text.startswith("/") else text
