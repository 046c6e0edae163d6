"""Runs and times compiled models in child processes, one at a time on a device."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..hwmodels.device import Device
from ..hwmodels.measurement import Measurement, MeasureProtocol
from .child import EXIT_LOST, EXIT_WRONG_OUTPUT
from .compiler import RunError
from .manifest import read
from .remote import DeviceLost, gone


def measure(artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol) -> dict[str, Measurement]:
    """See `Compiler.measure`; the first artifact is the reference that tells drift."""
    if not artifacts:
        return {}
    with device_lock(device):
        for _ in range(protocol.retries + 1):
            times: dict[str, list[float]] = {name: [] for name in artifacts}
            powers: dict[str, list[float]] = {name: [] for name in artifacts}
            for _ in range(protocol.processes):
                found = run_child(artifacts, device, protocol)
                for name, values in found.run_s.items():
                    times[name].extend(values)
                    watts = found.watts.get(name)
                    powers[name].extend([] if watts is None else [watts])
            drifted = drift(next(iter(times.values()))) > protocol.drift
            if not drifted:
                break
    count = protocol.processes
    return {
        name: Measurement(
            device.name, tuple(values), drifted, count, float(np.mean(powers[name])) if powers[name] else None
        )
        for name, values in times.items()
    }


def drift(values: list[float]) -> float:
    """Relative change of the median between the first and the last third."""
    third = max(1, len(values) // 3)
    first, last = float(np.median(values[:third])), float(np.median(values[-third:]))
    return abs(last - first) / max(min(first, last), 1e-12)


def check(artifact: Path, device: Device, *, time_limit_s: float = 60.0) -> float:
    """Compares one artifact with its stored outputs, in a child process.

    Returns:
        The largest difference, relative to the largest output.

    Raises:
        RunError: it crashed, failed, took too long or gave other outputs.
    """
    protocol = MeasureProtocol(time_limit_s=time_limit_s)
    return run_child({"artifact": artifact}, device, protocol, runs=0).error["artifact"]


@dataclass(frozen=True)
class ChildResult:
    """What a child process found of every artifact, by name.

    `run_s` are the seconds of each timed run, `reference_s` what the first artifact took beside each; `error`
    the largest difference from the stored outputs, relative to the largest output; `kernels` (kernel, seconds) in the
    order of the calls, where they were asked for; `watts` the power of the processor's packages while each ran, None
    where that cannot be read.
    """

    run_s: Mapping[str, list[float]]
    error: Mapping[str, float]
    kernels: Mapping[str, list[tuple[str, float]]]
    reference_s: Mapping[str, list[float]] = field(default_factory=dict)
    watts: Mapping[str, float | None] = field(default_factory=dict)


def site_times(
    artifacts: Mapping[str, Path], device: Device, protocol: MeasureProtocol
) -> dict[str, list[tuple[str, str, float]]]:
    """(kernel, site, seconds) of every kernel call of every artifact, in order; site "" where none is known.

    Raises:
        RunError: as for `measure`.
    """
    with device_lock(device):
        profiles = run_child(artifacts, device, protocol, runs=0, kernels=True).kernels
    return {name: _named(rows, list(read(artifacts[name]).kernels)) for name, rows in profiles.items()}


def _named(rows: list[tuple[str, float]], ours: list[tuple[str, str]]) -> list[tuple[str, str, float]]:
    found = []
    for kernel, seconds in rows:
        # Kernels of the fallback stand between ours: the manifest lists ours in the order of the calls.
        site = ours.pop(0)[1] if ours and ours[0][0] == kernel else ""
        found.append((kernel, site, seconds))
    return found


def run_child(
    artifacts: Mapping[str, Path],
    device: Device,
    protocol: MeasureProtocol,
    runs: int | None = None,
    kernels: bool = False,
    quiet_s: float = 0.0,
) -> ChildResult:
    """Checks, times and profiles artifacts in one child process.

    Args:
        artifacts: By name; the first is the reference, timed beside every sample of another.
        device: Must be here.
        protocol: How often, and its limits.
        runs: Instead of the protocol's.
        kernels: Whether the kernels in them are timed, too.
        quiet_s: Where it is not 0 the others get more runs, up to a limit, until so many were beside a reference that
            took at most so long.

    Raises:
        RunError: an artifact crashed, failed, took too long or gave other outputs; it is named.
        DeviceLost: the device is behind RPC and does not answer.
    """
    limit = protocol.time_limit_s * max(1, len(artifacts))
    with tempfile.TemporaryDirectory(prefix="planish-run-") as folder:
        request, result = Path(folder, "request.json"), Path(folder, "result.json")
        request.write_text(
            json.dumps(
                {
                    "artifacts": {name: str(path) for name, path in artifacts.items()},
                    "runs": protocol.runs if runs is None else runs,
                    "quiet_s": quiet_s,
                    "warmup_s": protocol.warmup_s,
                    "kernels": kernels,
                    "rpc": device.rpc,
                    "threads": device.threads,
                    "time_limit_s": limit,
                }
            ),
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "planish.compilers.child", str(request), str(result)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=limit,
                env=environment(device),
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout
            name = _last_line(output)
            if device.rpc and name is None:
                raise DeviceLost(f"device {device.name} gave no session within {limit:.0f} s") from None
            if away := gone(device):
                raise DeviceLost(f"device {device.name} is lost: {away}") from None
            raise RunError(
                f"artifact {name!r} did not end within {limit:.0f} s and was killed; "
                "raise time_limit_s if it needs longer", name
            ) from None  # fmt: skip
        if done.returncode == 0 and result.is_file():
            found = json.loads(result.read_text(encoding="utf-8"))
            profile = {name: [(str(k), float(t)) for k, t in rows] for name, rows in found["kernels"].items()}
            return ChildResult(found["run_s"], found["error"], profile, found["reference_s"], found["watts"])
        raise _failure(done, device)


def _failure(done: subprocess.CompletedProcess[str], device: Device) -> RunError:
    name, reason = _last_line(done.stdout), _last_line(done.stderr) or "it said nothing"
    if done.returncode == EXIT_LOST:
        return DeviceLost(f"device {device.name} is lost: {reason}")
    if done.returncode < 0:
        return RunError(f"artifact {name!r} crashed with signal {-done.returncode}", name, crashed=True)
    if done.returncode == EXIT_WRONG_OUTPUT:
        return RunError(f"artifact {name!r}: {reason}", name)
    if done.returncode == 0:
        return RunError(f"artifact {name!r} ended its process before the runs were done", name)
    return RunError(f"artifact {name!r} failed: {reason}", name)


def _last_line(text: str | None) -> str | None:
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else None


def environment(device: Device) -> dict[str, str]:
    """The environment of a child that runs compiled code with the device's threads."""
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
    kind = re.sub(r"[^\w.-]+", "-", device.rpc or device.name.partition("?")[0])
    path = Path(tempfile.gettempdir()) / f"planish-{os.getuid()}-{kind}.lock"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
