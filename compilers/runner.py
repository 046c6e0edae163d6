"""Runs and times compiled models in child processes, one at a time on a device."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..hwmodels.device import Device
from ..hwmodels.measurement import Measurement, MeasureProtocol
from .child import EXIT_WRONG_OUTPUT
from .compiler import RunError


def measure(artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol) -> dict[str, Measurement]:
    """See `Compiler.measure`; the first artifact is the reference that tells drift."""
    with device_lock(device):
        for _ in range(protocol.retries + 1):
            times: dict[str, list[float]] = {name: [] for name in artifacts}
            for _ in range(protocol.processes):
                for name, values in run_child(artifacts, device, protocol).items():
                    times[name].extend(values)
            drifted = drift(next(iter(times.values()))) > protocol.drift
            if not drifted:
                break
    return {name: Measurement(device.name, tuple(values), drifted) for name, values in times.items()}


def drift(values: list[float]) -> float:
    """Relative change of the median between the first and the last third."""
    third = max(1, len(values) // 3)
    first, last = float(np.median(values[:third])), float(np.median(values[-third:]))
    return abs(last - first) / max(min(first, last), 1e-12)


def check(artifact: Path, device: Device, *, time_limit_s: float = 60.0) -> None:
    """Compares one artifact with its stored outputs, in a child process.

    Raises:
        RunError: it crashed, failed, took too long or gave other outputs.
    """
    run_child({"artifact": artifact}, device, MeasureProtocol(time_limit_s=time_limit_s), runs=0)


def run_child(
    artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol, runs: int | None = None
) -> dict[str, list[float]]:
    """Seconds of each run of each artifact in one child process."""
    with tempfile.TemporaryDirectory(prefix="planish-run-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        request.write_text(
            json.dumps(
                {
                    "artifacts": {name: str(path) for name, path in artifacts.items()},
                    "runs": protocol.runs if runs is None else runs,
                    "warmup_s": protocol.warmup_s,
                }
            ),
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "planish.compilers.child", str(request), str(result)]
        limit = protocol.time_limit_s * max(1, len(artifacts))
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env=_environment(device), check=False
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout
            name = _last_line(output)
            raise RunError(
                f"artifact {name!r} did not end within {limit:.0f} s and was killed; "
                "raise time_limit_s if it needs longer", name
            ) from None  # fmt: skip
        if done.returncode == 0:
            return {k: list(v) for k, v in json.loads(result.read_text(encoding="utf-8"))["run_s"].items()}
        raise _failure(done)


def _failure(done: subprocess.CompletedProcess[str]) -> RunError:
    name, reason = _last_line(done.stdout), _last_line(done.stderr) or "it said nothing"
    if done.returncode < 0:
        return RunError(f"artifact {name!r} crashed with signal {-done.returncode}", name)
    if done.returncode == EXIT_WRONG_OUTPUT:
        return RunError(f"artifact {name!r}: {reason}", name)
    return RunError(f"artifact {name!r} failed: {reason}", name)


def _last_line(text: str | None) -> str | None:
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else None


def _environment(device: Device) -> dict[str, str]:
    threads = str(device.threads)
    return {
        **os.environ,
        # The runtime library alone is what an artifact's user has; it also loads faster than the compiler.
        "TVM_USE_RUNTIME_LIB": "1",
        "TVM_NUM_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
    }


@contextmanager
def device_lock(device: Device) -> Iterator[None]:
    """One measurement at a time on a physical device, across all processes of this machine and user."""
    kind = device.name.partition("?")[0].replace("/", "-")
    path = Path(tempfile.gettempdir()) / f"planish-{os.getuid()}-{kind}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
