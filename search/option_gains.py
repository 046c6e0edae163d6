"""What every option alone would gain on a device, and why some gain nothing: for a person, before any search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..spaces.local_error import LocalErrors
from ..spaces.space import Kind
from .library import option_table

if TYPE_CHECKING:
    from .evaluate import Evaluator

# What is gained below this share of the model's latency is not told apart from noise in any measurement.
_NOISE = 0.002
# Rows and columns that a terminal is shown.
_SHOWN = 8
_COLUMNS = ("choice", "option", "latency_ratio", "size_ratio")


def option_gains(evaluator: Evaluator, label: str) -> list[dict[str, object]]:
    """A row for every option of every choice: latency and size of the model with this option alone, and a note.

    Latency is predicted (see `library.latency_model`), relative to the original by the same prediction. `pays` says
    whether it is lower by more than noise; the note says why it is not.
    """
    space = evaluator.proposal.space
    latency = f"latency[{label}]"
    nothing = LocalErrors({c.name: (0.0,) * len(c.options) for c in space.choices}, {})
    table = option_table(evaluator, nothing, [latency, "size"], every=True)
    alone = [(place, level) for place, c in enumerate(space.choices) for level in range(1, len(c.options))]
    levels = np.zeros((1 + len(alone), len(space.choices)), dtype=np.int64)
    for row, (place, level) in enumerate(alone, start=1):
        levels[row, place] = level
    seconds, sizes = table.cost(latency, levels), table.cost("size", levels)
    rows: list[dict[str, object]] = []
    for row, (place, level) in enumerate(alone, start=1):
        choice = space.choices[place]
        ratio = float(seconds[row] / seconds[0])
        pays = ratio < 1 - _NOISE
        rows.append(
            {
                "choice": choice.name,
                "option": choice.options[level],
                "latency_ratio": ratio,
                "size_ratio": float(sizes[row] / sizes[0]),
                "pays": pays,
                "why": "" if pays else _why(choice.kind, seconds[row] - seconds[0]),
            }
        )
    return rows


def _why(kind: Kind, added_s: float) -> str:
    if kind is Kind.CLUSTER:
        return "shared weights are written out to run: storage only"
    change = f"{added_s * 1e6:+.2f} us" if abs(added_s) >= 5e-9 else "nothing"
    if kind is Kind.BITS:
        return f"the layer's kernels are not bound by the width of its numbers: {change}"
    if kind is Kind.PRUNE:
        return f"the layers that lose channels are not bound by them: {change}"
    return f"its kernels together take no less than the layer's own: {change}"


def gains_in_short(profile: Mapping[str, object]) -> dict[str, object]:
    """A profile whose rows of gains are the best few, and a count for every reason to gain nothing."""
    devices = profile.get("devices")
    short: dict[str, object] = {}
    for label, entry in devices.items() if isinstance(devices, Mapping) else ():
        rows = [row for row in entry.get("gains", ()) if isinstance(row, Mapping)]
        if not rows:
            short[label] = entry
            continue
        paying = sorted((row for row in rows if row["pays"]), key=lambda row: float(row["latency_ratio"]))
        reasons = Counter(str(row["why"]).partition(": ")[0] for row in rows if not row["pays"])
        short[label] = {
            **entry,
            "gains": [{key: row[key] for key in _COLUMNS} for row in paying[:_SHOWN]],
            "options_that_pay": f"{len(paying)} of {len(rows)}, the best of them above",
            "gain_nothing": dict(reasons),
        }
    return {**profile, "devices": short}
