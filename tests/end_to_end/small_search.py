"""A search of about a minute on a model of two convolutions, and what its journal says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

OWN = Path(__file__).parent / "own_task.py"
SPEC = """
model = "{own}:model"
data = "{own}:data"
budget = "latency<=0.9x"
objectives = ["accuracy", "latency", "size"]
workers = 2
[search]
trials = 4
batch = 2
proxy_images = 64
[distill]
rungs = [1, 2]
survivors = [4, 3]
[measure]
runs = 5
processes = 1
drift = 1.0
"""
# What makes its front a function of its seed.
PREDICTED = 'latency = "predicted"\n'


def write_spec(folder: Path, name: str, more: str = "") -> Path:
    """Writes the specification with more of its table [measure], and the weights and data that it opens there."""
    path = folder / name
    path.write_text(SPEC.format(own=OWN) + more, encoding="utf-8")
    if not (folder / "own.pt").exists():
        prepare(folder)
    return path


def prepare(folder: Path) -> None:
    """Writes the weights and data that the model and data of `OWN` open in their current folder."""
    subprocess.run([sys.executable, str(OWN)], cwd=folder, check=True)


def events(run: Path) -> list[dict[str, object]]:
    """The journal's events; a line that is being written is left out."""
    path = run / "trials.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def start(spec: Path, run: Path, *more: str) -> subprocess.Popen[str]:
    """The search in the background, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "planish.search", "search", str(spec), "--out", str(run), *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=spec.parent,
    )


def facts(run: Path) -> Counter[tuple[object, ...]]:
    """What was evaluated: how often every (event, trial, rung) was recorded."""
    return Counter(
        (e["event"], e["trial"], e.get("rung"), e.get("device"))
        for e in events(run)
        if e["event"] in ("score", "rung", "measure", "end")
    )
