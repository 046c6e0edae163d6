"""A search's front beside what a user would do by hand: Torch-Pruning, fine-tuning, ONNX Runtime's static int8.

    python benchmarks/by_hand.py --run RUN      # a finished run of runs/cifar10-resnet20.toml, say
    python benchmarks/by_hand.py --quick        # searches the digits itself, briefly

By hand: the run's original is pruned at a few ratios (groups by magnitude, channels rounded to 4: to 8, which
Torch-Pruning recommends, layers of 16 lose half at a ratio of 0.25 and nothing at 0.7), trained for as many epochs as
the run's finalists, of as many images, with the same recipe and teacher, then quantised by ONNX Runtime (static, by
channel, calibrated on 256 training images). Channels that a shortcut pads stay: Torch-Pruning takes `F.pad` for a
function of every element, and would remove others after it than before. With `--keep DIR` a killed comparison carries
on. The run: the models of its front, as compiled. All are timed in turns in one process, batch 1; accuracies are
computed by the engine that is timed: what is best is chosen by the validation split, and what it loses is told of the
test split. Sizes are of stored weights. Speed-ups are over the run's original, compiled in float32.

Needs: pip install -c constraints.txt -e ".[benchmark]".
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

RATIOS = (0.0, 0.25, 0.5, 0.7)
_CALIBRATION = 256
_ROUND_TO = 4

Row = dict[str, Any]


def original(run: Path) -> tuple[Any, Any]:
    """The specification and the task of a run."""
    from planish.search.rundir import RunDirectory
    from planish.search.tasks import load_task

    spec = RunDirectory.open(run).spec()
    return spec, load_task(spec.model, spec.data or None, spec.weights, seed=spec.seed)


def prune(task: Any, ratio: float) -> Any:
    """The task's model with a share of its channels gone, as Torch-Pruning's own introduction does it.

    Layers whose channels cannot go without changing what others compute are left as they are.
    """
    import copy

    import torch
    import torch_pruning

    from planish.spaces.coupling import couple
    from planish.spaces.trace import trace

    module = copy.deepcopy(task.model)
    classes = len(task.data.classes)
    last = [m for m in module.modules() if isinstance(m, torch.nn.Linear) and m.out_features == classes]
    if ratio:
        last += [module.get_submodule(name) for name in couple(trace(task.model, task.data.example(1))).refused]
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        pruner = torch_pruning.pruner.BasePruner(
            module, task.data.example(1), importance=importance, pruning_ratio=ratio, ignored_layers=last,
            round_to=_ROUND_TO,
        )  # fmt: skip
        pruner.step()
    return module


def by_hand(run: Path, ratio: float, out: Path) -> None:
    """Prunes, trains and quantises; writes `out`, the ONNX form of int8."""
    import onnx
    import torch
    from engines import write_onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from planish.hwmodels.device import host
    from planish.search.distill import distill
    from planish.search.evaluate import recipe_of

    torch.set_num_threads(1)
    spec, task = original(run)
    module, keys = prune(task, ratio), spec.distill
    if ratio:
        distill(
            module, task.model, task.data.train, to_epoch=keys.rungs[-1], total_epochs=keys.rungs[-1], seed=spec.seed,
            recipe=recipe_of(keys), samples=keys.train_limit, lessons=out.parent / "teacher",
            checkpoint=out.with_suffix(".safetensors"), restarts=[r for r in keys.rungs if r < keys.rungs[-1]],
        )  # fmt: skip
    example = task.data.example(1)
    floats, prepared = out.with_suffix(".float.onnx"), out.with_suffix(".prepared.onnx")
    write_onnx(module.eval(), example, str(floats), quantised=False)
    quant_pre_process(str(floats), str(prepared))

    name = onnx.load(str(prepared)).graph.input[0].name
    inputs = iter(task.data.train.calibration(_CALIBRATION).unsqueeze(1))

    class Calibration(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            found = next(inputs, None)
            return None if found is None else {name: found.numpy()}

    # Without VNNI sums of two products saturate in 16 bits; ONNX Runtime advises weights of 7 bits there.
    saturates = not any("vnni" in feature for feature in host().features)
    partial = out.with_suffix(".partial.onnx")  # what a kill cuts short is not taken for a result
    quantize_static(
        str(prepared), str(partial), Calibration(), per_channel=True, activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8, reduce_range=saturates,
    )  # fmt: skip
    partial.replace(out)


class Artifact:
    """A compiled model of a run, as `planish export` writes it."""

    def __init__(self, folder: Path, x: Any) -> None:
        from planish.compilers.loader import LOADERS
        from planish.compilers.manifest import read

        manifest = read(folder)
        self._loaded = LOADERS[manifest.compiler](folder, manifest)
        self._loaded.run(x.numpy())

    def __call__(self, x: Any) -> Any:
        return self._loaded.run(x.numpy())

    def run(self) -> None:
        self._loaded._vm.invoke_stateful("main")  # type: ignore[attr-defined]


class Onnx:
    """A model in ONNX Runtime, one thread, inputs and outputs bound."""

    def __init__(self, file: Path, x: Any) -> None:
        from engines import OnnxRuntime

        self._engine = OnnxRuntime(str(file), x, 1)
        self._session = self._engine._session
        self._name = self._session.get_inputs()[0].name

    def __call__(self, x: Any) -> Any:
        return self._session.run(None, {self._name: x.numpy()})[0]

    def run(self) -> None:
        self._engine.run()


def weights_bytes(file: Path) -> int:
    """The bytes of an ONNX file's constants: weights, biases, scales and zero points, without the graph."""
    import onnx

    return sum(len(onnx.numpy_helper.to_array(t).tobytes()) for t in onnx.load(str(file)).graph.initializer)


