"""The specification of a search, from a TOML file or from flags; an unknown key is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError, nearest
from .locate import located, relative_to
from .objective import Budget, Objective, device_label, objectives_of, parse_budget
from .spec_defaults import KEYS, PRESET_VALUES, Value
from .spec_values import check_value, cross_check
from .toml_text import read_toml, write_toml


@dataclass(frozen=True)
class SearchKeys:
    """The table [search]."""

    trials: int
    batch: int
    ahead: int
    proxy_images: int


@dataclass(frozen=True)
class SpaceKeys:
    """The table [space]; `lanes` 0 stands for the device's."""

    families: tuple[str, ...]
    lanes: int


@dataclass(frozen=True)
class DistillKeys:
    """The table [distill]; rungs in epochs so far, survivors as many as enter each; `train_limit` 0 stands for all.

    `device` is `auto`, `cpu` or `cuda`.
    """

    rungs: tuple[int, ...]
    survivors: tuple[int, ...]
    learning_rate: float
    temperature: float
    alpha: float
    attention: float
    hints: float
    batch_size: int
    train_limit: int
    device: str
    precision: str

    def passes(self, images: int) -> float:
        """How often the longest training sees each of so many images."""
        shown = min(self.train_limit, images) if self.train_limit else images
        return self.rungs[-1] * shown / images


@dataclass(frozen=True)
class MeasureKeys:
    """The table [measure]; `latency` is `measured` or `predicted`.

    `runs` and `warmup_s` are per process, `drift` is a share of the original's latency.
    """

    latency: str
    runs: int
    processes: int
    warmup_s: float
    time_limit_s: float
    drift: float


@dataclass(frozen=True)
class Spec:
    """A search as resolved: every key has its value, and paths that were found are absolute.

    `weights` None: the model's own. `workers` 0: one per core.
    """

    model: str
    weights: str | None
    data: str
    device: tuple[str, ...]
    budget: tuple[str, ...]
    objectives: tuple[str, ...]
    preset: str
    workers: int
    seed: int
    sampler: str
    address: str
    search: SearchKeys
    space: SpaceKeys
    distill: DistillKeys
    measure: MeasureKeys

    def labels(self) -> tuple[str, ...]:
        """The devices as metrics name them."""
        return tuple(device_label(device) for device in self.device)

    def budgets(self) -> tuple[Budget, ...]:
        """The budgets, one per device for a latency that names none."""
        return tuple(budget for text in self.budget for budget in parse_budget(text, self.labels()))

    def targets(self) -> tuple[Objective, ...]:
        """The objectives, one per device for latency."""
        return objectives_of(self.objectives, self.labels())

    def flat(self) -> dict[str, Value]:
        """Every key as `key` or `table.key` in the order of `KEYS`, without weights as an empty text."""
        values: dict[str, Value] = {}
        for name in KEYS:
            table, dot, key = name.partition(".")
            value = getattr(getattr(self, table), key) if dot else getattr(self, name)
            values[name] = "" if value is None else value
        return values

    def resolved_toml(self, folder: Path | None = None) -> str:
        """The specification as TOML, every default written out.

        Args:
            folder: Where the text will stand: paths near it are written relative to it. None: paths stay absolute.
        """
        values = self.flat()
        return write_toml(values if folder is None else relative_to(values, folder))


def load_spec(
    path: Path | None,
    overrides: Mapping[str, object] | None = None,
    bases: Sequence[Path] | None = None,
    *,
    needed: bool = True,
) -> Spec:
    """Reads a specification; what it does not say comes from its preset, then from the defaults.

    Args:
        path: A TOML file, or None for flags alone.
        overrides: Flat keys (`seed`, `search.trials`) that go before the file's.
        bases: Where relative paths are looked for, in order: by default the current folder, then the file's.
        needed: Whether the files that it names are to be used.

    Raises:
        UserError: the file is missing or not TOML; a key is unknown, missing, of another type or out of range.
    """
    if bases is None:
        bases = (Path.cwd(), *([path.parent] if path else []))
    written = _read(path) if path else {}
    name = str(path) if path else "the command line"
    given = {key: check_value(key, value, name) for key, value in written.items()}
    given |= {key: check_value(key, value, "the command line") for key, value in (overrides or {}).items()}
    missing = [key for key, entry in KEYS.items() if entry.required and not given.get(key)]
    if missing:
        raise UserError(f"{name} lacks {missing[0]!r}: {KEYS[missing[0]].help}")
    values = cross_check(_filled(given), given, name)
    return _spec(located(values, bases, needed=needed))


