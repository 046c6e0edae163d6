"""Kill anything at any time: the same command carries on, and nothing finished is evaluated again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from tests.end_to_end.conftest import Command
from tests.end_to_end.small_search import PREDICTED, events, facts, start, write_spec

pytestmark = [pytest.mark.tvm, pytest.mark.ray]

_PATIENCE_S = 300


def wait_for(run: Path, kind: str, count: int) -> None:
    """Until the journal has so many events of a kind."""
    for _ in range(_PATIENCE_S * 10):
        if sum(1 for event in events(run) if event["event"] == kind) >= count:
            return
        time.sleep(0.1)
    raise AssertionError(f"{run} never had {count} events {kind!r}: {Counter(str(e['event']) for e in events(run))}")


@pytest.fixture(scope="module")
def predicted(spec: Path) -> Path:
    """The search by predicted latency: what it finds is a function of its seed."""
    return write_spec(spec.parent, "predicted.toml", PREDICTED)


@pytest.fixture(scope="module")
def undisturbed(planish: Command, predicted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one worker that nobody killed."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = planish("search", predicted, "--workers", 1, "--out", run)
    assert done.returncode == 0, done.stderr
    return run


def test_a_killed_controller_repeats_nothing_and_comes_to_the_front_of_one_undisturbed_worker(
    planish: Command, predicted: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for kind, count in (("score", 5), ("rung", 2)):
        process = start(predicted, run)
        wait_for(run, kind, count)
        process.kill()
        process.wait()
    before = facts(run)
    done = planish("search", predicted, "--out", run)
    assert done.returncode == 0, done.stderr
    after = facts(run)
    assert max(after.values()) == 1
    assert before.keys() <= after.keys()
    # Byte for byte: neither the interruption nor the number of workers (two here) is to be seen in it.
    assert (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()
    front = json.loads((run / "front.json").read_bytes())
    assert {entry["measured"] for entry in front["front"]} == {False}


def test_a_killed_worker_costs_no_trial_and_nobody_else_on_the_network_is_heard(spec: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(spec, run)
    wait_for(run, "score", 2)
    workers = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "ray::_Worker" in " ".join(p.cmdline())
    ]
    assert workers
    heard = [
        connection.laddr.ip
        for member in (psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True))
        for connection in member.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert heard
    assert {ip.removeprefix("::ffff:") for ip in heard} <= {"127.0.0.1", "::1"}
    workers[0].send_signal(signal.SIGKILL)
    output, _ = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 0, output
    assert max(facts(run).values()) == 1
    ends = [e for e in events(run) if e["event"] == "end"]
    assert not [e for e in ends if e["state"] == "failed"], ends


def test_weights_that_are_gone_stop_the_search_with_one_line_and_ctrl_c_says_how_to_carry_on(
    spec: Path, tmp_path: Path
) -> None:
    run, weights = tmp_path / "run", spec.parent / "own.pt"
    process = start(spec, run)
    wait_for(run, "score", 4)
    weights.rename(tmp_path / "own.pt")
    output, _ = process.communicate(timeout=_PATIENCE_S)
    (tmp_path / "own.pt").rename(weights)
    assert process.returncode == 2, output
    assert "Traceback" not in output
    assert f"relative paths are looked for in the current folder, {spec.parent}" in output.splitlines()[-1]
    process = start(spec, run)
    wait_for(run, "rung", 1)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 130
    assert f"planish resume {run}" in output
    assert "Traceback" not in output
    assert not [e for e in events(run) if e["event"] == "end" and e["state"] == "failed"]
    assert max(facts(run).values()) == 1


def test_another_processor_trains_and_nothing_else_and_the_run_ends_where_it_began(
    planish: Command, predicted: Path, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(predicted, run)
    wait_for(run, "rung", 1)
    process.kill()
    process.wait()
    # As if it had begun on a machine of another processor.
    own = (run / "devices.json").read_text(encoding="utf-8")
    note = {label: entry | {"device": "of another"} for label, entry in json.loads(own).items()}
    (run / "devices.json").write_text(json.dumps(note), encoding="utf-8")
    refused = planish("resume", run)
    assert refused.returncode == 2
    assert "are of another cpu" in refused.stderr
    trained = planish("resume", run, "--train-only")
    assert trained.returncode == 0, trained.stderr
    assert "trained; carry on where the run began" in trained.stderr
    found = Counter(str(event["event"]) for event in events(run))
    assert found["rung"] == 4 + 3
    assert "finalists" not in {event.get("phase") for event in events(run)}
    (run / "devices.json").write_text(own, encoding="utf-8")
    done = planish("resume", run)
    assert done.returncode == 0, done.stderr
    assert (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()


def test_what_is_lost_of_a_finished_run_is_made_anew_from_what_was_recorded(
    planish: Command, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (run / "front.json").unlink()
    (run / "provenance.json").unlink()
    for checkpoint in run.glob("trials/*/checkpoint.safetensors"):
        checkpoint.unlink()
    done = planish("resume", run)
    assert done.returncode == 0, done.stderr
    assert (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()
    assert facts(run) == facts(undisturbed)


def test_finalists_whose_checkpoints_are_lost_are_trained_again_and_are_the_same(
    planish: Command, undisturbed: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    lines = (run / "trials.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    begun = next(n for n, line in enumerate(lines) if json.loads(line).get("phase") == "finalists")
    (run / "trials.jsonl").write_text("".join(lines[: begun + 1]), encoding="utf-8")
    (run / "front.json").unlink()
    checkpoints = sorted(run.glob("trials/*/checkpoint.safetensors"))
    checkpoints[0].unlink()
    checkpoints[-1].write_bytes(checkpoints[-1].read_bytes()[:1000])
    done = planish("resume", run)
    assert done.returncode == 0, done.stderr
    assert "are lost; they are trained again" in done.stderr
    assert (run / "front.json").read_bytes() == (undisturbed / "front.json").read_bytes()
