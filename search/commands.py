"""What every command does: it calls one function, imported only then, and words the result."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError
from .json_text import mapping
from .progress import Progress, duration
from .spec_defaults import KEYS
from .text_table import text_of, text_table


@dataclass(frozen=True)
class Output:
    """A command's result: for machines, and worded for people."""

    result: object
    text: str


def search(arguments: argparse.Namespace, command: str) -> Output:
    """`planish search`."""
    from .config import default_out, load_spec

    spec = load_spec(arguments.spec, overrides(arguments))
    if arguments.out is None and arguments.spec is None:
        raise UserError("name the run's folder: --out runs/NAME (only a specification file has a default)")
    arguments.run = arguments.out or default_out(arguments.spec)
    # Only now: a mistake in the specification is told before torch is loaded.
    from .controller import search_run

    with _progress() as progress:
        run = search_run(spec, arguments.run, progress, command)
    return _run_output(run.path, run.front, run.summary())


def resume(arguments: argparse.Namespace, command: str) -> Output:
    """`planish resume`."""
    from .controller import resume_run

    with _progress() as progress:
        run = resume_run(arguments.run, progress, arguments.workers, train_only=arguments.train_only)
    return _run_output(run.path, run.front, run.summary())


def status(arguments: argparse.Namespace, command: str) -> Output:
    """`planish status`."""
    from .quantities import metric_cells, metric_names
    from .status import status as status_of

    state = status_of(arguments.run)
    place = "finished" if state["phase"] == "done" else f"{state['phase']}, {state['done']} of {state['total']} done"
    lines = [f"{state['run']}: {place}"]
    if state["controller"]:
        lines.append(f"working: {state['controller']}")
        left = state["eta_s"]
        lines += [f"about {duration(left)} left in this phase"] if isinstance(left, float) else []
    elif state["phase"] != "done":
        lines.append(f"nothing works on it; carry on with: planish resume {state['run']}")
    trials, best = mapping(state["trials"]), mapping(state["best"])
    lines += ["trials: " + ", ".join(f"{count} {name}" for name, count in trials.items())] if trials else []
    if best:
        metrics = mapping(best["metrics"])
        names = metric_names([metrics])
        cells = ", ".join(f"{name} {cell}" for name, cell in zip(names, metric_cells(metrics, {}, names), strict=True))
        if predicted := state["latency"]:
            lines.append(f"latency: {predicted}")
        lines.append(f"best so far{'' if best['final'] else ' (before fine-tuning)'}: trial {best['trial']}, {cells}")
    if state["nearest_miss"]:
        lines.append(f"no candidate keeps the budget; nearest: trial {mapping(state['nearest_miss']).get('trial')}")
    return Output(state, "\n".join(lines))


def report(arguments: argparse.Namespace, command: str) -> Output:
    """`planish report`."""
    from .report import write_report

    path = write_report(arguments.run)
    return Output({"report": str(path)}, str(path))


def export(arguments: argparse.Namespace, command: str) -> Output:
    """`planish export`."""
    from .export_text import export_text
    from .exporting import export_run

    result = export_run(arguments.run, arguments.pick, arguments.trial, arguments.out)
    return Output(result, export_text(result))


def profile(arguments: argparse.Namespace, command: str) -> Output:
    """`planish profile`."""
    from .config import load_spec
    from .option_gains import gains_in_short
    from .profile_page import check_place, write_profile_page

    spec = load_spec(arguments.spec, overrides(arguments))
    if arguments.html:
        check_place(arguments.html)
    from .profile import profile as profile_of

    with _progress() as progress:
        result = profile_of(spec, progress, table=not arguments.no_table, tiles=arguments.tiles)
    if arguments.html:
        write_profile_page(result, arguments.html)
    return Output(result, text_of(gains_in_short(result)))


def devices(arguments: argparse.Namespace, command: str) -> Output:
    """`planish devices`."""
    from .devices import export_times, import_times, list_devices, table_of

    if arguments.import_from:
        count = import_times(arguments.import_from)
        return Output({"imported": count}, f"{count} times imported from {arguments.import_from}")
    if arguments.export_to:
        count = export_times(arguments.export_to)
        return Output({"exported": count}, f"{count} times exported to {arguments.export_to}")
    if arguments.table:
        held = table_of()
        columns = ["device", "kernels", "quiet", "networks", "newest", "of this version", "usable here as"]
        rows = [
            [h["title"], h["kernels"], h["quiet"], h["networks"], h["newest"], h["current"], h["name"] or "-"]
            for h in held
        ]
        return Output(held, text_table(columns, rows) if rows else "no kernel was measured yet; see planish profile")
    found = list_devices()
    usable = ["yes" if d["timed"] else "predicted" if d["usable"] else "no" for d in found]
    rows = [[d["name"], d["kind"], how, d["missing"]] for d, how in zip(found, usable, strict=True)]
    table = text_table(["device", "kind", "usable", "what is missing"], rows)
    note = "predicted: nothing can be timed there from here, but its latency be predicted (measure.latency)"
    return Output(found, f"{table}\n{note}" if "predicted" in usable else table)


def bench(arguments: argparse.Namespace, command: str) -> Output:
    """`planish bench`."""
    from .bench import bench as bench_of
    from .bench import bench_text

    result = bench_of(arguments.folder, arguments.runs)
    return Output(result, bench_text(result))


COMMANDS: Mapping[str, Callable[[argparse.Namespace, str], Output]] = {
    "search": search,
    "resume": resume,
    "status": status,
    "report": report,
    "export": export,
    "profile": profile,
    "devices": devices,
    "bench": bench,
}


def overrides(arguments: argparse.Namespace) -> dict[str, object]:
    """The keys that were given as flags, `--set table.key=value` last.

    Raises:
        UserError: a `--set` has no `=`.
    """
    given: dict[str, object] = {}
    for key in KEYS:
        value = getattr(arguments, key, None)
        if value is not None:
            given[key] = [part for item in value for part in item.split(",")] if key == "objectives" else value
    for text in arguments.set or ():
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text!r} is not KEY=VALUE, for instance --set search.trials=64")
        given[key.strip()] = _toml_value(value.strip())
    return given


def _toml_value(text: str) -> object:
    """The text as a TOML value, or as it is where it is none, so that a text needs no quotes."""
    from .toml_text import read_toml

    try:
        return read_toml(f"value = {text}")["value"]
    except ValueError:
        return text


def _run_output(path: Path, front: Sequence[Mapping[str, object]], summary: Mapping[str, object]) -> Output:
    from .quantities import metric_cells, metric_names

    names = metric_names([mapping(entry.get("metrics")) for entry in front])
    rows = [
        [entry.get("trial"), *metric_cells(mapping(entry.get("metrics")), {}, names), bool(entry.get("meets_budget"))]
        for entry in front
    ]
    parts = [text_table(["trial", *names, "keeps budget"], rows)] if rows else ["the front is empty"]
    parts += [text_of(summary), f"planish report {path}    planish export {path} --out DIR"]
    return Output(
        {"run": str(path), "front": list(front), "summary": dict(summary)}, "\n\n".join(p for p in parts if p)
    )


@contextmanager
def _progress() -> Iterator[Progress]:
    progress = Progress(sys.stderr)
    try:
        yield progress
    finally:
        progress.close()
