"""A run's folder: the search as resolved, where it came from, what was evaluated, and the front."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ..spaces.space import SearchSpace
from .atomic import sync_folder, write_json, write_text
from .config import Spec, load_spec
from .errors import UserError, file_mistakes
from .front import front_csv
from .journal import Event, Journal, read_events
from .json_text import parsed
from .lock import FolderLock
from .replay import FORMAT, History, Phase, Record, Replay
from .trial import State, Trial

# What may differ between a run and its resumption: it changes where the work is done, not what comes out.
_FREE_KEYS = frozenset({"workers", "address"})
# What the teacher says of the training images, while a rung lasts.
FRONT = "front.json"
LESSONS = "teacher"
_OTHER_FOLDER = "choose another folder with --out"


class RunDirectory:
    """A run's folder, open for reading, or (from `create` and `resume`) locked and open for recording too."""

    def __init__(self, path: Path, lock: FolderLock | None) -> None:
        """Not for callers: use `open`, `resume` or `create`."""
        self.path = path
        self._lock = lock
        self._journal = Journal(self._trials_path) if lock else None
        self._new_session = True
        # Told every event once it is on the disk.
        self.listener: Callable[[Mapping[str, object]], None] | None = None
        # Only the holder of the lock writes, so what it has read and written is all there is.
        self._replay = self._added(self._journal.found()) if self._journal else None

    @staticmethod
    def open(path: Path) -> RunDirectory:
        """Opens a run for reading, even while a controller works in it.

        Raises:
            UserError: there is no run in the folder.
        """
        if not (path / "spec.toml").is_file():
            raise UserError(f"{path} holds no run (it has no spec.toml); name a folder that `planish search` made")
        return RunDirectory(path, None)

    @staticmethod
    def resume(path: Path) -> RunDirectory:
        """Opens a run for carrying on.

        Raises:
            UserError: there is no run in the folder, or another controller works in it.
        """
        RunDirectory.open(path)
        return _locked(path, FolderLock(path))

    @staticmethod
    def examine(path: Path, spec: Spec) -> None:
        """Whether `create` can use the folder; for callers that have work to do before they call it.

        Raises:
            UserError: it holds something else, or a run of another spec (the first key that differs is named).
        """
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; {_OTHER_FOLDER}")
        if (path / "spec.toml").exists():
            _check_same(path, spec)
        elif path.is_dir() and _foreign(path):
            raise UserError(f"{path} exists and holds no run (found {_foreign(path)[0]}); {_OTHER_FOLDER}")

    @staticmethod
    def create(path: Path, spec: Spec, provenance: Mapping[str, object]) -> RunDirectory:
        """Makes a run's folder, or resumes the run that is there if it has the same spec.

        Raises:
            UserError: the folder holds something else or a run of another spec (the first key that differs is
                named), another controller works in it, or it cannot be written.
        """
        RunDirectory.examine(path, spec)
        advice = _OTHER_FOLDER
        with file_mistakes(str(path), advice):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
        lock = FolderLock(path)
        try:
            if (path / "spec.toml").exists():
                _check_same(path, spec)
            else:
                write_json(path / "provenance.json", provenance, advice)
                write_text(path / "spec.toml", spec.resolved_toml(path), advice)
        except BaseException:
            lock.release()
            raise
        return _locked(path, lock)

    def close(self) -> None:
        """Closes the journal and gives the lock back; a second call does nothing."""
        if self._journal:
            self._journal.close()
        if self._lock:
            self._lock.release()
        self._journal = self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def spec(self, *, needed: bool = False) -> Spec:
        """The search as resolved; its paths are found from the run's folder, whatever the current folder is.

        Args:
            needed: Whether the files that it names are to be used: a run without them can still be read.
        """
        return load_spec(self.path / "spec.toml", bases=(self.path,), needed=needed)

    def history(self) -> History:
        """Everything the journal tells; empty before the first event."""
        return (self._replay or self._read()).history()

    @property
    def records(self) -> Mapping[int, Record]:
        """Every trial that started, as it is now; a locked run keeps them up to date without reading anything again."""
        return (self._replay or self._read()).records

    @property
    def phases(self) -> Sequence[Phase]:
        """The phases in the order of their beginning."""
        return (self._replay or self._read()).phases

    def trials(self) -> list[Trial]:
        """Every trial by number, those still running included."""
        return self.history().trials()

    def append(self, trial: Trial) -> None:
        """Records a trial as it now is: that it started, and unless it is RUNNING, how it ended.

        What is recorded already is not repeated: a second end of a trial changes nothing.
        """
        known = self.records
        if trial.number not in known:
            self.start([trial])
        if trial.state is not State.RUNNING and known[trial.number].trial.state is State.RUNNING:
            end = {"event": "end", "trial": trial.number, "state": trial.state.value}
            self._record({**end, "metrics": dict(trial.metrics), "error": trial.error})

    def start(self, trials: Sequence[Trial]) -> None:
        """Records that trials start, which none of them has, in one write."""
        events = [{"event": "start", "trial": t.number, "batch": t.batch, "seed": t.seed} for t in trials]
        self._record(*({**e, "options": dict(t.candidate.options)} for e, t in zip(events, trials, strict=True)))

    def score(self, number: int, metrics: Mapping[str, object]) -> None:
        """Records the one-shot metrics of a trial that has started."""
        self._record({"event": "score", "trial": self._started(number), "metrics": dict(metrics)})

    def rescore(self, number: int, metrics: Mapping[str, object]) -> None:
        """Records the one-shot metrics of a trial on more images than `score` saw."""
        self._record({"event": "rescore", "trial": self._started(number), "metrics": dict(metrics)})

    def measure(self, number: int, device: str, metrics: Mapping[str, object]) -> None:
        """Records what was measured of a trial on a device."""
        self._record({"event": "measure", "trial": self._started(number), "device": device, "metrics": dict(metrics)})

    def rung(self, number: int, rung: int, epochs: float, metrics: Mapping[str, object]) -> None:
        """Records what a trial is after a rung of distillation; `epochs` counts from its start."""
        event = {"event": "rung", "trial": self._started(number), "rung": rung, "epochs": epochs}
        self._record({**event, "metrics": dict(metrics)})

    def phase(self, name: str, total: int, unit: str, trials: Sequence[int] = ()) -> None:
        """Records that a phase begins, or goes on after a resumption.

        Args:
            total: The phase's items, those done before a resumption included.
            unit: The event that counts one item: `score`, `rescore`, `rung`, `measure` or `end`.
            trials: Who was chosen for it, where that was a choice.
        """
        chosen = {"trials": list(trials)} if trials else {}
        self._record({"event": "phase", "phase": name, "total": total, "unit": unit, **chosen})

    def trial_folder(self, number: int) -> Path:
        """The folder of a trial's weights, recipe and artifact: `trials/0007`; a locked run makes a missing one."""
        folder = self.path / "trials" / f"{number:04d}"
        if self._lock:
            with file_mistakes(str(folder), self._advice):
                folder.mkdir(parents=True, exist_ok=True)
        return folder

    def trial_file(self, number: int, name: str) -> dict[str, object] | None:
        """A JSON object in a trial's folder; None where there is none.

        Raises:
            UserError: the file is something else.
        """
        file = Path("trials", f"{number:04d}", name)
        return self._read_json(str(file)) if (self.path / file).exists() else None

    def write_space(self, space: SearchSpace) -> None:
        """Writes space.json.

        Raises:
            UserError: the folder holds another space, so its trials mean something else now.
        """
        if (self.path / "space.json").exists():
            if self.space().to_json() != space.to_json():
                raise UserError(
                    f"{self.path / 'space.json'} is not the space that planish now finds in the model: the model or "
                    "planish has changed since; start anew with another --out"
                )
            return
        write_json(self.path / "space.json", space.to_json(), self._advice)

    def space(self) -> SearchSpace:
        """Reads space.json; UserError where it is missing or not a space."""
        try:
            return SearchSpace.from_json(self._read_json("space.json"))
        except (ValueError, KeyError, TypeError) as error:
            path = self.path / "space.json"
            raise UserError(f"{path} is not a search space: {error}; restore it from a copy") from error

    def write_front(self, front: Mapping[str, object]) -> None:
        """Writes front.json and front.csv, each atomically. `front` is what `front.front_document` returns."""
        write_json(self.path / FRONT, front, self._advice)
        write_text(self.path / "front.csv", front_csv(front), self._advice)

    def front(self) -> dict[str, object]:
        """Reads front.json; UserError where there is none yet, or where an entry is no trial."""
        front = self._read_json(FRONT)
        listed = front.get("front")
        if not isinstance(listed, list) or not all(_is_entry(entry) for entry in listed):
            raise UserError(
                f"{self.path / 'front.json'} holds an entry that is no trial; restore it from a copy, or delete it and "
                f"carry on with: planish resume {self.path}"
            )
        return front

    def provenance(self) -> dict[str, object]:
        """Reads provenance.json."""
        return self._read_json("provenance.json")

    def add_resumption(self, provenance: Mapping[str, object]) -> None:
        """Adds a session to provenance.json under `resumed`, without what is as it was."""
        # Of a run whose file is lost this session is the first that is known.
        first = self.provenance() if (self.path / "provenance.json").exists() else {}
        changed = {key: value for key, value in provenance.items() if first.get(key) != value}
        resumed = first.get("resumed", [])
        resumed = [*resumed, changed] if isinstance(resumed, list) else [changed]
        write_json(self.path / "provenance.json", {**first, "resumed": resumed}, self._advice)

    @property
    def _trials_path(self) -> Path:
        return self.path / "trials.jsonl"

    @property
    def _advice(self) -> str:
        return f"what was recorded is kept; once that is put right, carry on with: planish resume {self.path}"

    def _record(self, *events: Mapping[str, object]) -> None:
        assert self._journal is not None, "the run was opened for reading"
        assert self._replay is not None
        if not events:
            return  # a batch whose trials have all begun before
        if self._new_session:
            # With the first event, so that opening a run and doing nothing leaves it as it was.
            events = ({"event": "session", "format": FORMAT}, *events)
            self._new_session = False
        for event in self._journal.append(*events):
            self._replay.add(event)
            if self.listener:
                self.listener(event.data)

    def _read(self) -> Replay:
        return self._added(read_events(self._trials_path) if self._trials_path.exists() else ())

    def _added(self, events: Sequence[Event]) -> Replay:
        told = Replay(self._trials_path)
        for event in events:
            told.add(event)
        return told

    def _started(self, number: int) -> int:
        assert number in self.records, f"trial {number} never started"
        return number

    def _read_json(self, name: str) -> dict[str, object]:
        path = self.path / name
        try:
            value = parsed(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"{path} does not exist yet; carry on with: planish resume {self.path}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}; restore it from a copy or delete it") from error
        if not isinstance(value, dict):
            raise UserError(f"{path} is not a JSON object; restore it from a copy or delete it")
        return value


def _locked(path: Path, lock: FolderLock) -> RunDirectory:
    try:
        return RunDirectory(path, lock)
    except BaseException:
        lock.release()
        raise


def _is_entry(entry: object) -> bool:
    """Whether an entry of a front says which trial it is and what is known of it."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), dict) for key in ("metrics", "options")):
        return False
    return isinstance(entry.get("trial"), int) and not isinstance(entry["trial"], bool)


def _foreign(path: Path) -> list[str]:
    """What stands in a folder beside the leftovers of a creation that was killed."""
    return sorted(p.name for p in path.iterdir() if not p.name.startswith(".") and p.name != "provenance.json")


def _check_same(path: Path, spec: Spec) -> None:
    there, asked = load_spec(path / "spec.toml", bases=(path,)).flat(), spec.flat()
    for key, value in there.items():
        if key not in _FREE_KEYS and asked[key] != value:
            raise UserError(
                f"{path / 'spec.toml'} has {key} = {value!r} and this search asks for {asked[key]!r}; choose another "
                f"folder with --out, or carry on with the folder's own: planish resume {path}"
            )
