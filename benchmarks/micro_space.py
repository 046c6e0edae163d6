"""Evaluates every network of a small space once and stores the result: 6 blocks with 6 options each, 46 656 networks.

    python benchmarks/micro_space.py            # three quarters of an hour: writes benchmarks/data/micro_space.npz
    python benchmarks/micro_space.py --quick    # the first two forms, 64 networks: writes nothing

The network is the built-in one for scikit-learn's digits. Each of its six blocks can be put in one of six forms, with
the product's own closed forms fitted on the original's inputs; the networks of all combinations are run on the
validation split (a tree, so that what they share is computed once). A form's latency is what it changes in the compiled
original, timed in turns with it; latencies of blocks add up. With that the exact front of the space is known, and how
far any search is from it.

The file holds no pickles: correct answers (uint16) and divergence from the original (float16) of every network, the
last block's form changing fastest, and by block and form the latency, the size, and the product's own guesses: the
error seen on the original's inputs and the counted time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np

FILE = Path(__file__).resolve().parent / "data" / "micro_space.npz"
BLOCKS = tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(2))
# What every form sets at a block's two convolutions and its inner channels.
FORMS: tuple[dict[str, Any], ...] = (
    {},
    {"bits": 8},
    {"bits": 8, "prune": 0.5},
    {"bits": 8, "prune": 0.75},
    {"bits": 8, "block": ("separable", "separable")},
    {"bits": 4, "block": ("pointwise", "identity"), "prune": 0.5},
)


def evaluator_of() -> Any:
    from planish.search.config import load_spec
    from planish.search.evaluate import Evaluator

    keys = {"model": "digits-resnet", "data": "digits32", "device": "cpu", "measure.processes": 6, "measure.runs": 60}
    return Evaluator(load_spec(None, keys))


def candidate_of(space: Any, block: str, form: dict[str, Any]) -> Any:
    """The space's candidate in which one block has a form and all others are as they were."""
    from planish.spaces.space import Candidate

    options = dict(space.original().options)

    def put(name: str, option: Any) -> None:
        choice = next(c for c in space.choices if c.name == name)
        options[name] = option if option in choice.options else choice.options[-1]

    for number, conv in enumerate((f"{block}.conv1", f"{block}.conv2")):
        if "bits" in form:
            put(f"{conv}:bits", form["bits"])
        if "block" in form:
            put(f"{conv}:block", form["block"][number])
    if "prune" in form:
        put(f"{block}.conv1:prune", form["prune"])
    return Candidate(options)


