"""What a search survives: processes killed at random, and thousands of trials on hundreds of workers.

    python benchmarks/faults.py                  # 100 kills; 10 000 trials on 1 to 1000 simulated workers
    python benchmarks/faults.py --quick          # 1 kill; 10 000 trials of fewer choices on 1000 workers
    python benchmarks/faults.py --kills 100 --kills-each 1 --beside 2 --no-nodes --workers   # 100 disturbed searches
    python benchmarks/faults.py --trace RUN      # takes the seconds of evaluations from a run, for later calls

**Kills** (`--kills`): a short search (predicted latency, so that its front is a function of the seed) runs once
undisturbed, then again and again while one of its processes is killed with SIGKILL at a random moment: the controller,
one of its workers, Ray's raylet or Ray's head. Where that ends the search, it is resumed. A finished evaluation that a
killed journal had and the last one has not counts as lost, one that was recorded twice as repeated. `--kills-each` is
how many a search suffers, `--beside` how many searches run at once.

**Nodes** (`--nodes`): the same search on a Ray cluster of three nodes on this machine; one leaves (its raylet is killed
with all of its workers) and another joins, while candidates are scored and again within a rung. Then a search by
measured latency on a cluster one node of which is the device: its worker is killed three times.

**Scale** (`simulated_search.py`): evaluations that only take time, from a real trace, scaled to `--seconds`. The
controller's cost is real: proposals, journal with fsync, study. The utilisation is that of the workers until the last
candidate is handed out.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import psutil
from tests.end_to_end.small_search import PREDICTED, events, facts, start, write_spec

# What a process of a search is called in its command line.
ROLES = {
    "controller": "planish.search",
    "worker": "ray::",
    "raylet": "raylet/raylet",
    "head": "gcs_server",
}
# From one kill to the next at most; a whole search takes about twice as long.
_SPAN_S = 40.0
_PATIENCE_S = 600.0

SPEC = "own.toml"
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1 kill; 10 000 trials of fewer choices on 1000 workers")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kills-each", type=int, default=6, help="at most so many in one search")
    parser.add_argument("--beside", type=int, default=1, help="disturbed searches at once")
    parser.add_argument("--nodes", action=argparse.BooleanOptionalAction, default=True, help="not with --quick")
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 8, 64, 1000])
    parser.add_argument("--sites", type=int, default=20, help="layers of the simulated searches, two choices each")
    parser.add_argument("--seconds", type=float, default=60.0, help="the mean of a simulated evaluation")
    parser.add_argument("--sampler", default="random", help="of the simulated searches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, metavar="RUN", help="store how long this run's evaluations took, and end")
    args = parser.parse_args()
    if args.trace:
        from simulated_search import store_trace

        from planish.search.errors import UserError

        try:
            store_trace(args.trace)
        except UserError as error:
            parser.error(str(error))
        return
    if args.quick:
        args.kills, args.sites, args.workers, args.nodes = min(args.kills, 1), min(args.sites, 4), [1000], False
    rows: list[Row] = []
    summary: Row = {}
    with tempfile.TemporaryDirectory(prefix="planish-faults-") as folder:
        for workers in args.workers:
            rows.append(scale_row(Path(folder) / f"scale{workers}", workers, args))
            show(rows[-1])
        if args.workers:
            summary |= scale_summary(rows)
        if args.kills or args.nodes:
            wanted = undisturbed_front(Path(folder))
        if args.kills:
            found = kill_rows(Path(folder), wanted, args)
            rows += found
            summary |= kill_summary(found)
        if args.nodes:
            rows.append(node_row(Path(folder), wanted))
            show(rows[-1])
            rows.append(device_row(Path(folder)))
            show(rows[-1])
    if args.json:
        from compiled_speed import machine

        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=2))
    else:
        print(", ".join(f"{key} {value}" for key, value in summary.items()))


def scale_row(folder: Path, workers: int, args: argparse.Namespace) -> Row:
    """A simulated search, then its resumption."""
    from simulated_search import simulate

    # Batches that many workers do not wait for: about two rounds of work are handed out beyond the one that is told.
    keys: Row = {
        "trials": args.trials,
        "workers": workers,
        "mean_s": args.seconds,
        "batch": max(8, min(500, workers)),
        "ahead": 0 if workers == 1 else 8,
        "sampler": args.sampler,
        "sites": args.sites,
    }
    process = psutil.Process()
    before = process.memory_info().rss
    run = simulate(folder, **keys)
    resumed = simulate(folder, **keys)
    overhead = 1e3 * np.array(run["overhead_s"])
    fifths = [float(part.mean()) for part in np.array_split(overhead, 5)]
    return {
        "part": "scale",
        **keys,
        "overhead_ms_p50": float(np.median(overhead)),
        "overhead_ms_p99": float(np.quantile(overhead, 0.99)),
        "overhead_ms_mean": float(overhead.mean()),
        "overhead_ms_fifths": fifths,
        "utilisation": run["utilisation"],
        "resume_s": resumed["ready_s"],
        "memory_mb": (process.memory_info().rss - before) / 1e6,
        "journal_mb": (folder / "trials.jsonl").stat().st_size / 1e6,
    }


def scale_summary(rows: list[Row]) -> Row:
    most = max(rows, key=lambda row: row["workers"])
    return {
        "overhead_ms_p50": round(most["overhead_ms_p50"], 2),
        "overhead_ms_p99": round(most["overhead_ms_p99"], 2),
        "utilisation_1000": round(most["utilisation"], 4) if most["workers"] == 1000 else None,
        "resume_s_10000": round(most["resume_s"], 2) if most["trials"] == 10_000 else None,
    }


def undisturbed_front(folder: Path) -> bytes:
    """What the short search comes to."""
    undisturbed = folder / "undisturbed"
    process = start(write_spec(folder, SPEC, PREDICTED), undisturbed)
    output, _ = process.communicate(timeout=_PATIENCE_S)
    if process.returncode != 0:
        raise SystemExit(f"the undisturbed search failed: {output}")
    return (undisturbed / "front.json").read_bytes()


def kill_rows(folder: Path, wanted: bytes, args: argparse.Namespace) -> list[Row]:
    """A row for every disturbed search, until so many processes were killed."""
    rows: list[Row] = []
    with ThreadPoolExecutor(args.beside) as pool:
        while (left := args.kills - sum(len(row["killed"]) for row in rows)) > 0:
            each = min(left, args.kills_each)
            runs = range(len(rows), len(rows) + min(args.beside, left // each))
            wave = [
                pool.submit(disturbed, folder, folder / f"run{i}", random.Random(f"{args.seed} {i}"), each)
                for i in runs
            ]
            for search in as_completed(wave):
                row = search.result()
                row["same_front"] = row.pop("front") == wanted
                rows.append(row)
                show(row)
    return rows


def disturbed(folder: Path, run: Path, rng: random.Random, planned: int) -> Row:
    """A search to its end with some kills on the way; `hung`: sessions that had to be killed because they waited."""
    killed: list[str] = []
    sessions = hung = 0
    known: Counter[Any] = Counter()
    started = time.monotonic()
    while True:
        sessions += 1
        process = start(folder / SPEC, run)
        while planned and process.poll() is None:
            until = time.monotonic() + rng.uniform(1, _SPAN_S)
            while time.monotonic() < until and process.poll() is None:
                time.sleep(0.2)
            role = victim(process, rng)
            if role is None:
                break
            killed.append(role)
            planned -= 1
            known |= facts(run)
            if role == "controller":
                break
        try:
            output, _ = process.communicate(timeout=_PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            hung += 1
        if process.returncode == 0:
            break
        if "Traceback" in output:
            show({"part": "kill", "traceback": output[-2000:]})
        if sessions > 20:
            raise SystemExit(f"{run} does not end: {output[-2000:]}")
    after = facts(run)
    return {
        "part": "kill",
        "killed": killed,
        "sessions": sessions,
        "hung": hung,
        "lost": sum(1 for fact in known if fact not in after),
        "repeated": sum(count - 1 for count in after.values()),
        "failed": [event["error"] for event in events(run) if event.get("state") == "failed"],
        "front": (run / "front.json").read_bytes(),
        "seconds": time.monotonic() - started,
    }


def node_row(folder: Path, wanted: bytes) -> Row:
    """The search on three nodes: twice one leaves and another joins, while candidates are scored and within a rung."""
    run = folder / "nodes"
    with cluster_of(1) as cluster:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        cluster.wait_for_nodes()
        process = start(folder / SPEC, run, "--address", cluster.address, "--workers", "3")
        wait_for(process, run, "score", 5)
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        training: list[psutil.Process] = []
        while process.poll() is None and not training:
            time.sleep(0.2)
            training = workers_of(nodes[1], "ray::Rung")
        cluster.remove_node(nodes[1], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        row = {"part": "nodes", "trainings_lost": len(training), **ended(process, run)}
    return {**row, "same_front": (run / "front.json").exists() and (run / "front.json").read_bytes() == wanted}


def device_row(folder: Path) -> Row:
    """A search by measured latency, timed on a node that is the device, whose worker is killed three times."""
    run = folder / "device"
    killed = 0
    with cluster_of(2) as cluster:
        cluster.add_node(num_cpus=0, resources={"device:cpu": 1})
        cluster.wait_for_nodes()
        process = start(write_spec(folder, "measured.toml"), run, "--address", cluster.address, "--workers", "2")
        for scored in (1, 4, 7):
            wait_for(process, run, "score", scored)
            workers = [p for p in psutil.process_iter() if "ray::_Timing" in " ".join(command_of(p))]
            for worker in workers:
                worker.kill()
            killed += len(workers)
        return {"part": "device", "killed": ["device worker"] * killed, **ended(process, run)}


@contextmanager
def cluster_of(cpus: int) -> Iterator[Any]:
    """A Ray cluster on this machine whose head has so many cores."""
    import logging

    from ray.cluster_utils import Cluster

    logging.getLogger("ray").setLevel(logging.ERROR)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "include_dashboard": False})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def wait_for(process: subprocess.Popen[str], run: Path, kind: str, count: int) -> None:
    """Until the journal has so many events of a kind, or the search has ended."""
    while process.poll() is None and sum(e["event"] == kind for e in events(run)) < count:
        time.sleep(0.2)


def workers_of(node: Any, mark: str) -> list[psutil.Process]:
    """A Ray node's worker processes with a mark in their command line."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [worker for worker in raylet.children(recursive=True) if mark in " ".join(command_of(worker))]


