"""Searches as a user launches them: the command in a process of its own, on a model of two convolutions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.end_to_end.small_search import write_spec

Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that commands are given in: it has the weights that the user's file opens by a relative path."""
    folder = tmp_path_factory.mktemp("workplace")
    write_spec(folder, "own.toml")
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
    """A specification of a search that takes about a minute."""
    return workplace / "own.toml"


@pytest.fixture(scope="session")
def finished(planish: Command, spec: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that ended undisturbed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    done = planish("search", spec, "--out", run, "--json")
    assert done.returncode == 0, done.stderr
    (run.parent / "stdout.json").write_text(done.stdout, encoding="utf-8")
    return run
