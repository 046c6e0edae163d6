"""How near compiled convolutions come to what the machine can do: its measured peaks, and every kernel's share of them.

    python benchmarks/roofline.py            # ResNet-50's layers, fp32 and int8, batch 1, one thread
    python benchmarks/roofline.py --quick    # ResNet-20's

A share is the layer's multiply-accumulates, as the model defines them, a second, over the measured peak. Winograd's
form needs fewer than that, so it may pass 100 %; the summary has the share of the direct forms alone and of all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

Row = dict[str, Any]


def peaks() -> dict[str, float]:
    """Measured peaks of one core: float32 and int8 multiply-accumulates a second, bytes a second read from memory."""
    import numpy as np
    import tvm
    from tvm.tirx.script import builder as T

    from planish.compilers.cpu.emit import argument, dot_step, kernel, local
    from planish.compilers.tvm_build import cpu_machine, tvm_target
    from planish.hwmodels.device import parse_device
    from planish.spaces.bit_widths import PAIRS

    device = parse_device("cpu")
    cpu, target = cpu_machine(device), tvm_target(device)
    lanes, ways = cpu.lanes, 12 if cpu.registers == 16 else 24
    number = 2_000_000

    def seconds(function: Any, *arrays: Any) -> float:
        module = tvm.compile(tvm.IRModule({"main": function.with_attr("global_symbol", "main")}), target).jit()
        tensors = [tvm.runtime.tensor(a) for a in arrays]
        return float(min(module.time_evaluator("main", tvm.cpu(), number=1, repeat=7)(*tensors).results))

    with kernel() as (multiply, body):
        factors, out = argument("factors", (2, lanes)), argument("out", (ways, lanes))

        def fused() -> None:
            sums = local((ways, lanes))
            with T.vectorized(0, lanes) as lane:
                for i in range(ways):
                    T.buffer_store(sums, out[i, lane], [i, lane])
            with T.serial(0, number), T.vectorized(0, lanes) as lane:
                for i in range(ways):
                    T.buffer_store(sums, sums[i, lane] * factors[0, lane] + factors[1, lane], [i, lane])
            with T.vectorized(0, lanes) as lane:
                for i in range(ways):
                    T.buffer_store(out, sums[i, lane], [i, lane])

        body(fused)
    half, ones = np.full((2, lanes), 0.5, np.float32), np.ones((ways, lanes), np.float32)
    found = {"fp32_macs_per_s": number * ways * lanes / seconds(multiply.function, half, ones)}

    dot = cpu.dot_for(PAIRS[8])
    kind = f"x{lanes * dot.depth}"
    with kernel() as (dots, body):
        weight_type = "int16" if dot.data == "int16" else "int8"
        weight = argument("weight", (lanes, dot.depth), weight_type)
        out = argument("out", (ways, lanes), "int32")

        def sums_of_bytes() -> None:
            sums = local((ways, lanes), "int32")
            whole = T.ramp(0, 1, lanes)
            for i in range(ways):
                T.buffer_store(sums, out.vload([i, 0], f"int32x{lanes}"), [i, whole])
            with T.serial(0, number):
                for i in range(ways):
                    # The sum itself is a factor: of two that do not change LLVM would compute the product once.
                    total = sums.vload([i, 0], f"int32x{lanes}")
                    factors = T.reinterpret(dot.data + kind, total), weight.vload([0, 0], weight_type + kind)
                    T.buffer_store(sums, dot_step(dot, lanes, total, *factors), [i, whole])
            for i in range(ways):
                T.buffer_store(out, sums.vload([i, 0], f"int32x{lanes}"), [i, whole])

        body(sums_of_bytes)
    shape, zeros = (lanes, dot.depth), np.zeros((ways, lanes), np.int32)
    arrays = np.zeros(shape, weight_type), zeros
    found["int8_macs_per_s"] = number * ways * lanes * dot.depth / seconds(dots.function, *arrays)

    rows = 1 << 20  # 8 vectors each: half a gigabyte of AVX-512, more than any cache
    with kernel() as (read, body):
        data, out = argument("data", (rows, 8, lanes)), argument("out", (8, lanes))

        def stream() -> None:
            sums = local((8, lanes))
            with T.vectorized(0, lanes) as lane:
                for i in range(8):
                    T.buffer_store(sums, T.float32(0), [i, lane])
            with T.serial(0, rows) as row, T.vectorized(0, lanes) as lane:
                for i in range(8):
                    T.buffer_store(sums, sums[i, lane] + data[row, i, lane], [i, lane])
            with T.vectorized(0, lanes) as lane:
                for i in range(8):
                    T.buffer_store(out, sums[i, lane], [i, lane])

        body(stream)
    zeros = np.zeros((rows, 8, lanes), np.float32)
    found["bytes_per_s"] = zeros.nbytes / seconds(read.function, zeros, np.zeros((8, lanes), np.float32))
    return found


def layers(model: str, precision: str, limits: dict[str, float]) -> list[Row]:
    """Every convolution and dense layer: kernel, seconds, MACs, share of the peak."""
    import torch
    from engines import folded, quantised
    from nets import NETS, make

    from planish.compilers import runner
    from planish.compilers.registry import compiler_for
    from planish.compilers.verify import FLOAT_TOLERANCE, INT8_TOLERANCE
    from planish.hwmodels.device import parse_device
    from planish.hwmodels.measurement import MeasureProtocol
    from planish.spaces.quantize import deploy

    device = parse_device("cpu")
    x = torch.randn(1, *NETS[model].shape, generator=torch.Generator().manual_seed(1))
    module = folded(make(model))
    if precision == "int8":
        module = deploy(quantised(module, torch.randn(8, *NETS[model].shape)))
    macs = _macs(folded(make(model)), x)
    tolerance = INT8_TOLERANCE if precision == "int8" else FLOAT_TOLERANCE
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "artifact")
        compiler_for(device).compile(torch.export.export(module, (x,)), device, path, x[None], tolerance=tolerance)
        timed = runner.site_times({"model": path}, device, MeasureProtocol())["model"]
    peak = limits[f"{precision}_macs_per_s"]
    return [
        {
            "model": model, "precision": precision, "site": site, "kernel": kernel, "us": round(1e6 * seconds, 2),
            "macs": macs[site], "share": round(macs[site] / seconds / peak, 3),
            "winograd": "winograd" in kernel,
        }
        for kernel, site, seconds in timed
        if site in macs
    ]  # fmt: skip


def _macs(module: Any, x: Any) -> dict[str, int]:
    """Multiply-accumulates of every convolution and linear layer, by its name."""
    from torch import nn

    found: dict[str, int] = {}
    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):

            def count(layer: Any, _: Any, output: Any, name: str = name) -> None:
                channels = output.shape[1] if isinstance(layer, nn.Conv2d) else output.shape[-1]
                found[name] = output.numel() * layer.weight.numel() // channels

            hooks.append(layer.register_forward_hook(count))
    module(x)
    for hook in hooks:
        hook.remove()
    return found


def summarise(rows: Sequence[Row]) -> dict[str, float | None]:
    """Geometric means of the shares of convolutions: the direct forms, and all with Winograd's."""
    summary: dict[str, float | None] = {}
    for precision in ("fp32", "int8"):
        convolutions = [r for r in rows if r["precision"] == precision and "dense" not in r["kernel"]]
        direct = [r["share"] for r in convolutions if not r["winograd"]]
        summary[f"{precision}_peak_share"] = round(statistics.geometric_mean(direct), 3) if direct else None
        shares = [r["share"] for r in convolutions]
        summary[f"{precision}_peak_share_with_winograd"] = (
            round(statistics.geometric_mean(shares), 3) if shares else None
        )
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or one JSON object."""
    from compiled_speed import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 instead of ResNet-50")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(arguments)
    limits = peaks()
    precisions = [p for p in ("fp32", "int8") if f"{p}_macs_per_s" in limits]
    model = "resnet20" if args.quick else "resnet50"
    rows = [row for precision in precisions for row in layers(model, precision, limits)]
    summary = {**summarise(rows), **{name: round(value) for name, value in limits.items()}}
    if args.json:
        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=1))
        return 0
    print("one core: " + ", ".join(f"{value / 1e9:.1f} G {name}" for name, value in limits.items()))
    for row in rows:
        print(f"{row['precision']} {row['site']:24} {row['kernel']:48} {row['us']:9.1f} us {100 * row['share']:6.1f} %")
    print(", ".join(f"{name} {value}" for name, value in summary.items() if "share" in name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
