"""The search space: what may be changed at each site of a model, and one point of it."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Option = int | float | str | None


class Kind(str, Enum):
    """The five compression families.

    `apply` prunes before it replaces blocks, so that a block is fitted to the channels that are left; the others follow
    in this order.
    """

    BLOCK = "block"
    PRUNE = "prune"
    RANK = "rank"
    CLUSTER = "cluster"
    BITS = "bits"


@dataclass(frozen=True)
class Choice:
    """The options of one kind at one site; `options[0]` leaves the site as it is."""

    site: str
    kind: Kind
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if len(self.options) < 2:
            raise ValueError(f"choice {self.name!r} has {len(self.options)} options; it needs at least 2")
        if len({json.dumps(option) for option in self.options}) != len(self.options):
            raise ValueError(f"choice {self.name!r} repeats an option: {list(self.options)}")

    @property
    def name(self) -> str:
        """`site:kind`, unique within a space."""
        return f"{self.site}:{self.kind.value}"


@dataclass(frozen=True)
class Candidate:
    """One option for every choice of a space, by the choice's name."""

    options: Mapping[str, Option]

    def key(self) -> str:
        """A digest that is equal for equal candidates in any process (16 hexadecimal digits)."""
        return self._key

    @cached_property
    def _key(self) -> str:
        text = json.dumps(dict(sorted(self.options.items())), separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.key())


@dataclass(frozen=True)
class SearchSpace:
    """The choices of a model, in a fixed order, and the layers that were left out with the reason."""

    choices: tuple[Choice, ...]
    left_out: Mapping[str, str]

    def __post_init__(self) -> None:
        names = [choice.name for choice in self.choices]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the space has two choices named {', '.join(twice)}; a site has one choice of a kind")

    def size(self) -> int:
        """The number of candidates."""
        return math.prod(len(choice.options) for choice in self.choices)

    def original(self) -> Candidate:
        """The candidate that leaves every site as it is."""
        return Candidate({choice.name: choice.options[0] for choice in self.choices})

    def sample(self, rng: np.random.Generator) -> Candidate:
        """One candidate, every option of a choice equally likely."""
        return self.decode([int(rng.integers(len(choice.options))) for choice in self.choices])

    def encode(self, candidate: Candidate) -> NDArray[np.int64]:
        """The index of the candidate's option in every choice, shape (n_choices,).

        Raises:
            ValueError: a choice is missing, unknown, or has no such option.
        """
        unknown = sorted(set(candidate.options) - {choice.name for choice in self.choices})
        if unknown:
            raise ValueError(f"the candidate names {', '.join(unknown)}, which the space does not have")
        return np.array([_index(choice, candidate) for choice in self.choices], dtype=np.int64)

    def decode(self, indices: Sequence[int] | NDArray[np.int64]) -> Candidate:
        """The inverse of `encode`."""
        if len(indices) != len(self.choices):
            raise ValueError(f"{len(indices)} indices were given for {len(self.choices)} choices")
        for choice, index in zip(self.choices, indices, strict=True):
            if not 0 <= index < len(choice.options):
                raise ValueError(f"index {index} of choice {choice.name!r} is outside 0..{len(choice.options) - 1}")
        return Candidate({c.name: c.options[int(i)] for c, i in zip(self.choices, indices, strict=True)})

    def neighbours(self, candidate: Candidate) -> Iterable[Candidate]:
        """Every candidate that differs from this one in the option of exactly one choice."""
        indices = self.encode(candidate)
        for position, choice in enumerate(self.choices):
            for other in range(len(choice.options)):
                if other != indices[position]:
                    changed = indices.copy()
                    changed[position] = other
                    yield self.decode(changed)

    def to_json(self) -> dict[str, object]:
        """A JSON object that `from_json` reads back."""
        return {
            "choices": [{"site": c.site, "kind": c.kind.value, "options": list(c.options)} for c in self.choices],
            "left_out": dict(self.left_out),
        }

    @staticmethod
    def from_json(data: Mapping[str, object]) -> SearchSpace:
        """Reads what `to_json` wrote."""
        choices, left_out = data.get("choices"), data.get("left_out")
        if not isinstance(choices, list) or not isinstance(left_out, dict):
            raise ValueError("a space needs the keys 'choices' (a list) and 'left_out' (an object)")
        return SearchSpace(
            tuple(Choice(str(c["site"]), Kind(c["kind"]), tuple(c["options"])) for c in choices),
            {str(site): str(reason) for site, reason in left_out.items()},
        )


def _index(choice: Choice, candidate: Candidate) -> int:
    if choice.name not in candidate.options:
        raise ValueError(f"the candidate has no option for choice {choice.name!r}")
    option = candidate.options[choice.name]
    for index, known in enumerate(choice.options):
        if known == option and type(known) is type(option):
            return index
    raise ValueError(f"option {option!r} of choice {choice.name!r} is not one of {list(choice.options)}")
