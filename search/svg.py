"""Small pictures as SVG text: axes, points, lines. Everything that is text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 20, 20, 56
_FONT = 'font-family="system-ui, sans-serif" font-size="13"'

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Picture:
    """A plot's frame: what its axes span. Methods return SVG elements for points given in the axes' units."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        """Pixels from the left."""
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """Pixels from the top."""
        low, high = self.y_range
        return HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)

    def holds(self, x: float, y: float) -> bool:
        """Whether a point lies inside the axes; a NaN does not."""
        return self.x_range[0] <= x <= self.x_range[1] and self.y_range[0] <= y <= self.y_range[1]

    def dot(self, x: float, y: float, colour: str, title: str, radius: float = 4.5) -> str:
        """A point that shows its title under the pointer."""
        place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{radius}"'
        return f'<circle {place} fill="{escape(colour)}"><title>{escape(title)}</title></circle>'

    def square(self, x: float, y: float, colour: str, title: str) -> str:
        """A square point that shows its title under the pointer."""
        place = f'x="{self.x(x) - 5:.1f}" y="{self.y(y) - 5:.1f}" width="10" height="10"'
        return f'<rect {place} fill="{escape(colour)}"><title>{escape(title)}</title></rect>'

    def line(self, points: Points, colour: str, dashed: bool = False, width: float = 1.5) -> str:
        """A line through points; what lies outside the axes is drawn at their edge."""
        text = " ".join(f"{self.x(self._inside(x, 0)):.1f},{self.y(self._inside(y, 1)):.1f}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        return f'<polyline points="{text}" fill="none" stroke="{escape(colour)}" stroke-width="{width}"{dash}/>'

    def label(self, x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
        """A text whose baseline begins (or ends) near a point."""
        place = f'x="{self.x(x) + (6 if anchor == "start" else -6):.1f}" y="{self.y(y) - 6:.1f}" text-anchor="{anchor}"'
        return f'<text {place} fill="{escape(colour)}" {_FONT}>{escape(text)}</text>'

    def _inside(self, value: float, axis: int) -> float:
        low, high = (self.x_range, self.y_range)[axis]
        return min(max(value, low), high)


def drawing(
    picture: Picture,
    elements: Sequence[str],
    title: str,
    x_name: str,
    y_name: str,
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> str:
    """A whole SVG document with axes; stands alone and inside a page.

    Args:
        elements: What the picture's methods returned.
        x_text, y_text: Write a tick's value.
    """
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" width="100%" '
        f'style="max-width:{WIDTH}px"><title>{escape(title)}</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
    for value in ticks(*picture.x_range):
        place = f"{picture.x(value):.1f}"
        parts.append(f'<line x1="{place}" y1="{_TOP}" x2="{place}" y2="{bottom}" stroke="#e6e6e6"/>')
        parts.append(_text(place, bottom + 18, x_text(value), "middle"))
    for value in ticks(*picture.y_range):
        place = f"{picture.y(value):.1f}"
        parts.append(f'<line x1="{_LEFT}" y1="{place}" x2="{right}" y2="{place}" stroke="#e6e6e6"/>')
        parts.append(_text(_LEFT - 8, float(place) + 4, y_text(value), "end"))
    parts.append(f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#555555"/>')
    parts.append(_text((_LEFT + right) / 2, HEIGHT - 14, x_name, "middle"))
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle" fill="#333333" {_FONT}>'
        f"{escape(y_name)}</text>"
    )
    return "\n".join([*parts, *elements, "</svg>"])


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within a range, about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((power * factor for factor in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], share: float = 0.08, least: float = 1e-6) -> tuple[float, float]:
    """The range of values with a margin; never empty."""
    low, high = min(values), max(values)
    margin = max((high - low) * share, least)
    return low - margin, high + margin


def _text(x: float | str, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y:.1f}" text-anchor="{anchor}" fill="#333333" {_FONT}>{escape(text)}</text>'
