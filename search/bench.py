"""`planish bench`: an exported model checked against its stored outputs and timed beside the original."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ..compilers.compiler import RunError
from ..compilers.cpu_features import device_of, lacking
from ..compilers.manifest import NAME as MANIFEST
from ..compilers.manifest import Manifest, read
from ..compilers.registry import compiler_for
from ..compilers.runner import check
from ..hwmodels.measurement import MeasureProtocol
from .errors import UserError
from .quantities import quantity

ORIGINAL = "original"
_MODEL = "exported"
_RUNS = 30
_PROCESSES = 3
_RETRIES = 1
# Until a model that does not end is given up; and what a timed run may take, in times of the check.
_CHECK_S, _RUN_CHECKS = 600.0, 16


def bench(path: Path, runs: int | None) -> dict[str, object]:
    """Checks an artifact and times it, in turns with the original beside it where there is one.

    Everything runs in fresh processes that have the artifact's runtime only, with as many threads as it was compiled
    for.

    Args:
        path: What `planish export` wrote, or any compiled model's folder.
        runs: Timed runs in each of three processes; None: 30.

    Returns:
        A JSON object: `parity_ok` (always true: anything else raises), `max_error` and `tolerance` relative to the
        largest output, `latency_s` (median) with `ci95`, `energy_j` (of one run, by the counters of the processor's
        packages; None where they cannot be read), `original_latency_s` and `speedup` (None without an original),
        `threads`, `batch`, `device`, and `drifted` (see `Measurement`).

    Raises:
        UserError: this CPU lacks what the model was compiled for, or the model crashes, hangs or computes something
            else than when it was stored.
        ManifestError: the folder is no artifact, or its files are missing or changed.
        DeviceError: its device is not usable here.
        ValueError: too few runs.
    """
    protocol = MeasureProtocol(runs=_RUNS if runs is None else runs, processes=_PROCESSES, retries=_RETRIES)
    least_s = protocol.time_limit_s
    manifest = _read(path)
    artifacts = {_MODEL: path}
    if (path / ORIGINAL / MANIFEST).is_file():
        _read(path / ORIGINAL)
        # First, as the reference that tells whether the machine was quiet.
        artifacts = {ORIGINAL: path / ORIGINAL, _MODEL: path}
    device = device_of(manifest)
    compiler = compiler_for(device, manifest.compiler)
    try:
        start = time.monotonic()
        error = check(path, device, time_limit_s=_CHECK_S)
        # The check takes at least one run; a process takes some for every timed one, of the original longer ones.
        limit_s = max(least_s, _RUN_CHECKS * protocol.runs * (time.monotonic() - start))
        protocol = replace(protocol, time_limit_s=limit_s)
        measured = compiler.measure(artifacts, device, protocol)
    except RunError as reason:
        raise UserError(f"{path} is not usable: {reason}; export it again") from None
    own, base = measured[_MODEL], measured.get(ORIGINAL)
    return {
        "folder": str(path),
        "parity_ok": True,
        "max_error": error,
        "tolerance": manifest.tolerance,
        "latency_s": own.latency_s,
        "ci95": list(own.ci95),
        "energy_j": own.energy_j,
        "original_latency_s": base.latency_s if base else None,
        "speedup": base.latency_s / own.latency_s if base else None,
        "threads": device.threads,
        "batch": manifest.inputs[0].shape[0],
        "device": manifest.device,
        "drifted": own.drifted,
    }


def bench_text(result: Mapping[str, object]) -> str:
    """The result of `bench` for people."""
    low, high = (quantity(value, "s") for value in _list(result["ci95"]))
    threads = "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"
    where = f"on {str(result['device']).partition('?')[0]}, {threads}, batch {result['batch']}"
    lines = [
        f"{result['folder']}: computes what was stored with it ({error_text(result)})",
        f"latency   {quantity(result['latency_s'], 's')} {where} (95 % interval of the median: {low} to {high})",
    ]
    if result["energy_j"] is not None:
        lines.append(
            f"energy    {quantity(result['energy_j'], 'J')} a run, by the counters of the processor's packages"
        )
    if result["speedup"] is not None:
        speedup = f"{result['speedup']:.3g}x as fast as the original"
        lines.append(f"original  {quantity(result['original_latency_s'], 's')}, in turns with it: {speedup}")
    if result["drifted"]:
        share = f"{MeasureProtocol().drift:.0%}"
        lines.append(f"the machine was not quiet: from its first to its last third the timing moved more than {share}")
    return "\n".join(lines)


def error_text(result: Mapping[str, object]) -> str:
    """How far outputs are from the stored ones, and may be, relative to the largest output."""
    return (
        f"differs by {_number(result['max_error'])} of the largest output, allowed are {_number(result['tolerance'])}"
    )


def _read(path: Path) -> Manifest:
    if not (path / MANIFEST).exists() and path.is_dir():
        inside = sorted(found.parent.name for found in path.glob(f"*/{MANIFEST}") if found.parent.name != ORIGINAL)
        if inside:
            raise UserError(f"{path} holds a model for each of several devices; name one: {path / inside[0]}")
    manifest = read(path)
    absent = lacking(manifest.target)
    if absent:
        raise UserError(
            f"{path} was compiled for a CPU that has what this one lacks: {absent}; run it there, or search on a "
            "machine like this one"
        )
    return manifest


def _number(value: object) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []
