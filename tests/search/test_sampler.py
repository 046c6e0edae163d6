"""What is proposed, and that it depends on the seed and on what was told alone."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from tests.search.tables import table_for

from planish.search.dynamic_program import solve
from planish.search.errors import UserError
from planish.search.objective import objectives_of
from planish.search.option_table import levels_of
from planish.search.planish_sampler import SamplerTask
from planish.search.refine import Goals, least_error
from planish.search.sampler import SAMPLERS, Proposer, opening, strongest, uniform_policies
from planish.spaces.space import Candidate, Choice, Kind, SearchSpace


def space_of(sites: int = 3) -> SearchSpace:
    choices: list[Choice] = []
    for site in (f"layer{i}" for i in range(sites)):
        choices += [
            Choice(site, Kind.BLOCK, (None, "grouped", "identity")),
            Choice(site, Kind.PRUNE, (None, 0.25, 0.5, 0.75)),
            Choice(site, Kind.RANK, (None, "svd:32", "svd:16")),
            Choice(site, Kind.CLUSTER, (None, 16)),
            Choice(site, Kind.BITS, (None, 8, 4)),
        ]
    return SearchSpace(tuple(choices), {})


def values(candidate: Candidate) -> list[float]:
    """Two objectives that contradict each other, from the options alone."""
    strength = sum(len(str(option)) for option in candidate.options.values() if option is not None)
    return [1 - strength / 200, (1 + strength % 7) / 8]


def proposer(folder: Path, sampler: str, seed: int = 0, space: SearchSpace | None = None) -> Proposer:
    folder.mkdir(parents=True, exist_ok=True)
    space = space or space_of()
    task = SamplerTask(table_for(space), objectives_of(("accuracy", "latency"), ("cpu",)), (1.0, 1.0), {}, 10)
    return Proposer(folder / "study.log", space, sampler, seed, ["maximize", "minimize"], task=task)


def asked(proposing: Proposer, batches: int, size: int, known: Sequence[Candidate] = ()) -> list[Candidate]:
    """Every candidate of so many batches, each told before the next; the known ones are the first."""
    found: list[Candidate] = []
    for batch in range(1, 1 + batches):
        candidates = proposing.ask(batch, size, known[len(found) : len(found) + size])
        for candidate in candidates:
            proposing.tell(candidate, values(candidate))
        found += candidates
    return found


def length(sampler: str) -> tuple[int, int]:
    """Batches and their size: enough to come to a sampler's own proposals behind what it begins with."""
    if sampler == "gp":  # every proposal is a fit of seconds; the first 8 are random
        return 2, 5
    return (3, 4) if sampler in ("planish", "tpe", "netadapt") else (5, 6)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_run_that_was_cut_short_is_completed_as_it_would_have_been(
    tmp_path: Path, sampler: str, share: float
) -> None:
    undisturbed = asked(proposer(tmp_path / "a", sampler), *length(sampler))
    known = undisturbed[: round(share * len(undisturbed))]
    resumed = asked(proposer(tmp_path / "b", sampler), *length(sampler), known)
    assert [c.key() for c in resumed] == [c.key() for c in undisturbed]


