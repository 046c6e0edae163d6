"""A device behind TVM RPC, on loopback: timed there, what crashes, hangs or is gone there costs no more than here."""

from __future__ import annotations

import ast
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.compilers.faulty import library
from torch import nn

from planish.compilers import board_server, kernel_timer, manifest, runner
from planish.compilers.compiler import RunError
from planish.compilers.kernel_store import KernelStore
from planish.compilers.kernel_timer import KernelProtocol, time_kernels
from planish.compilers.network_timer import time_networks
from planish.compilers.remote import DeviceLost, unanswered
from planish.compilers.tvm_compiler import TvmCompiler
from planish.compilers.tvm_workloads import plan
from planish.hwmodels.device import Device, parse_device
from planish.hwmodels.measurement import MeasureProtocol

pytestmark = pytest.mark.tvm

QUICK = MeasureProtocol(runs=3, processes=1, warmup_s=0, retries=0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", *(str(word) for word in command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> None:
    """Ends a server that was started here, with its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr:
        process.stderr.close()


@pytest.fixture(scope="module")
def board() -> Iterator[Device]:
    """A device that is served on loopback."""
    port = free_port()
    process = started("planish.compilers.board_server", "--port", port, "--key", "cpu")
    assert process.stderr is not None
    assert process.stderr.readline() == f"serving cpu at 127.0.0.1:{port}\n"
    yield parse_device(f"rpc://127.0.0.1:{port}/cpu")
    ended(process)


@pytest.fixture(scope="module")
def model() -> tuple[torch.export.ExportedProgram, torch.Tensor]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 5)).eval()
    examples = torch.randn(2, 1, 3, 6, 6)
    return torch.export.export(network, (examples[0],)), examples


@pytest.fixture(scope="module")
def good(
    board: Device, model: tuple[torch.export.ExportedProgram, torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A model that was compiled for the device."""
    folder = tmp_path_factory.mktemp("good") / "artifact"
    return TvmCompiler().compile(model[0], board, folder, model[1], tolerance=1e-5).path


def test_a_model_is_checked_and_timed_on_the_device(board: Device, good: Path) -> None:
    found = runner.measure({"original": good, "again": good}, board, QUICK)
    assert {name: (m.device, len(m.run_s)) for name, m in found.items()} == {
        "original": (board.name, 3), "again": (board.name, 3),
    }  # fmt: skip
    # A round trip to a server takes longer than this model: its own clock timed it.
    assert all(0 < m.latency_s < 1e-3 for m in found.values())


def test_wrong_outputs_of_the_device_are_told(board: Device, good: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(good, wrong)
    with np.load(wrong / manifest.EXAMPLES) as stored:
        inputs, outputs = stored["inputs"], stored["outputs"]
    np.savez(wrong / manifest.EXAMPLES, inputs=inputs, outputs=outputs + 1)
    known = manifest._parse(wrong)
    files = {name: manifest.digest(wrong / name) for name in known.files}
    replace(known, files=files).write(wrong)
    with pytest.raises(RunError, match="'wrong': outputs differ"):
        runner.measure({"good": good, "wrong": wrong}, board, QUICK)


@pytest.mark.parametrize("body", ["*(volatile int*)8 = 1;", "_exit(7);"])
def test_what_crashes_there_is_named_and_the_device_serves_the_next(
    board: Device, good: Path, tmp_path: Path, body: str
) -> None:
    with pytest.raises(RunError, match="'faulty' failed") as caught:
        runner.measure({"good": good, "faulty": library(tmp_path / "faulty", body)}, board, QUICK)
    assert (caught.value.artifact, isinstance(caught.value, DeviceLost)) == ("faulty", False)
    assert runner.measure({"good": good}, board, QUICK)["good"].latency_s > 0


def test_what_never_ends_there_is_killed_and_the_device_serves_the_next(
    board: Device, good: Path, tmp_path: Path
) -> None:
    endless = library(tmp_path / "endless", "for (;;) pause();")
    with pytest.raises(RunError, match="'endless' did not end within 6 s") as caught:
        runner.measure({"endless": endless}, board, replace(QUICK, time_limit_s=6))
    assert caught.value.artifact == "endless"
    assert runner.measure({"good": good}, board, QUICK)["good"].latency_s > 0


def test_kernels_are_timed_on_the_device(
    board: Device, model: tuple[torch.export.ExportedProgram, torch.Tensor], tmp_path: Path
) -> None:
    works = plan(model[0], board).kernels
    reference = max(works.values(), key=lambda work: work.workload.macs)
    protocol = KernelProtocol(runs=2, sample_s=1e-5, rounds=1)
    timed = time_kernels(works, reference, board, protocol, store=KernelStore(tmp_path / "store.sqlite"))
    assert not timed.failed
    assert timed.samples.keys() == works.keys()
    assert all(0 < seconds < 1e-3 for samples in timed.samples.values() for seconds in samples.run_s)


def test_a_device_that_is_lost_between_kernels_keeps_what_was_timed_and_blames_none(
    model: tuple[torch.export.ExportedProgram, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    server = started("planish.compilers.board_server", "--port", port, "--key", "cpu")
    assert server.stderr is not None
    server.stderr.readline()
    device = parse_device(f"rpc://127.0.0.1:{port}/cpu")
    works = plan(model[0], device).kernels
    assert len(works) > 1
    reference = max(works.values(), key=lambda work: work.workload.macs)
    monkeypatch.setattr(kernel_timer, "_TOGETHER", 1)

    def unplugged(done: int, total: int) -> None:
        if server.poll() is None:
            ended(server)

    timed = time_kernels(
        works, reference, device, KernelProtocol(runs=2, sample_s=1e-5, rounds=1),
        store=KernelStore(tmp_path / "store.sqlite"),
        advance=unplugged,
    )  # fmt: skip
    assert len(timed.samples) == 1
    assert timed.failed == {}
    assert f"nothing answers at 127.0.0.1:{port}" in str(timed.lost)


def test_a_device_that_is_lost_between_networks_is_told(good: Path) -> None:
    gone = parse_device(f"rpc://127.0.0.1:{free_port()}/cpu")
    timed = time_networks({"one": good}, good, gone, QUICK)
    assert (timed.samples, timed.failed) == ({}, {})
    assert "nothing answers at 127.0.0.1" in str(timed.lost)


def test_a_device_that_is_gone_is_no_artifacts_fault(good: Path) -> None:
    gone = parse_device(f"rpc://127.0.0.1:{free_port()}/cpu")
    assert "board_server --host 127.0.0.1" in str(unanswered(gone))
    with pytest.raises(DeviceLost, match=r"nothing answers at 127\.0\.0\.1") as caught:
        runner.measure({"good": good}, gone, QUICK)
    assert caught.value.artifact is None


def test_a_device_whose_power_fails_while_it_runs_something_is_lost(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection stays open: the process here waits for its answer, and is killed in the end."""
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\necho good\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    gone = parse_device(f"rpc://127.0.0.1:{free_port()}/cpu")
    with pytest.raises(DeviceLost, match=r"is lost: nothing answers at 127\.0\.0\.1"):
        runner.measure({"good": good}, gone, replace(QUICK, time_limit_s=1.0))
    # One that is there is slow, which is the artifact's doing.
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        slow = parse_device(f"rpc://127.0.0.1:{server.getsockname()[1]}/cpu")
        with pytest.raises(RunError, match="artifact 'good' did not end within 1 s") as caught:
            runner.measure({"good": good}, slow, replace(QUICK, time_limit_s=1.0))
        assert not isinstance(caught.value, DeviceLost)


def test_a_server_of_another_key_says_so(board: Device, good: Path) -> None:
    other = replace(board, rpc=board.rpc.replace("/cpu", "/cpu/cortex-a72"))
    with pytest.raises(DeviceLost, match="does not lend 'cpu/cortex-a72'"):
        runner.measure({"good": good}, other, QUICK)


def test_a_tracker_lends_its_devices(good: Path) -> None:
    port, tracker_port = free_port(), free_port()
    tracker = started(
        "tvm.exec.rpc_tracker", "--host", "127.0.0.1", "--port", tracker_port, "--port-end", tracker_port + 1
    )
    server = started(
        "planish.compilers.board_server", "--port", port, "--key", "cpu", "--tracker", f"127.0.0.1:{tracker_port}"
    )
    try:
        assert server.stderr is not None
        server.stderr.readline()
        board = parse_device(f"rpc://127.0.0.1:{tracker_port}/cpu")
        for _ in range(300):
            if unanswered(board) is None:
                break
            time.sleep(0.1)
        assert runner.measure({"good": good}, board, QUICK)["good"].latency_s > 0
    finally:
        ended(server)
        ended(tracker)


def test_a_port_that_is_taken_ends_the_server_with_a_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = started("planish.compilers.board_server", "--port", taken.getsockname()[1], "--key", "cpu")
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said.splitlines()[-1].endswith("of 127.0.0.1 cannot be served")


def test_the_server_of_a_board_needs_nothing_of_planish() -> None:
    """The file is copied to boards as it is."""
    tree = ast.parse(Path(board_server.__file__).read_text(encoding="utf-8"))
    names = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} == {"__future__", "tvm"}
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
