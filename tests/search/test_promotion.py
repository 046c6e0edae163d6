"""Who is promoted: checked against the definition of dominance, not against the code's ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from planish.search.config import load_spec
from planish.search.data import Split
from planish.search.ledger import Ledger
from planish.search.promotion import promote, promoted
from planish.search.score import guessing


def beats(a: np.ndarray, b: np.ndarray) -> bool:
    """Nowhere worse and somewhere better; less is better."""
    return bool((a <= b).all() and (a < b).any())


def random_case(seed: int, n: int = 24) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    losses = rng.random((n, 2))
    return losses, losses[:, 1]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("count", [1, 3, 8, 23])
def test_as_many_as_asked_for_and_each_once(seed: int, count: int) -> None:
    losses, cost = random_case(seed)
    rows = promote(losses, cost, count)
    assert len(rows) == count == len(set(rows))
    assert rows == sorted(rows)


@pytest.mark.parametrize("seed", range(10))
def test_inside_a_bin_nobody_goes_before_somebody_who_beats_them(seed: int) -> None:
    losses, cost = random_case(seed)
    chosen = set(promote(losses, cost, 8))
    for members in np.array_split(np.argsort(cost, kind="stable"), 4):
        for row in set(members.tolist()) & chosen:
            beaten_by = [other for other in members.tolist() if beats(losses[other], losses[row])]
            assert set(beaten_by) <= chosen


@pytest.mark.parametrize("seed", range(10))
def test_every_quarter_of_the_costs_gets_its_share(seed: int) -> None:
    losses, cost = random_case(seed)
    chosen = set(promote(losses, cost, 8))
    for members in np.array_split(np.argsort(cost, kind="stable"), 4):
        assert len(chosen & set(members.tolist())) == 2


def test_what_does_not_divide_goes_to_the_fast_end() -> None:
    losses, cost = random_case(0)
    fastest = set(np.argsort(cost, kind="stable")[:6].tolist())
    assert len(fastest & set(promote(losses, cost, 5))) == 2


def test_what_has_no_value_is_never_promoted() -> None:
    losses, cost = random_case(1, 6)
    losses[2, 0] = np.nan
    cost[4] = np.nan
    assert promote(losses, cost, 6) == [0, 1, 3, 5]


@pytest.mark.parametrize("count", [0, -1])
def test_nobody_where_nobody_is_asked_for(count: int) -> None:
    assert promote(*random_case(0), count) == []


def test_equal_candidates_are_taken_in_the_order_of_their_numbers() -> None:
    assert promote(np.ones((8, 2)), np.ones(8), 4) == promote(np.ones((8, 2)), np.ones(8), 4) == [0, 2, 4, 6]


def test_all_where_there_are_no_more_than_asked_for() -> None:
    assert promote(*random_case(2, 3), 5) == [0, 1, 2]


def test_no_rows_at_all() -> None:
    assert promote(np.empty((0, 2)), np.empty(0), 3) == []


def ledger_of(accuracies: list[float], **keys: object) -> Ledger:
    """Trials that were trained once; the later ones are faster and smaller."""

    def metrics(accuracy: float, seconds: float) -> dict[str, object]:
        interval = [accuracy - 0.02, accuracy + 0.02]
        return {"accuracy": accuracy, "accuracy_ci95": interval, "latency_s": {"cpu": {"value": seconds}}}

    spec = load_spec(None, {"model": "own", "data": "own", **keys})
    records = {
        n: SimpleNamespace(before=lambda rung, n=n, a=a: metrics(a, 1e-3 / (2 + n)))
        for n, a in enumerate(accuracies, start=1)
    }
    original = metrics(0.95, 1e-3)
    fake = SimpleNamespace(
        spec=spec,
        original=original,
        objectives=spec.targets(),
        records=records,
        bounds=lambda: [b.resolve(original) for b in spec.budgets()],
    )
    return cast("Ledger", fake)


def test_what_was_trained_and_only_guesses_is_left_behind() -> None:
    ledger = ledger_of([0.9, 0.8, 0.7, 0.11])
    assert promoted(ledger, [1, 2, 3, 4], 4, 1, guess=0.1) == [1, 2, 3]
    assert promoted(ledger, [1, 2, 3, 4], 4, 0, guess=0.1) == [1, 2, 3, 4]  # nobody was trained yet
    assert promoted(ledger, [1, 2, 3, 4], 4, 1) == [1, 2, 3, 4]


# Nearly all training is done after the first rung already: what is below a budget then stays below it.
LITTLE_LEFT = {"distill.rungs": [18, 19, 20], "distill.survivors": [8, 6, 4]}


def test_below_a_budget_on_accuracy_the_nearest_go_on() -> None:
    # Without one, the extremes of a front are kept: the fastest is on it, however little it knows.
    accuracies = [0.93, 0.80, 0.85, 0.60, 0.70, 0.30, 0.40, 0.20]
    names = list(range(1, 9))
    assert 8 in promoted(ledger_of(accuracies), names, 4, 1)
    kept = promoted(ledger_of(accuracies, budget=["accuracy>=-5pp"], **LITTLE_LEFT), names, 4, 1)
    # The first keeps it; of the others the most accurate of every bin of cost.
    assert kept == [1, 3, 5, 7]
    assert promoted(ledger_of(accuracies, budget=["accuracy>=-5pp"]), names, 4, 0) == promoted(
        ledger_of(accuracies), names, 4, 0
    )  # nobody was trained yet


def test_to_the_last_rung_go_those_nearest_to_a_budget_on_accuracy_however_fast_the_others_are() -> None:
    accuracies = [0.83, 0.80, 0.85, 0.60, 0.70, 0.30, 0.40, 0.20]
    names = list(range(1, 9))
    ledger = ledger_of(accuracies, budget=["accuracy>=-5pp"], **LITTLE_LEFT)
    assert promoted(ledger, names, 4, 2) == [1, 3, 5, 7]  # the best of every bin
    assert promoted(ledger, names, 4, 2, last=True) == [1, 2, 3, 5]
    keeping = ledger_of([0.94, 0.93, 0.92, 0.91, 0.70, 0.6], budget=["accuracy>=-5pp"], **LITTLE_LEFT)
    # Those who keep it are chosen as ever: fast and slow ones.
    assert promoted(keeping, [1, 2, 3, 4, 5, 6], 2, 2, last=True) == promoted(keeping, [1, 2, 3, 4], 2, 2)


def test_nobody_takes_a_place_from_those_whom_training_may_bring_to_the_budget() -> None:
    accuracies = [0.93, 0.80, 0.85, 0.60, 0.70, 0.30, 0.40, 0.20]
    names = list(range(1, 9))
    ledger = ledger_of(accuracies, budget=["accuracy>=-5pp"])
    assert promoted(ledger, names, 3, 0, hopeless={4, 5, 6, 7, 8}) == [1, 2, 3]
    # The places that are left go to the most accurate of the others, fast as all of them are.
    assert promoted(ledger, names, 5, 0, hopeless={4, 5, 6, 7, 8}) == [1, 2, 3, 4, 5]
    # What was trained has shown what it is.
    assert promoted(ledger, names, 4, 1, hopeless={1, 3}) == promoted(ledger, names, 4, 1)


def test_who_will_keep_a_budget_when_all_training_is_done_goes_on_as_if_it_did() -> None:
    """Of CIFAR-10's ResNet-20, what lost 2.6 to 4.3 points after one epoch of thirty lost 1.0 to 1.3 after six."""
    accuracies = [0.948, 0.93, 0.91, 0.85, 0.70, 0.60]
    names = list(range(1, 7))
    long = {"distill.rungs": [1, 6, 30], "distill.survivors": [6, 4, 2]}
    ledger = ledger_of(accuracies, budget=["accuracy>=-1pp"], **long)
    # 30 epochs leave an eighth of what one leaves: that of the second and the third is half a point at most.
    assert promoted(ledger, names, 3, 1) == [1, 2, 3]
    assert promoted(ledger, names, 2, 1) == promoted(ledger, [1, 2, 3], 2, 1)
    assert 3 in promoted(ledger, names, 2, 1)  # the fastest of them
    # After six more than a third, and the last choice is made with a margin: 1.1 of 2 points, and 2.3 of 4.
    assert promoted(ledger, names, 2, 2, last=True) == [1, 2]
    # Who keeps it before any training does not need to be hoped for.
    assert promoted(ledger, names, 2, 0, hopeless={1, 2, 3, 4, 5}) == [1, 6]


