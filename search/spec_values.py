"""Checks of a specification's values, each alone and together."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from .artifact_path import path_name
from .errors import UserError, nearest
from .objective import device_label, objectives_of, parse_budget
from .spec_defaults import KEYS, Key, Value


def check_value(key: str, value: object, where: str) -> Value:
    """The value as its key's type; a text stands for a list of one where texts are wanted.

    Args:
        where: The file's name, for messages.

    Raises:
        UserError: the key is unknown, or the value has another type, is out of range or not allowed.
    """
    if key not in KEYS:
        table, dot, _ = key.partition(".")
        siblings = [known for known in KEYS if known.rpartition(".")[0] == (table if dot else "")] or list(KEYS)
        raise UserError(f"{where} has the unknown key {key!r}; {nearest(key, siblings)}")
    entry = KEYS[key]
    message = f"{where}: {key} = {value!r}"
    if entry.kind == "text":
        if not isinstance(value, str):
            raise UserError(f"{message} must be a text")
        return _allowed(value, entry, message)
    if entry.kind == "texts":
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise UserError(f"{message} must be a text or a list of texts")
        if len(set(items)) != len(items):
            raise UserError(f"{message} repeats an entry")
        return tuple(_allowed(item, entry, message) for item in items)
    if entry.kind == "integers":
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"{message} must be a list of at least one whole number")
        return tuple(int(_number(item, entry, message, whole=True)) for item in value)
    return _number(value, entry, message, whole=entry.kind == "integer")


def cross_check(values: Mapping[str, Value], given: Mapping[str, Value], where: str) -> dict[str, Value]:
    """The values once those that came from a preset fit those that were given.

    A preset's survivors are as many as the rungs and never more than the trials, and neither is a preset's batch.

    Args:
        values: Every key.
        given: The keys that the user gave.

    Raises:
        UserError: given values contradict each other, or a budget or an objective cannot be read.
    """
    fitted = dict(values)
    trials = int(str(values["search.trials"]))
    rungs = [int(str(rung)) for rung in _tuple(values["distill.rungs"])]
    survivors = [int(str(count)) for count in _tuple(values["distill.survivors"])]
    if "search.batch" not in given:
        fitted["search.batch"] = min(trials, int(str(values["search.batch"])))
    if "distill.survivors" not in given:
        survivors = [min(trials, survivors[min(rung, len(survivors) - 1)]) for rung in range(len(rungs))]
        fitted["distill.survivors"] = tuple(survivors)
    if len(rungs) != len(survivors):
        raise UserError(
            f"{where}: distill.rungs = {rungs} has {len(rungs)} entries and distill.survivors = {survivors} has "
            f"{len(survivors)}; give both with one entry per rung"
        )
    if any(later <= earlier for earlier, later in pairwise(rungs)):
        raise UserError(f"{where}: distill.rungs = {rungs} must rise (they count epochs from the start)")
    if any(later > earlier for earlier, later in pairwise((trials, *survivors))):
        raise UserError(f"{where}: distill.survivors = {survivors} must not rise nor exceed the {trials} trials")
    if values["search.ahead"] and values["measure.latency"] != "predicted":
        raise UserError(
            f"{where}: search.ahead = {values['search.ahead']} lets candidates be scored while others are timed; it "
            'needs measure.latency = "predicted", or 0'
        )
    _check_targets(values, where)
    return fitted


def _check_targets(values: Mapping[str, Value], where: str) -> None:
    devices = [device_label(str(name)) for name in _tuple(values["device"])]
    objectives = [str(name) for name in _tuple(values["objectives"])]
    if not devices or not all(devices):
        raise UserError(f"{where}: device = {devices} names no device; `planish devices` lists them")
    if len(set(devices)) != len(devices):
        raise UserError(f"{where}: device names two files called {sorted(devices)}; rename one")
    if len(set(map(path_name, devices))) != len(devices):
        raise UserError(f"{where}: device = {devices} would share a folder of compiled models; rename one of the files")
    if not values["space.families"]:
        raise UserError(f"{where}: space.families is empty; allowed are {', '.join(KEYS['space.families'].allowed)}")
    if "accuracy" not in objectives or len(objectives) < 2:
        raise UserError(f"{where}: objectives = {objectives} must hold accuracy and at least one cost")
    try:
        objectives_of(objectives, devices)
        for text in _tuple(values["budget"]):
            parse_budget(str(text), devices)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _tuple(value: Value) -> tuple[object, ...]:
    assert isinstance(value, tuple)
    return value


def _allowed(value: str, entry: Key, message: str) -> str:
    if entry.allowed and value not in entry.allowed:
        raise UserError(f"{message}: {value!r} is not allowed; {nearest(value, entry.allowed)}")
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in value):
        raise UserError(f"{message} holds a character that cannot be printed")
    return value


def _number(value: object, entry: Key, message: str, whole: bool) -> int | float:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise UserError(f"{message} must be a {'whole ' if whole else ''}number")
    assert isinstance(value, (int, float))
    if not entry.low <= value <= entry.high:
        raise UserError(f"{message} is out of range; allowed is {entry.low:g} to {entry.high:g}")
    return value if whole else float(value)
