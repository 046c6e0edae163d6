"""`planish profile --html FILE`: what every layer costs, what options gain, and how wrong the latency model is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from .atomic import write_text
from .errors import UserError
from .json_text import mapping
from .page import page
from .report import table

_ROW, _LABEL, _WIDTH, _VALUE = 20, 220, 760, 120
_FONT = 'font-family="system-ui, sans-serif" font-size="12"'
_TIME, _BOUND = "#a9cdf0", "#0b6bcb"


def write_profile_page(profile: Mapping[str, object], path: Path) -> None:
    """Writes what `profile.profile` returned as a page that loads nothing.

    Raises:
        UserError: the file cannot be written.
    """
    check_place(path)
    write_text(path, profile_html(profile), "choose another file with --html")


def check_place(path: Path) -> None:
    """Whether a page can stand there, before a profile is made for it.

    Raises:
        UserError: its folder is missing, or it is a folder itself.
    """
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be written: there is no folder {path.parent}"
        raise UserError(f"{path} {what}; choose another file with --html")


def profile_html(profile: Mapping[str, object]) -> str:
    """The page as text; every text from the profile is escaped."""
    devices = mapping(profile.get("devices"))
    parts = {
        "devices": "\n".join(_device(str(name), mapping(entry)) for name, entry in devices.items()),
        "left_out": _left_out(mapping(profile.get("left_out"))),
    }
    return page("profile.html", f"Planish: profile of {profile.get('model')}", parts)


def layers_svg(layers: Sequence[Mapping[str, object]], other_s: float) -> str:
    """A bar for every layer: the time that it takes, and the part of it that the roofline leaves it no choice about."""
    rows = [
        (str(row.get("site")), _number(row.get("time_s")), _number(row.get("roofline_share"))) for row in layers
    ] + [("everything else", other_s, 0.0)]
    longest = max((seconds for _, seconds, _ in rows), default=0.0) or 1.0
    height, room = _ROW * len(rows) + 10, _WIDTH - _LABEL - _VALUE
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" width="100%" '
        f'style="max-width:{_WIDTH}px"><title>Time of every layer</title>'
    ]
    for number, (name, seconds, bound) in enumerate(rows):
        top, length = _ROW * number + 5, max(0.0, seconds / longest * room)
        parts += [
            f'<text x="{_LABEL - 8}" y="{top + 12}" text-anchor="end" {_FONT}>{escape(name)}</text>',
            f'<rect x="{_LABEL}" y="{top}" width="{length:.1f}" height="{_ROW - 6}" fill="{_TIME}"/>',
            f'<rect x="{_LABEL}" y="{top}" width="{length * min(bound, 1.0):.1f}" height="{_ROW - 6}" '
            f'fill="{_BOUND}"/>',
            f'<text x="{_LABEL + length + 6:.1f}" y="{top + 12}" {_FONT}>{seconds * 1e6:.1f} us</text>',
        ]
    return "\n".join([*parts, "</svg>"])


def _device(name: str, entry: Mapping[str, object]) -> str:
    layers = [mapping(row) for row in _list(entry.get("layers"))]
    gains = [mapping(row) for row in _list(entry.get("gains"))]
    paying = sorted((g for g in gains if g.get("pays")), key=lambda g: _number(g.get("latency_ratio")))
    idle = [g for g in gains if not g.get("pays")]
    reachable = [
        [key, *(f"{_number(value):.4g}" for value in _list(span))]
        for key, span in mapping(entry.get("reachable")).items()
    ]
    model = mapping(entry.get("latency_model"))
    error = mapping(model.get("held_out"))
    # A page is read when the terminal is long gone: what makes its numbers doubtful stands above them.
    notes = "".join(f'<p class="warn">{escape(str(note))}</p>' for note in _list(model.get("notes")))
    failed = [[what, reason] for what, reason in mapping(model.get("failed")).items()]
    parts = [
        f"<h2>{escape(name)}: {escape(str(entry.get('title', '')))}</h2>",
        notes,
        f"<p>{_latency(entry)} Light: the time of a layer; dark: the part that arithmetic and memory traffic at their "
        "peaks would take.</p>",
        layers_svg(layers, _number(entry.get("other_time_s"))),
        "<h3>Reachable</h3>",
        table(["cost", "least", "most"], reachable),
        f"<h3>What options gain, each alone, by {escape(str(entry.get('gains_from', 'the latency model')))}</h3>",
        f'<div class="scroll">{table(["choice", "option", "latency", "size"], [_gain(g) for g in paying])}</div>',
        "<h3>Options that gain nothing, and why</h3>",
        f'<div class="scroll">{_idle(idle)}</div>',
    ]
    if error:
        rows = [[key, "" if value is None else f"{_number(value):.3g}"] for key, value in error.items()]
        source = model.get("carried_over_from")
        parts += ["<h3>The latency model's own error, on networks left out</h3>"]
        parts += [f"<p>It is carried over from {escape(str(source))}.</p>"] if source else []
        parts += [table(["", ""], rows)]
    if failed:
        parts += ["<h3>Not measured</h3>", f'<div class="scroll">{table(["", "reason"], failed)}</div>']
    return "\n".join(parts)


def _latency(entry: Mapping[str, object]) -> str:
    seconds = f"{_number(entry.get('latency_s')) * 1e6:.1f} us"
    error = entry.get("predicted_error")
    if error is None:
        low, high = ([_number(value) * 1e6 for value in _list(entry.get("latency_ci95"))] + [0.0, 0.0])[:2]
        interval = f" (95 % interval {low:.1f} to {high:.1f} us)" if high else ""
        drifted = " The machine's speed changed meanwhile: take it with care." if entry.get("drifted") else ""
        return f"The model takes {seconds}{interval}.{drifted}"
    return (
        f"The model is predicted to take {seconds}: the device is only described, so that the figure's standard "
        f"deviation is {_number(error):.0%} of it; a wrong clock cancels in ratios between models."
    )


def _gain(row: Mapping[str, object]) -> list[object]:
    ratios = (f"{_number(row.get(key)):.3f}x" for key in ("latency_ratio", "size_ratio"))
    return [row.get("choice"), row.get("option"), *ratios]


def _idle(rows: Sequence[Mapping[str, object]]) -> str:
    """Grouped by reason: there are many."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        reason = str(row.get("why")).rpartition(": ")[0] or str(row.get("why"))
        by_reason.setdefault(reason, []).append(f"{row.get('choice')}={row.get('option')}")
    found = [[reason, len(names), ", ".join(names)] for reason, names in by_reason.items()]
    return table(["reason", "options", ""], found) if found else "<p>None.</p>"


def _left_out(left_out: Mapping[str, object]) -> str:
    by_reason: dict[str, list[str]] = {}
    for layer, reason in left_out.items():
        by_reason.setdefault(str(reason), []).append(layer)
    rows = [[", ".join(names), reason] for reason, names in by_reason.items()]
    return table(["layers", "reason"], rows) if rows else "<p>Nothing is left alone.</p>"


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list) else []


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0
