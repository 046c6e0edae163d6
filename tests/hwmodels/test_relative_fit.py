"""Few measurements, one of them odd: what the fits of whole networks make of them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from planish.hwmodels.relative_fit import relative_fit

TRUE = (1.2, 0.3)


def networks(count: int, seed: int = 0) -> NDArray[np.float64]:
    """Two terms of so many networks, that do not go together."""
    rng = np.random.default_rng(seed)
    return np.column_stack([rng.uniform(50, 150, count), rng.uniform(40, 90, count)])


def test_coefficients_are_those_that_the_measurements_were_made_with() -> None:
    terms = networks(14)
    fit = relative_fit(terms, terms @ np.array(TRUE), TRUE)
    assert fit.coefficients == pytest.approx(TRUE, rel=1e-6)
    assert fit.left_out == pytest.approx(terms @ np.array(TRUE), rel=1e-6)


@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_one_network_unlike_all_others_does_not_say_what_they_take(factor: float) -> None:
    terms = networks(14)
    noise = 1 + 0.01 * np.random.default_rng(1).standard_normal(14)
    measured = terms @ TRUE * noise
    plain = relative_fit(terms, measured, TRUE)
    measured[3] *= factor
    fit = relative_fit(terms, measured, TRUE)
    rest = np.arange(14) != 3
    # Within what the noise of one percent leaves of fourteen; least squares would move them by three percent.
    assert terms[rest] @ fit.coefficients == pytest.approx(terms[rest] @ plain.coefficients, rel=0.01)
    assert fit.left_out[3] == pytest.approx(terms[3] @ TRUE, rel=0.02)


@pytest.mark.parametrize("takes", [0.0, 0.5])
def test_a_further_term_has_to_predict_what_is_left_out(takes: float) -> None:
    count = 12
    terms = networks(count)
    rng = np.random.default_rng(2)
    more = rng.uniform(20, 120, count)
    measured = (terms @ TRUE + takes * more) * (1 + 0.01 * rng.standard_normal(count))
    fit = relative_fit(np.column_stack([terms, more]), measured, [*TRUE, 0.0], optional=1)
    assert fit.coefficients.shape == (3,)
    if takes:
        assert fit.coefficients[2] == pytest.approx(takes, rel=0.1)
    else:
        assert fit.coefficients[2] == 0.0


def test_no_coefficient_is_below_zero() -> None:
    terms = networks(14)
    fit = relative_fit(terms, terms @ np.array([1.0, -0.2]), (1.0, 0.0))
    assert fit.coefficients[1] == 0.0
