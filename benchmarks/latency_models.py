"""How wrong the latency models are on networks that they were never fitted to, beside simpler models in the same run.

    python benchmarks/latency_models.py            # four spaces, 1 and 2 threads: hours, most of them compiling
    python benchmarks/latency_models.py --quick    # DS-CNN's space, 1 thread, few networks
    python benchmarks/latency_models.py --keep DIR # carry on from what an earlier call with that folder has measured

For every space and number of threads a table is built as `planish profile` builds it, on a database of its own. Then
held-out candidates, random ones and ones near the fast end of the space, are predicted, compiled and timed on a quiet
machine (see docs/latency-models.md), all of them once and then all once more: the lower of the two times counts. Those
that did not meet a quiet machine both times are counted and left out of the errors.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

if TYPE_CHECKING:
    from planish.hwmodels.kernel_database import KernelDatabase
    from planish.hwmodels.table import TableModel
    from planish.hwmodels.workload import Workload
    from planish.search.evaluate import Evaluator

SPACES = ("resnet20", "resnet56", "mobilenetv2-32", "dscnn")
PROBES = 20
# Seconds of timing for every held-out network, at most, and how many are compiled and timed together.
NETWORK_S, TOGETHER = 5.0, 25
# The reference does not tell everything that slows a network down (neighbours that take a share of a cache's bandwidth
# may not slow the reference). What disturbs only adds, and seldom meets a network twice.
PASSES = 2
# Where fewer of a table's kernels met a quiet machine the same profile is asked for again, so often at most.
ENOUGH_QUIET, PROFILES = 0.9, 4

Row = dict[str, Any]


def evaluator_of(net: str, device: str) -> Evaluator:
    """The net with random data: structure is all that latency depends on."""
    import torch
    from nets import NETS, make

    from planish.search.config import load_spec
    from planish.search.data import Data, Split
    from planish.search.evaluate import Evaluator
    from planish.search.tasks import Task

    model = make(net)
    x = torch.randn(8, *NETS[net].shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    split = Split(x, torch.arange(8) % classes)
    data = Data(split, split, split, tuple(str(number) for number in range(classes)))
    spec = load_spec(None, {"model": net, "data": "random", "device": device})
    return Evaluator(spec, Task(model, data, net))


def near_front(space: Any, rng: np.random.Generator, count: int) -> list[Any]:
    """Candidates near the fast end: the strongest and the uniform ones, with a few choices changed at random."""
    from planish.search.sampler import strongest, uniform_policies

    bases = [*strongest(space), *uniform_policies(space)]
    found = {}
    while len(found) < count:
        indices = space.encode(bases[int(rng.integers(len(bases)))]).copy()
        for place in rng.choice(len(indices), size=max(1, len(indices) // 12), replace=False):
            indices[place] = rng.integers(len(space.choices[place].options))
        candidate = space.decode(indices)
        found[candidate.key()] = candidate
    return list(found.values())


@dataclass(frozen=True)
class HeldOut:
    """A held-out network's planned calls, its times, and by how many bytes its memory differs from the plan's."""

    calls: tuple[Workload, ...]
    # In the order that they were taken: those of a quiet machine, or all where it never met one.
    times_s: tuple[float, ...]
    quiet: bool
    memory_error: int

    @property
    def seconds(self) -> float:
        """The time that counts: what disturbs only adds."""
        return min(self.times_s)

    @property
    def spread(self) -> float:
        """By what share the longest time is above the shortest."""
        return max(self.times_s) / min(self.times_s) - 1


def measure(evaluator: Any, label: str, candidates: Sequence[Any], database: Any, kept: Path) -> list[HeldOut]:
    """Every candidate that can be built and timed; what the file `kept` has of a quiet machine is not timed again."""
    from real_judge import read_lines

    from planish.compilers.kernel_times import times_version
    from planish.hwmodels.workload import Workload

    version = times_version()
    found: dict[str, list[Row]] = {}
    for row in read_lines(kept):
        # Rows of before calls were kept are of no use here.
        if row["version"] == version and row["quiet"] and "calls" in row:
            found.setdefault(row["key"], []).append(row)
    by_key = {candidate.key(): candidate for candidate in candidates}

    def quiet(key: str) -> list[Row]:
        return [row for row in found.get(key, []) if row["quiet"]]

    with tempfile.TemporaryDirectory() as folder:
        models = Compiled(evaluator, label, Path(folder))
        for number in range(PASSES):
            missing = [key for key in by_key if len(quiet(key)) <= number]
            if number:  # in other company than before
                np.random.default_rng(number).shuffle(missing)
            for start in range(0, len(missing), TOGETHER):
                new = models.timed([by_key[key] for key in missing[start : start + TOGETHER]], database)
                with kept.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row | {"version": version}) + "\n" for row in new)
                for row in new:
                    found.setdefault(row["key"], []).append(row)
    networks = []
    for key in by_key:
        if rows := quiet(key) or found.get(key):
            calls = tuple(Workload(**w) for w in rows[0]["calls"])
            times, wrong = tuple(row["median_s"] for row in rows), max(row["memory_error"] for row in rows)
            networks.append(HeldOut(calls, times, len(quiet(key)) >= PASSES, wrong))
    return networks


class Compiled:
    """Candidates planned and compiled, each once, and timed beside the reference."""

    def __init__(self, evaluator: Any, label: str, folder: Path) -> None:
        self.evaluator, self.label, self.folder = evaluator, label, folder
        self.device = evaluator.devices[label]
        self.reference: Any = None
        # None where a candidate cannot be compiled.
        self.known: dict[str, tuple[Path, Any] | None] = {}

    def timed(self, candidates: Sequence[Any], database: Any) -> list[Row]:
        """Rows of key, calls, median_s, quiet, memory_error: of those that can be compiled and run."""
        from planish.compilers.manifest import read
        from planish.compilers.network_timer import time_networks
        from planish.hwmodels.quiet import settled

        models = {c.key(): model for c in candidates if (model := self._compiled(c)) is not None}
        if not models:
            return []
        timed = time_networks(
            {key: path for key, (path, _) in models.items()}, self.reference.path, self.device,
            known_reference_s=database.reference_s(f"network {self.reference.manifest.kernels[0][0]}"), rounds=1000,
            limit_s=NETWORK_S * len(models),
        )  # fmt: skip
        rows = []
        for key, samples in timed.samples.items():
            (path, planned), time = models[key], settled(samples, timed.reference_s)
            wrong = abs(planned.working_bytes - read(path).working_bytes)
            row: Row = {"key": key, "median_s": time.median_s, "quiet": time.quiet, "memory_error": wrong}
            rows.append(row | {"calls": [asdict(work) for work in planned.calls]})
        return rows

    def _compiled(self, candidate: Any) -> tuple[Path, Any] | None:
        from planish.compilers.tvm_workloads import plan
        from planish.search import table_measuring as tables

        if self.reference is None:
            self.reference = tables.compiled_reference(self.evaluator, self.label, self.folder / "reference")
        key = candidate.key()
        if key not in self.known:
            try:
                program = tables.program_of(self.evaluator, candidate)
                path = tables.compiled(self.evaluator, self.label, program, self.folder / key)
                self.known[key] = path, plan(program, self.device)
            except (ValueError, RuntimeError) as error:
                print(f"left out: {str(error).splitlines()[0]}", file=sys.stderr)
                self.known[key] = None
        return self.known[key]


def size_errors(evaluator: Any, candidates: Sequence[Any]) -> list[int]:
    """How far the stored bytes of the planned structure are from those of the fitted model."""
    from planish.spaces.apply import skeleton
    from planish.spaces.size import stored_bytes

    found = []
    for candidate in candidates:
        try:
            planned = stored_bytes(skeleton(candidate, evaluator.traced, evaluator.proposal))
            found.append(abs(planned - stored_bytes(evaluator.build(candidate))))
        except (ValueError, RuntimeError):
            continue
    return found


def forest_of(times: Any) -> Callable[[Sequence[Any]], float]:
    """nn-Meter's way (Zhang et al. 2021): a random forest on every kernel's own sizes, and the sum of its guesses."""
    from sklearn.ensemble import RandomForestRegressor

    names = ("c", "h", "w", "o", "kh", "stride", "groups", "m", "k", "bytes")

    def features(work: Any) -> list[float]:
        kind = sum(ord(letter) for letter in work.op)
        return [kind, work.bits, work.macs, work.moved_bytes, *(work.shapes.get(name, 0) for name in names)]

    known = list(times.values())
    forest = RandomForestRegressor(200, random_state=0, n_jobs=1)
    forest.fit([features(t.workload) for t in known], [t.time.median_s for t in known])
    return lambda calls: float(forest.predict([features(work) for work in calls]).sum())


def table_of(evaluator: Evaluator, label: str, database: KernelDatabase, note: Path) -> tuple[TableModel, Row]:
    """The table as `planish profile` builds it, and what that took; what an earlier call has built is not built again.

    Where many kernels met no quiet machine the profile advises to give the same command again: that is done, until
    `ENOUGH_QUIET` of them did or `PROFILES` were made. The seconds are those of the longest of them.

    Args:
        note: The file that says what building took, once the table is complete.
    """
    from planish.compilers.kernel_times import times_version
    from planish.hwmodels.load import BusyMachine
    from planish.search.atomic import write_json
    from planish.search.fitted import fitted
    from planish.search.latency_table import build_table
    from planish.search.progress import Progress

    took = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {}
    if took.pop("version", None) != times_version():
        # What was cut off begins anew: the seconds are those of one go, every kernel compiled in it.
        database.path.unlink(missing_ok=True)
        shutil.rmtree(note.parent / "cache", ignore_errors=True)
        took = {"profiles": 0}
    took = {"profiles": 1} | took  # a note of before they were counted is of one
    while not took["profiles"] or (kernels_quiet(database) < ENOUGH_QUIET and took["profiles"] < PROFILES):
        try:
            table = build_table(evaluator, label, database, Progress(None), seed=0)
        except BusyMachine as error:
            raise SystemExit(f"{note.parent.name}: {error}") from None
        took["profiles"] += 1
        took["profile_s"] = max(table.seconds, took.get("profile_s", 0.0))
        took.setdefault("kernels", table.measured)
        write_json(note, took | {"version": times_version()})
    model = fitted(evaluator.devices[label], database.times(), database.networks())
    return model, took | {"kernels_quiet": kernels_quiet(database)}


def kernels_quiet(database: KernelDatabase) -> float:
    """The share of a database's kernels that met a quiet machine."""
    return float(np.mean([time.time.quiet for time in database.times().values()] or [0.0]))