def default_out(spec_path: Path) -> Path:
    """Where the run of a specification goes: `runs/STEM`, beside the file when that stands in a folder named runs."""
    folder = spec_path.parent if spec_path.resolve().parent.name == "runs" else Path("runs")
    return folder / spec_path.stem


def _read(path: Path) -> dict[str, object]:
    """The file's flat keys."""
    try:
        document = read_toml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the specification {path}: {os.strerror(error.errno or 0)}") from None
    except ValueError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    tables = {key.partition(".")[0] for key in KEYS if "." in key}
    flat: dict[str, object] = {}
    for key, value in document.items():
        if not isinstance(value, dict):
            flat[key] = value
        elif key in tables:
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            raise UserError(f"{path} has the unknown table [{key}]; {nearest(key, tables)}")
    return flat


def _filled(given: Mapping[str, Value]) -> dict[str, Value]:
    preset = PRESET_VALUES[str(given.get("preset", "default"))]
    filled: dict[str, Value] = {}
    for key, entry in KEYS.items():
        value = given[key] if key in given else preset.get(key, entry.default)
        assert value is not None, f"{key} has neither a default nor a value in every preset"
        filled[key] = value
    return filled


def _spec(values: Mapping[str, Value]) -> Spec:
    text, texts = _Reader(values).text, _Reader(values).texts
    integer, integers, number = _Reader(values).integer, _Reader(values).integers, _Reader(values).number
    return Spec(
        model=text("model"),
        weights=text("weights") or None,
        data=text("data"),
        device=texts("device"),
        budget=texts("budget"),
        objectives=texts("objectives"),
        preset=text("preset"),
        workers=integer("workers"),
        seed=integer("seed"),
        sampler=text("sampler"),
        address=text("address"),
        search=SearchKeys(
            integer("search.trials"), integer("search.batch"), integer("search.ahead"), integer("search.proxy_images")
        ),
        space=SpaceKeys(texts("space.families"), integer("space.lanes")),
        distill=DistillKeys(
            rungs=integers("distill.rungs"),
            survivors=integers("distill.survivors"),
            learning_rate=number("distill.learning_rate"),
            temperature=number("distill.temperature"),
            alpha=number("distill.alpha"),
            attention=number("distill.attention"),
            hints=number("distill.hints"),
            batch_size=integer("distill.batch_size"),
            train_limit=integer("distill.train_limit"),
            device=text("distill.device"),
            precision=text("distill.precision"),
        ),
        measure=MeasureKeys(
            latency=text("measure.latency"),
            runs=integer("measure.runs"),
            processes=integer("measure.processes"),
            warmup_s=number("measure.warmup_s"),
            time_limit_s=number("measure.time_limit_s"),
            drift=number("measure.drift"),
        ),
    )


@dataclass(frozen=True)
class _Reader:
    """Checked values by their static type."""

    values: Mapping[str, Value]

    def text(self, key: str) -> str:
        return str(self.values[key])

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values[key]
        assert isinstance(value, tuple)
        return tuple(str(item) for item in value)

    def integer(self, key: str) -> int:
        value = self.values[key]
        assert isinstance(value, int)
        return value

    def number(self, key: str) -> float:
        value = self.values[key]
        assert isinstance(value, (int, float))
        return float(value)

    def integers(self, key: str) -> tuple[int, ...]:
        value = self.values[key]
        assert isinstance(value, tuple)
        return tuple(int(item) for item in value)
