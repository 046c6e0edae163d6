"""What the events of a journal add up to: trials, their rungs and the phases of the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from ..spaces.space import Candidate
from .errors import UserError
from .journal import Event
from .trial import State, Trial, read_object, read_options

Metrics = Mapping[str, object]
# Of journals. One of a later format may hold facts that this version would pass over, and so evaluate again.
FORMAT = 1


@dataclass(frozen=True)
class Rung:
    """What a trial was after a rung of distillation: its epochs so far and its metrics."""

    epochs: float
    metrics: Metrics
    time_s: float


@dataclass(frozen=True)
class Record:
    """A trial with everything that was recorded about it.

    `score` are the one-shot metrics, `rescore` those on all of the validation split, `measures` the measured ones by
    device, `rungs` by their number.
    Times are in seconds since 1970. The trial's metrics are all of them together, later ones over earlier ones and
    those of its end over all.
    """

    trial: Trial
    score: Metrics | None
    measures: Mapping[str, Metrics]
    rungs: Mapping[int, Rung]
    started_s: float
    scored_s: float | None
    measured_s: Sequence[float]
    ended_s: float | None
    rescore: Metrics | None = None
    rescored_s: float | None = None

    def before(self, rung: int) -> Metrics:
        """The metrics as they were before a rung: the one-shot score, what was measured, and the rungs before it."""
        metrics: Metrics = _merged(self.score or {}, self.rescore or {})
        for measured in self.measures.values():
            metrics = _merged(metrics, measured)
        for number in sorted(self.rungs):
            metrics = _merged(metrics, self.rungs[number].metrics) if number < rung else metrics
        return metrics


@dataclass(frozen=True)
class Phase:
    """A phase of the run: how many items it has, and the event that counts one (`score`, `rescore`, `rung`,
    `measure`, `end`).

    `trials` are those that were chosen for it, where that was a choice.
    """

    name: str
    total: int
    unit: str
    time_s: float
    trials: tuple[int, ...] = ()


@dataclass(frozen=True)
class History:
    """A journal's content: records by trial number, phases in the order of their beginning, and when sessions began."""

    records: Mapping[int, Record]
    phases: Sequence[Phase]
    sessions: Sequence[float]

    def trials(self) -> list[Trial]:
        """Every trial by number, those still running included."""
        return [record.trial for _, record in sorted(self.records.items())]


class Replay:
    """Adds up events one by one: what an event costs does not depend on how many there were before."""

    def __init__(self, path: Path) -> None:
        """`path` is the journal, for messages."""
        self._path = path
        self._drafts: dict[int, _Draft] = {}
        self._phases: list[Phase] = []
        self._sessions: list[float] = []
        self._records: dict[int, Record] = {}

    def add(self, event: Event) -> None:
        """Takes the next event. Events of unknown kind are ignored; of two equal facts the first one stands.

        Raises:
            UserError: a known event lacks a key or speaks of a trial that never started (named by file and line).
        """
        kind = event.data.get("event")
        if kind == "session":
            self._check_format(event)
        try:
            if kind == "phase":
                self._phases.append(_phase(event.data))
            elif kind == "session":
                self._sessions.append(_number(event.data, "time"))
            elif kind in ("start", "score", "rescore", "measure", "rung", "end"):
                number = _apply(event.data, self._drafts)
                self._records[number] = self._drafts[number].record()
        except ValueError as error:
            advice = "restore the file from a copy, or delete that line"
            raise UserError(f"{self._path}:{event.line}: {error}; {advice}") from error

    def _check_format(self, event: Event) -> None:
        written = event.data.get("format", 1)
        if isinstance(written, int) and written > FORMAT:
            raise UserError(
                f"{self._path}:{event.line}: a later planish wrote format {written}, this one reads up to {FORMAT}; "
                "carry on with that version"
            )

    @property
    def records(self) -> Mapping[int, Record]:
        """Every trial that started, as it is now and will be after later events: nothing is copied."""
        return MappingProxyType(self._records)

    @property
    def phases(self) -> Sequence[Phase]:
        """The phases so far, in the order of their beginning; nothing is copied."""
        return self._phases

    def history(self) -> History:
        """What the events so far tell; later ones do not change it."""
        return History(dict(sorted(self._records.items())), list(self._phases), list(self._sessions))


