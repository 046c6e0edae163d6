"""Which samples count on a machine that others use too."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planish.hwmodels.quiet import (
    ENOUGH,
    Samples,
    best_reference_s,
    lacking,
    open_samples,
    quiet_limit_s,
    quiet_samples,
    settled,
    standard_error,
    steadily_slower,
)


def test_only_quiet_samples_count_and_they_count_as_they_are() -> None:
    # A neighbour doubles the reference and triples the kernel; half of the samples are beside it.
    quiet, loud = Samples((10.0,) * ENOUGH, (1.0,) * ENOUGH), Samples((30.0,) * ENOUGH, (2.0,) * ENOUGH)
    found = settled(loud + quiet, best_s=1.0)
    assert (found.median_s, found.low_s, found.high_s, found.runs, found.quiet) == (10.0, 10.0, 10.0, ENOUGH, True)


def test_without_enough_quiet_samples_the_ratio_to_the_reference_counts() -> None:
    found = settled(Samples((30.0,) * 20, (2.0,) * 20), best_s=1.0)
    assert (found.median_s, found.quiet) == (15.0, False)


@pytest.mark.parametrize(("calmest", "expected"), [(12, 1.0), (11, 1.08)])
def test_the_calmest_samples_count_where_they_are_enough(calmest: int, expected: float) -> None:
    samples = Samples((1.0,) * calmest + (1.08,) * 14, (1.0,) * calmest + (1.06,) * 14)
    found = settled(samples, 1.0)
    assert found.quiet
    assert found.median_s == expected


def test_one_quiet_sample_less_than_enough_does_not_settle() -> None:
    loud = Samples((30.0,) * 9, (2.0,) * 9)
    assert open_samples(loud + Samples((10.0,) * (ENOUGH - 1), (1.0,) * (ENOUGH - 1)), 1.0)
    assert not open_samples(loud + Samples((10.0,) * ENOUGH, (1.0,) * ENOUGH), 1.0)
    assert open_samples(None, 1.0)
    assert open_samples(loud, None)


def test_the_best_reference_is_no_single_lucky_sample() -> None:
    assert best_reference_s([Samples((1.0,) * 100, (0.5, *(1.0,) * 99))]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="no sample"):
        best_reference_s([])


def test_every_run_needs_its_reference() -> None:
    with pytest.raises(ValueError, match="2 runs have 1 times"):
        Samples((1.0, 2.0), (1.0,))
    with pytest.raises(ValueError, match="no sample"):
        settled(Samples(), 1.0)


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=40), st.floats(1e-6, 1e3))
def test_the_interval_holds_the_median(pairs: list[tuple[float, float]], best: float) -> None:
    runs, references = zip(*pairs, strict=True)
    found = settled(Samples(tuple(runs), tuple(references)), best)
    assert 0 < found.low_s <= found.median_s <= found.high_s


def test_the_interval_reaches_to_the_median_of_every_process() -> None:
    """Two processes in which a model is as fast as can be, and one in which it is slower throughout."""
    calm = (1.0,) * 6
    usual, slower = Samples((1.0,) * 6, calm), Samples((1.05,) * 6, calm)
    found = settled(usual + slower + usual, best_s=1.0)
    assert (found.median_s, found.low_s, found.high_s) == (1.0, 1.0, 1.05)
    # All in one process they are runs of the same model.
    assert settled(Samples((1.0,) * 60 + (1.05,) * 6, (1.0,) * 66), best_s=1.0).high_s == 1.0
    with pytest.raises(ValueError, match="6 runs are not those of processes"):
        Samples((1.0,) * 6, calm, (3, 2))


def test_a_process_that_was_hardly_ever_quiet_does_not_widen_the_interval() -> None:
    usual = Samples((1.0,) * 12, (1.0,) * 12)
    disturbed = Samples((1.4, 1.4, *(9.0,) * 10), (1.0, 1.0, *(3.0,) * 10))
    assert settled(usual + disturbed, best_s=1.0).high_s == 1.0


@pytest.mark.parametrize(
    ("reference_s", "ratio"),
    [
        ((1.3, 1.31, 1.32, 1.35, 1.33), 1.3),  # another clock
        ((1.0, 1.31, 1.32, 1.35, 1.33), None),  # once as fast as known: a neighbour
        ((1.3, 1.6, 1.9, 1.35, 1.7), None),  # not steady: a neighbour, too
        ((1.0, 1.01, 1.05, 1.1, 1.02), None),
        ((), None),
    ],
)
def test_a_machine_that_is_slower_for_good_is_told_from_one_that_others_use(
    reference_s: tuple[float, ...], ratio: float | None
) -> None:
    found = steadily_slower([Samples((1.0,) * len(reference_s), reference_s)], 1.0)
    assert found == (None if ratio is None else pytest.approx(ratio, rel=0.01))


@pytest.mark.parametrize(
    ("beside", "taken"),
    [([1.0], 3), ([2.0], 12), ([2.0, 1.0], 6), ([2.0, 2.0, 2.0, 1.0], 12), ([1.0, 1.0, 2.0, 1.0], 4)],
)
def test_a_process_goes_on_until_enough_was_quiet_or_patience_ends(beside: list[float], taken: int) -> None:
    found: list[float] = []
    while lacking(found, 3, quiet_limit_s(1.0)):
        found.append(beside[len(found) % len(beside)])
    assert len(found) == taken


def test_where_no_best_is_known_any_sample_counts() -> None:
    assert quiet_limit_s(None) == 0
    assert lacking([9.0] * 2, 3, 0)
    assert not lacking([9.0] * 3, 3, 0)


def test_processes_that_disagree_need_more_of_them_up_to_a_limit() -> None:
    def of(medians: list[float]) -> Samples:
        return sum((Samples((m,) * 3, (1.0,) * 3) for m in medians), Samples())

    agreeing, apart = [10.0, 10.1] * 3, [9.0, 11.0] * 3
    assert open_samples(of(agreeing[:5]), 1.0, enough=18, exact=0.02)
    assert not open_samples(of(agreeing), 1.0, enough=18, exact=0.02)
    assert open_samples(of(apart), 1.0, enough=18, exact=0.02)
    assert not open_samples(of(apart), 1.0, enough=18)
    assert open_samples(of(apart * 2), 1.0, enough=18, exact=0.02)
    assert not open_samples(of(apart * 3), 1.0, enough=18, exact=0.02)
    # The error of the mean of n values is their deviation by the root of n, that of the median is 1.2533 times as much.
    assert standard_error(of(apart)) == pytest.approx(1.2533 * 1.0954 / 6**0.5 / 10.0, rel=1e-3)
    assert standard_error(of([3.0])) == float("inf")


def test_quiet_samples_keep_their_processes() -> None:
    loud = Samples((5.0, 6.0, 7.0), (1.0, 2.0, 1.0)) + Samples((8.0,), (3.0,)) + Samples((9.0,), (1.1,))
    assert quiet_samples(loud, 1.0) == Samples((5.0, 7.0, 9.0), (1.0, 1.0, 1.1), (2, 1))
    assert quiet_samples(loud, 0.1) == Samples()