def evaluate_all(evaluator: Any, blocks: list[list[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Correct answers and divergence of every network, the last block's form changing fastest."""
    import torch
    from torch.nn import functional

    model, split = evaluator.teacher, evaluator.task.data.validation
    x, y = split.batch(slice(0, len(split))), split.targets
    correct, divergence = [], []
    with torch.no_grad():
        teacher = functional.log_softmax(model(x).double(), 1)

        def visit(level: int, value: torch.Tensor) -> None:
            if level == len(BLOCKS):
                logits = model.fc(value.mean((2, 3)))
                own = functional.log_softmax(logits.double(), 1)
                correct.append(int((logits.argmax(1) == y).sum()))
                divergence.append(float((teacher.exp() * (teacher - own)).sum(1).mean()))
                return
            for block in blocks[level]:
                visit(level + 1, block(value))
            if level == 2:
                print(f"{len(correct)} networks", file=sys.stderr, flush=True)

        visit(0, functional.relu(model.bn(model.stem(x))))
    return np.array(correct, dtype=np.uint16), np.maximum(np.array(divergence), 0).astype(np.float16)


def latencies(evaluator: Any, candidates: dict[tuple[int, int], Any]) -> tuple[float, np.ndarray]:
    """Seconds of the original and what every form of every block adds to them, from compiled networks in turns."""
    from planish.search.evaluate import Job
    from planish.search.measuring import measure_trials

    with tempfile.TemporaryDirectory() as folder:
        jobs = {key: Job(n + 1, c, 0, Path(folder, str(n + 1))) for n, (key, c) in enumerate(candidates.items())}
        original = Job(0, evaluator.proposal.space.original(), 0, Path(folder, "0"))
        for job in (original, *jobs.values()):
            evaluator.compile(evaluator.build(job.candidate), job, "artifact")
        folders = {job.number: job.folder for job in jobs.values()}
        results = measure_trials(evaluator, {0: original.folder, **folders}, original.folder, "artifact", final=True)
    base = results[0]["latency_s"]["cpu"]["value"]
    added = np.zeros((len(BLOCKS), len(FORMS)))
    for key, job in jobs.items():
        added[key] = base * (results[job.number]["latency_ratio"]["cpu"] - 1)
    return base, added


def guesses(evaluator: Any, candidates: dict[tuple[int, int], Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every form's error on the original's inputs, its counted seconds and the bytes that it saves, by the table."""
    from planish.search.library import option_table
    from planish.search.option_table import levels_of
    from planish.spaces.local_error import local_errors

    errors = local_errors(evaluator.traced, evaluator.proposal, evaluator.calibration)
    table = option_table(evaluator, errors, ["latency[cpu]", "size"])
    space = evaluator.proposal.space
    zero = levels_of(space, [space.original()])
    found = [np.zeros((len(BLOCKS), len(FORMS))) for _ in range(3)]
    for key, candidate in candidates.items():
        own = levels_of(space, [candidate])
        found[0][key] = table.error(own)[0]
        for values, name in zip(found[1:], ("latency[cpu]", "size"), strict=True):
            values[key] = table.cost(name, own)[0] - table.cost(name, zero)[0]
    return found[0], found[1], found[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluates the space, and prints what every form of every block costs, or one JSON object."""
    import torch
    from compiled_speed import machine

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first two forms of every block; nothing is stored")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    forms = FORMS[:2] if args.quick else FORMS
    evaluator = evaluator_of()
    space = evaluator.proposal.space
    candidates = {
        (b, f): candidate_of(space, block, form)
        for b, block in enumerate(BLOCKS)
        for f, form in enumerate(forms)
        if form
    }
    base, added = latencies(evaluator, candidates)
    errors, counted, bytes_added = guesses(evaluator, candidates)
    blocks = [
        [
            (evaluator.build(candidates[b, f]) if (b, f) in candidates else evaluator.teacher).get_submodule(block)
            for f in range(len(forms))
        ]
        for b, block in enumerate(BLOCKS)
    ]
    correct, divergence = evaluate_all(evaluator, blocks)
    samples = len(evaluator.task.data.validation)
    if not args.quick:
        FILE.parent.mkdir(exist_ok=True)
        np.savez_compressed(
            FILE, correct=correct, divergence=divergence, samples=samples, base_s=base, added_s=added, errors=errors,
            counted_s=counted, bytes_added=bytes_added, bytes=float(option_bytes(evaluator)),
        )  # fmt: skip
    rows = [
        {"block": BLOCKS[b], "form": FORMS[f], "latency_added": round(float(added[b, f]) / base, 4),
         "counted": round(float(counted[b, f]) / base, 4), "error": round(float(errors[b, f]), 6),
         "bytes_added": int(bytes_added[b, f])}
        for b, f in candidates
    ]  # fmt: skip
    summary = {
        "networks": len(correct), "original_us": round(1e6 * base, 2), "original_accuracy": float(correct[0]) / samples,
        "stored_bytes": None if args.quick else FILE.stat().st_size,
    }  # fmt: skip
    if args.json:
        print(json.dumps({"rows": rows, "summary": summary, "machine": machine()}, indent=1))
        return 0
    for row in rows:
        print(
            f"{row['block']} as {row['form']}: latency {row['latency_added']:+.3f} (counted {row['counted']:+.3f}) of "
            f"the original's, error {row['error']:.5f}, {row['bytes_added']:+d} bytes"
        )
    print(", ".join(f"{name} {value}" for name, value in summary.items()))
    return 0


def option_bytes(evaluator: Any) -> int:
    from planish.spaces.size import stored_bytes

    return stored_bytes(evaluator.traced.module)


if __name__ == "__main__":
    sys.exit(main())
