"""A run's `library.json`: the table of options, so that a resumed run proposes from the same numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..hwmodels.fingerprint import fingerprint
from ..spaces.space import SearchSpace
from .atomic import write_text
from .errors import UserError
from .json_text import parsed
from .option_table import Array, OptionTable, Site

if TYPE_CHECKING:
    from ..hwmodels.device import Device

_ADVICE = "delete it, and the run makes it again"


def write_library(path: Path, table: OptionTable, key: str, advice: str) -> None:
    """Writes a table under the key of what it was made from.

    Raises:
        UserError: it cannot be written; `advice` says what to do then.
    """
    document = {
        "key": key,
        "option_errors": {
            choice.name: _numbers(errors)
            for choice, errors in zip(table.space.choices, table.option_errors, strict=True)
        },
        "shared": [table.space.choices[place].name for place in sorted(table.shared_errors)],
        "shared_costs": {
            name: {table.space.choices[place].name: _numbers(costs) for place, costs in by_place.items()}
            for name, by_place in table.shared_costs.items()
        },
        "fixed": dict(table.fixed),
        "sites": [
            {
                "site": site.name,
                "shared": [table.space.choices[place].name for place in site.shared],
                "own": [table.space.choices[place].name for place in site.own],
                "combinations": site.combinations.tolist(),
                "errors": _numbers(site.errors),
                "costs": {name: costs.tolist() for name, costs in site.costs.items()},
            }
            for site in table.sites
        ],
        "left_out": dict(table.left_out),
    }
    write_text(path, json.dumps(document, separators=(",", ":"), allow_nan=False) + "\n", advice)


def read_library(path: Path, space: SearchSpace, key: str) -> OptionTable | None:
    """The table that was made from the same things; None where there is none.

    Raises:
        UserError: the file is damaged.
    """
    try:
        document = parsed(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}; {_ADVICE}") from error
    if not isinstance(document, dict) or document.get("key") != key:
        return None
    try:
        return _read(document, space)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not a library of this space ({type(error).__name__}: {error}); {_ADVICE}"
        ) from error


def library_key(space: SearchSpace, costs: Sequence[str], devices: Sequence[Device], inputs: Sequence[Any]) -> str:
    """A digest of what a table is made from: space, costs, devices, and the tensors of weights and calibration.

    Of a device that can be timed its peaks are left out: they go by the clock of the moment.
    """
    about = [
        [fingerprint(d), sorted(d.tiles.items()), None if d.timed else sorted(d.macs_per_s.items())] for d in devices
    ]
    digest = hashlib.sha256(json.dumps([space.to_json(), list(costs), about]).encode())
    for tensor in inputs:
        digest.update(tensor.detach().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _read(document: Mapping[str, Any], space: SearchSpace) -> OptionTable:
    places = {choice.name: place for place, choice in enumerate(space.choices)}
    option_errors = tuple(_array(document["option_errors"][c.name], (len(c.options),)) for c in space.choices)
    sites = []
    for entry in document["sites"]:
        shared = tuple(places[name] for name in entry["shared"])
        own = tuple(places[name] for name in entry["own"])
        errors = _array(entry["errors"], None)
        combinations = np.array(entry["combinations"], dtype=np.int64).reshape(len(errors), len(own))
        for column, place in enumerate(own):
            if not (
                (combinations[:, column] >= 0) & (combinations[:, column] < len(space.choices[place].options))
            ).all():
                raise ValueError(f"a level of {space.choices[place].name} is out of range")
        sizes = (*(len(space.choices[place].options) for place in shared), len(errors))
        costs = {str(name): _array(values, sizes) for name, values in entry["costs"].items()}
        if set(costs) != set(document["fixed"]):
            raise ValueError(f"site {entry['site']} has the costs {sorted(costs)}")
        sites.append(Site(str(entry["site"]), shared, own, combinations, errors, costs))
    return OptionTable(
        space=space,
        shared_errors={places[name]: option_errors[places[name]] for name in document["shared"]},
        shared_costs={
            str(name): {
                places[choice]: _array(costs, (len(space.choices[places[choice]].options),))
                for choice, costs in by_name.items()
            }
            for name, by_name in document["shared_costs"].items()
        },
        sites=tuple(sites),
        fixed={str(name): float(value) for name, value in document["fixed"].items()},
        option_errors=option_errors,
        left_out={str(name): str(reason) for name, reason in document["left_out"].items()},
    )


def _numbers(values: Array) -> list[float | None]:
    """JSON has no infinity: None stands for it."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _array(values: Any, shape: tuple[int, ...] | None) -> Array:
    if shape is None or len(shape) == 1:
        values = [np.inf if value is None else value for value in values]
    found = np.array(values, dtype=np.float64)
    if shape is not None and found.shape != shape:
        raise ValueError(f"an array has the shape {found.shape}, not {shape}")
    if np.isnan(found).any():
        raise ValueError("an array holds NaN")
    return found
