"""`planish profile`: what every layer costs on the device, what is reachable, and what has no options and why."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from ..compilers.kernel_times import database_of
from ..hwmodels.device import Device
from ..hwmodels.load import LoadWatch, wait_for_quiet
from ..hwmodels.rapl import EnergyCounters
from .config import Spec
from .errors import UserError
from .json_text import mapping
from .latency_table import LatencyTable, build_table
from .measuring import measure_trials
from .option_gains import option_gains
from .peaks import with_measured_peaks
from .progress import Progress
from .reachable import check_answers
from .slow_sites import LayerCost, layer_costs
from .table_measuring import TableLimits, refuse_loaded
from .tile_measuring import measure_tiles
from .workers import Failure

if TYPE_CHECKING:
    from ..compilers.tvm_workloads import Plan
    from .evaluate import Evaluator, Job


_log = logging.getLogger(__name__)


def profile(
    spec: Spec, progress: Progress, *, table: bool = True, limits: TableLimits | None = None, tiles: bool = False
) -> dict[str, object]:
    """Compiles the original and the cheapest corners of its space, and builds its latency table, which times them.

    On a device that is only described nothing is timed: its figures are predicted, and `predicted_error` says how far
    they may be off.

    Args:
        spec: Of the search that is to come.
        progress: Told of every step.
        table: Whether to build the table: two to five minutes on a device that was never seen, then under one.
        limits: Of the table.
        tiles: Whether to measure how the model's convolutions are computed fastest, and keep it for the user.

    Returns:
        By device: the original's latency, a row a layer (MACs, bytes, seconds, share, the roofline's bound and what
        binds; seconds are measured on this machine and predicted for any other), the reachable range of every cost, the
        latency model with its own error, and what every option alone would gain, with the reason where it gains
        nothing; also the space's size, its options a site, and what was left out with its reason.

    Raises:
        ValueError: the task or a device is not usable, others use the cores that measuring needs, or used them
            meanwhile; with a table also: the database of kernel times is damaged.
    """
    import torch

    from ..compilers.compiler import RunError
    from ..compilers.remote import DeviceLost
    from ..compilers.runner import site_times
    from ..hwmodels.measurement import MeasureProtocol
    from .evaluate import Evaluator, Job
    from .sampler import strongest

    torch.set_num_threads(1)
    progress.begin("load and trace", 1)
    evaluator = Evaluator(spec)
    progress.advance()
    check_answers(evaluator.devices.values(), predicted=True)
    described = [label for label, device in evaluator.devices.items() if not device.timed]
    evaluator.asks_energy = True
    here = [device for device in evaluator.devices.values() if device.here]
    if table:  # what would refuse a table is told before anything is spent
        for device in evaluator.devices.values():
            database_of(device).times()
    for device in here:
        wait_for_quiet(device.threads)
    space = evaluator.proposal.space
    candidates = [space.original(), *(strongest(space) if space.choices else [])]
    with tempfile.TemporaryDirectory(prefix="planish-profile-") as folder:
        jobs = [Job(n, candidate, spec.seed, Path(folder, str(n))) for n, candidate in enumerate(candidates)]
        progress.begin("compile", len(jobs))
        metrics: dict[int, dict[str, object]] = {}
        plans: dict[int, dict[str, Plan]] = {}
        for job in jobs:
            plans[job.number] = {}
            try:
                metrics[job.number] = _compiled(evaluator, job, described, plans[job.number])
            except (ValueError, RuntimeError) as error:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                if job.number == 0:
                    raise UserError(f"the model as it is cannot be compiled: {reason}") from error
                _log.warning("one of the cheapest candidates cannot be compiled and is left out: %s", reason)
            progress.advance()
        jobs = [job for job in jobs if job.number in metrics]
        in_tables = [
            label
            for label, device in evaluator.devices.items()
            if table and device.timed and evaluator.compilers[label].name == "tvm"
        ]
        tables: dict[str, LatencyTable] = {}
        for label in in_tables:
            made = {
                job.candidate.key(): (
                    plans[job.number][label],
                    evaluator.artifact_folder(job.folder, label, "artifact"),
                )
                for job in jobs
            }
            try:
                tables[label] = build_table(
                    evaluator, label, database_of(evaluator.devices[label]), progress,
                    seed=spec.seed, limits=limits, more=[job.candidate for job in jobs], made=made,
                )  # fmt: skip
            except DeviceLost:
                raise
            except RunError as error:
                raise UserError(f"nothing can be timed on {label}: {error}") from error
            if tables[label].kernel_error is not None:  # it can tell of kernels that were not measured
                evaluator.predictor.use(label, tables[label].model)
            _add_latencies(jobs, label, tables[label], metrics)
        # A table does not tell what a run uses.
        counted = here and EnergyCounters.here() is not None
        if counted or any(device.timed and label not in in_tables for label, device in evaluator.devices.items()):
            progress.begin("time", 1)
            _time(evaluator, jobs, metrics)
            progress.advance()
        devices: dict[str, dict[str, object]] = {}
        for label, device in evaluator.devices.items():
            if device.here:
                artifact = evaluator.artifact_folder(jobs[0].folder, label, "artifact")
                protocol = MeasureProtocol(time_limit_s=spec.measure.time_limit_s)
                try:
                    with LoadWatch() as watch:
                        calls = site_times({"original": artifact}, device, protocol)["original"]
                    refuse_loaded(watch, device)
                except RunError as error:  # as of a model that takes seconds, of which each kernel would run often
                    _log.warning("the layers' times on %s are predicted: %s", label, error)
                    calls = evaluator.predictor.calls(space.original(), label)
            else:  # its kernels cannot be told from each other from here
                calls = evaluator.predictor.calls(space.original(), label)
            peaks = with_measured_peaks(device, evaluator.compilers[label]) if device.timed else device
            rows = layer_costs(evaluator.traced, peaks, calls)
            devices[label] = _device(label, peaks, rows, calls, metrics)
            if label in tables:
                devices[label]["latency_model"] = _table(tables[label])
            if tiles and device.here and evaluator.compilers[label].name == "tvm":
                devices[label]["tiles"] = measure_tiles(evaluator, label, progress)
            if not device.timed:
                devices[label]["predicted_error"] = evaluator.predictor.error(label)
    for label in evaluator.devices if space.choices else ():
        devices[label]["gains"] = option_gains(evaluator, label)
        devices[label]["gains_from"] = evaluator.predictor.model(label).basis
    return {
        "model": spec.model,
        "devices": devices,
        "candidates": float(space.size()),
        "options": {f"{c.site}:{c.kind.value}": list(c.options) for c in space.choices},
        "left_out": dict(space.left_out),
    }


def _compiled(evaluator: Evaluator, job: Job, described: Sequence[str], plans: dict[str, Plan]) -> dict[str, object]:
    """Compiles a candidate; its costs, with the latencies on devices that are only described."""
    module = evaluator.build(job.candidate) if job.number == 0 else evaluator.skeleton(job.candidate)
    compiled = evaluator.compile(module, job, "artifact", plans)
    predicted = mapping(evaluator.predicted(module)["latency_s"]) if described else {}
    latencies = {label: predicted[label] for label in described}
    return evaluator.costs(module) | compiled | {"latency_s": latencies}


def _time(evaluator: Evaluator, jobs: Sequence[Job], metrics: Mapping[int, dict[str, object]]) -> None:
    """Times candidates beside the original, which is the first; what is known of their latencies stays.

    Raises:
        UserError: it is the original.
        BusyMachine: others used the cores meanwhile.
    """
    folders = {job.number: job.folder for job in jobs}
    with LoadWatch() as watch:
        timed = measure_trials(evaluator, folders, jobs[0].folder, "artifact", final=True)
    for device in evaluator.devices.values():
        if device.here:
            refuse_loaded(watch, device)
    first = timed.get(0)
    if isinstance(first, Failure):
        raise UserError(f"the model as it is cannot be timed: {first}")
    for number, result in timed.items():
        if not isinstance(result, Failure):
            latencies = {**mapping(result.get("latency_s")), **mapping(metrics[number]["latency_s"])}
            metrics[number] |= {**result, "latency_s": latencies}


def _add_latencies(
    jobs: Sequence[Job], label: str, table: LatencyTable, metrics: Mapping[int, dict[str, object]]
) -> None:
    """What candidates took when the table was made; the first of them, the original, must have run.

    Raises:
        UserError: it did not.
    """
    for job in jobs:
        time = table.timed.get(job.candidate.key())
        if time is not None:
            entry = {"value": time.median_s, "ci95": [time.low_s, time.high_s]}
            metrics[job.number]["latency_s"] = {**mapping(metrics[job.number]["latency_s"]), label: entry}
        elif job.number == 0:
            reason = table.failed.get(f"network {job.candidate.key()}", "it was not run")
            raise UserError(f"the model as it is cannot be timed: {reason}")
        if job.number == 0 and time is not None and not time.quiet:
            metrics[0]["drifted"] = True


def _device(
    label: str,
    device: Device,
    rows: list[LayerCost],
    calls: list[tuple[str, str, float]],
    metrics: Mapping[int, Mapping[str, object]],
) -> dict[str, object]:
    total = sum(seconds for _, _, seconds in calls)
    # Where one was not timed its joules are modelled: no range of both kinds.
    measured = bool(metrics[0].get("energy_measured"))
    alike = [m for m in metrics.values() if bool(m.get("energy_measured")) == measured]
    latencies = [value for m in metrics.values() if not isnan(value := _value(m, label))]
    return {
        "title": device.title,
        "threads": device.threads,
        "peaks": {
            "macs_per_s": {str(bits): rate for bits, rate in device.macs_per_s.items()},
            "bytes_per_s": device.bytes_per_s,
            "source": device.source,
        },
        "latency_s": _value(metrics[0], label),
        "latency_ci95": _entry(metrics[0], label).get("ci95"),
        "drifted": bool(metrics[0].get("drifted")),
        "layers": [
            {
                "site": row.site,
                "macs": row.macs,
                "moved_bytes": row.moved_bytes,
                "time_s": row.time_s,
                "share": row.time_s / total if total else None,
                "roofline_share": row.bound_s / row.time_s if row.time_s else None,
                "bound_by": row.bound_by,
            }
            for row in rows
        ],
        "other_time_s": total - sum(row.time_s for row in rows),
        "reachable": {
            name: [min(values), max(values)]
            for name, values in {
                "latency_s": latencies,
                **{
                    key: [float(str(m[key])) for m in among]
                    for key, among in {
                        **{key: list(metrics.values()) for key in ("size_bytes", "macs", "peak_memory_bytes")},
                        "energy_j": alike,
                    }.items()
                    if all(key in m for m in among)
                },
            }.items()
        },
        "energy_measured": measured,
    }


def _table(table: LatencyTable) -> dict[str, object]:
    error = table.held_out
    return {
        **({"carried_over_from": table.source} if table.source else {}),
        "kernels_measured": table.measured,
        "kernels_known": table.known,
        "kernels_predicted": table.left,
        "quiet_share": table.quiet,
        "networks": 0 if error is None else error.count,
        "held_out": None if error is None else {k: None if isnan(v) else v for k, v in asdict(error).items()},
        "kernel_error": table.kernel_error,
        "network_error": table.error,
        "failed": dict(table.failed),
        "notes": list(table.notes),
        "seconds": table.seconds,
    }


def _entry(metrics: Mapping[str, object], label: str) -> Mapping[str, object]:
    return mapping(mapping(metrics.get("latency_s")).get(label))


def _value(metrics: Mapping[str, object], label: str) -> float:
    return float(str(_entry(metrics, label).get("value", "nan")))
