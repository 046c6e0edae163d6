"""Non-negative terms that sum to what was measured, fitted to relative errors, and their error on what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# How strongly the coefficients are held to what is expected of them.
_PRIOR = 0.05


@dataclass(frozen=True)
class RelativeFit:
    """The coefficients, shape (m,), and every measurement predicted by a fit to the others, shape (n,)."""

    coefficients: NDArray[np.float64]
    left_out: NDArray[np.float64]


def relative_fit(terms: NDArray[np.float64], measured: NDArray[np.float64], expected: Sequence[float]) -> RelativeFit:
    """Fits terms of shape (n, m) to measurements of shape (n,), all positive; `expected` are the coefficients' own."""
    relative, everyone = terms / measured[:, None], np.arange(len(measured))
    left_out = np.array([terms[i] @ _solved(relative[everyone != i], expected) for i in everyone])
    return RelativeFit(_solved(relative, expected), left_out)


def log_error(predicted: NDArray[np.float64], measured: NDArray[np.float64]) -> float:
    """The standard deviation of log(predicted / measured), by the median: a few odd ones do not decide about all.

    Half of the errors of a normal distribution are within 0.6745 standard deviations.
    """
    residuals = np.log(predicted / measured)
    return float(max(np.median(np.abs(residuals)) / 0.6745, 0.5 * np.std(residuals)))


def _solved(relative: NDArray[np.float64], expected: Sequence[float]) -> NDArray[np.float64]:
    """The coefficients with which every row sums to 1."""
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(relative).mean(0), 1e-12)
    prior = np.diag(scale) * _PRIOR * np.sqrt(len(relative))
    rows = np.concatenate([relative, prior])
    target = np.concatenate([np.ones(len(relative)), prior @ np.array(expected)])
    return np.asarray(nnls(rows, target)[0], np.float64)
