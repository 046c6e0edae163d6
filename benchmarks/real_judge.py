"""Samplers on a real task: results kept by candidate on disk, hypervolume against charged evaluations.

With predicted latencies the samplers that have a table of options know what the judge goes by, as a search knows what
`planish profile` measured: what that took is not charged. With measured ones they know the table alone.
"""

from __future__ import annotations

import hashlib
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
# Networks of fronts that are compiled and timed before they are noted.
_TIMED_TOGETHER = 32
_REPOSITORY = Path(__file__).resolve().parents[1]
# What accuracies, latencies and the charge of the library come from; rows come from what proposes, too.
_EVALUATION = (
    "spaces/*.py", "hwmodels/*.py", "compilers/**/*.py", "search/evaluate.py", "search/score.py", "search/fitted.py",
    "search/predicting.py", "search/library*.py", "search/data*.py", "benchmarks/real_judge.py",
)  # fmt: skip
_ALL = ("spaces/*.py", "hwmodels/*.py", "compilers/**/*.py", "search/*.py", "benchmarks/*_judge.py")


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
    times_fronts: bool = False,
) -> list[Row]:
    """A row for every method: hypervolumes at a few charged budgets and the area of what is missing, by seed.

    Every row is kept beside the evaluations as soon as it is whole.
    """
    rows = []
    with Judge(task, latency, cache, workers) as judge:
        for sampler in ("planish", *samplers):
            rows.append(judge.row(task, sampler, sampler, seeds, most, ours))
            if times_fronts:
                rows[-1] = judge.with_timed_fronts(rows[-1])
        if families:
            rows.append(judge.row(f"{task} families", "all", "planish", seeds, ours, ours))
    for name in FAMILIES if families else ():
        with Judge(task, latency, cache, workers, (name,)) as judge:
            rows.append(judge.row(f"{task} families", name, "planish", seeds, ours, ours))
    return rows


