"""How long a kernel takes that nobody has measured yet, from those that were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernel_database import KernelTime
from .relative_fit import log_error
from .workload import Workload

# Words of a workload's form that change what its kernel does at both ends of the sum.
_EPILOGUES = ("quantize=True", "'quantize'", "'add'", "'mul'", "'relu'", "'silu'", "'sigmoid'", "'hardswish'", "'gelu'")
# Words of the names that TVM gives to what it fuses.
_FUSED = ("_pack", "unpack", "pad", "transpose", "strided_slice", "concat", "quantize", "_add", "_multiply", "_relu")
_SIZES = ("n", "c", "o", "h", "w", "oh", "ow", "kh", "kw", "stride", "groups", "m", "k", "heads", "s", "t", "bytes")
_COUNTS = 4  # of the features: what is counted of a workload, before its sizes
# Folds that tell the error of what is predicted.
_FOLDS = 5
# Fewer measured kernels than this are no ground for a forest.
LEAST = 20


@dataclass(frozen=True)
class KernelRegression:
    """Times of unseen kernels: a line through the compiler's own estimate, and a forest on what that leaves.

    Everything is fitted to logarithms, because a tenth too much weighs the same for every kernel. Extremely randomised
    trees (Geurts et al. 2006) take any mix of sizes without scaling; between kernels of near sizes they interpolate.

    Attributes:
        error: The standard deviation of log(predicted / measured) on kernels that were not fitted to.
    """

    line: Any
    forest: Any
    ops: tuple[str, ...]
    error: float

    @staticmethod
    def fit(times: Sequence[KernelTime], seed: int = 0) -> KernelRegression:
        """Fits to measured kernels.

        Raises:
            ValueError: fewer than `LEAST` were given.
        """
        if len(times) < LEAST:
            raise ValueError(f"{len(times)} measured kernels are too few to predict others from; measure {LEAST}")
        ops = tuple(sorted({t.workload.op for t in times}))
        x = np.array([_features(t.workload, ops) for t in times])
        y = np.log([t.time.median_s for t in times])
        rng = np.random.default_rng(seed)
        folds = rng.permutation(len(times)) % _FOLDS
        left_out = np.empty(len(times))
        for fold in range(_FOLDS):
            inside = folds != fold
            line, forest = _fitted(x[inside], y[inside], len(ops), seed)
            left_out[~inside] = _predicted(line, forest, x[~inside], len(ops))
        error = log_error(np.exp(left_out), np.exp(y))
        return KernelRegression(*_fitted(x, y, len(ops), seed), ops, error)

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """Seconds of each, shape (n,); an operator that was never measured counts as the average one of its size."""
        if not workloads:
            return np.empty(0)
        x = np.array([_features(work, self.ops) for work in workloads])
        return np.exp(_predicted(self.line, self.forest, x, len(self.ops)))

    def spread(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """How far the trees disagree about each, shape (n,): the standard deviation of log seconds."""
        if not workloads:
            return np.empty(0)
        x = np.array([_features(work, self.ops) for work in workloads])[:, _COUNTS:]
        return np.asarray(np.std([tree.predict(x) for tree in self.forest.estimators_], axis=0), np.float64)


def _features(work: Workload, ops: Sequence[str]) -> list[float]:
    counts = [work.cycles, work.macs, work.moved_bytes, work.weight_bytes]
    return [
        *(log(1 + count) for count in counts),
        *(float(work.op == op) for op in ops),
        *(log(1 + work.shapes.get(name, 0)) for name in _SIZES),
        float(work.bits), float(work.threads),
        *(float(work.form.count(word)) for word in (*_EPILOGUES, *_FUSED)),
    ]  # fmt: skip


def _fitted(x: NDArray[Any], y: NDArray[Any], ops: int, seed: int) -> tuple[Any, Any]:
    from sklearn.ensemble import ExtraTreesRegressor
    from sklearn.linear_model import Ridge

    # No coefficient below zero, and counts only here: so more work of the same shapes never takes less.
    line = Ridge(1.0, positive=True).fit(x[:, : _COUNTS + ops], y)
    forest = ExtraTreesRegressor(200, max_features=0.8, random_state=seed, n_jobs=1)
    return line, forest.fit(x[:, _COUNTS:], y - line.predict(x[:, : _COUNTS + ops]))


def _predicted(line: Any, forest: Any, x: NDArray[Any], ops: int) -> NDArray[np.float64]:
    return np.asarray(line.predict(x[:, : _COUNTS + ops]) + forest.predict(x[:, _COUNTS:]), np.float64)
