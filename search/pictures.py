"""The pictures of a run: accuracy against cost, and the hypervolume as trials come in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

from .objective import METRIC_KEYS, Objective, goal_of, split_metric
from .svg import Picture, drawing, padded
from .trial import Trial

_FRONT, _BORDER, _ORIGINAL, _OTHER, _BUDGET = "#0b6bcb", "#a9cdf0", "#c43d00", "#b8b8b8", "#2a7d2a"
_ACCURACY = Objective("accuracy", "maximize")


def front_svg(front: Mapping[str, object], trials: Sequence[Trial] = (), cost: Objective | None = None) -> str:
    """Accuracy against a cost relative to the original, as an SVG document that stands alone.

    The original is a square, the front blue with 95 % intervals, other trials grey, a budget on the cost dashed. The
    axes show the front well; how many other trials lie outside is told.

    Args:
        front: front.json.
        trials: Drawn in grey where they have both metrics and are not on the front; empty: the front alone.
        cost: By default the first of the front's objectives that is one.
    """
    cost = cost or costs_of(front)[0]
    original = _metrics(front.get("original"))
    listed = front.get("front")
    entries = [entry for entry in listed if isinstance(entry, Mapping)] if isinstance(listed, list) else []
    points = [_point(cost, _metrics(entry), original) for entry in entries]
    known = [p for p in [*points, _point(cost, original, original)] if _drawable(p)]
    bound = _bound(front, cost, original)
    numbers = {entry.get("trial") for entry in entries}
    grey = [(t.number, _point(cost, t.metrics, original)) for t in trials if t.number not in numbers]
    picture = _frame(known, bound, [point for _, point in grey if _drawable(point)])
    dots = [
        picture.dot(*point, _OTHER, f"trial {number}: {_where(point)}", radius=3)
        for number, point in grey
        if picture.holds(*point)
    ]
    outside = sum(_drawable(point) and not picture.holds(*point) for _, point in grey)
    if outside:
        corner = (picture.x_range[1], picture.y_range[0])
        dots.append(picture.label(*corner, f"trials not shown: {outside}", "#777777", "end"))
    dots += _bound_line(picture, bound)
    staircase = _staircase([point for point in points if _drawable(point)], picture.x_range[1])
    dots += [picture.line(staircase, _BORDER)] if staircase else []
    for entry, point in zip(entries, points, strict=True):
        if _drawable(point):
            dots += _whiskers(picture, cost, point, _metrics(entry))
            dots.append(picture.dot(*point, _FRONT, f"trial {entry.get('trial')}: {_where(point)}"))
    base = _point(cost, original, original)
    if _drawable(base):
        dots.append(picture.square(*base, _ORIGINAL, f"original: {_where(base)}"))
        dots.append(picture.label(*base, "original", _ORIGINAL, "end"))
    name, device = split_metric(cost.metric)
    x_name = f"{name}{f' on {device}' if device else ''}, relative to the original"
    texts = (lambda x: f"{x:.3g}x", lambda y: f"{100 * y:.4g} %")
    return drawing(picture, dots, "Accuracy against cost", x_name, "accuracy", *texts)


def history_svg(hypervolumes: Sequence[tuple[int, float]]) -> str:
    """Hypervolume against the number of trials evaluated, as an SVG document that stands alone."""
    counts = [float(count) for count, _ in hypervolumes] or [0.0, 1.0]
    values = [value for _, value in hypervolumes] or [0.0, 1.0]
    picture = Picture((0.0, max(counts[-1], 1.0)), (0.0, padded([0.0, *values], least=0.01)[1]))
    lines = [picture.line([(float(count), value) for count, value in hypervolumes], _FRONT)] if hypervolumes else []
    name = "hypervolume (1 - cost ratio by accuracy)"
    return drawing(picture, lines, "Search history", "trials", name, lambda x: f"{x:.4g}", lambda y: f"{y:.3g}")


def costs_of(front: Mapping[str, object]) -> list[Objective]:
    """The objectives of front.json that are costs, in their order; MACs where there is none."""
    objectives = front.get("objectives")
    names = [str(o.get("metric")) for o in objectives if isinstance(o, Mapping)] if isinstance(objectives, list) else []
    costs = [name for name in names if split_metric(name)[0] in METRIC_KEYS and goal_of(name) == "minimize"]
    return [Objective(name, "minimize") for name in costs or ["macs"]]


Point = tuple[float, float]


def _point(cost: Objective, metrics: Mapping[str, object], original: Mapping[str, object]) -> Point:
    return cost.ratio(metrics, original), _ACCURACY.value(metrics)


def _drawable(point: Point) -> bool:
    return all(math.isfinite(value) for value in point)


def _frame(known: Sequence[Point], bound: float | None, others: Sequence[Point]) -> Picture:
    """Axes that show the front well: the others may widen them, but a ruined network does not flatten the rest."""
    xs = [x for x, _ in known] + ([bound] if bound is not None else []) or [0.0, 1.0]
    ys = [y for _, y in known] or [0.0, 1.0]
    reach = max(0.02, max(ys) - min(ys))
    ys += [y for _, y in others if min(ys) - reach <= y <= max(ys) + reach]
    xs += [x for x, _ in others if x <= max(xs) + 0.1]
    return Picture((max(0.0, padded(xs, least=0.05)[0]), padded(xs, least=0.05)[1]), padded(ys, least=0.005))


def _bound(front: Mapping[str, object], cost: Objective, original: Mapping[str, object]) -> float | None:
    budget = front.get("budget")
    base = cost.value(original)
    for entry in budget if isinstance(budget, list) else []:
        if isinstance(entry, Mapping) and entry.get("metric") == cost.metric and _is_number(entry.get("bound")):
            return float(entry["bound"]) / base if base else None
    return None


def _bound_line(picture: Picture, bound: float | None) -> list[str]:
    if bound is None or math.isnan(bound):
        return []
    low, high = picture.y_range
    line = picture.line([(bound, low), (bound, high)], _BUDGET, dashed=True)
    return [line, picture.label(bound, low, "budget", _BUDGET)]


def _staircase(points: Sequence[Point], right: float) -> list[Point]:
    """The border of what the front dominates: at a cost, the best accuracy that is had for at most that much."""
    border: list[Point] = []
    for x, y in sorted(points):
        if not border or y > border[-1][1]:
            border += [(x, border[-1][1])] if border else []
            border.append((x, y))
    return [*border, (right, border[-1][1])] if border else []


def _whiskers(picture: Picture, cost: Objective, point: Point, metrics: Mapping[str, object]) -> list[str]:
    lines = []
    accuracy = metrics.get("accuracy_ci95")
    if _is_interval(accuracy):
        lines.append(picture.line([(point[0], accuracy[0]), (point[0], accuracy[1])], _FRONT, width=1))
    name, device = split_metric(cost.metric)
    by_device = metrics.get(METRIC_KEYS[name])
    entry = by_device.get(device) if isinstance(by_device, Mapping) else None
    interval = entry.get("ci95") if isinstance(entry, Mapping) else None
    value = cost.value(metrics)
    if _is_interval(interval) and value:
        # Around the ratio that is drawn, which may come from another measurement than the quotient of the medians.
        low, high = (point[0] * end / value for end in interval)
        lines.append(picture.line([(low, point[1]), (high, point[1])], _FRONT, width=1))
    return lines


def _is_interval(value: object) -> TypeGuard[list[float]]:
    return isinstance(value, list) and len(value) == 2 and all(_is_number(item) for item in value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _where(point: Point) -> str:
    return f"{100 * point[1]:.2f} % at {point[0]:.3f}x"


def _metrics(entry: object) -> Mapping[str, object]:
    metrics = entry.get("metrics") if isinstance(entry, Mapping) else None
    return metrics if isinstance(metrics, Mapping) else {}
