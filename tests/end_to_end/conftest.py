"""Searches as a user launches them: the command in a process of its own, on a model of two convolutions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that commands are given in: it has the weights that the user's file opens by a relative path."""
    folder = tmp_path_factory.mktemp("workplace")
    subprocess.run([sys.executable, str(OWN)], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="session")
def planish(workplace: Path) -> Command:
    """Runs `planish ARGUMENTS`."""

    def run(*arguments: object, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "planish.search", *(str(argument) for argument in arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, cwd=workplace)

    return run


@pytest.fixture(scope="session")
def spec(workplace: Path) -> Path:
    """A specification of a search that takes about half a minute."""
    path = workplace / "own.toml"
    path.write_text(SPEC.format(own=OWN), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(planish: Command, spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended undisturbed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = planish("search", spec, "--out", run, "--json")
    assert done.returncode == 0, done.stderr
    (run.parent / "stdout.json").write_text(done.stdout, encoding="utf-8")
    return run


def events(run: Path) -> list[dict[str, object]]:
    """The journal's events; a line that is being written is left out."""
    path = run / "trials.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line[-1] == "\n"]


def start(spec: Path, run: Path) -> subprocess.Popen[str]:
    """The search in the background, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "planish.search", "search", str(spec), "--out", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        cwd=spec.parent,
    )
