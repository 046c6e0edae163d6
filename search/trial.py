"""A trial: a candidate with what became of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from ..spaces.space import Candidate, Option


class State(str, Enum):
    """RUNNING until it ends; STOPPED by successive halving; INFEASIBLE outside a bound; FAILED with an error."""

    RUNNING = "running"
    COMPLETE = "complete"
    STOPPED = "stopped"
    INFEASIBLE = "infeasible"
    FAILED = "failed"


@dataclass(frozen=True)
class Trial:
    """A candidate with its state and metrics.

    `metrics` is a JSON object; what is not known yet is absent or None:
    `accuracy` and `accuracy_ci95` (low, high) as fractions, `latency_s` by device as {"value", "ci95"},
    `latency_ratio` by device, `size_bytes`, `entropy_coded_bytes`, `macs`, `peak_memory_bytes`, `energy_j`, `measured`.
    """

    number: int
    candidate: Candidate
    state: State
    metrics: Mapping[str, object]
    error: str | None
    seed: int
    batch: int = 0

    def to_json(self) -> dict[str, object]:
        """A JSON object that `from_json` reads back (a number that is not finite becomes null)."""
        return {
            "trial": self.number,
            "options": dict(self.candidate.options),
            "state": self.state.value,
            "metrics": finite(self.metrics),
            "error": self.error,
            "seed": self.seed,
            "batch": self.batch,
        }

    @staticmethod
    def from_json(data: Mapping[str, object]) -> Trial:
        """Reads what `to_json` wrote.

        Raises:
            ValueError: a key is missing or has another type.
        """
        error = data.get("error")
        return Trial(
            number=_integer(data, "trial"),
            candidate=Candidate(read_options(data)),
            state=State(data.get("state")),
            metrics=read_object(data, "metrics"),
            error=None if error is None else str(error),
            seed=_integer(data, "seed"),
            batch=_integer(data, "batch"),
        )


def finite(value: object) -> object:
    """The value as JSON can hold it: a NaN or an infinity becomes None, a tuple a list, at any depth."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def read_object(data: Mapping[str, object], key: str) -> dict[str, object]:
    """The JSON object under a key; ValueError where there is none."""
    value = data.get(key)
    if not isinstance(value, dict):
        raise ValueError(f"{key!r} is {value!r}; it must be a JSON object")
    return {str(name): item for name, item in value.items()}


def read_options(data: Mapping[str, object]) -> dict[str, Option]:
    """The candidate's options by choice; ValueError where one is not a JSON scalar."""
    options: dict[str, Option] = {}
    for name, option in read_object(data, "options").items():
        if isinstance(option, bool) or not isinstance(option, (int, float, str, type(None))):
            raise ValueError(f"option {option!r} of {name!r} is not a number, a text or null")
        options[name] = option
    return options


def _integer(data: Mapping[str, object], key: str) -> int:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key!r} is {value!r}; it must be a whole number")
    return value