def accuracy(engine: Any, split: Any) -> float:
    """The share of a split's samples that an engine of batch 1 names rightly."""
    right = 0
    for index in range(len(split)):
        right += int(engine(split.batch(slice(index, index + 1))).argmax() == int(split.targets[index]))
    return right / len(split)


def _keep_apart(folder: Path, spec: Any) -> None:
    """Notes in the folder of which model and training what lies there is; refuses that of another."""
    note = folder / "made-of.json"
    own = {"model": spec.model, "data": str(spec.data), "seed": spec.seed, "distill": asdict(spec.distill)}
    text = json.dumps(own, default=str, sort_keys=True)
    if note.exists() and note.read_text(encoding="utf-8") != text:
        raise SystemExit(f"{folder} holds what was made by hand of another run or training; name another folder")
    note.write_text(text, encoding="utf-8")


def compare(run: Path, ratios: Sequence[float], turns: int, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """A row a model, and the summary; what is made by hand is kept in the folder."""
    from compiled_speed import _times
    from fine_tuned import at_drops, models_of

    spec, task = original(run)
    x = task.data.example(1)
    engines: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for entry in models_of(run):
        number = int(entry["trial"])
        label = f"trial {number}" if number else "original"
        engines[label] = Artifact(run / "trials" / f"{number:04d}" / "artifact", x)
        sizes[label] = int(entry["metrics"]["size_bytes"])
    _keep_apart(folder, spec)
    files = {ratio: folder.resolve() / f"pruned-{ratio}.onnx" for ratio in ratios}
    # In processes of their own, one a core: each trains on one thread.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda ratio: _child(run, ratio, files[ratio]), ratios))
    engines["original, onnxruntime fp32"] = Onnx(files[ratios[0]].with_suffix(".float.onnx"), x)
    sizes["original, onnxruntime fp32"] = sizes["original"]
    for ratio, file in files.items():
        label = f"{f'torch-pruning {ratio}, ' if ratio else ''}onnxruntime int8"
        engines[label], sizes[label] = Onnx(file, x), weights_bytes(file)
    times = _times(engines, turns, 1)
    rows = [
        {
            "model": label,
            "by_hand": "onnxruntime" in label,
            "us": 1e6 * statistics.median(times[label]),
            "validation_accuracy": accuracy(engine, task.data.validation),
            "test_accuracy": accuracy(engine, task.data.test),
            "size_bytes": sizes[label],
        }
        for label, engine in engines.items()
    ]
    base = rows[0]
    for row in rows:
        row["speedup"] = base["us"] / row["us"]
        for split in ("validation", "test"):
            row[f"{split}_drop_pp"] = 100 * (base[f"{split}_accuracy"] - row[f"{split}_accuracy"])
        row["size_ratio"] = row["size_bytes"] / base["size_bytes"]
    keys = spec.distill
    summary: dict[str, Any] = {"epochs": keys.rungs[-1], "images_an_epoch": keys.train_limit or len(task.data.train)}
    summary |= at_drops([row for row in rows if not row["by_hand"]])
    summary |= at_drops([row for row in rows if row["by_hand"]], "by_hand_")
    return rows, summary


def _child(run: Path, ratio: float, out: Path) -> None:
    if out.exists():
        return
    command = [sys.executable, __file__, "--run", str(run), "--one", json.dumps([ratio, str(out)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"by hand at ratio {ratio}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a short search of the digits: under 5 minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--run", type=Path, help="the folder of a finished run on one device, cpu, one thread")
    parser.add_argument("--ratios", nargs="+", type=float, help=f"of pruning ({' '.join(map(str, RATIOS))})")
    parser.add_argument("--turns", type=int, default=15, help="turns of every engine, each at least 20 ms")
    parser.add_argument("--keep", type=Path, help="a folder for what is made by hand of this run; found again there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    needed = ("onnx", "onnxruntime", "torch_pruning")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        print(f'not installed: {", ".join(missing)}; pip install -c constraints.txt -e ".[benchmark]"', file=sys.stderr)
        return 2
    if not args.run and not args.quick:
        parser.error("name a finished run with --run, or give --quick")
    if args.one:
        logging.disable(logging.WARNING)
        ratio, out = json.loads(args.one)
        by_hand(args.run, float(ratio), Path(out))
        return 0
    from fine_tuned import search_digits

    from planish.search.errors import UserError

    with tempfile.TemporaryDirectory() as folder:
        run = args.run or search_digits(Path(folder))
        ratios = tuple(dict.fromkeys([0.0, *(args.ratios or (RATIOS[:3] if args.quick else RATIOS))]))
        kept = args.keep or Path(folder, "by-hand")
        kept.mkdir(parents=True, exist_ok=True)
        try:
            rows, summary = compare(run, ratios, args.turns, kept)
        except UserError as error:
            raise SystemExit(str(error)) from None
    if args.json:
        from compiled_speed import machine

        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=1))
        return 0
    print(f"{'':42} {'us':>8} {'speed-up':>9} {'validation':>10} {'test':>8} {'drop':>7} {'bytes':>9}")
    for row in rows:
        print(
            f"{row['model']:42} {row['us']:8.1f} {row['speedup']:8.2f}x {row['validation_accuracy']:10.2%} "
            f"{row['test_accuracy']:8.2%} {row['test_drop_pp']:7.2f} {row['size_bytes']:9}"
        )
    print(", ".join(f"{key} {value if value is None else round(value, 3)}" for key, value in summary.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
