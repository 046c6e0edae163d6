"""The child process that runs compiled models: `python -m planish.compilers.child REQUEST.json RESULT.json`.

It imports the runtime that the artifacts need and little else of Planish's, so that a crash or a hang costs one
request and the timings are those of a user's process. The request is
`{"artifacts": {name: folder}, "runs": n, "quiet_s": s, "warmup_s": s, "kernels": bool, "rpc": address, "threads": t,
"time_limit_s": s}`; with 0 runs it only checks; an empty address stands for this machine. Where `quiet_s` is not 0
every artifact gets more runs, up to a limit, until beside `runs` of them the first took at most so many seconds. Each
line of standard output names the artifact it is about to touch, so that the parent knows whose crash it was; what
compiled code prints goes nowhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..hwmodels.quiet import lacking
from ..hwmodels.rapl import EnergyCounters, PowerMeter
from . import manifest as manifests
from .loader import LOADERS, REMOTE_LOADERS, Loaded, answers, remote_session

# One sample, and what runs before it untimed. The models' weights push each other out of the caches: after another
# model's turn the first run took three times as long as the tenth, and samples of 1 ms ranked models by whose weights
# the others had left there. Weights of many megabytes come back run by run, so that so many are made at least;
# of a model of which one run fills a sample one is enough, because fetching weights is little of it.
_SAMPLE_S = 5e-3
_BEFORE_S = 2e-3
_BEFORE_RUNS = 8
_KERNEL_REPEATS = 20
EXIT_WRONG_OUTPUT = 3
EXIT_FAILED = 4
EXIT_LOST = 5


def main(request_path: str, result_path: str) -> int:
    """Runs a request; the exit status says what went wrong, the last line of standard error why."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    loaded: dict[str, Loaded] = {}
    errors: dict[str, float] = {}
    announce = _announcer()
    session = None
    try:
        if request["rpc"]:
            session = remote_session(request["rpc"], request["threads"], request["time_limit_s"])
        for name, folder in request["artifacts"].items():
            announce(name)
            loaded[name] = _load(Path(folder), session)
            errors[name] = check(loaded[name], Path(folder))
        result = _timed(request, loaded, announce) | {"error": errors}
    except (WrongOutput, manifests.ManifestError) as error:
        return _ended(EXIT_WRONG_OUTPUT, str(error))
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        if request["rpc"] and (session is None or not answers(request["rpc"])):
            return _ended(EXIT_LOST, reason)
        return _ended(EXIT_FAILED, f"{type(error).__name__}: {reason}")
    Path(result_path).write_text(json.dumps(result), encoding="utf-8")
    return 0


def _ended(code: int, reason: str) -> int:
    print(reason, file=sys.stderr, flush=True)
    return code


