"""From kernels timed alone to whole networks: what calling them in a row adds, and what caches keep between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .held_out import HeldOut, held_out
from .relative_fit import log_error, relative_fit
from .workload import Workload

# Fewer networks than this cannot tell the terms apart.
LEAST = 6
# What a plain sum of kernels is wrong by, where no network says (docs/latency-models.md, "plain sum of the table").
_UNFITTED = 0.25
# Expected: a network is the sum of its kernels.
_SUM = (1.0, 0.0, 0.0)


@dataclass(frozen=True)
class Corrector:
    """`L = a calls + b sum of the kernels' times + c bytes of weights`, no coefficient below zero.

    On several threads c is for every call that is shared among them instead: while a kernel is timed alone the others
    are awake. Three terms in either case, because a table may have few networks that met a quiet machine, and the last
    only where networks that are left out are predicted better with it. Fitted to relative errors, so that fast networks
    count as much as slow ones.

    Attributes:
        call_s: Seconds that a call adds.
        factor: Of the kernels' times: below 1 where a kernel finds its input still near from the one before.
        byte_s: Seconds a byte of weights.
        shared_s: Seconds that a shared call adds.
        error: The standard deviation of log(predicted / measured), each network predicted from the others: of those
            that are judged, and not below that of all where fewer than `LEAST` are.
        networks: That it was fitted to.
        held_out: The errors on those that are judged, each predicted from the others; None where it was not fitted.
    """

    call_s: float = 0.0
    factor: float = 1.0
    byte_s: float = 0.0
    shared_s: float = 0.0
    error: float = _UNFITTED
    networks: int = 0
    held_out: HeldOut | None = None

    def apply(self, sum_s: float, workloads: Sequence[Workload]) -> float:
        """Seconds of a network of these workloads whose kernels take `sum_s` alone."""
        weights = sum(work.weight_bytes for work in workloads)
        called = self.call_s * len(workloads) + self.shared_s * _shared(workloads)
        return self.factor * sum_s + called + self.byte_s * weights

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
        shares = any(_shared(net) for net in networks)
        third = [_shared(net) * 1e-6 if shares else sum(w.weight_bytes for w in net) * 1e-10 for net in networks]
        terms = np.array([[s, len(net) * 1e-6, t] for s, net, t in zip(sums_s, networks, third, strict=True)])
        fit = relative_fit(terms, y, _SUM, optional=1)
        factor, call, last = (float(value) for value in fit.coefficients)
        chosen = np.ones(len(y), dtype=bool) if judged is None else np.array(judged, dtype=bool)
        left_out, measured = fit.left_out[chosen], y[chosen]
        found = held_out(list(left_out), list(measured)) if chosen.any() else None
        error = log_error(left_out, measured) if chosen.any() else 0.0
        if chosen.sum() < LEAST:  # so few may be right by chance
            error = max(error, log_error(fit.left_out, y))
        byte, shared = (0.0, last * 1e-6) if shares else (last * 1e-10, 0.0)
        return Corrector(call * 1e-6, factor, byte, shared, error, len(y), found)


def _shared(workloads: Sequence[Workload]) -> int:
    """How many calls are shared among threads."""
    return sum(work.threads > 1 for work in workloads)
