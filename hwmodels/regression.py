"""How long a kernel takes that nobody has measured yet, from those that were."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kernel_database import KernelTime
from .relative_fit import log_error
from .workload import Workload

# Words of a workload's form that change how its kernel reads weights, and what it does at both ends of the sum.
_EPILOGUES = (
    "quantize=True",
    "'quantize'",
    "op='bfloat16'",
    "weight_bits=4",
    "weight_bits=8",
    "nibbles=True",
    "'add'",
    "'mul'",
    "'relu'",
    "'silu'",
    "'sigmoid'",
    "'hardswish'",
    "'gelu'",
)
# Words of the names that TVM gives to what it fuses.
_FUSED = ("_pack", "unpack", "pad", "transpose", "strided_slice", "concat", "quantize", "_add", "_multiply", "_relu")
_SIZES = (
    "n", "c", "o", "h", "w", "oh", "ow", "kh", "kw", "stride", "groups", "m", "k", "heads", "s", "t", "bytes",
    "operands",
)  # fmt: skip
_COUNTS = 4  # of the features: what is counted of a workload, before its sizes
# Fewer measured kernels than this are no ground for a regression.
LEAST = 20
# The process's scales are fitted to so many kernels, and it interpolates between so many: its cost grows with their
# cube.
_FOR_SCALES, _MOST = 400, 2500
# The standard deviation of log seconds of an operator that was never measured.
_UNKNOWN_OPERATOR = 0.5
# Where the search for the process's scales begins, (variance, length, noise): from one start alone it ended now and
# then where the process takes everything for noise.
_STARTS = ((1.0, 10.0, 0.1), (1.0, 3.0, 0.01), (0.1, 30.0, 0.01))


@dataclass(frozen=True)
class KernelRegression:
    """Times of unseen kernels: a line through the compiler's own estimate, and a Gaussian process on what that leaves.

    Everything is fitted to logarithms, because a tenth too much weighs the same for every kernel. The process
    (Rasmussen and Williams 2006; once differentiable Matern covariance on standardised features, noise fitted too)
    interpolates between kernels of near sizes, and says how far it has to.

    Attributes:
        error: The standard deviation of log(predicted / measured) of kernels, each predicted from the others.
    """

    line: Any
    process: Any
    centre: NDArray[np.float64]
    scale: NDArray[np.float64]
    ops: tuple[str, ...]
    error: float

    @staticmethod
    def fit(times: Sequence[KernelTime], seed: int = 0) -> KernelRegression:
        """Fits to measured kernels.

        Raises:
            ValueError: fewer than `LEAST` were given.
        """
        from sklearn.linear_model import Ridge

        if len(times) < LEAST:
            raise ValueError(f"{len(times)} measured kernels are too few to predict others from; measure {LEAST}")
        rng = np.random.default_rng(seed)
        if len(times) > _MOST:
            times = [times[place] for place in np.sort(rng.choice(len(times), _MOST, replace=False))]
        ops = tuple(sorted({t.workload.op for t in times}))
        x = np.array([_features(t.workload, ops) for t in times])
        y = np.log([t.time.median_s for t in times])
        # No coefficient below zero, and counts only here: so more work of the same shapes never takes less.
        line = Ridge(1.0, positive=True).fit(x[:, : _COUNTS + len(ops)], y)
        rest = y - line.predict(x[:, : _COUNTS + len(ops)])
        sizes = _without_counts(x)
        centre, scale = sizes.mean(0), sizes.std(0)
        scale = np.where(scale > 0, scale, 1.0)
        with _one_thread():
            process, left_out = _process((sizes - centre) / scale, rest, rng)
        error = log_error(np.exp(left_out), np.exp(rest))
        return KernelRegression(line, process, centre, scale, ops, error)

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """Seconds of each, shape (n,); an operator that was never measured counts as the average one of its size."""
        if not workloads:
            return np.empty(0)
        x = np.array([_features(work, self.ops) for work in workloads])
        with _one_thread():
            rest = self.process.predict((_without_counts(x) - self.centre) / self.scale)
        return np.asarray(np.exp(self.line.predict(x[:, : _COUNTS + len(self.ops)]) + rest), np.float64)

    def spread(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """How uncertain each is, shape (n,): the process's standard deviation of log seconds.

        Of an operator that was never measured the process knows nothing: it counts as a device that nobody has.
        """
        if not workloads:
            return np.empty(0)
        x = _without_counts(np.array([_features(work, self.ops) for work in workloads]))
        with _one_thread():
            found = np.asarray(self.process.predict((x - self.centre) / self.scale, return_std=True)[1], np.float64)
        return np.where([work.op in self.ops for work in workloads], found, np.maximum(found, _UNKNOWN_OPERATOR))


def _features(work: Workload, ops: Sequence[str]) -> list[float]:
    counts = [work.cycles, work.macs, work.moved_bytes, work.weight_bytes]
    return [
        *(log(1 + count) for count in counts),
        *(float(work.op == op) for op in ops),
        *(log(1 + work.shapes.get(name, 0)) for name in _SIZES),
        float(work.bits), float(work.threads),
        *(float(work.form.count(word)) for word in (*_EPILOGUES, *_FUSED)),
    ]  # fmt: skip


@cache
def _linear_algebra() -> Any:
    import sklearn.gaussian_process  # noqa: F401  # what is limited must be loaded
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")


def _one_thread() -> Any:
    """Linear algebra on one thread: with more the last digits differ, and a search must not depend on their number."""
    return _linear_algebra().limit(limits=1)


def _without_counts(x: NDArray[Any]) -> NDArray[Any]:
    """Features of kernels without what is counted, except for the cycles, which tell a kernel's form."""
    return np.delete(x, np.s_[1:_COUNTS], axis=1)


def _process(x: NDArray[Any], y: NDArray[Any], rng: np.random.Generator) -> tuple[Any, NDArray[np.float64]]:
    """A Gaussian process of what features (n, f) give values (n,), and each of these predicted from the others."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernels = [
        ConstantKernel(variance, (1e-4, 1e2)) * Matern(length, (0.1, 100.0), nu=1.5) + WhiteKernel(noise, (1e-6, 1.0))
        for variance, length, noise in _STARTS
    ]
    few = rng.choice(len(x), _FOR_SCALES, replace=False) if len(x) > _FOR_SCALES else np.arange(len(x))
    with warnings.catch_warnings():
        # A scale at the end of its range is one that hardly matters.
        warnings.simplefilter("ignore", ConvergenceWarning)
        processes = [GaussianProcessRegressor(kernel, normalize_y=True).fit(x[few], y[few]) for kernel in kernels]
    process = max(processes, key=lambda one: one.log_marginal_likelihood_value_)
    if len(few) < len(x):
        process = GaussianProcessRegressor(process.kernel_, optimizer=None, normalize_y=True).fit(x, y)
    # Leaving one out is a division by the inverse's diagonal (Rasmussen and Williams 2006, 5.12).
    lower = np.linalg.inv(process.L_)
    left_out = y - process._y_train_std * process.alpha_ / np.square(lower).sum(0)
    return process, left_out