def kept_table(net: str, folder: Path) -> TableModel | None:
    """The table of one thread that an earlier call has built in the folder; None where there is none."""
    from planish.compilers.kernel_times import database_of
    from planish.hwmodels.device import parse_device
    from planish.search.fitted import fitted

    device, path = parse_device("cpu"), folder / f"{net}-1" / "times.sqlite"
    database = database_of(device, path) if path.exists() else None
    return fitted(device, times, database.networks()) if database and (times := database.times()) else None


def run_space(net: str, threads: int, random: int, front: int, folder: Path, sources: dict[str, TableModel]) -> Row:
    """A row: the errors of every model on a space's held-out networks, and what building the table took."""
    from planish.compilers.kernel_times import database_of
    from planish.hwmodels.corrector import weights_of
    from planish.hwmodels.held_out import held_out
    from planish.hwmodels.kernel_database import network_key
    from planish.hwmodels.transfer import TransferModel

    name = "cpu" if threads == 1 else f"cpu?threads={threads}"
    # Kernels of its own, too: none is compiled yet.
    os.environ["PLANISH_CACHE"] = str(folder / "cache")
    evaluator = evaluator_of(net, name)
    label = next(iter(evaluator.devices))
    device, space = evaluator.devices[label], evaluator.proposal.space
    database = database_of(device, folder / "times.sqlite")
    table, profile = table_of(evaluator, label, database, folder / "profile.json")
    rng = np.random.default_rng(12345)  # the table's candidates come from another seed
    candidates = [*(space.sample(rng) for _ in range(random)), *near_front(space, rng, front)]
    # A few of the fast end may be just what the table was fitted to, under another name (a codebook changes no kernel).
    seen = {network.key() for network in database.networks()}
    found = [
        network
        for network in measure(evaluator, label, candidates, database, folder / "held_out.jsonl")
        if network_key(network.calls) not in seen
    ]
    timed = [network for network in found if network.quiet]
    pairs = [(network.calls, network.seconds) for network in timed]
    if len(pairs) < 3:
        raise SystemExit(f"{net}: only {len(pairs)} networks met a quiet machine; run it again, or let it take longer")
    measured = [seconds for _, seconds in pairs]
    fitted = database.networks()
    scale = float(np.median([n.time.median_s / sum(w.macs for w in n.workloads) for n in fitted]))
    forest = forest_of(table.times)

    def kernels_sum(calls: Sequence[Any]) -> float:
        return float(table.kernels(calls)[0].sum())

    def scaled(model: Callable[[Sequence[Any]], float]) -> Callable[[Sequence[Any]], float]:
        """By one factor to the same networks that the other models were fitted to."""
        factor = float(np.median([n.time.median_s / model(n.workloads) for n in fitted]))
        return lambda calls: factor * model(calls)

    models: dict[str, Callable[[Sequence[Any]], float]] = {
        "planish": lambda calls: table.predict(calls).latency_s,
        "macs": lambda calls: scale * sum(work.macs for work in calls),
        "table sum": scaled(kernels_sum),
        "random forest": scaled(forest),
    }
    errors = {name: asdict(held_out([model(calls) for calls, _ in pairs], measured)) for name, model in models.items()}
    first = held_out([table.predict(network.calls).latency_s for network in timed], [n.times_s[0] for n in timed])
    spreads = [network.spread for network in timed]
    row: Row = {
        "space": net, "threads": threads, "networks": len(found), "quiet": len(pairs), **profile,
        "stated_error": table.corrector.error,
        "outliers": [
            {"us": 1e6 * seconds, "predicted_us": 1e6 * told, "weight_bytes": weights_of(calls)}
            for calls, seconds in pairs
            if abs((told := table.predict(calls).latency_s) / seconds - 1) > 0.1
        ],
        "errors": errors, "first_times": asdict(first),
        "times_differ": {"median": float(np.median(spreads)), "p95": float(np.percentile(spreads, 95))},
        "memory_error": max((network.memory_error for network in found), default=0),
        "size_error": max(size_errors(evaluator, candidates[:5]), default=0),
    }  # fmt: skip
    if threads == 1:
        sources[net] = table
    elif len(pairs) > PROBES and (source := sources.get(net) or kept_table(net, folder.parent)) is not None:
        chosen = rng.permutation(len(pairs))
        probes = [pairs[place] for place in chosen[:PROBES]]
        model = TransferModel.fit(device, source, [calls for calls, _ in probes], [s for _, s in probes])
        rest = [pairs[place] for place in chosen[PROBES:]]
        carried = held_out([model.predict(calls).latency_s for calls, _ in rest], [s for _, s in rest])
        row["transfer"] = asdict(carried) | {"trusted": model.trusted}
    return row


