"""Compiled models against the peers that a user would choose for speed: interleaved in one process, outputs checked.

    python benchmarks/compiled_speed.py            # every model, fp32 and int8, batch 1 and 8, 1 and 2 threads
    python benchmarks/compiled_speed.py --quick    # the small ones, batch 1, one thread

Needs the peers: pip install -c constraints.txt -e ".[benchmark]".
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import logging
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

if TYPE_CHECKING:
    from engines import Engine

PEERS = ("onnxruntime", "openvino", "torch.compile")
QUICK = ("digits-resnet", "resnet20", "mobilenetv2-32", "dscnn")
# What memory decides is not a comparison of kernels: it is timed where it is asked for.
MEMORY_BOUND = "mlp"
# One turn of an engine is at least this long, so that caches and clocks settle on it.
TURN_S = 0.02
# Engines of several threads keep them spinning for some 50 ms, on the cores that the next one needs.
_SPIN_S = 0.2
# Largest difference from torch, relative to the largest output.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "int8": 0.1, "int4": 0.1, "w8": 1e-3, "w4": 1e-3}
# The option of the layers; the peers get the same weights as bytes, or as float32 that are bfloat16.
BITS: dict[str, int | str] = {"bf16": "bf16", "int8": 8, "int4": 4, "w8": "w8", "w4": "w4"}

Row = dict[str, Any]


def run_case(model: str, precision: str, batch: int, threads: int, peers: Sequence[str], turns: int) -> Row:
    """Builds a model on every engine, checks the outputs and times them in turns; milliseconds are medians."""
    import torch
    from engines import OnnxRuntime, OpenVino, Planish, TorchCompile, folded, quantised, simulated, write_onnx
    from nets import NETS, make

    from planish.spaces.quantize import deploy

    torch.set_num_threads(threads)
    x = torch.randn(batch, *NETS[model].shape, generator=torch.Generator().manual_seed(1))
    original = make(model)
    integers = precision in BITS
    if integers:
        calibration = torch.randn(32, *NETS[model].shape, generator=torch.Generator().manual_seed(2))
        trained = quantised(folded(original), calibration, BITS[precision])
        own, other = deploy(trained), simulated(trained)
    else:
        own = other = original
    with torch.no_grad():
        expected = own(x).numpy()
    engines: dict[str, Engine] = {"planish": Planish(own, x, threads, integers)}
    compile_s = engines["planish"].compile_s  # type: ignore[attr-defined]
    makers: dict[str, Callable[[], Engine]] = {"torch.compile": lambda: TorchCompile(original, x, threads)}
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "model.onnx"))
        write_onnx(other, x, file, integers)
        makers |= {
            "onnxruntime": lambda: OnnxRuntime(file, x, threads),
            "openvino": lambda: OpenVino(file, x, threads, "bf16" if precision == "bf16" else "f32"),
        }
        for peer in peers:
            # It has no int8 form of the same model: its fp32 is not a peer of int8.
            if not (peer == "torch.compile" and integers):
                engines[peer] = makers[peer]()
        errors = {name: _difference(engine.output(), expected) for name, engine in engines.items()}
        times = _times(engines, turns, threads)
    wrong = {name: round(error, 4) for name, error in errors.items() if not error <= TOLERANCE[precision]}
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    ratios = {name: medians[name] / medians["planish"] for name in engines if name != "planish"}
    return {
        "model": model, "precision": precision, "batch": batch, "threads": threads,
        "ms": {name: round(value, 4) for name, value in medians.items()},
        "peer_over_planish": {name: round(value, 3) for name, value in ratios.items()},
        "best_peer_over_planish": round(min(ratios.values()), 3) if ratios else None,
        "compile_s": [round(seconds, 2) for seconds in compile_s], "wrong_outputs": wrong,
    }  # fmt: skip


def _times(engines: dict[str, Engine], turns: int, threads: int) -> dict[str, list[float]]:
    numbers: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(turns + 1):
        for name, engine in engines.items():
            with _turn(engine, threads):
                engine.run()  # the first run after another engine's finds its caches cold and its threads asleep
                start = time.perf_counter()
                engine.run()
                seconds = max(time.perf_counter() - start, 1e-7)
                numbers.setdefault(name, max(1, math.ceil(TURN_S / seconds)))
                start = time.perf_counter()
                for _ in range(numbers[name]):
                    engine.run()
                if turn:  # the first turn warms up
                    times[name].append((time.perf_counter() - start) / numbers[name])
    return times


@contextmanager
def _turn(engine: Engine, threads: int) -> Iterator[None]:
    """An engine's turn, after the threads of the one before have stopped waiting for more work on the other cores."""
    if threads > 1:
        time.sleep(_SPIN_S)
    enter, leave = (getattr(engine, name, None) for name in ("enter", "leave"))
    if enter:
        enter()
    try:
        yield
    finally:
        if leave:
            leave()


def _difference(output: Any, expected: Any) -> float:
    import numpy as np

    return float(np.abs(output - expected).max() / np.abs(expected).max())


