"""Non-negative terms that sum to what was measured, fitted to relative errors, and their error on what is left out.

A table has a dozen networks, some unlike all others (the original with its large weights among quantised ones): what
is far off counts less (Huber, "Robust Estimation of a Location Parameter", 1964), or it alone would say what the rest
take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# How strongly the coefficients are held to what is expected of them.
_PRIOR = 0.05
# Errors count less from so many standard deviations on (95 % as efficient where all are normal), and a standard
# deviation is this much at least.
_HUBER, _LEAST_SPREAD = 1.345, 0.005
_STEPS = 20
# A term that improves the error on what is left out by less than this is not worth having.
WORTH = 0.9


@dataclass(frozen=True)
class RelativeFit:
    """The coefficients, shape (m,), and every measurement predicted by a fit to the others, shape (n,)."""

    coefficients: NDArray[np.float64]
    left_out: NDArray[np.float64]


def relative_fit(
    terms: NDArray[np.float64], measured: NDArray[np.float64], expected: Sequence[float], optional: int = 0
) -> RelativeFit:
    """Fits terms of shape (n, m) to measurements of shape (n,), all positive; `expected` are the coefficients' own.

    Of the last terms so many are `optional`: their coefficients are 0 unless what is left out is predicted better by
    them, because few measurements fit any term somehow.
    """
    best = _fit(terms[:, : terms.shape[1] - optional], measured, expected)
    for count in range(terms.shape[1] - optional + 1, terms.shape[1] + 1):
        more = _fit(terms[:, :count], measured, expected[:count])
        if log_error(more.left_out, measured) < WORTH * log_error(best.left_out, measured):
            best = more
    coefficients = np.zeros(terms.shape[1])
    coefficients[: len(best.coefficients)] = best.coefficients
    return RelativeFit(coefficients, best.left_out)


def log_error(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """The standard deviation of log(predicted / measured), by the median: a few odd ones do not decide about all.

    Half of the errors of a normal distribution are within 0.6745 standard deviations.
    """
    residuals = np.log(predicted / measured)
    return float(max(np.median(np.abs(residuals)) / 0.6745, 0.5 * np.std(residuals)))


def _fit(terms: NDArray[np.float64], measured: NDArray[np.float64], expected: Sequence[float]) -> RelativeFit:
    relative, everyone = terms / measured[:, None], np.arange(len(measured))
    expected = expected[: terms.shape[1]]
    left_out = np.array([terms[i] @ _solved(relative[everyone != i], expected) for i in everyone])
    return RelativeFit(_solved(relative, expected), left_out)


def _solved(relative: NDArray[np.float64], expected: Sequence[float]) -> NDArray[np.float64]:
    """The coefficients with which every row sums to 1, but for those that are far from it whatever the others do."""
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(relative).mean(0), 1e-12)
    prior = np.diag(scale) * _PRIOR * np.sqrt(len(relative))
    weights = np.ones(len(relative))
    found = np.zeros(relative.shape[1])
    for _ in range(_STEPS):
        root, before = np.sqrt(weights), found
        rows = np.concatenate([relative * root[:, None], prior])
        found = np.asarray(nnls(rows, np.concatenate([root, prior @ np.array(expected)]))[0], np.float64)
        if np.allclose(found, before, rtol=1e-6, atol=0.0):
            break
        errors = np.abs(relative @ found - 1)
        spread = max(float(np.median(errors)) / 0.6745, _LEAST_SPREAD)
        weights = np.minimum(1.0, _HUBER * spread / np.maximum(errors, 1e-12))
    return found
