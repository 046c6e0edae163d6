"""How much a small model's latency differs from process to process, with addresses at random and always alike.

    python benchmarks/process_spread.py            # 8 candidates of DS-CNN's space, 16 processes each
    python benchmarks/process_spread.py --quick    # 2 candidates, 8 processes each

Every process loads a compiled candidate and takes the fastest of eight samples, so that the machine's own noise counts
little. A process is slow where that is 4 % more than the median of the faster half. `setarch -R` (util-linux) turns the
randomisation of addresses off; where it is missing, or not permitted, there is only the first half.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

SLOW = 0.04
SAMPLES, SAMPLE_S = 8, 0.01

Row = dict[str, Any]


def child(folder: Path) -> None:
    """Prints the microseconds of an artifact in this process."""
    from planish.compilers.loader import LOADERS
    from planish.compilers.manifest import EXAMPLES, read

    manifest = read(folder)
    loaded = LOADERS[manifest.compiler](folder, manifest)
    loaded.run(np.load(folder / EXAMPLES)["inputs"][0])
    number = max(1, round(SAMPLE_S / loaded.time(10)))
    print(1e6 * min(loaded.time(number) for _ in range(SAMPLES)))


def in_processes(folder: Path, count: int, prefix: Sequence[str]) -> list[float]:
    """The microseconds of an artifact in so many processes."""
    command = [*prefix, sys.executable, __file__, "--child", str(folder)]
    runtime = {**os.environ, "TVM_USE_RUNTIME_LIB": "1", "TVM_NUM_THREADS": "1"}
    done = (subprocess.run(command, capture_output=True, text=True, check=True, env=runtime) for _ in range(count))
    return [float(one.stdout.split()[-1]) for one in done]


def slow_share(times: Sequence[float]) -> float:
    """The share of times that are more than `SLOW` above the median of the faster half."""
    ordered = np.sort(times)
    usual = float(np.median(ordered[: -(-len(ordered) // 2)]))
    return float(np.mean(ordered > (1 + SLOW) * usual))


def fixed_addresses() -> list[str] | None:
    """The command before a command that fixes addresses, None where there is none."""
    found = shutil.which("setarch")
    if found is None or subprocess.run([found, "-R", "true"], capture_output=True, check=False).returncode:
        return None
    return [found, "-R"]


def rows_of(candidates: int, processes: int) -> list[Row]:
    """A row a candidate: microseconds of every process, with random addresses and with fixed ones."""
    from latency_models import evaluator_of

    from planish.search.table_measuring import compiled_skeleton

    evaluator = evaluator_of("dscnn", "cpu")
    space, rng = evaluator.proposal.space, np.random.default_rng(12345)
    fixed = fixed_addresses()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(candidates):
            artifact = compiled_skeleton(evaluator, "cpu", space.sample(rng), Path(folder, str(number)))
            row: Row = {"candidate": number, "random_us": in_processes(artifact, processes, [])}
            row["fixed_us"] = None if fixed is None else in_processes(artifact, processes, fixed)
            rows.append(row)
    return rows


def summarise(rows: Sequence[Row]) -> dict[str, float | None]:
    """Shares of slow processes of all candidates, and the worst process over its candidate's median."""
    fixed = [row["fixed_us"] for row in rows if row["fixed_us"]]
    return {
        "slow_share": round(float(np.mean([slow_share(row["random_us"]) for row in rows])), 3),
        "slow_share_fixed": round(float(np.mean([slow_share(times) for times in fixed])), 3) if fixed else None,
        "slowest_over_median": round(max(max(r["random_us"]) / float(np.median(r["random_us"])) for r in rows), 3),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the times, or one JSON object."""
    import torch
    from compiled_speed import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 candidates, 8 processes each")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        child(args.child)
        return 0
    torch.set_num_threads(1)
    rows = rows_of(*((2, 8) if args.quick else (8, 16)))
    summary = summarise(rows)
    if args.json:
        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=1))
        return 0
    for row in rows:
        for name in ("random_us", "fixed_us"):
            times = " ".join(f"{value:.1f}" for value in sorted(row[name])) if row[name] else "not permitted here"
            print(f"candidate {row['candidate']}, {name.removesuffix('_us')} addresses, us: {times}")
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