def summarise(rows: Sequence[Row]) -> dict[str, float | None]:
    """Geometric means and worst cases of peer time over our time, by precision; the best peer counts."""
    summary: dict[str, float | None] = {}
    asked = [precision for precision in TOLERANCE if any(r["precision"] == precision for r in rows)]
    for precision in dict.fromkeys(("fp32", "int8", *asked)):
        ratios = [
            r["best_peer_over_planish"] for r in rows if r["precision"] == precision and r["best_peer_over_planish"]
        ]
        summary[f"{precision}_geomean"] = round(statistics.geometric_mean(ratios), 3) if ratios else None
        summary[f"{precision}_worst"] = min(ratios, default=None)
    with_ort = [r["peer_over_planish"]["onnxruntime"] for r in rows if "onnxruntime" in r["peer_over_planish"]]
    summary["onnxruntime_worst"] = min(with_ort, default=None)
    whole = {(r["model"], r["batch"], r["threads"]): r["ms"]["planish"] for r in rows if r["precision"] == "fp32"}
    gains = [
        whole[key] / r["ms"]["planish"]
        for r in rows
        if r["precision"] == "int8" and (key := (r["model"], r["batch"], r["threads"])) in whole
    ]
    summary["int8_over_fp32"] = round(statistics.geometric_mean(gains), 3) if gains else None
    compiled = [r["compile_s"] for r in rows if r["model"] == "resnet50"]
    for position, name in enumerate(("cold", "warm")):
        summary[f"compile_s_{name}"] = max((seconds[position] for seconds in compiled), default=None)
    return summary


def kernel_shares(quick: bool) -> dict[str, float | None]:
    """The shares of the machine's peaks that `roofline.py` finds, in a process of its own."""
    command = [sys.executable, str(Path(__file__).with_name("roofline.py")), "--json", *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"roofline.py: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}", file=sys.stderr)
        return {}
    summary = json.loads(done.stdout)["summary"]
    return {key: value for key, value in summary.items() if "share" in key}


def write_table(path: Path, rows: Sequence[Row], summary: dict[str, float | None], command: str) -> None:
    """The rows, the summary and the machine as Markdown."""
    peers = [peer for peer in PEERS if any(peer in r["ms"] for r in rows)]
    header = ["model", "precision", "batch", "threads", "planish ms", *(f"{peer} ms (ratio)" for peer in peers)]
    lines = ["# Compiled models and their peers", "", f"`{command}`", ""]
    lines += [f"- {key}: {value}" for key, value in machine().items() if key != "versions"]
    lines += [f"- {name} {version}" for name, version in machine()["versions"].items()]
    lines += ["", "A ratio is the peer's time over Planish's; times are medians, in turns in one process.", ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for r in rows:
        cells = [r["model"], r["precision"], r["batch"], r["threads"], f"{r['ms']['planish']:.3f}"]
        cells += [
            f"{r['ms'][peer]:.3f} ({r['peer_over_planish'][peer]:.2f}x)" if peer in r["ms"] else "" for peer in peers
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    lines += ["", "Summary: " + ", ".join(f"{key} {value}" for key, value in summary.items()), ""]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")


def machine() -> dict[str, Any]:
    """The processor, its vector instructions as the compiler sees them, and the versions of what was compared."""
    from importlib.metadata import PackageNotFoundError, version

    from planish.hwmodels.device import parse_device

    versions = {}
    for package in ("planish", "torch", "apache-tvm", "onnxruntime", "openvino"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(names),
        "device": parse_device("cpu").title,
        "instructions": " ".join(parse_device("cpu").features),
        "python": platform.python_version(),
        "versions": versions,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every case in a process of its own."""
    from nets import NETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the small models, batch 1, one thread: under 5 minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--models", nargs="+", choices=tuple(NETS), metavar="MODEL", help=", ".join(NETS))
    parser.add_argument("--precisions", nargs="+", choices=tuple(TOLERANCE), default=["fp32", "int8"])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--turns", type=int, default=15, help="turns of every engine, each at least 20 ms")
    parser.add_argument("--no-roofline", action="store_true", help="leave out the kernels' shares of the peaks")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table as Markdown too")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.case:
        logging.disable(logging.WARNING)
        print(json.dumps(run_case(**json.loads(args.case))))
        return 0
    needed = {"onnx": True, **{peer: peer in args.peers for peer in ("onnxruntime", "openvino")}}
    missing = [name for name, used in needed.items() if used and importlib.util.find_spec(name) is None]
    if missing:
        print(f'not installed: {", ".join(missing)}; pip install -c constraints.txt -e ".[benchmark]"', file=sys.stderr)
        return 2
    models = args.models or (QUICK if args.quick else tuple(net for net in NETS if net != MEMORY_BOUND))
    batches = args.batches or ([1] if args.quick else [1, 8])
    threads = args.threads or ([1] if args.quick else [1, 2])
    rows: list[Row] = []
    failed = False
    if not args.json:
        print(f"{'model':16} {'':5} batch threads  planish ms  " + "  ".join(f"{peer:>14}" for peer in args.peers))
    for model, precision, batch, count in itertools.product(models, args.precisions, batches, threads):
        case = {
            "model": model, "precision": precision, "batch": batch, "threads": count, "peers": args.peers,
            "turns": args.turns,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, "--case", json.dumps(case)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            failed = True
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"{model} {precision} batch {batch}, {count} threads: {reason}", file=sys.stderr)
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
        if row["wrong_outputs"]:
            failed = True
            print(f"{model} {precision}: wrong outputs (difference) {row['wrong_outputs']}", file=sys.stderr)
        if not args.json:
            peers = "  ".join(
                f"{row['ms'][p]:7.3f} {row['peer_over_planish'][p]:5.2f}x" if p in row["ms"] else " " * 14
                for p in args.peers
            )
            print(f"{model:16} {precision:5} {batch:5} {count:7} {row['ms']['planish']:11.3f}  {peers}", flush=True)
    summary = summarise(rows)
    if not args.no_roofline:
        summary |= kernel_shares(args.quick)
    if args.write:
        given = sys.argv[1:] if arguments is None else arguments
        write_table(args.write, rows, summary, " ".join(["python benchmarks/compiled_speed.py", *given]))
    if args.json:
        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=1))
    else:
        print("peer's time over ours: " + ", ".join(f"{key} {value}" for key, value in summary.items()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