def test_netadapt_takes_what_one_model_came_to_for_its_other_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models have many names here, and its walk comes to the cheap end all the same."""
    space = space_of(2)

    def without_codebooks(candidate: Candidate) -> Candidate:
        return Candidate({n: None if n.endswith("cluster") else option for n, option in candidate.options.items()})

    task = SamplerTask(table_for(space), objectives_of(("accuracy", "latency"), ("cpu",)), (1.0, 1.0), {}, 10)
    proposing = Proposer(
        tmp_path / "study.log", space, "netadapt", 0, ["maximize", "minimize"], without_codebooks, task=task
    )
    walked: list[Candidate] = []
    step = Proposer._next_step

    def noted(self: Proposer) -> Candidate | None:
        candidate = step(self)
        walked.extend([candidate] if candidate else [])
        return candidate

    monkeypatch.setattr(Proposer, "_next_step", noted)
    asked(proposing, 40, 4)
    assert len({without_codebooks(c).key() for c in walked}) == len(walked)
    cost = task.table.cost("latency[cpu]", np.array([space.encode(c) for c in walked]))
    least = solve(task.table, "latency[cpu]", buckets=400).least()
    assert cost.min() < 1.2 * least


def test_planish_opens_with_uniform_policies_and_goes_on_as_one_that_was_told_them(tmp_path: Path) -> None:
    space = space_of()
    task = SamplerTask(table_for(space), objectives_of(("accuracy", "latency"), ("cpu",)), (1.0, 1.0), {}, 10)
    opened = Proposer(tmp_path / "a.log", space, "planish", 0, ["maximize", "minimize"])
    first = opened.ask(1, 3)
    assert [c.key() for c in first] == [c.key() for c in uniform_policies(space)[:3]]
    opened.inform(task)
    informed = Proposer(tmp_path / "b.log", space, "planish", 0, ["maximize", "minimize"], task=task)
    informed.ask(1, 3, first)
    for candidate in first:
        opened.tell(candidate, values(candidate))
        informed.tell(candidate, values(candidate))
    asked_for = opened.ask(2, 3)
    assert [c.key() for c in asked_for] == [c.key() for c in informed.ask(2, 3)]
    assert {c.key() for c in asked_for}.isdisjoint(c.key() for c in first)


@pytest.mark.parametrize(("sampler", "batch", "trials", "count"), [
    ("planish", 8, 300, 8), ("planish", 8, 24, 3), ("planish", 8, 4, 1), ("dp", 8, 300, 0), ("nsga2", 8, 300, 0),
])  # fmt: skip
def test_the_opening_is_a_small_share_of_the_search(sampler: str, batch: int, trials: int, count: int) -> None:
    assert opening(sampler, batch, trials) == count


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_whole_batches_of_an_earlier_session_are_told_without_asking(tmp_path: Path, sampler: str) -> None:
    batches, size = length(sampler)
    undisturbed = asked(proposer(tmp_path / "a", sampler), batches, size)
    resumed = proposer(tmp_path / "b", sampler)
    for batch in range(1, batches):
        known = undisturbed[(batch - 1) * size : batch * size]
        resumed.replay(batch, [(candidate, values(candidate), {}) for candidate in known])
    last = resumed.ask(batches, size)
    assert [c.key() for c in last] == [c.key() for c in undisturbed[-size:]]


def test_the_log_is_a_study_of_everything_that_was_told_once_however_often_the_search_is_resumed(
    tmp_path: Path,
) -> None:
    first = proposer(tmp_path, "random")
    told = first.ask(1, 3)
    first.tell(told[0], [0.5, 0.25], {"divergence": 0.125})
    first.tell(told[1], None)
    first.close()
    again = proposer(tmp_path, "random")
    again.replay(1, [(told[0], [0.5, 0.25], {"divergence": 0.125}), (told[1], None, {}), (told[2], [0.75, 0.5], {})])
    again.close()
    study = study_of(tmp_path)
    assert [t.params for t in study.trials] == [dict(c.options) for c in told]
    assert [t.state.name for t in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.trials[0].values == [0.5, 0.25]
    assert study.trials[0].user_attrs == {"divergence": 0.125}
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]


@pytest.mark.parametrize("content", [b"", b"not a log\n", b'{"op_code": 99}\n', b"\x80\x04]\n"])
def test_a_damaged_log_is_written_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.log").write_bytes(content)
    proposing = proposer(tmp_path, "random")
    [candidate] = proposing.ask(1, 1)
    proposing.tell(candidate, [0.5, 0.5])
    proposing.close()
    assert [t.params for t in study_of(tmp_path).trials] == [dict(candidate.options)]


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_that_a_killed_process_left_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Optuna locks by a link to the path as it was given, which of a relative one leads nowhere."""
    monkeypatch.chdir(tmp_path)
    folder = Path("run")
    folder.mkdir()
    if there:
        proposer(folder, "random").close()
    (folder / "study.log.lock").symlink_to("run/study.log")
    proposing = proposer(folder, "random")
    [candidate] = proposing.ask(1, 1)
    proposing.tell(candidate, [0.5, 0.5])
    closing = threading.Thread(target=proposing.close, daemon=True)
    closing.start()
    closing.join(60)
    assert not closing.is_alive()
    assert [t.params for t in study_of(folder).trials] == [dict(candidate.options)]