def test_a_cost_that_stays_as_it_is_excludes_nobody() -> None:
    """Narrow numbers change no count of multiply-accumulates, and are offered all the same: they are faster."""
    ledger = ledger_of([0.9, 0.8, 0.7, 0.6], objectives=["accuracy", "latency", "macs"])
    original = dict(ledger.original) | {"macs": 100}
    rows = {n: dict(record.before(0)) | {"macs": 100} for n, record in ledger.records.items()}
    fake = SimpleNamespace(
        spec=ledger.spec, original=original, objectives=ledger.objectives, bounds=lambda: [],
        records={n: SimpleNamespace(before=lambda rung, n=n: rows[n]) for n in rows},
    )  # fmt: skip
    assert promoted(cast("Ledger", fake), [1, 2, 3, 4], 4, 1) == [1, 2, 3, 4]
    rows[2]["latency_s"] = {"cpu": {"value": 2e-3}}  # slower than the original
    assert promoted(cast("Ledger", fake), [1, 2, 3, 4], 4, 1) == [1, 3, 4]


def test_where_all_guess_they_go_on() -> None:
    assert promoted(ledger_of([0.1, 0.09, 0.11]), [1, 2, 3], 2, 1, guess=0.1)


def test_guessing_names_the_most_frequent_class() -> None:
    split = Split(torch.zeros(5, 2), torch.tensor([0, 2, 2, 2, 1]))
    assert guessing(split) == 0.6
    own = Split(split.inputs, split.targets, metric=lambda outputs, targets: torch.zeros(len(targets)))
    assert guessing(own) == 0.0