def replay(events: Sequence[Event], path: Path) -> History:
    """The history that the events, in the order of the file, tell; see `Replay.add` for what it raises."""
    told = Replay(path)
    for event in events:
        told.add(event)
    return told.history()


@dataclass
class _Draft:
    """A record while its events are read."""

    start: Trial
    started_s: float
    metrics: Metrics = field(default_factory=dict)
    last: Metrics = field(default_factory=dict)
    score: Metrics | None = None
    rescore: Metrics | None = None
    measures: dict[str, Metrics] = field(default_factory=dict)
    rungs: dict[int, Rung] = field(default_factory=dict)
    state: State = State.RUNNING
    error: str | None = None
    scored_s: float | None = None
    rescored_s: float | None = None
    measured_s: list[float] = field(default_factory=list)
    ended_s: float | None = None

    def record(self) -> Record:
        start = self.start
        metrics = _merged(self.metrics, self.last)
        trial = Trial(start.number, start.candidate, self.state, metrics, self.error, start.seed, start.batch)
        return Record(
            trial,
            self.score,
            dict(self.measures),
            dict(self.rungs),
            self.started_s,
            self.scored_s,
            tuple(self.measured_s),
            self.ended_s,
            self.rescore,
            self.rescored_s,
        )


def _apply(data: Mapping[str, object], drafts: dict[int, _Draft]) -> int:
    """Adds an event to its trial's draft; the trial's number."""
    number, kind, time_s = _whole(data, "trial"), data["event"], _number(data, "time")
    if kind == "start":
        candidate = Candidate(read_options(data))
        trial = Trial(number, candidate, State.RUNNING, {}, None, _whole(data, "seed"), _whole(data, "batch"))
        drafts.setdefault(number, _Draft(trial, time_s))
        return number
    if number not in drafts:
        raise ValueError(f"trial {number} has the event {kind!r} but never started")
    draft, metrics = drafts[number], read_object(data, "metrics")
    if kind == "end":
        if draft.ended_s is None:
            draft.state, draft.last, draft.ended_s = State(data.get("state")), metrics, time_s
            draft.error = None if data.get("error") is None else str(data["error"])
        return number
    if kind == "score":
        if draft.score is not None:
            return number
        draft.score, draft.scored_s = metrics, time_s
    elif kind == "rescore":
        if draft.rescore is not None:
            return number
        draft.rescore, draft.rescored_s = metrics, time_s
    elif kind == "measure":
        device = str(data.get("device", ""))
        if device in draft.measures:
            return number
        draft.measures[device] = metrics
        draft.measured_s.append(time_s)
    else:
        rung = _whole(data, "rung")
        if rung in draft.rungs:
            return number
        draft.rungs[rung] = Rung(_number(data, "epochs"), metrics, time_s)
    draft.metrics = _merged(draft.metrics, metrics)
    return number


def _merged(old: Metrics, new: Metrics) -> dict[str, object]:
    """The new metrics over the old ones; those by device (`latency_s`) are merged device by device."""
    merged = dict(old)
    for name, value in new.items():
        before = merged.get(name)
        both = isinstance(before, dict) and isinstance(value, dict)
        merged[name] = {**before, **value} if both else value  # type: ignore[dict-item]
    return merged


def _phase(data: Mapping[str, object]) -> Phase:
    given = data.get("trials", [])
    if not isinstance(given, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in given):
        raise ValueError(f"'trials' is {given!r}; it must be a list of trials' numbers")
    return Phase(
        str(data.get("phase")), _whole(data, "total"), str(data.get("unit")), _number(data, "time"), tuple(given)
    )


def _whole(data: Mapping[str, object], key: str) -> int:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{key!r} is {value!r}; it must be a whole number from 0")
    return value


def _number(data: Mapping[str, object], key: str) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{key!r} is {value!r}; it must be a number")
    return float(value)
