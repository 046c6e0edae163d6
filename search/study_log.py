"""`study.log`: the search's trials as an Optuna study on disk, for Optuna's own tools.

It follows the search and nothing is read from it: the journal is the source of truth. A thread writes it, because a
trial of a large space takes Optuna's journal milliseconds, and reading a long one back takes seconds.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..spaces.space import Candidate, SearchSpace
from .study_space import distributions_of

if TYPE_CHECKING:
    import optuna

_Told = tuple[Candidate, Sequence[float] | None, Mapping[str, object]]

NAME = "planish"
# So many at most wait to be written together.
_TOGETHER = 256
_PATIENCE_S = 10.0


class StudyLog:
    """Appends finished trials to a study of the name `planish`; what an earlier session wrote is kept."""

    def __init__(self, path: Path, space: SearchSpace, directions: Sequence[str]) -> None:
        """Starts the thread; the file is opened there.

        Args:
            path: The file.
            space: What candidates are of.
            directions: `minimize` or `maximize` for every value.
        """
        # Optuna's lock is a link to the path that it is given, and of a relative one leads nowhere.
        self._path, self._directions = path.absolute(), tuple(directions)
        self._distributions = distributions_of(space)
        self._waiting: queue.SimpleQueue[_Told | None] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write, name="study.log", daemon=True)
        self._thread.start()

    def add(self, candidate: Candidate, values: Sequence[float] | None, attributes: Mapping[str, object]) -> None:
        """Takes the next finished trial; a resumed search tells all of them again, in the same order.

        Args:
            candidate: Its options.
            values: Of the objectives; None where it failed.
            attributes: What else is known.
        """
        self._waiting.put((candidate, values, attributes))

    def close(self) -> None:
        """Waits until everything is written; a second call does nothing."""
        if self._thread.is_alive():
            self._closing.set()
            self._waiting.put(None)
            self._thread.join()

    def _write(self) -> None:
        try:
            # An old log takes seconds to read; what a resumed search proposes first need not wait for that.
            self._closing.wait(_PATIENCE_S)
            study = self._open()
            skipped = len(study.get_trials(deepcopy=False))
            for told in self._batches():
                new, skipped = told[skipped:], max(0, skipped - len(told))
                study.add_trials([self._trial(*each) for each in new])
        except Exception as error:
            # A full disk, for one: the search goes on, its journal says what is wrong, and the next session writes it.
            logging.getLogger(__name__).warning("%s is not written any more: %s", self._path, error)

    def _batches(self) -> Iterator[list[_Told]]:
        """Lists of trials that wait, until there is an end."""
        while True:
            told = [self._waiting.get()]
            while len(told) < _TOGETHER and not self._waiting.empty():
                told.append(self._waiting.get())
            yield [each for each in told if each is not None]
            if None in told:
                return

    def _trial(
        self, candidate: Candidate, values: Sequence[float] | None, attributes: Mapping[str, object]
    ) -> optuna.trial.FrozenTrial:
        import optuna

        states = optuna.trial.TrialState
        return optuna.create_trial(
            state=states.FAIL if values is None else states.COMPLETE,
            values=None if values is None else list(values),
            params=dict(candidate.options),
            distributions=self._distributions,
            user_attrs=dict(attributes),
        )

    def _open(self) -> optuna.Study:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
        from optuna.study import StudyDirection

        # The folder is this process's alone: a lock there is of one that was killed, and Optuna would wait for it.
        for lock in self._path.parent.glob(f"{self._path.name}.lock*"):
            lock.unlink()
        directions = [StudyDirection.MAXIMIZE if d == "maximize" else StudyDirection.MINIMIZE for d in self._directions]
        if self._path.exists():
            try:
                study = optuna.load_study(study_name=NAME, storage=JournalStorage(JournalFileBackend(str(self._path))))
                if study.directions == directions:
                    return study
            except Exception as error:  # whatever a damaged log provokes in its reader
                logging.getLogger(__name__).debug("%s is written anew: %s", self._path, error)
        for old in self._path.parent.glob(self._path.name + "*"):
            old.unlink()
        storage = JournalStorage(JournalFileBackend(str(self._path)))
        return optuna.create_study(study_name=NAME, storage=storage, directions=directions)
