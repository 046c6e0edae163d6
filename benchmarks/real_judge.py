"""Samplers on a real task: results kept by candidate on disk, hypervolume against charged evaluations."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from micro_judge import charged_curve, curve_row, seeded, volume

Row = dict[str, Any]
DATA = Path(os.environ.get("PLANISH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TASKS: dict[str, dict[str, Any]] = {
    "digits": {"model": "digits-resnet", "data": "digits32"},
    "cifar10": {
        "model": "cifar10-resnet20",
        "weights": str(DATA / "weights" / "cifar10_resnet20.pt"),
        "data": f"cifar10:{DATA / 'cifar10'}?validation=test",
    },
}
# Block types that shrink, what prunes, and so on: one family at a time.
FAMILIES = ("prune", "bits", "rank", "block")
_PROXY = 512


def task_rows(
    task: str,
    samplers: Sequence[str],
    seeds: Sequence[int],
    most: int,
    ours: int,
    latency: str,
    cache: Path,
    workers: int,
    families: bool,
) -> list[Row]:
    """A row for every method: hypervolumes at a few charged budgets and the area of what is missing, by seed."""
    rows = []
    with Judge(task, latency, cache, workers) as judge:
        for sampler in ("planish", *samplers):
            started = time.monotonic()
            curves = np.array([judge.curve(sampler, seed, most) for seed in seeds])
            row = curve_row("hypervolume", task, sampler, curves, ours, time.monotonic() - started)
            rows.append(row | {"library_charge": judge.charge})
            print(rows[-1]["sampler"], rows[-1]["hypervolume"], file=sys.stderr, flush=True)
    if families:
        for name in (*FAMILIES, "all"):
            started = time.monotonic()
            chosen = FAMILIES if name == "all" else (name,)
            with Judge(task, latency, cache, workers, chosen) as judge:
                curves = np.array([judge.curve("planish", seed, ours) for seed in seeds])
            rows.append(curve_row("hypervolume", f"{task} families", name, curves, ours, time.monotonic() - started))
            print(name, rows[-1]["hypervolume"], file=sys.stderr, flush=True)
    return rows


class Judge:
    """A task's evaluator on local Ray workers, with everything that was ever evaluated."""

    def __init__(
        self, task: str, latency: str, cache: Path, workers: int, families: Sequence[str] | None = None
    ) -> None:
        from planish.compilers.kernel_times import times_version
        from planish.search.config import load_spec
        from planish.search.evaluate import Evaluator
        from planish.search.predicting import keep_times

        keys = {**TASKS[task], "device": "cpu", "search.proxy_images": _PROXY, "preset": "quick"}
        if families is not None:
            keys["space.families"] = list(families)
        self.spec = load_spec(None, keys)
        self.evaluator = Evaluator(self.spec)
        self.space = self.evaluator.proposal.space
        self.latency = latency
        # Latencies of other kernels, or by another table, are not to be mixed with these.
        self.folder = cache.resolve() / task / times_version()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.evaluator.times = keep_times(self.evaluator, self.folder)
        self.file = self.folder / f"{latency}.jsonl"
        self.known: dict[str, dict[str, float] | None] = {}
        if self.file.exists():
            for text in self.file.read_text(encoding="utf-8").splitlines():
                entry = json.loads(text)
                self.known[entry["key"]] = entry["values"]
        self.workers = workers or os.cpu_count() or 1

    def __enter__(self) -> Judge:
        from planish.search.shipping import stored
        from planish.search.workers import Pool, Shared, cluster

        self._cluster = cluster("local", self.workers)
        self._cluster.__enter__()
        shared = Shared(self.spec, task=stored(self.evaluator.task), times=self.evaluator.times)
        self.pool = Pool(shared, self.workers)
        self._learn()
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.close()
        self._cluster.__exit__(*error)

    def _learn(self) -> None:
        """The original's values, the library, and what that costs in evaluations."""
        from planish.search.library_phase import LIBRARY, library
        from planish.search.planish_sampler import SamplerTask
        from planish.search.progress import Progress

        predictor = self.evaluator.predictor
        print(
            f"latencies are {self.latency}; the model, {predictor.model('cpu').basis}, "
            f"says {predictor.error('cpu'):.1%} of itself",
            file=sys.stderr,
            flush=True,
        )
        self.original = self.values([self.space.original()])[0]
        assert self.original is not None
        # For the charge, candidates as searches evaluate them, on all workers at once; the first ones warm these.
        rng = np.random.default_rng(0)
        typical = [self.space.sample(rng) for _ in range(6 * self.workers)]
        self._evaluate(typical[: 2 * self.workers])
        started = time.monotonic()
        self._evaluate(typical[2 * self.workers :])
        each = (time.monotonic() - started) / (4 * self.workers)
        (self.folder / LIBRARY).unlink(missing_ok=True)
        started = time.monotonic()
        table = library(self.evaluator, self.folder, self.pool, self.workers, ["latency[cpu]"], Progress(None))
        self.charge = max(1, round((time.monotonic() - started) / each))
        print(f"an evaluation takes {each:.2f} s, the library {self.charge} evaluations", file=sys.stderr, flush=True)
        shape = self.evaluator.traced.output_shape
        self.task = SamplerTask(
            table, self.spec.targets(), (self.original["accuracy"], 1.0), {}, classes=shape[1], trained=False
        )

    def curve(self, sampler: str, seed: int, most: int) -> list[float]:
        """The hypervolume after every charged evaluation, the original's included."""
        from planish.search.sampler import OPENS, WITH_TABLE, Proposer

        sampler, begin = seeded(sampler, self.space)
        library = self.charge if sampler in WITH_TABLE else 0
        losses = [[1 - self.original["accuracy"], 1.0]]

        def evaluate(candidates: Sequence[Any]) -> Iterator[float]:
            for candidate, values in zip(candidates, self.values(candidates), strict=True):
                told = None if values is None else [values["accuracy"], self.ratio(values)]
                proposer.tell(candidate, told, values.get("divergence") if values else None)
                if told:
                    losses.append([1 - told[0], told[1]])
                yield volume(np.array(losses))

        with tempfile.TemporaryDirectory() as folder:
            proposer = Proposer(
                Path(folder) / "study.log", self.space, sampler, seed, ("maximize", "minimize"),
                self.evaluator.simplified,
                task=None if sampler in OPENS else self.task,
            )  # fmt: skip
            found = charged_curve(proposer, sampler, self.task, library, most, 0.0, evaluate, begin)
            proposer.close()
        return found

    def values(self, candidates: Sequence[Any]) -> list[dict[str, float] | None]:
        """Accuracy, divergence and latency relative to the original of every candidate; None for one that failed."""
        missing = list({c.key(): c for c in candidates if c.key() not in self.known}.values())
        if missing:
            found = self._evaluate(missing)
            with self.file.open("a", encoding="utf-8") as file:
                for candidate, values in zip(missing, found, strict=True):
                    self.known[candidate.key()] = values
                    file.write(json.dumps({"key": candidate.key(), "values": values}) + "\n")
        return [self.known[candidate.key()] for candidate in candidates]

    def _evaluate(self, candidates: Sequence[Any]) -> list[dict[str, float] | None]:
        from planish.search.workers import Failure

        method = "foresee" if self.latency == "predicted" else "score"
        found = self._run(method, candidates, [()] * len(candidates))
        if self.latency == "measured":
            found = self._timed(found)
        values: list[dict[str, float] | None] = []
        for result in found:
            if isinstance(result, Failure):
                values.append(None)
                continue
            own = {name: float(result[name]) for name in ("accuracy", "divergence") if name in result}
            own["latency_s"] = float(result["latency_s"]["cpu"]["value"])
            if self.latency == "measured":
                own["ratio"] = float(result["latency_ratio"]["cpu"])
            values.append(own)
        return values

    def ratio(self, values: dict[str, float]) -> float:
        """Latency relative to the original: as measured beside it, or by the same model."""
        return values["ratio"] if "ratio" in values else values["latency_s"] / self.original["latency_s"]

    def _timed(self, found: list[Any]) -> list[Any]:
        from planish.search.measuring import measure_trials
        from planish.search.workers import Failure

        folders = {
            n: self.folder / "work" / str(n) for n, result in enumerate(found) if not isinstance(result, Failure)
        }
        original = self.folder / "original"
        if not (original / "artifact").exists():
            from planish.search.evaluate import Job

            job = Job(0, self.space.original(), 0, original)
            self.evaluator.compile(self.evaluator.build(job.candidate), job, "artifact")
        timed = measure_trials(self.evaluator, folders, original, "untrained", final=False)
        return [
            timed[n] if isinstance(timed.get(n, r), Failure) else {**r, **timed.get(n, {})} for n, r in enumerate(found)
        ]

    def _run(self, method: str, candidates: Sequence[Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        from planish.search.evaluate import Job

        results: dict[int, Any] = {}
        jobs = [
            (Job(n, candidate, 0, self.folder / "work" / str(n)), extra)
            for n, (candidate, extra) in enumerate(zip(candidates, arguments, strict=True))
        ]
        self.pool.run(method, jobs, lambda job, result: results.__setitem__(job.number, result))
        return [results[n] for n in range(len(jobs))]