def test_of_unequal_classes_nobody_who_keeps_the_budget_counts_as_guessing() -> None:
    """Nine tenths are of one class: what is right nearly as often as the original cannot be told from naming it."""
    accuracies = [0.93, 0.925, 0.915, 0.90]
    names = [1, 2, 3, 4]
    assert promoted(ledger_of(accuracies), names, 4, 1, guess=0.9) == [1, 2]  # 0.95 is the original's
    assert promoted(ledger_of(accuracies, budget=["accuracy>=-4pp"]), names, 4, 1, guess=0.9) == [1, 2, 3]


def test_what_can_never_be_offered_is_not_trained_beside_what_can() -> None:
    """Trial n takes 1 / (2 + n) of the original's time, and no training makes it faster."""
    names = [1, 2, 3, 4, 5]
    keeping = ledger_of([0.9] * 5, budget=["latency<=0.2x"])
    assert promoted(keeping, names, 5, 1) == [3, 4, 5]
    assert promoted(keeping, names, 5, 0) == [3, 4, 5]
    # Measured once, a few per cent above the budget: it may keep it when it is measured again.
    assert promoted(ledger_of([0.9] * 5, budget=["latency<=0.195x"]), names, 5, 1) == [3, 4, 5]
    # Nobody keeps it: the search goes on with what there is.
    assert promoted(ledger_of([0.9] * 5, budget=["latency<=0.1x"]), names, 5, 1) == names
