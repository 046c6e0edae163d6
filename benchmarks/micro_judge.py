"""The small space whose networks are all known (`micro_space.py`): its exact front, and how far a search is from it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

FILE = Path(__file__).resolve().parent / "data" / "micro_space.npz"
# What the library costs, in evaluations: see `search_quality.py`, which measures it on a real task.
LIBRARY_CHARGE = 10

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Micro:
    """The stored networks.

    Attributes:
        space: 6 choices with 6 options.
        table: The product's own guesses.
        accuracy: Of every network, shape (6,) * 6.
        divergence: The same shape.
        ratio: Latency relative to the original, the same shape.
        best: The hypervolume of the exact front.
    """

    space: Any
    table: Any
    accuracy: np.ndarray
    divergence: np.ndarray
    ratio: np.ndarray
    best: float


def load(path: Path = FILE) -> Micro:
    """Reads the stored networks."""
    from planish.search.option_table import OptionTable, Site
    from planish.spaces.space import Choice, Kind, SearchSpace

    with np.load(path, allow_pickle=False) as stored:
        blocks, forms = stored["added_s"].shape
        shape = (forms,) * blocks
        accuracy = stored["correct"].reshape(shape) / int(stored["samples"])
        divergence = stored["divergence"].reshape(shape).astype(np.float64)
        ratio = np.ones(shape)
        for block, added in enumerate(stored["added_s"] / float(stored["base_s"])):
            ratio = ratio + added.reshape([-1 if axis == block else 1 for axis in range(blocks)])
        errors, counted = stored["errors"], stored["counted_s"]
    names = tuple(f"form{form}" for form in range(1, forms))
    choices = tuple(Choice(f"block{block}", Kind.BLOCK, (None, *names)) for block in range(blocks))
    space = SearchSpace(choices, {})
    sites = tuple(
        Site(
            choice.site, (), (place,), np.arange(forms)[:, None], errors[place],
            {"latency[cpu]": counted[place] - counted[place].min()},
        )
        for place, choice in enumerate(choices)
    )  # fmt: skip
    # What the counted time of the original is does not matter, as long as what is added to it is in proportion.
    whole = float(-counted.min(1).sum())
    table = OptionTable(space, {}, {}, sites, {"latency[cpu]": 0.1 * whole}, tuple(errors), {})
    every = np.stack([1 - accuracy.ravel(), ratio.ravel()], 1)
    return Micro(space, table, accuracy, divergence, ratio, volume(every))


def volume(losses: np.ndarray) -> float:
    """The hypervolume of rows (1 - accuracy, latency ratio) with the reference (1, 1)."""
    from planish.search.pareto import hypervolume

    order = np.lexsort((losses[:, 0], losses[:, 1]))
    ordered = losses[order]
    falling = ordered[:, 0] < np.concatenate([[np.inf], np.minimum.accumulate(ordered[:, 0])[:-1]])
    return float(hypervolume(ordered[falling], np.ones(2)))


def regrets(micro: Micro, sampler: str, seed: int, charged: int) -> list[float]:
    """The share of the best hypervolume that is missing after every charged evaluation, the original's included."""
    from planish.search.objective import objectives_of
    from planish.search.planish_sampler import SamplerTask
    from planish.search.sampler import OPENS, WITH_TABLE, Proposer

    sampler, begin = seeded(sampler, micro.space)
    objectives = objectives_of(("accuracy", "latency"), ("cpu",))
    start = (0,) * len(micro.space.choices)
    task = SamplerTask(micro.table, objectives, (float(micro.accuracy[start]), 1.0), {}, classes=10, trained=False)
    library = LIBRARY_CHARGE if sampler in WITH_TABLE else 0
    seen = [_losses(micro, [start])]

    def evaluate(candidates: Sequence[Any]) -> Iterator[float]:
        for candidate in candidates:
            key = tuple(int(level) for level in micro.space.encode(candidate))
            values = [float(micro.accuracy[key]), float(micro.ratio[key])]
            proposer.tell(candidate, values, {"divergence": float(micro.divergence[key])})
            seen.append(_losses(micro, [key]))
            yield 1 - volume(np.concatenate(seen)) / micro.best

    with tempfile.TemporaryDirectory() as folder:
        proposer = Proposer(
            Path(folder) / "study.log", micro.space, sampler, seed, ("maximize", "minimize"),
            task=None if sampler in OPENS else task,
        )  # fmt: skip
        first = 1 - volume(seen[0]) / micro.best
        found = charged_curve(proposer, sampler, task, library, charged, first, evaluate, begin)
        proposer.close()
    return found


def seeded(name: str, space: Any) -> tuple[str, list[Any]]:
    """The sampler of a name, and for `NAME+grid` the uniform policies that it is told before it proposes.

    As many as the evolutionary samplers begin with by themselves.
    """
    from planish.search.sampler import POLICIES, uniform_policies

    sampler, _, more = name.partition("+")
    return sampler, uniform_policies(space)[:POLICIES] if more == "grid" else []


def charged_curve(
    proposer: Any,
    sampler: str,
    task: Any,
    library: int,
    charged: int,
    original: _Found,
    evaluate: Callable[[Sequence[Any]], Iterable[_Found]],
    begin: Sequence[Any] = (),
    batch: int = 8,
) -> list[_Found]:
    """What `evaluate` gives after every charged evaluation: the original, the opening, the library, the search.

    Args:
        proposer: Of the sampler, without the table where it can open without it.
        sampler: Its name.
        task: With the table.
        library: Evaluations that the table costs; 0 where it is not used.
        charged: Evaluations in all.
        original: What the original alone gives.
        evaluate: Evaluates and tells candidates; gives something after each.
        begin: Candidates that come first.
        batch: Candidates that are asked for at once.
    """
    from planish.search.sampler import OPENS, opening

    found, number = [original], 0
    if sampler in OPENS:
        number = 1
        found += evaluate(proposer.ask(number, opening(sampler, batch, charged)))
        proposer.inform(task)
    found += [found[-1]] * library
    while len(found) <= charged:
        number += 1
        given, begin = begin[:batch], begin[batch:]
        candidates = proposer.ask(number, min(batch, charged + 1 - len(found)), given)
        if not candidates:
            break
        found += evaluate(candidates)
    return (found + [found[-1]] * charged)[: charged + 1]


def curve_row(kind: str, task: str, sampler: str, curves: np.ndarray, ours: int, seconds: float) -> dict[str, Any]:
    """A method's `regret` or `hypervolume`, shape (seeds, charged + 1), at a few budgets; the area that is missing."""
    most = curves.shape[1] - 1
    places = sorted({30, ours, 100, 200, most} & set(range(most + 1)))
    missing = curves if kind == "regret" else 1 - curves
    return {
        "task": task,
        "sampler": sampler,
        "seeds": len(curves),
        kind: {str(place): [float(value) for value in curves[:, place]] for place in places},
        "area": [float(value) for value in missing.mean(1)],
        "seconds": seconds,
    }


def _losses(micro: Micro, keys: Sequence[tuple[int, ...]]) -> np.ndarray:
    return np.array([[1 - micro.accuracy[key], micro.ratio[key]] for key in keys])
