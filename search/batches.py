"""Asks for batches and tells what became of them, in an order that no worker's speed can change.

A batch is asked for once the batch that lies `ahead + 1` before it is told, and that one is told right then, whatever
else has ended by that time. With `ahead` above 0 workers that are done with a batch start on the next ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .ledger import Ledger, Told
from .sampler import Proposer
from .steps import Steps

if TYPE_CHECKING:
    from .workers import Pool


class Batches:
    """The candidates of a search, from the first after the corners to the last."""

    def __init__(self, ledger: Ledger, steps: Steps, proposer: Proposer, first: int) -> None:
        """Asks for nothing yet.

        Args:
            ledger: What is recorded.
            steps: Score and time trials.
            proposer: Has been told the trials before `first`.
            first: The number of the first trial.
        """
        keys = ledger.spec.search
        self._ledger, self._steps, self._proposer = ledger, steps, proposer
        self._next, self._end = first, first + keys.trials
        self._size, self._ahead = keys.batch, keys.ahead
        self._batch, self._over = 0, False
        self._open: deque[Sequence[int]] = deque()

    def opening(self, pool: Pool, count: int) -> None:
        """One batch, evaluated and told; it may be smaller than asked for without being the last."""
        self._score(pool, self._ask(count))
        self._over = False
        self._tell_all()

    def rest(self, pool: Pool) -> None:
        """Every other batch."""
        if self._ahead == 0:
            while not self._ended:
                self._score(pool, self._ask(self._size))
                self._tell_all()
            return
        queue: deque[int] = deque()

        def more() -> int | None:
            while not queue and not self._ended:
                if len(self._open) > self._ahead:
                    if not self._steps.settled(self._open[0]):
                        return None
                    self._tell()
                numbers = self._ask(self._size)
                self._steps.catch_up(numbers)
                queue.extend(self._steps.unscored(numbers))
            return queue.popleft() if queue else None

        self._steps.stream(pool, more)
        self._tell_all()

    @property
    def _ended(self) -> bool:
        return self._over or self._next >= self._end

    def _score(self, pool: Pool, numbers: Sequence[int]) -> None:
        if numbers:
            self._steps.score(pool, numbers)

    def _ask(self, size: int) -> Sequence[int]:
        """The numbers of the next batch; none where an earlier session has settled it."""
        self._batch += 1
        ledger, proposer = self._ledger, self._proposer
        recorded = self._recorded()
        known = [ledger.candidate(number) for number in recorded]
        # One that another followed was as long as the journal has it, however many were asked for.
        whole = self._next + len(recorded) in ledger.records
        count = len(recorded) if whole else min(size, self._end - self._next)
        numbers: Sequence[int] = range(self._next, self._next + count)
        if known and len(known) == count and self._steps.settled(numbers) and self._followed(numbers):
            proposer.replay(self._batch, self._told(numbers))
            self._next += count
            return ()
        candidates = proposer.ask(self._batch, count, known)
        numbers = numbers[: len(candidates)]
        ledger.begin(dict(zip(numbers, candidates, strict=True)), self._batch)
        self._open.append(numbers)
        self._next += len(candidates)
        self._over = len(candidates) < count
        return numbers

    def _recorded(self) -> list[int]:
        """The trials of the batch that an earlier session has begun."""
        records, found = self._ledger.records, []
        for number in range(self._next, self._end):
            if number not in records or records[number].trial.batch != self._batch:
                break
            found.append(number)
        return found

    def _followed(self, numbers: Sequence[int]) -> bool:
        """Whether the batches that were asked for before this one was told are known as well.

        Else it must be running while they are asked for, as it was.
        """
        last = min(self._end, numbers[-1] + 1 + self._ahead * self._size)
        return all(number in self._ledger.records for number in range(numbers[-1] + 1, last))

    def _tell_all(self) -> None:
        while self._open:
            self._tell()

    def _tell(self) -> None:
        for told in self._told(self._open.popleft()):
            self._proposer.tell(*told)

    def _told(self, numbers: Sequence[int]) -> list[Told]:
        return [self._ledger.told(number) for number in numbers]