def digest(patterns: Sequence[str]) -> str:
    """Of the repository's files of these names."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in _REPOSITORY.glob(pattern)}):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def read_lines(file: Path) -> list[Row]:
    """The whole lines of a file that a kill may have cut short; the rest goes, so that what follows begins a line."""
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return [json.loads(line) for line in whole.splitlines()]


class Judge:
    """A task's evaluator on local Ray workers, with everything that was ever evaluated."""

    def __init__(self, task: str, latency: str, cache: Path, workers: int, families: Sequence[str] = FAMILIES) -> None:
        from planish.compilers.kernel_times import times_version
        from planish.search.config import load_spec
        from planish.search.evaluate import Evaluator
        from planish.search.predicting import keep_times

        keys = {**TASKS[task], "device": "cpu", "search.proxy_images": _PROXY, "preset": "quick"}
        keys["space.families"] = list(families)
        self.spec = load_spec(None, keys)
        self.evaluator = Evaluator(self.spec)
        self.space = self.evaluator.proposal.space
        self.latency = latency
        # What other code found, or another table, is not to be mixed with this.
        self.folder = cache.resolve() / task / f"{times_version()}.{digest(_EVALUATION)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.evaluator.times = keep_times(self.evaluator, self.folder)
        self.file = self.folder / f"{latency}.jsonl"
        self.known: dict[str, dict[str, float] | None] = {}
        for entry in read_lines(self.file):
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
        from planish.search.planish_sampler import SamplerTask

        predictor = self.evaluator.predictor
        print(
            f"latencies are {self.latency}; the model, {predictor.model('cpu').basis}, "
            f"says {predictor.error('cpu'):.1%} of itself",
            file=sys.stderr,
            flush=True,
        )
        self.original = self.values([self.space.original()])[0]
        shape = self.evaluator.traced.output_shape
        self.charge, table = self._charge()
        print(f"the library counts as {self.charge} evaluations", file=sys.stderr, flush=True)
        self.task = SamplerTask(
            table, self.spec.targets(), (self.original["accuracy"], 1.0), {}, classes=shape[1], trained=False
        )

    def _charge(self) -> tuple[int, Any]:
        """The library, and how many evaluations making it took: timed once for a kept folder."""
        from planish.search.atomic import write_json
        from planish.search.library_phase import LIBRARY, library
        from planish.search.progress import Progress

        def made() -> Any:
            return library(self.evaluator, self.folder, self.pool, self.workers, ["latency[cpu]"], Progress(None))

        kept = self.folder / f"charge-{self.latency}-{'-'.join(self.spec.space.families)}-{self.workers}.json"
        if kept.exists():
            return int(json.loads(kept.read_text(encoding="utf-8"))["charge"]), made()
        # Candidates as searches evaluate them, on all workers at once; the first ones warm these.
        rng = np.random.default_rng(0)
        typical = [self.space.sample(rng) for _ in range(6 * self.workers)]
        self._evaluate(typical[: 2 * self.workers])
        started = time.monotonic()
        self._evaluate(typical[2 * self.workers :])
        each = (time.monotonic() - started) / (4 * self.workers)
        (self.folder / LIBRARY).unlink(missing_ok=True)
        started = time.monotonic()
        table = made()
        seconds = time.monotonic() - started
        entry = {"charge": max(1, round(seconds / each)), "library_s": seconds, "evaluation_s": each}
        write_json(kept, entry)
        return int(entry["charge"]), table

    def row(self, task: str, name: str, sampler: str, seeds: Sequence[int], most: int, ours: int) -> Row:
        """A method's row; where the folder has it from the same code, that one."""
        file = self.folder / "rows.jsonl"
        key = [task, name, sampler, list(seeds), most, ours, self.latency, self.charge, digest(_ALL)]
        row: Row | None = next((entry["row"] for entry in read_lines(file) if entry["key"] == key), None)
        if row is None:
            started = time.monotonic()
            found = [self.curve(sampler, seed, most) for seed in seeds]
            curves = np.array([[value for value, _ in curve] for curve, _ in found])
            row = curve_row("hypervolume", task, name, curves, ours, time.monotonic() - started)
            row["library_charge"] = self.charge
            # Of what was evaluated when the method is compared.
            compared = ours if sampler == "planish" else most
            row["fronts"] = [self._front(told[: curve[compared][1]]) for curve, told in found]
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"key": key, "row": row}) + "\n")
        print(name, row["hypervolume"], file=sys.stderr, flush=True)
        return row

    def with_timed_fronts(self, row: Row) -> Row:
        """A method's row with the hypervolumes of its fronts with latencies as timed beside the original.

        What is searched by predicted latencies is judged by measured ones where it counts: all that a front is made of
        is compiled and timed.
        """
        fronts = [[(self.space.decode(indices), loss) for indices, loss in front] for front in row["fronts"]]
        ratios = self._ratios([candidate for front in fronts for candidate, _ in front])
        volumes = []
        for front in fronts:
            losses = [[1 - self.original["accuracy"], 1.0]]
            losses += [[loss, ratio] for c, loss in front if (ratio := ratios[c.key()]) is not None]
            volumes.append(volume(np.array(losses)))
        each = {candidate.key() for front in fronts for candidate, _ in front}
        errors = [
            abs(self.ratio(values) / ratio - 1)
            for key in each
            if (ratio := ratios[key]) is not None and (values := self.known[key]) is not None
        ]
        timed = {"hypervolume": volumes, "networks": len(errors), "failed": len(each) - len(errors)}
        timed["median_error"] = float(np.median(errors)) if errors else None
        print(row["sampler"], "timed", timed, file=sys.stderr, flush=True)
        return {**row, "timed": timed}

    def _front(self, told: Sequence[tuple[Any, list[float]]]) -> list[tuple[list[int], float]]:
        """Choices and error of every evaluated candidate that no other one beats, the original left out."""
        from planish.search.pareto import non_dominated

        found = {candidate.key(): (candidate, losses) for candidate, losses in told}
        points = np.array([[1 - self.original["accuracy"], 1.0], *(losses for _, losses in found.values())])
        return [
            ([int(index) for index in self.space.encode(candidate)], losses[0])
            for (candidate, losses), is_best in zip(found.values(), non_dominated(points)[1:], strict=True)
            if is_best
        ]

    def _ratios(self, candidates: Sequence[Any]) -> dict[str, float | None]:
        """Measured latency relative to the original, by key; None where one could not be compiled or run."""
        from planish.search.workers import Failure

        file = self.folder / "timed.jsonl"
        known: dict[str, float | None] = {entry["key"]: entry["ratio"] for entry in read_lines(file)}
        missing = list({c.key(): c for c in candidates if c.key() not in known}.values())
        for start in range(0, len(missing), _TIMED_TOGETHER):
            part = missing[start : start + _TIMED_TOGETHER]
            found = self._timed(self._run("score", part, [()] * len(part)))
            with file.open("a", encoding="utf-8") as lines:
                for candidate, result in zip(part, found, strict=True):
                    ratio = None if isinstance(result, Failure) else float(result["latency_ratio"]["cpu"])
                    known[candidate.key()] = ratio
                    lines.write(json.dumps({"key": candidate.key(), "ratio": ratio}) + "\n")
        return known

    def curve(
        self, sampler: str, seed: int, most: int
    ) -> tuple[list[tuple[float, int]], list[tuple[Any, list[float]]]]:
        """A search's course.

        Returns:
            After every charged evaluation, the original's included, the hypervolume and how many candidates are told;
            and these with their losses.
        """
        from planish.search.sampler import OPENS, WITH_TABLE, Proposer

        sampler, begin = seeded(sampler, self.space)
        # Twins are charged once, as to the samplers that begin so by themselves.
        begin = list({self.evaluator.simplified(candidate).key(): candidate for candidate in begin}.values())
        library = self.charge if sampler in WITH_TABLE else 0
        losses = [[1 - self.original["accuracy"], 1.0]]
        succeeded: list[Any] = []

        def state() -> tuple[float, int]:
            return volume(np.array(losses)), len(succeeded)

        def evaluate(candidates: Sequence[Any]) -> Iterator[tuple[float, int]]:
            for candidate, values in zip(candidates, self.values(candidates), strict=True):
                told = None if values is None else [values["accuracy"], self.ratio(values)]
                known = values and {name: v for name, v in values.items() if name == "divergence"}
                proposer.tell(candidate, told, known)
                if told:
                    losses.append([1 - told[0], told[1]])
                    succeeded.append(candidate)
                yield state()

        with tempfile.TemporaryDirectory() as folder:
            proposer = Proposer(
                Path(folder) / "study.log", self.space, sampler, seed, ("maximize", "minimize"),
                self.evaluator.simplified,
                task=None if sampler in OPENS else self.task,
            )  # fmt: skip
            found = charged_curve(proposer, sampler, self.task, library, most, state(), evaluate, begin)
            proposer.close()
        return found, list(zip(succeeded, losses[1:], strict=True))

    def values(self, candidates: Sequence[Any]) -> list[dict[str, float] | None]:
        """Accuracy, divergence and latency relative to the original of every candidate; None for one that failed."""
        missing = list({c.key(): c for c in candidates if c.key() not in self.known}.values())
        if missing:
            found = self._evaluate(missing)
            if missing[0].key() == self.space.original().key() and found[0] is None:
                raise SystemExit("the original cannot be evaluated")  # nothing to remember
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
        from planish.compilers.manifest import NAME as MANIFEST
        from planish.search.evaluate import Job
        from planish.search.measuring import measure_trials
        from planish.search.workers import Failure

        folders = {
            n: self.folder / "work" / str(n) for n, result in enumerate(found) if not isinstance(result, Failure)
        }
        original = self.folder / "original"
        if not (original / "artifact" / MANIFEST).exists():
            job = Job(0, self.space.original(), 0, original)
            self.evaluator.compile(self.evaluator.build(job.candidate), job, "artifact")
        timed = measure_trials(self.evaluator, folders, original, "untrained", final=False)
        whole: list[Any] = []
        for n, result in enumerate(found):
            latency = timed.get(n, result)  # what failed was not timed
            whole.append(latency if isinstance(latency, Failure) else {**result, **latency})
        return whole

    def _run(self, method: str, candidates: Sequence[Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        from planish.search.evaluate import Job

        results: dict[int, Any] = {}
        jobs = [
            (Job(n, candidate, 0, self.folder / "work" / str(n)), extra)
            for n, (candidate, extra) in enumerate(zip(candidates, arguments, strict=True))
        ]
        self.pool.run(method, jobs, lambda job, result: results.__setitem__(job.number, result))
        return [results[n] for n in range(len(jobs))]
