"""Pages that Shoal writes: one HTML file each, without scripts or outside resources, all in one look.

``page.html`` holds the look, ``chart.html`` draws a chart; a page's own template extends the one and imports the other. All
text is escaped by the template engine, so a corpus or a model's answer cannot write markup into a page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from shoal.progress import duration

WIDTH, HEIGHT = 440, 200  # of a chart, in its own units
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 30  # margins for the labels
LETTER, LINE = 6.0, 11.0  # what a letter of a name takes of the width, and a name of the height
TICKS = 4  # wanted on an axis; there are up to half as many again
NOTHING = "\N{EN DASH}"  # stands for a value that there is none of

Point = tuple[float, float]


@dataclass(frozen=True)
class Mark:
    """A point of a chart with its name, whose baseline starts at (`left`, `base`)."""

    x: float
    y: float
    name: str
    left: float
    base: float

    def covers(self, other: Mark) -> bool:
        """Do the two names lie over each other?"""
        apart = self.left >= other.left + other.wide or other.left >= self.left + self.wide
        return not apart and abs(self.base - other.base) < LINE

    @property
    def wide(self) -> float:
        return LETTER * len(self.name)


@dataclass(frozen=True)
class Line:
    """A curve in a chart: its `points` in the chart's units as an SVG attribute, and named marks on it."""

    name: str
    points: str
    kind: str = "line"  # line, faint (the raw values under a smoothed line), marks (no line)
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Chart:
    """A plot with its curves and ticks, all in its own units; the template needs the frame as well."""

    title: str
    x_label: str
    lines: Sequence[Line]
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    bottom: int = HEIGHT - BOTTOM


def write(template: Path, out_html: Path, **values: Any) -> None:
    """Write the page of `template`; ``r`` of `values` holds its title, among others."""
    folders = [template.parent, Path(__file__).parent]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folders), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration, "seen": _shown_image}
    page = environment.get_template(template.name).render(**values)
    out_html.parent.mkdir(parents=True, exist_ok=True)
    out_html.write_text(page, encoding="utf-8")


def number(value: object, unit: str = "") -> str:
    """A value as people read it; a dash where there is none."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return NOTHING if value is None else str(value)
    if not math.isfinite(value):
        return NOTHING
    match unit:
        case "share":
            return f"{value:.1%}"
        case "bytes":
            return f"{value / 1e6:,.2f} MB"
        case "tokens/s" | "count":
            return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def chart(
    title: str,
    x_label: str,
    curves: Mapping[str, tuple[str, Sequence[Point]]],
    names: Mapping[Point, str] | None = None,
) -> Chart:
    """A chart of `curves`, name -> (kind, points); the points in `names` get a mark with their name."""
    every = [point for _, points in curves.values() for point in points]
    x_low, x_high = _span(x for x, _ in every)
    y_low, y_high = _span((y for _, y in every), room=0.06)

    def at(point: Point) -> Point:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - (point[1] - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    lines, placed = [], list[Mark]()
    for name, (kind, points) in curves.items():
        places = [at(point) for point in points]
        marks = [_mark(at(point), names[point], placed) for point in points if names and point in names]
        lines.append(Line(name, " ".join(f"{x},{y}" for x, y in places), kind, marks))
    return Chart(
        title,
        x_label,
        lines,
        [(at((x, y_low))[0], f"{x:g}") for x in ticks(x_low, x_high)],
        [(at((x_low, y))[1], f"{y:g}") for y in ticks(y_low, y_high)],
    )


def _mark(at: Point, name: str, placed: list[Mark]) -> Mark:
    """`name` beside the point `at`, in the frame, above unless a name of those `placed` is there; it becomes one of them."""
    x, y = at
    wide = LETTER * len(name)
    sides = [left for left in (x + 6, x - 6 - wide) if LEFT <= left <= WIDTH - RIGHT - wide] or [x + 6]
    tried = [Mark(x, y, name, left, base) for base in (y - 7, y + 16) for left in sides]
    found = next((mark for mark in tried if not any(map(mark.covers, placed))), tried[0])
    placed.append(found)
    return found


def ticks(low: float, high: float) -> list[float]:
    """Round numbers within `low` and `high`, about `TICKS` of them."""
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(n * step, digits) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _span(values: Iterable[float], room: float = 0.0) -> Point:
    every = list(values)
    low, high = min(every), max(every)
    if high <= low:  # a flat curve runs through the middle
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    return low - room * (high - low), high + room * (high - low)


def _shown_image(url: object) -> str:
    """`url` if it carries an image in itself; the page must fetch nothing."""
    return url if isinstance(url, str) and url.startswith("data:image/") else ""
