"""From kernels timed alone to whole networks: what calling them in a row adds, and what caches keep between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, sqrt

import numpy as np
from numpy.typing import NDArray

from .held_out import HeldOut, held_out
from .relative_fit import WORTH, RelativeFit, log_error, relative_fit
from .workload import Workload

# Fewer networks than this cannot tell the terms apart.
LEAST = 6
# What a plain sum of kernels is wrong by, where no network says (docs/latency-models.md, "plain sum of the table").
_UNFITTED = 0.25
# Expected: a network is the sum of its kernels.
_SUM = (1.0, 0.0, 0.0, 0.0)
# Weights are read in a circle, run after run: where they are this much more than a cache holds, each goes before it is
# read again (least recently used goes first).
_CIRCLE = 0.25
# What a call reads that the one before has written on several threads, too, is for the most part where it is needed.
_FAR = 0.25
# Caches below this hold one kernel's weights, whose own time tells of that; and how many sizes are tried.
_LEAST_CACHE, _SIZES = 2 * 2**20, 6


@dataclass(frozen=True)
class Corrector:
    """`L = a calls + b sum of the kernels' times + c bytes of weights + d bytes that the cache does not keep`, no
    coefficient below zero.

    On several threads c is of the bytes that cores fetch from each other instead (see `fetched`): while a kernel is
    timed alone every core has its part from the run before. Of the weights of a network that has more of them than a
    cache holds (see `spilled`) none waits there for the next run, while a kernel's that is timed alone do. A table may
    have few networks that met a quiet machine: the last two count only where networks that are left out are predicted
    better with them. Fitted to relative errors, so that fast networks count as much as slow ones.

    Attributes:
        call_s: Seconds that a call adds.
        factor: Of the kernels' times: below 1 where a kernel finds its input still near from the one before.
        byte_s: Seconds a byte of weights.
        fetch_s: Seconds a byte that a core fetches from another.
        spill_s: Seconds that a byte of weights adds where the cache does not keep it.
        cache_bytes: Of the cache, as the measured networks tell it; infinite where none is too large for it.
        error: The standard deviation of log(predicted / measured), each network predicted from the others: of those
            that are judged, and not below that of all where fewer than `LEAST` are.
        networks: That it was fitted to.
        held_out: The errors on those that are judged, each predicted from the others; None where it was not fitted.
    """

    call_s: float = 0.0
    factor: float = 1.0
    byte_s: float = 0.0
    fetch_s: float = 0.0
    error: float = _UNFITTED
    networks: int = 0
    held_out: HeldOut | None = None
    spill_s: float = 0.0
    cache_bytes: float = inf

    def apply(self, sum_s: float, workloads: Sequence[Workload]) -> float:
        """Seconds of a network of these workloads whose kernels take `sum_s` alone."""
        return self.factor * sum_s + float(self._added(workloads).sum())

    def calls_s(self, alone_s: NDArray[np.float64], workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """Seconds of every call of a network, shape (n,), each of which takes `alone_s`, of the same shape, alone."""
        return self.factor * alone_s + self._added(workloads)

    def _added(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """What calling kernels in a row adds to each."""
        weights = np.array([work.weight_bytes for work in workloads], np.float64)
        byte_s = self.byte_s + self.spill_s * spilled(float(weights.sum()), self.cache_bytes)
        return self.call_s + self.fetch_s * fetched(workloads) + byte_s * weights

    @staticmethod
    def fit(
        sums_s: Sequence[float],
        networks: Sequence[Sequence[Workload]],
        measured_s: Sequence[float],
        judged: Sequence[bool] | None = None,
    ) -> Corrector:
        """Fits to measured networks.

        Args:
            sums_s: What each one's kernels take alone.
            networks: Their workloads.
            measured_s: What they take.
            judged: On which of them the error is stated, of another model's it is another one; by default all.

        Raises:
            ValueError: fewer than `LEAST`, or not as many of each.
        """
        if len(measured_s) < LEAST or not len(sums_s) == len(networks) == len(measured_s):
            raise ValueError(
                f"{len(sums_s)} sums, {len(networks)} networks and {len(measured_s)} times were given; "
                f"one of each is needed for at least {LEAST} networks"
            )
        y = np.array(measured_s)
        shares = any(work.threads > 1 for net in networks for work in net)
        weights = np.array([weights_of(net) for net in networks], np.float64)
        third = np.array([fetched(net).sum() for net in networks]) if shares else weights
        terms = np.array([[s, len(net) * 1e-6, 1e-10 * t] for s, net, t in zip(sums_s, networks, third, strict=True)])
        fit, cache = relative_fit(terms, y, _SUM[:3], optional=1), inf
        # The terms that are worth having, and not left out again for the few networks that the last is about.
        used = np.flatnonzero([True, True, fit.coefficients[2] > 0])
        plain = best = _root_mean_square(fit, y)
        for size in _caches(weights):
            bytes_s = weights * [1e-10 * spilled(own, size) for own in weights]
            more = relative_fit(np.column_stack([terms[:, used], bytes_s]), y, [*np.take(_SUM, used), 0.0])
            error = _root_mean_square(more, y)
            if error < min(WORTH * plain, best):
                coefficients = np.zeros(4)
                coefficients[[*used, 3]] = more.coefficients
                fit, cache, best = RelativeFit(coefficients, more.left_out), size, error
        factor, call, last, *rest = (float(value) for value in fit.coefficients)
        chosen = np.ones(len(y), dtype=bool) if judged is None else np.array(judged, dtype=bool)
        left_out, measured = fit.left_out[chosen], y[chosen]
        found = held_out(list(left_out), list(measured)) if chosen.any() else None
        error = log_error(left_out, measured) if chosen.any() else 0.0
        if chosen.sum() < LEAST:  # so few may be right by chance
            error = max(error, log_error(fit.left_out, y))
        byte, fetch = (0.0, last * 1e-10) if shares else (last * 1e-10, 0.0)
        spill = sum(rest) * 1e-10
        return Corrector(call * 1e-6, factor, byte, fetch, error, len(y), found, spill, cache if spill else inf)


def weights_of(workloads: Sequence[Workload]) -> int:
    """The bytes of weights that one run reads."""
    return sum(work.weight_bytes for work in workloads)


def fetched(workloads: Sequence[Workload]) -> NDArray[np.float64]:
    """The bytes of inputs and outputs of every call, shape (n,), that a core has to fetch from another one.

    Of a call that is shared among threads all where the call before was not, because one core wrote what they read;
    of a call on one thread none, which costs too little to tell.
    """
    found, before = np.zeros(len(workloads)), 1
    for place, work in enumerate(workloads):
        if work.threads > 1:
            found[place] = max(0, work.moved_bytes - work.weight_bytes) * (_FAR if before > 1 else 1.0)
        before = work.threads
    return found


def spilled(weight_bytes: float, cache_bytes: float) -> float:
    """The share of a network's weights that a cache does not keep from run to run."""
    return min(1.0, max(0.0, (weight_bytes / cache_bytes - 1) / _CIRCLE))


def _root_mean_square(fit: RelativeFit, measured: NDArray[np.float64]) -> float:
    """Of the relative errors on what is left out.

    Unlike the median it tells of the few networks that a cache is too small for.
    """
    return float(np.sqrt(np.mean(np.log(fit.left_out / measured) ** 2)))


def _caches(weights: NDArray[np.float64]) -> Iterator[float]:
    """Sizes between those of measured networks, the largest first: what is between two of them, none tells."""
    sizes = sorted({float(size) for size in weights if size > 0}, reverse=True)
    between = [sqrt(above * below) for above, below in pairwise(sizes) if above > (1 + _CIRCLE) * below]
    yield from [size for size in between if size >= _LEAST_CACHE][:_SIZES]
