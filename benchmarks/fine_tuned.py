"""What the front of a finished run comes to: speed-up and size at so many points of accuracy, epochs of training."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Points of accuracy below the original, and what is told there.
DROPS = {0.5: ("speedup", "size_ratio"), 1.5: ("speedup",)}

Row = dict[str, Any]


def front_rows(run: Path) -> list[Row]:
    """A row for the original and every other model of a run's front, on the device that the run named first."""
    from planish.search.rundir import RunDirectory

    directory = RunDirectory.open(run)
    spec = directory.spec()
    device = spec.labels()[0]
    rows = []
    for entry in models_of(run):
        values = entry["metrics"]
        change = values.get("test_accuracy_change_ci95")
        rows.append(
            {
                "task": spec.model,
                "device": device,
                "trial": entry["trial"],
                "us": 1e6 * values["latency_s"][device]["value"],
                "speedup": 1 / values["latency_ratio"][device],
                "validation_accuracy": values["accuracy"],
                "test_accuracy": values["test_accuracy"],
                "test_drop_pp_ci95": None if change is None else [-100 * end for end in reversed(change)],
                "size_bytes": values["size_bytes"],
                "macs": values["macs"],
                "epochs": (entry["recipe"] or {}).get("epochs", 0),
            }
        )
    base = rows[0]
    for row in rows:
        row["validation_drop_pp"] = 100 * (base["validation_accuracy"] - row["validation_accuracy"])
        row["test_drop_pp"] = 100 * (base["test_accuracy"] - row["test_accuracy"])
        row["size_ratio"] = row["size_bytes"] / base["size_bytes"]
        row["macs_ratio"] = row["macs"] / base["macs"]
    return rows


def models_of(run: Path) -> Iterator[Row]:
    """The entries of a run's `front.json`: the original, then the front's other models."""
    from planish.search.rundir import RunDirectory

    front: Any = RunDirectory.open(run).front()
    yield front["original"]
    yield from (entry for entry in front["front"] if entry["trial"] != 0)


def at_drops(rows: Sequence[Row], prefix: str = "") -> dict[str, float | None]:
    """The best speed-up and the least size among what loses at most so many points of validation accuracy.

    Beside each what the same model loses on the test split, which chose nothing; None where there is no model.
    """
    summary: dict[str, float | None] = {}
    for (name, drop), chosen in _chosen(rows).items():
        summary[f"{prefix}{name}_at_{drop}pp"] = chosen.get(name)
        summary[f"{prefix}{name}_at_{drop}pp_test_drop"] = chosen.get("test_drop_pp")
    return summary


def _chosen(rows: Sequence[Row]) -> dict[tuple[str, float], Row]:
    """The row of every figure and drop; empty where there is none."""
    found: dict[tuple[str, float], Row] = {}
    for drop, names in DROPS.items():
        within = [row for row in rows if row["validation_drop_pp"] <= drop]
        for name, best in (("speedup", max), ("size_ratio", min)):
            if name in names:
                found[name, drop] = best(within, key=lambda row: row[name], default={})  # type: ignore[operator]
    return found


def fronts_by_task(runs: Sequence[Path]) -> dict[str, list[Row]]:
    """The rows of finished runs, those of one task together, by its short name.

    Raises:
        SystemExit: a folder holds no finished run.
    """
    from real_judge import TASKS

    from planish.search.errors import UserError

    names = {keys["model"]: name for name, keys in TASKS.items()}
    found: dict[str, list[Row]] = {}
    for run in runs:
        try:
            rows = front_rows(run)
        except UserError as error:
            raise SystemExit(f"{run}: {error}") from None
        except (KeyError, IndexError, TypeError) as error:
            raise SystemExit(f"{run}: the run is not finished ({error} is missing); planish resume {run}") from None
        found.setdefault(names.get(rows[0]["task"], rows[0]["task"]), []).extend(rows)
    return found


def front_summary(rows: Sequence[Row]) -> dict[str, Any]:
    """`at_drops`, and the most epochs of training that the models had which it tells of."""
    told = [*_chosen(rows).values()]
    return {**at_drops(rows), "epochs": max((row["epochs"] for row in told if row), default=0)}


def search_digits(folder: Path) -> Path:
    """A short search of the digits, in `folder`; the run's own folder.

    Raises:
        SystemExit: it failed.
    """
    run = folder / "run"
    spec = Path(__file__).resolve().parents[1] / "runs" / "digits.toml"
    command = [sys.executable, "-m", "planish.search", "search", str(spec), "--out", str(run)]
    for change in ("search.trials=16", "distill.rungs=[2]", "distill.survivors=[6]"):
        command += ["--set", change]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise SystemExit("the search of the digits failed; it says above why")
    return run