def test_a_log_that_cannot_be_written_does_not_stop_the_search(tmp_path: Path) -> None:
    (tmp_path / "study.log").mkdir()
    proposing = proposer(tmp_path, "random")
    [candidate] = proposing.ask(1, 1)
    proposing.tell(candidate, [0.5, 0.5])
    proposing.close()
    assert proposing.ask(2, 1)


def study_of(folder: Path) -> optuna.Study:
    """The study as Optuna's own tools open it."""
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name="planish", storage=storage)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_is_proposed_twice_nor_the_original(tmp_path: Path, sampler: str) -> None:
    batches, size = length(sampler)
    found = asked(proposer(tmp_path, sampler), batches, size)
    keys = {candidate.key() for candidate in found}
    assert len(keys) == len(found) == batches * size
    assert space_of().original().key() not in keys


@pytest.mark.parametrize("sampler", ["random", "nsga2", "nsga3", "tpe", "planish"])
def test_another_seed_proposes_others(tmp_path: Path, sampler: str) -> None:
    batches, size = (4, 8) if sampler.startswith("nsga") else (3, 4)  # NSGA begins with 24 policies, whatever the seed
    one, two = (asked(proposer(tmp_path / str(seed), sampler, seed), batches, size) for seed in (0, 1))
    assert [c.key() for c in one] != [c.key() for c in two]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_small_space_is_exhausted_and_not_repeated(tmp_path: Path, sampler: str) -> None:
    space = SearchSpace((Choice("a", Kind.BITS, (None, 8)), Choice("b", Kind.BITS, (None, 8))), {})
    found = asked(proposer(tmp_path, sampler, space=space), 2, 4)
    assert {c.key() for c in found} | {space.original().key()} == {
        Candidate({"a:bits": a, "b:bits": b}).key() for a in (None, 8) for b in (None, 8)
    }
    assert len(found) == 3


def test_failed_and_infinite_values_are_told_without_harm(tmp_path: Path) -> None:
    proposing = proposer(tmp_path, "nsga2")
    first, second, third = proposing.ask(1, 3)
    proposing.tell(first, None)
    proposing.tell(second, [float("nan"), 1.0])
    proposing.tell(third, [1.0, 1.0])
    assert len(proposing.ask(2, 30)) == 30


def test_policies_treat_every_site_alike() -> None:
    for policy in uniform_policies(space_of()):
        for kind in Kind:
            assert len({policy.options[f"layer{i}:{kind.value}"] for i in range(3)}) == 1


def test_policies_cover_every_level_of_pruning_at_every_width_of_numbers() -> None:
    combinations = {(p.options["layer0:prune"], p.options["layer0:bits"]) for p in uniform_policies(space_of())}
    expected = {(p, b) for p in (None, 0.25, 0.5, 0.75) for b in (None, 8, 4)} - {(None, None)}
    assert expected <= combinations


def test_a_choice_with_fewer_options_reaches_its_last_with_the_others() -> None:
    space = SearchSpace((Choice("a", Kind.PRUNE, (None, 0.25, 0.5, 0.75)), Choice("b", Kind.PRUNE, (None, 0.5))), {})
    found = {tuple(policy.options.values()) for policy in uniform_policies(space)}
    assert (0.75, 0.5) in found
    assert all(b == 0.5 for a, b in found if a)


