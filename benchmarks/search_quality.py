"""How good the search is: against an exact front, against every other sampler, and one family against all together.

    python benchmarks/search_quality.py              # the small space with all samplers, then a real task
    python benchmarks/search_quality.py --quick      # the small space, fewer seeds
    python benchmarks/search_quality.py --run RUN    # what the front of a finished run comes to, too

**The small space** (`micro_space.py`): 46 656 networks whose accuracy and latency are all stored, so that the best
hypervolume is known. A method's regret is the share of it that is missing after so many charged evaluations. What the
library of options costs is charged too, as evaluations.

**A real task** (`--task digits` or `--task cifar10`): candidates are built and scored before training on the validation
split; latency is predicted by the table that `planish profile` left, else by the compiler's counted time of every
kernel that the candidate calls (`--latency predicted`, the same for every method), or compiled and timed beside the
original (`--latency measured`). With `--time-fronts` what each method returns, ours at 60 evaluations and the
baselines' at 300, is compiled and timed beside the original all the same, and judged by that. Evaluations are kept by
candidate in `--cache`, so that methods and seeds share them, and rows when they are whole: a killed run carries on. The
families that pay in latency take part: prune, bits, rank and block.

**Finished runs** (`--run`): the speed-up of its fine-tuned front, as timed, at 0.5 and 1.5 points of validation
accuracy below the original and the size at 0.5 points, beside each what that model loses on the test split (which chose
nothing), and the epochs of training.

In the summary `hv_...` are hypervolumes of the real task where one is judged (the small space's, shares of its best,
are `micro_...` then), and what was found of every task stands in `tasks` too.

Every method has the same space, evaluator, batches of 8 and seeds; the reference of the hypervolume is (error 1,
latency of the original). Intervals are 95 %, by bootstrap over seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

OURS = "planish"
# `+grid`: begun with uniform policies, as the evolutionary samplers are by themselves.
BASELINES = ("grid", "random", "nsga2", "nsga3", "tpe", "tpe+grid", "gp", "netadapt", "dp")
# By far the slowest. GP, more than three minutes of one core for 60 evaluations, takes part where it is named.
SLOW = ("tpe", "tpe+grid", "gp")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the small space alone, 2 seeds, without tpe and gp")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--most", type=int, default=300, help="charged evaluations of the baselines")
    parser.add_argument("--ours", type=int, default=60, help="charged evaluations of ours that are compared")
    parser.add_argument(
        "--samplers", nargs="+", choices=BASELINES, default=[name for name in BASELINES if name != "gp"]
    )
    parser.add_argument("--task", choices=("none", "digits", "cifar10"), default="digits")
    parser.add_argument("--task-alone", action="store_true", help="without the small space")
    parser.add_argument("--families", action="store_true", help="each family alone against all together, too")
    parser.add_argument("--latency", choices=("predicted", "measured"), default="predicted")
    parser.add_argument("--time-fronts", action="store_true", help="judge what each method returns as timed, too")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("runs/search-quality"))
    parser.add_argument("--run", nargs="+", default=[], type=Path, help="folders of finished runs, summed up")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.task = 2, "none"
        args.samplers = [name for name in args.samplers if name not in SLOW]
    if not args.samplers or args.ours > args.most or args.seeds < 1:
        parser.error("name a baseline (--quick goes without tpe and gp), a seed, and --most at least as many as --ours")
    from fine_tuned import front_summary, fronts_by_task

    fronts = fronts_by_task(args.run)  # a run that is not finished is told at once
    seeds = list(range(args.seeds))
    rows: list[Row] = []
    summary: Row = {}
    if not args.task_alone:
        rows = micro_rows(args.samplers, seeds, args.most, args.ours)
        summary = micro_summary(rows, args.ours, args.most)
    if args.task != "none":
        from real_judge import task_rows

        real = task_rows(
            args.task, args.samplers, seeds, args.most, args.ours, args.latency, args.cache, args.workers,
            args.families, args.time_fronts,
        )  # fmt: skip
        rows += real
        own = real_summary(real, args.ours, args.most)
        summary = {**{name if name.startswith("regret") else f"micro_{name}": v for name, v in summary.items()}, **own}
        summary["tasks"] = {args.task: own}
    for task, front in fronts.items():
        rows += front
        own = front_summary(front)
        summary |= {"task": task, **own}
        summary.setdefault("tasks", {}).setdefault(task, {}).update(own)
    if args.json:
        from compiled_speed import machine

        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=2))
        return
    for row in rows:
        print(front_line(row) if "trial" in row else line(row))
    summary.pop("tasks", None)
    shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in summary.items()}
    print(", ".join(f"{key} {value}" for key, value in shown.items()))


def micro_rows(samplers: Sequence[str], seeds: Sequence[int], most: int, ours: int) -> list[Row]:
    from micro_judge import curve_row, load, regrets

    micro, rows = load(), []
    for sampler in (OURS, *samplers):
        started = time.monotonic()
        found = np.array([regrets(micro, sampler, seed, most) for seed in seeds])
        rows.append(curve_row("regret", "micro", sampler, found, ours, time.monotonic() - started))
        print(line(rows[-1]), file=sys.stderr)
    return rows


def micro_summary(rows: Sequence[Row], ours: int, most: int) -> Row:
    own = next(row for row in rows if row["sampler"] == OURS)
    regret = float(np.mean(own["regret"][str(ours)]))
    return {f"regret_{ours}": regret, **volumes(rows, "regret", ours, most), **wins(rows)}


def volumes(rows: Sequence[Row], kind: str, ours: int, most: int) -> Row:
    """Our hypervolume at so many charged evaluations, the best baseline's at more; of regrets what is not missing."""
    means = {}
    for row in rows:
        mean = float(np.mean(row[kind][str(ours if row["sampler"] == OURS else most)]))
        means[row["sampler"]] = 1 - mean if kind == "regret" else mean
    return {f"hv_ours_{ours}": means.pop(OURS), f"hv_best_baseline_{most}": max(means.values())}


