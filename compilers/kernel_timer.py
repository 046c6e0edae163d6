"""Times kernels alone, each in a child process beside a reference, until the machine was quiet for all of them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..hwmodels.device import Device
from ..hwmodels.quiet import Samples, best_reference_s, open_samples, quiet_limit_s
from .child import EXIT_LOST
from .compiler import CompileError, RunError
from .kernel_store import KernelStore
from .linker import linker
from .remote import DeviceLost, gone
from .runner import device_lock, environment
from .tvm_build import kernel_objects, tvm_target
from .tvm_values import Kernel
from .tvm_workloads import KernelWork

# Kernels in one library and one child: they share its start, and lose their samples together when one crashes.
_TOGETHER = 80
# How fast some kernels are differs from process to process, those that wait for their weights most: they have more
# samples until the standard error is this, the first ones first.
_EXACT = 0.02


@dataclass(frozen=True)
class KernelProtocol:
    """How kernels are timed.

    Attributes:
        runs: Samples of every kernel in a round, a process of its own, each of about `sample_s` after `before_s`
            untimed: few, because how fast a kernel is differs from process to process.
        rounds: What is not settled after one round is measured again, with all that waits, up to so many times.
        time_limit_s: For a round of `_TOGETHER` kernels.
    """

    runs: int = 4
    sample_s: float = 1e-3
    before_s: float = 1e-3
    rounds: int = 10
    time_limit_s: float = 120.0


@dataclass(frozen=True)
class Timed:
    """The samples of kernels by key, the reference's time on a quiet machine, and why kernels have no samples.

    `lost` is what ended it before its time (the device does not answer any more, or the reference does not run): the
    samples up to then count.
    """

    samples: dict[str, Samples]
    reference_s: float
    failed: dict[str, str]
    lost: RunError | None = None


def time_kernels(
    works: Mapping[str, KernelWork],
    reference: KernelWork,
    device: Device,
    protocol: KernelProtocol | None = None,
    known_reference_s: float | None = None,
    store: KernelStore | None = None,
    limit_s: float = 600.0,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Timed:
    """Compiles (or takes from the store) and times kernels.

    Args:
        works: By key; where time is short the first ones are the exact ones.
        reference: Timed beside every sample; it should take some 10 to 100 microseconds.
        device: Must be here.
        protocol: How often.
        known_reference_s: What the reference took on a quiet machine before; None where that is not known.
        store: Of compiled kernels; by default the user's.
        limit_s: No round begins after so many seconds of measuring.
        advance: Told how many kernels are settled, and of how many.

    Raises:
        CompileError: the kernels cannot be linked.
    """
    protocol, store = protocol or KernelProtocol(), store or KernelStore()
    samples: dict[str, Samples] = {}
    failed: dict[str, str] = {}
    found: list[Samples] = []
    best = known_reference_s
    with tempfile.TemporaryDirectory(prefix="planish-kernels-") as folder:
        groups = list(_linked(works, reference, device, Path(folder), store, failed))
        start = time.monotonic()

        def waiting(group: _Group, exact: float = 0.0) -> set[str]:
            return {
                key for key in group.keys if key not in failed and open_samples(samples.get(key), best, exact=exact)
            }

        def measure(group: _Group, wanted: set[str]) -> None:
            nonlocal best
            keys = [key for key in group.keys if key in wanted]
            with device_lock(device):
                timed = _round(group, keys, works, reference, device, protocol, failed, quiet_limit_s(best))
            for key, new in timed.items():
                samples[key] = samples.get(key, Samples()) + new
                found.append(new)
            if found:
                seen = best_reference_s(found)
                best = seen if known_reference_s is None else min(seen, known_reference_s)
            advance(sum(not open_samples(value, best) for value in samples.values()), len(works))

        try:
            for number in range(protocol.rounds):
                left = [group for group in groups if waiting(group)]
                if not left or (number and time.monotonic() - start > limit_s):
                    break
                for group in left:
                    measure(group, waiting(group))
            for group in groups:
                for _ in range(protocol.rounds):
                    inexact = waiting(group, _EXACT) - waiting(group)
                    if not inexact or time.monotonic() - start > limit_s:
                        break
                    measure(group, inexact)
        except DeviceLost as lost:
            return Timed(samples, best or 0.0, failed, lost)
    return Timed(samples, best or 0.0, failed)


@dataclass(frozen=True)
class _Group:
    library: Path
    keys: tuple[str, ...]


def _linked(
    works: Mapping[str, KernelWork],
    reference: KernelWork,
    device: Device,
    folder: Path,
    store: KernelStore,
    failed: dict[str, str],
) -> Iterator[_Group]:
    target = tvm_target(device)
    keys = list(works)
    for start in range(0, len(keys), _TOGETHER):
        group = keys[start : start + _TOGETHER]
        kernels = {work.kernel.symbol: work.kernel for work in [reference, *(works[key] for key in group)]}

        def lost(kernel: Kernel, error: Exception, group: Sequence[str] = group) -> None:
            """One kernel that TVM cannot compile costs its own time only."""
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            failed.update({key: reason for key in group if works[key].kernel.symbol == kernel.symbol})

        objects = kernel_objects(list(kernels.values()), target, folder, store, lost)
        library = folder / f"kernels{start}.so"
        command = [linker(device) or "c++", "-shared", "-fPIC", "-o", str(library), *(str(file) for file in objects)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(
                f"kernels cannot be linked: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )
        for file in objects:
            file.unlink(missing_ok=True)
        yield _Group(library, tuple(group))


def _round(
    group: _Group,
    keys: Sequence[str],
    works: Mapping[str, KernelWork],
    reference: KernelWork,
    device: Device,
    protocol: KernelProtocol,
    failed: dict[str, str],
    quiet_s: float,
) -> dict[str, Samples]:
    """One child's samples; a kernel that ends the child is named in `failed` and the others run again without it.

    Where they do not end in time together, they run in two children, and so on: a kernel is to blame only alone.

    Raises:
        DeviceLost: the device is behind RPC and does not answer.
    """
    left = list(keys)
    while left:
        request = {
            "library": str(group.library),
            "runs": protocol.runs,
            "quiet_s": quiet_s,
            "sample_s": protocol.sample_s,
            "before_s": protocol.before_s,
            "threads": device.threads,
            "rpc": device.rpc,
            "time_limit_s": protocol.time_limit_s,
            "kernels": [_entry("reference", reference), *(_entry(key, works[key]) for key in left)],
        }
        with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            json.dump(request, file)
            file.flush()
            command = [sys.executable, "-m", "planish.compilers.kernel_child", file.name]
            try:
                done = subprocess.run(
                    command, capture_output=True, encoding="utf-8", errors="replace", check=False,
                    stdin=subprocess.DEVNULL, timeout=protocol.time_limit_s, env=environment(device),
                )  # fmt: skip
                code, output, errors = done.returncode, done.stdout, done.stderr
            except subprocess.TimeoutExpired as error:
                output = (
                    error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else error.stdout or ""
                )
                code, errors = 1, f"it did not end within {protocol.time_limit_s:.0f} s"
                if device.rpc and not output:
                    raise DeviceLost(
                        f"device {device.name} gave no session within {protocol.time_limit_s:.0f} s"
                    ) from None
                if away := gone(device):
                    raise DeviceLost(f"device {device.name} is lost: {away}") from None
                if len(left) > 1:
                    half = len(left) // 2
                    parts = (left[:half], left[half:])
                    first, second = (
                        _round(group, p, works, reference, device, protocol, failed, quiet_s) for p in parts
                    )
                    return first | second
        lines = [json.loads(line) for line in output.splitlines() if line.startswith("{") and line.endswith("}")]
        if code == 0:
            return {
                line["key"]: Samples(tuple(line["run_s"]), tuple(line["reference_s"]))
                for line in lines
                if "key" in line
            }
        last = (errors.strip().splitlines() or ["it failed"])[-1]
        if code == EXIT_LOST or (device.rpc and not lines):
            raise DeviceLost(f"device {device.name} is lost: {last}")
        culprit = next((line["touch"] for line in reversed(lines) if "touch" in line), "reference")
        reason = f"crashed with signal {-code}" if code < 0 else last
        if culprit == "reference":
            failed |= dict.fromkeys(left, f"the reference kernel {reason}")
            return {}
        failed[culprit] = reason
        left.remove(culprit)
    return {}


def _entry(key: str, work: KernelWork) -> dict[str, object]:
    return {"key": key, "symbol": work.kernel.symbol, "arguments": [list(argument) for argument in work.arguments]}