def test_the_corners_combine_the_strongest_options() -> None:
    found = [tuple(corner.options[f"layer0:{kind.value}"] for kind in Kind) for corner in strongest(space_of(1))]
    names = [kind.value for kind in Kind]
    as_maps = [dict(zip(names, values, strict=True)) for values in found]
    assert all(corner["prune"] == 0.75 and corner["bits"] == 4 for corner in as_maps)
    assert {(corner["block"], corner["rank"]) for corner in as_maps} == {
        ("identity", None),
        (None, "svd:16"),
        (None, None),
    }


def test_corners_that_are_not_quantised_differ_in_that_alone() -> None:
    space = space_of(1)
    floats = strongest(space, quantised=False)
    assert {corner.options["layer0:bits"] for corner in floats} == {None}
    rest = [{name: o for name, o in c.options.items() if not name.endswith(":bits")} for c in strongest(space)]
    assert [{name: o for name, o in c.options.items() if not name.endswith(":bits")} for c in floats] == rest


def test_without_bits_the_corners_have_codebooks() -> None:
    choices = tuple(choice for choice in space_of(1).choices if choice.kind is not Kind.BITS)
    found = strongest(SearchSpace(choices, {}))
    assert {corner.options["layer0:cluster"] for corner in found} == {None, 16}
    alone = strongest(SearchSpace(tuple(choice for choice in choices if choice.kind is Kind.CLUSTER), {}))
    assert [dict(corner.options) for corner in alone] == [{"layer0:cluster": 16}]


def test_an_unknown_sampler_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sampler 'nsga' is not known"):
        proposer(tmp_path, "nsga")


@pytest.mark.parametrize("sampler", ["grid", "nsga2"])
def test_candidates_that_give_the_same_model_are_proposed_once(tmp_path: Path, sampler: str) -> None:
    def without_rank(candidate: Candidate) -> Candidate:
        """As if no factorisation ever paid off."""
        return Candidate({name: None if name.endswith(":rank") else o for name, o in candidate.options.items()})

    proposing = Proposer(tmp_path / "study.log", space_of(), sampler, 0, ["maximize", "minimize"], without_rank)
    found = asked(proposing, 5, 8)
    assert len({without_rank(candidate).key() for candidate in found}) == len(found) == 40


def test_hopeless_is_what_the_table_expects_below_the_budget_whatever_the_order_of_objectives() -> None:
    space = space_of()
    table = table_for(space)
    rng = np.random.default_rng(0)
    candidates = [space.original(), *(space.sample(rng) for _ in range(50))]
    by_order = []
    for names, original in ((("accuracy", "latency"), (0.9, 1.0)), (("latency", "accuracy"), (1.0, 0.9))):
        task = SamplerTask(table, objectives_of(names, ("cpu",)), original, {}, 10, least_accuracy=0.89)
        goals = replace(task.goals, base_loss=round(task.goals.base_loss, 9), most_loss=round(task.goals.most_loss, 9))
        assert goals == Goals(("latency[cpu]",), 0.1, 0.9, {}, 0.11)
        by_order.append(task.hopeless(candidates))
        assert not any(replace(task, least_accuracy=0.0).hopeless(candidates))
        # A limit that permits only what is hopeless does not make it less so; what is proposed goes by it.
        limited = replace(task, limits={"latency[cpu]": 0.3})
        assert limited.hopeless(candidates) == by_order[-1]
        assert limited.goals.least_error == least_error(table, limited.limits) > 0
    assert by_order[0] == by_order[1]
    errors = table.error(levels_of(space, candidates))
    least = min(error for error, hopeless in zip(errors, by_order[0], strict=True) if hopeless)
    assert not by_order[0][0]
    assert all((error >= least) == hopeless for error, hopeless in zip(errors, by_order[0], strict=True))