def _timed(
    request: dict[str, Any], loaded: dict[str, Loaded], announce: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """The samples of all in turn, and their kernels' times where they are asked for."""
    times: dict[str, list[float]] = {name: [] for name in loaded}
    beside: dict[str, list[float]] = {name: [] for name in loaded}
    counters = None if request["rpc"] else EnergyCounters.here()
    meters = {name: PowerMeter(counters) for name in loaded}
    if request["runs"]:
        numbers = {}
        for name, model in loaded.items():
            announce(name)
            numbers[name] = _warm_up(model, request["warmup_s"])
        reference, runs, quiet_s = next(iter(loaded)), request["runs"], request["quiet_s"]
        while waiting := [name for name in loaded if lacking(beside[name], runs, quiet_s if name != reference else 0)]:
            before = None
            for name in dict.fromkeys((reference, *waiting)):
                model = loaded[name]
                announce(name)
                times[name].append(_sample(model, numbers[name], meters[name]))
                # The first is the reference: timed between every two others, so that each has it on both sides.
                announce(reference)
                after = times[name][-1] if name == reference else _sample(loaded[reference], numbers[reference])
                beside[name].append(after if before is None else (before + after) / 2)
                before = after
    kernels = {}
    for name, model in loaded.items() if request["kernels"] else ():
        announce(name)
        kernels[name] = _kernels(model, Path(request["artifacts"][name]))
    watts = {name: meter.watts for name, meter in meters.items()}
    return {"run_s": times, "reference_s": beside, "kernels": kernels, "watts": watts}


class WrongOutput(RuntimeError):
    """An artifact whose outputs are not the ones that were stored with it."""


def check(model: Loaded, folder: Path) -> float:
    """Runs the stored examples; the largest difference from the stored outputs, relative to the largest output.

    The first example runs once more at the end: what it gave must not depend on what ran in between.

    Raises:
        WrongOutput: the difference is larger than the manifest's tolerance, or an output of either is not finite.
    """
    with np.load(folder / manifests.EXAMPLES, allow_pickle=False) as examples:
        inputs, expected = examples["inputs"], examples["outputs"]
    worst = max(_difference(model.run, x, y) for x, y in zip(inputs, expected, strict=True))
    worst = max(worst, _difference(model.run, inputs[0], expected[0]))
    if not worst <= model.manifest.tolerance:
        raise WrongOutput(
            f"outputs differ from the stored ones by {worst:.3g} of the largest output; "
            f"at most {model.manifest.tolerance:.3g} is allowed"
        )
    return worst


def _difference(run: Callable[[NDArray[Any]], NDArray[Any]], x: NDArray[Any], expected: NDArray[Any]) -> float:
    output = run(x)
    if output.shape != expected.shape:
        raise WrongOutput(f"the output has the shape {output.shape}; {expected.shape} was stored")
    # In float64, because differences of unsigned integers wrap around.
    output, expected = output.astype(np.float64), expected.astype(np.float64)
    # Before any maximum: what is compared with NaN is lost in it.
    if not (np.isfinite(output).all() and np.isfinite(expected).all()):
        return float("inf")
    return float(np.abs(output - expected).max() / max(float(np.abs(expected).max()), 1e-12))


def _announcer() -> Callable[[str], None]:
    """Writes lines to what is standard output now; from then on that leads nowhere, for code that prints to it."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    return lambda name: print(name, file=stream, flush=True)


def _kernels(model: Loaded, folder: Path) -> list[tuple[str, float]]:
    with np.load(folder / manifests.EXAMPLES, allow_pickle=False) as examples:
        return model.kernels(examples["inputs"][0], _KERNEL_REPEATS)


def _load(folder: Path, session: Any) -> Loaded:
    manifest = manifests.read(folder)
    if session is not None and manifest.compiler in REMOTE_LOADERS:
        return REMOTE_LOADERS[manifest.compiler](folder, manifest, session)
    if session is not None or manifest.compiler not in LOADERS:
        raise manifests.ManifestError(f"{folder} needs the compiler {manifest.compiler!r}; known: {sorted(LOADERS)}")
    return LOADERS[manifest.compiler](folder, manifest)


def _sample(model: Loaded, number: int, meter: PowerMeter | None = None) -> float:
    """Seconds of a run in a row of so many, its weights in the caches that hold them."""
    model.time(_runs_before(number))
    if meter is None:
        return model.time(number)
    meter.begin()
    seconds = model.time(number)
    meter.end()
    return seconds


def _runs_before(number: int) -> int:
    """Untimed runs before a sample of so many."""
    return 1 if number == 1 else max(_BEFORE_RUNS, round(number * _BEFORE_S / _SAMPLE_S))


def _warm_up(model: Loaded, seconds: float) -> int:
    """Runs for so many seconds; how many runs make one sample."""
    end, best = time.perf_counter() + seconds, float("inf")
    while True:
        best = min(best, model.time(1))
        if time.perf_counter() >= end:
            return max(1, round(_SAMPLE_S / max(best, 1e-9)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