def command_of(process: psutil.Process) -> list[str]:
    """The command line of a process; none of one that is gone or another's."""
    try:
        return list(process.cmdline())
    except psutil.Error:
        return []


def ended(process: subprocess.Popen[str], run: Path) -> Row:
    """How a search ended."""
    started = time.monotonic()
    output, _ = process.communicate(timeout=_PATIENCE_S)
    return {
        "code": process.returncode,
        "said": output[-300:] if process.returncode else "",
        "repeated": sum(count - 1 for count in facts(run).values()),
        "failed": [event["error"] for event in events(run) if event.get("state") == "failed"],
        "seconds": time.monotonic() - started,
    }


def kill_summary(rows: list[Row]) -> Row:
    return {
        "kills": sum(len(row["killed"]) for row in rows),
        "lost": sum(row["lost"] for row in rows),
        "repeated": sum(row["repeated"] for row in rows),
        "same_front": sum(row["same_front"] for row in rows) / len(rows),
    }


def victim(process: subprocess.Popen[str], rng: random.Random) -> str | None:
    """Kills a process of a search, of a role that it has now; its role, or None where there is none left."""
    try:
        own = psutil.Process(process.pid)
        family = [own, *own.children(recursive=True)]
        lines = {member: " ".join(member.cmdline()) for member in family}
    except psutil.Error:
        return None
    by_role = {
        role: [m for m, line in lines.items() if mark in line and (role == "controller") == (m == own)]
        for role, mark in ROLES.items()
    }
    present = [role for role, members in by_role.items() if members]
    if process.poll() is not None or not present:
        return None
    role = rng.choice(present)
    try:
        rng.choice(by_role[role]).send_signal(signal.SIGKILL)
    except psutil.Error:
        return None
    return role


def show(row: Row) -> None:
    print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), file=sys.stderr)


if __name__ == "__main__":
    main()