def summarise(rows: Sequence[Row]) -> dict[str, float | None]:
    """The worst space and thread count of everything."""
    own = [row["errors"]["planish"] for row in rows]
    keys = ("within_10", "within_5", "spearman", "spearman_fast_third")
    summary: dict[str, float | None] = {key: round(min(errors[key] for errors in own), 3) for key in keys}
    summary["profile_s"] = round(max(row["profile_s"] for row in rows), 1)
    summary["transfer_within_10"] = min(
        (row["transfer"]["within_10"] for row in rows if "transfer" in row), default=None
    )
    summary["memory_error"] = max(row["memory_error"] for row in rows)
    summary["size_error"] = max(row["size_error"] for row in rows)
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or one JSON object."""
    import torch
    from compiled_speed import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="DS-CNN, 1 thread, 16 + 8 networks")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--spaces", nargs="+", choices=SPACES, help="which spaces")
    parser.add_argument("--threads", nargs="+", type=int, help="which numbers of threads (1 2)")
    parser.add_argument("--random", type=int, help="random held-out networks of a space (200)")
    parser.add_argument("--front", type=int, help="held-out networks near the fast end (50)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what is measured there, and carry on from it")
    args = parser.parse_args(arguments)
    spaces = args.spaces or (("dscnn",) if args.quick else SPACES)
    threads = args.threads or ([1] if args.quick else [1, 2])
    random, front = (args.random or 16, args.front or 8) if args.quick else (args.random or 200, args.front or 50)
    torch.set_num_threads(1)
    rows: list[Row] = []
    sources: dict[str, TableModel] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for count in sorted(threads):
            for net in spaces:
                # A database of its own: the device was never seen.
                own = Path(args.keep or folder, f"{net}-{count}")
                own.mkdir(parents=True, exist_ok=True)
                row = run_space(net, count, random, front, own, sources)
                rows.append(row)
                if not args.json:
                    _show(row)
    summary = summarise(rows)
    if args.json:
        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in summary.items()), f"({time.monotonic() - start:.0f} s)")
    return 0


def _show(row: Row) -> None:
    print(
        f"{row['space']}, {row['threads']} thread(s): {row['quiet']} of {row['networks']} networks on a quiet machine, "
        f"{row['kernels']} kernels in {row['profile_s']:.0f} s ({row['kernels_quiet']:.0%} quiet after "
        f"{row['profiles']} profiles), memory error {row['memory_error']} bytes, "
        f"size error {row['size_error']} bytes"
    )
    for one in row["outliers"]:
        print(
            f"  beyond 10 %: {one['us']:.1f} us predicted as {one['predicted_us']:.1f}, "
            f"{one['weight_bytes'] / 1e6:.1f} MB of weights"
        )
    print(
        f"  times of a network differ by {row['times_differ']['median']:.1%}, 95 % of them by less than "
        f"{row['times_differ']['p95']:.1%}; 'first times' are the model's errors had each been timed once"
    )
    shown = (
        dict(row["errors"])
        | {"first times": row["first_times"]}
        | ({"transfer": row["transfer"]} if "transfer" in row else {})
    )
    for name, errors in shown.items():
        print(
            f"  {name:14} within 10 % {errors['within_10']:6.1%}  within 5 % {errors['within_5']:6.1%}  median "
            f"{errors['median_error']:6.1%}  Spearman {errors['spearman']:.3f}, fastest third "
            f"{errors['spearman_fast_third']:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