def wins(rows: Sequence[Row]) -> Row:
    """In how many seeds the area under our curve of missing hypervolume is smaller than every baseline's."""
    own = np.array(next(row for row in rows if row["sampler"] == OURS)["area"])
    others = np.array([row["area"] for row in rows if row["sampler"] != OURS])
    return {"auc_wins": int((own[None] < others).all(0).sum()), "auc_seeds": len(own)}


def real_summary(rows: Sequence[Row], ours: int, most: int) -> Row:
    judged = [row for row in rows if not row["task"].endswith("families")]
    return {**volumes(judged, "hypervolume", ours, most), **wins(judged), **timed_volumes(judged, ours, most)}


def timed_volumes(rows: Sequence[Row], ours: int, most: int) -> Row:
    """The same of fronts as timed, where they were."""
    means = {row["sampler"]: float(np.mean(row["timed"]["hypervolume"])) for row in rows if "timed" in row}
    if len(means) < 2:
        return {}
    return {f"hv_timed_ours_{ours}": means.pop(OURS), f"hv_timed_best_baseline_{most}": max(means.values())}


def line(row: Row) -> str:
    kind = "regret" if "regret" in row else "hypervolume"
    parts = []
    for place, values in row[kind].items():
        low, high = interval(values)
        scale = 100 if kind == "regret" else 1
        parts.append(f"{place}: {scale * np.mean(values):.3f} [{scale * low:.3f}, {scale * high:.3f}]")
    unit = " %" if kind == "regret" else ""
    if "timed" in row:
        low, high = interval(row["timed"]["hypervolume"])
        parts.append(f"front as timed: {np.mean(row['timed']['hypervolume']):.3f} [{low:.3f}, {high:.3f}]")
    return f"{row['task']:14} {row['sampler']:10} {kind}{unit} at {'  '.join(parts)}  ({row['seconds']:.0f} s)"


def front_line(row: Row) -> str:
    interval = row["test_drop_pp_ci95"]
    within = "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"
    return (
        f"{row['task']:14} trial {row['trial']:4} {row['us']:9.1f} us {row['speedup']:6.2f}x  "
        f"points lost: validation {row['validation_drop_pp']:+.2f}, test {row['test_drop_pp']:+.2f}{within} to "
        f"{row['test_accuracy']:.2%}  "
        f"size {row['size_ratio']:.3f}x  MACs {row['macs_ratio']:.3f}x  {row['epochs']} epochs"
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % by bootstrap of the mean."""
    drawn = np.random.default_rng(0).choice(np.array(values), (2000, len(values))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(low), float(high)


if __name__ == "__main__":
    main()
