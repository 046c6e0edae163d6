"""The child process that times kernels alone: `python -m planish.compilers.kernel_child REQUEST.json`.

The request is `{"library": file, "kernels": [{"key": k, "symbol": s, "arguments": [[shape, dtype], ...]}, ...],
"runs": n, "quiet_s": s, "sample_s": s, "before_s": s, "threads": t, "rpc": address, "time_limit_s": s}`; an empty
address stands for this machine. Where `quiet_s` is not 0 every kernel gets more runs, up to a limit, until beside
`runs` of them the reference took at most so many seconds.

The first kernel is the reference: it is timed before and after every sample of another, so that a change of the
machine's speed meets both, and a sample is given beside the reference's. Every other kernel runs for `before_s` untimed
first: its weights have to come back to the caches where they lie while a network runs, which takes more than one run.

Standard output is one JSON line `{"touch": key}` before a kernel is touched and `{"key": key, "run_s": [...],
"reference_s": [...]}` for each at the end. The exit status says whether the device is lost; what else a kernel does
wrong ends the process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ..hwmodels.quiet import lacking
from .child import EXIT_FAILED, EXIT_LOST
from .cpu.packing import bfloat16
from .loader import answers, pin_caller, remote_session, torch_hidden, uploaded


def main(request_path: str) -> int:
    """Runs a request."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    if not request["rpc"]:
        return _run(request, None)
    session = None
    try:
        session = remote_session(request["rpc"], request["threads"], request["time_limit_s"])
        return _run(request, session)
    except Exception as error:  # whatever TVM raises
        print((str(error).strip().splitlines() or ["no reason given"])[0], file=sys.stderr, flush=True)
        return EXIT_LOST if session is None or not answers(request["rpc"]) else EXIT_FAILED


def _run(request: dict[str, Any], session: Any) -> int:
    with torch_hidden():
        import tvm
    if session is not None:
        library, device = uploaded(session, Path(request["library"])), session.cpu()
    else:
        pin_caller(request["threads"])
        library, device = tvm.runtime.load_module(request["library"]), tvm.cpu()
    rng = np.random.default_rng(0)
    timed: list[_Timed] = []
    for kernel in request["kernels"]:
        _say({"touch": kernel["key"]})
        timed.append(_Timed(library, device, kernel, request["sample_s"], request["before_s"], rng))
    reference, *others = timed
    run_s: dict[str, list[float]] = {kernel.key: [] for kernel in others}
    reference_s: dict[str, list[float]] = {kernel.key: [] for kernel in others}
    runs, quiet_s = request["runs"], request["quiet_s"]
    while waiting := [kernel for kernel in others if lacking(reference_s[kernel.key], runs, quiet_s)]:
        before = reference.sample()
        for kernel in waiting:
            _say({"touch": kernel.key})
            kernel.warm_up()
            seconds, after = kernel.sample(), reference.sample()
            run_s[kernel.key].append(seconds)
            reference_s[kernel.key].append((before + after) / 2)
            before = after
    for key, values in run_s.items():
        _say({"key": key, "run_s": values, "reference_s": reference_s[key]})
    return 0


class _Timed:
    def __init__(
        self, library: Any, device: Any, kernel: dict[str, Any], sample_s: float, before_s: float, rng: Any
    ) -> None:
        from tvm.runtime import tensor

        self.key = kernel["key"]
        self._arguments = [tensor(_values(tuple(s), dtype, rng), device) for s, dtype in kernel["arguments"]]
        self._evaluator: Any = library.time_evaluator(kernel["symbol"], device, number=1, repeat=1)
        once_s = max(min(self.sample() for _ in range(3)), 1e-9)
        self._before, self._evaluator = (
            library.time_evaluator(kernel["symbol"], device, number=max(1, round(seconds / once_s)), repeat=1)
            for seconds in (before_s, sample_s)
        )

    def warm_up(self) -> None:
        """Untimed runs."""
        self._before(*self._arguments)

    def sample(self) -> float:
        """Mean seconds of one call; the calls are made by the runtime, because Python takes half a microsecond."""
        return float(self._evaluator(*self._arguments).mean)


def _values(shape: tuple[int, ...], dtype: str, rng: Any) -> Any:
    if dtype == "float32":
        # Neither denormal nor large: both would take longer than a model's values.
        return rng.uniform(0.25, 1.0, shape).astype(np.float32)
    if dtype == "uint16":
        return bfloat16(rng.uniform(0.25, 1.0, shape))
    if dtype in ("int32", "int64"):  # may be places in another argument
        return np.zeros(shape, dtype)
    low, high = (0, 255) if dtype == "uint8" else (-90, 90)
    return rng.integers(low, high, shape).astype(dtype)


def _say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
