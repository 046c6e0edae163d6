"""How far the choice that is made without measuring a kernel is from the best that measuring finds.

    python benchmarks/tile_choice.py            # the convolutions of ResNet-50 and MobileNetV2, fp32 and int8
    python benchmarks/tile_choice.py --quick    # those of ResNet-20

Every convolution is compiled as it would be, and in the ways whose estimates come next or are the best of their kind
(direct and Winograd's forms, blocks of output channels); all are timed in turns, one thread, batch 1, weights in the
caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

Row = dict[str, Any]
# Candidates beside the default, by estimate and then the best of each other kind.
NEXT, KINDS = 3, 5
TURNS, SAMPLE_S = 7, 0.004


def convolutions(model: str, precision: str) -> list[Any]:
    """(spec, choice) of every kernel of a convolution that the model calls."""
    import torch
    from engines import folded, quantised
    from nets import NETS, make

    from planish.compilers.cpu.convspec import ConvSpec
    from planish.compilers.tvm_build import cpu_machine
    from planish.compilers.tvm_frontend import import_program
    from planish.compilers.tvm_graph import Graph
    from planish.compilers.tvm_lower import lower
    from planish.hwmodels.device import parse_device
    from planish.spaces.quantize import deploy

    x = torch.randn(1, *NETS[model].shape, generator=torch.Generator().manual_seed(1))
    module = folded(make(model))
    if precision == "int8":
        module = deploy(quantised(module, torch.randn(8, *NETS[model].shape)))
    lowered = lower(Graph(import_program(torch.export.export(module, (x,)))), cpu_machine(parse_device("cpu")))
    subjects = [kernel.subject for kernel in lowered.kernels]
    found = [s for s in subjects if isinstance(s, tuple) and isinstance(s[0], ConvSpec) and not s[0].depthwise]
    return list(dict.fromkeys(found))


def candidates(spec: Any, chosen: Any) -> list[Any]:
    """The default first, then the next by estimate, then the best of each other kind."""
    from planish.compilers.cpu.tiles import choices
    from planish.compilers.tvm_build import cpu_machine
    from planish.hwmodels.device import parse_device

    every = choices(spec, cpu_machine(parse_device("cpu")), 0, 2**20 if spec.int8 else 0)
    found = [chosen, *[choice for choice in every if choice != chosen][:NEXT]]
    kinds = {_kind(choice) for choice in found}
    for choice in every:
        if _kind(choice) not in kinds and len(found) <= NEXT + KINDS:
            kinds.add(_kind(choice))
            found.append(choice)
    return found


def _kind(choice: Any) -> tuple[Any, ...]:
    return getattr(choice, "m", 0), choice.blocks


def seconds(spec: Any, options: Sequence[Any]) -> list[float]:
    """Median seconds of every option, timed in turns on the same data."""
    import numpy as np
    import tvm

    from planish.compilers.cpu.epilogue import quantize_numbers
    from planish.compilers.cpu.kernels import conv_kernel, conv_weights
    from planish.compilers.tvm_build import cpu_machine, tvm_target
    from planish.hwmodels.device import parse_device

    device = parse_device("cpu")
    machine, target, rng = cpu_machine(device), tvm_target(device), np.random.default_rng(0)
    shape = (spec.o, spec.c // spec.groups, *spec.kernel)
    weight = rng.integers(-90, 91, shape).astype(np.int8) if spec.int8 else rng.standard_normal(shape, np.float32)
    blocked = (spec.n, spec.in_blocks, spec.h, spec.w, spec.lanes)
    data_shape = blocked if spec.in_lanes == spec.lanes else (spec.n, spec.c, spec.h, spec.w)
    data = rng.standard_normal(data_shape, np.float32)
    if spec.int8 and not spec.quantize:
        data = rng.integers(0, 256, data_shape).astype(np.uint8)
    out = (spec.n, spec.out_blocks, spec.oh, spec.ow, spec.lanes)
    by_channel = np.full((spec.out_blocks, spec.lanes), 1e-3, np.float32)
    buffers = {
        "scale": by_channel, "bias": by_channel, "add": np.ones(out, np.float32), "mul": np.ones(out, np.float32),
        "quantize": quantize_numbers(0.1, 3),
    }  # fmt: skip
    extra = [buffers[step.op] for step in spec.steps if step.op in buffers]
    runs = []
    for option in options:
        function = conv_kernel(spec, option, machine).with_attr("global_symbol", "main")
        module = tvm.compile(tvm.IRModule({"main": function}), target).jit()
        numbers = [quantize_numbers(0.1, 10)] if spec.int8 else []
        arrays = [
            data,
            *numbers,
            *conv_weights(spec, option, machine, weight, 10),
            *extra,
            np.zeros(out, spec.out_dtype),
        ]
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        first = min(module.time_evaluator("main", tvm.cpu(), number=1, repeat=3)(*tensors).results)
        number = max(1, round(SAMPLE_S / first))
        runs.append((module.time_evaluator("main", tvm.cpu(), number=number, repeat=1), tensors))
    times: list[list[float]] = [[] for _ in options]
    for _ in range(TURNS):
        for position, (run, tensors) in enumerate(runs):
            times[position].append(run(*tensors).mean)
    return [statistics.median(values) for values in times]


def measure(model: str, precision: str) -> list[Row]:
    """A row a convolution: the default, the best, and how much longer the default takes."""
    rows = []
    for spec, chosen in convolutions(model, precision):
        options = candidates(spec, chosen)
        times = seconds(spec, options)
        best = min(range(len(options)), key=times.__getitem__)
        kernel, stride = spec.kernel, spec.stride
        rows.append(
            {
                "model": model, "precision": precision,
                "layer": f"{spec.c}x{spec.h}x{spec.w} -> {spec.o}, {kernel[0]}x{kernel[1]}, stride {stride[0]}",
                "default": str(chosen), "default_us": round(1e6 * times[0], 2),
                "best": str(options[best]), "best_us": round(1e6 * times[best], 2),
                "default_over_best": round(times[0] / times[best], 3), "measured": len(options),
            }
        )  # fmt: skip
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or one JSON object."""
    from compiled_speed import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="ResNet-20 instead of ResNet-50 and MobileNetV2")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    args = parser.parse_args(arguments)
    models = ("resnet20",) if args.quick else ("resnet50", "mobilenetv2")
    rows: list[Row] = []
    for model in models:
        for precision in ("fp32", "int8"):
            found = measure(model, precision)
            rows += found
            if not args.json:
                for r in found:
                    print(
                        f"{precision} {r['layer']:40} {r['default_us']:9.1f} us, best {r['best_us']:9.1f} us"
                        f" {r['default_over_best']:6.2f}x  {r['best'] if r['best'] != r['default'] else ''}",
                        flush=True,
                    )
    ratios = [r["default_over_best"] for r in rows]
    summary = {
        "default_over_best_geomean": round(statistics.geometric_mean(ratios), 3),
        "default_over_best_worst": max(ratios),
        "within_15_percent": round(sum(ratio <= 1.15 for ratio in ratios) / len(ratios), 3),
    }
    if args.json:
        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
