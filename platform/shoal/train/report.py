"""The report page: one HTML file without scripts or outside resources, drawn from the report's plain values.

What the page shows is decided in ``report.html``; here are the numbers' formats and the geometry of its charts. All text is
escaped by the template engine, so a corpus or a model's answer cannot write markup into the page.
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
SMOOTHED = 25  # independent stretches of a curve that are left when it is smoothed
TICKS = 4  # wanted on an axis; there are up to half as many again
NOTHING = "\N{EN DASH}"  # stands for a value that there is none of
LOWER_IS_BETTER = ("bits/byte", "MSE", "bytes")  # units

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve in a chart: its `points` in the chart's units as an SVG attribute, and labelled marks on it."""

    name: str
    points: str
    kind: str = "line"  # line, faint (the raw values under a smoothed line), marks (no line)
    marks: Sequence[tuple[float, float, str]] = ()


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


def render(report: Mapping[str, Any], out_html: Path) -> None:
    """Write the page of `report` (see `shoal.evaluation` and `shoal.quickstart` for its keys; what is missing is left out)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "duration": duration, "seen": _shown_image}
    stages = [{**stage, "charts": stage_charts(stage)} for stage in report.get("stages", ())]
    depth = report.get("depth") or {}
    page = environment.get_template("report.html").render(
        r=report,
        stages=stages,
        quality=quality_rows(report.get("quality") or {}),
        facts=headline(report),
        depth_charts=depth_charts(depth.get("rows", ())),
        sources=source_rows(report.get("corpus") or {}),
    )
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


def headline(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The few facts at the top, as (value, what it is)."""
    facts = []
    stages = report.get("stages") or ()
    if stages:
        facts.append((duration(sum(s["seconds"] for s in stages)), "of training"))
        facts.append((number(sum(s["tokens"] for s in stages), "count"), "tokens trained on"))
    quality = report.get("quality") or {}
    columns, rows = quality.get("columns", []), {row["metric"]: row for row in quality.get("rows", ())}
    if len(columns) >= 2:
        first, last = columns[0], columns[-1]
        for metric, what, inverse in (("weight file", "smaller", True), ("decode, batch 8", "as fast", False)):
            if metric in rows:
                a, b = (rows[metric]["values"][label] for label in (first, last))
                if a and b:
                    facts.append(
                        (f"{a / b if inverse else b / a:.2f}\N{MULTIPLICATION SIGN}", f"{what}: {last} beside {first}")
                    )
    if "bpb text" in rows:
        facts.append((number(rows["bpb text"]["values"][columns[-1]]), f"bits a byte of held-out text, {columns[-1]}"))
    return facts


def quality_rows(quality: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the quality table with, for each value, its share of the row's largest: the length of its bar."""
    rows = []
    for row in quality.get("rows", ()):
        values = [*row["values"].values(), *row["beside"].values()]
        largest = max((v for v in values if _finite(v)), default=0.0) or 1.0
        bars = {label: 100 * v / largest if _finite(v) else 0.0 for label, v in row["values"].items()}
        rows.append({**row, "bars": bars, "arrow": "↓" if row["unit"] in LOWER_IS_BETTER else "↑"})
    return rows


def source_rows(corpus: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The corpus table: one row a source, largest first."""
    rows = []
    for name, source in (corpus.get("sources") or {}).items():
        documents = source["documents"]
        rows.append({
            "name": name,
            "license": ", ".join(source["licenses"]),
            "documents": sum(documents.values()),
            "heldout": documents["heldout"],
            "tokens": source["tokens"],
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["tokens"])


def stage_charts(stage: Mapping[str, Any]) -> list[Chart]:
    """Loss and bits a byte of one training run over its updates, as trained on and as held out."""
    charts = []
    for key, title in (("loss", "training loss, nats a target"), ("bpb", "training bits a byte, full depth")):
        points = [(float(m["step"]), m[key]) for m in stage.get("metrics", ()) if _finite(m.get(key))]
        if len(points) >= 2:
            charts.append(chart(title, "update", {"raw": ("faint", points), "smoothed": ("line", _smooth(points))}))
    measured = stage.get("heldout", ())
    for modality in ("text", "code"):
        points = [(float(m["step"]), m[modality]) for m in measured if _finite(m.get(modality))]
        if len(points) >= 2:
            title = f"held-out {modality}, bits a byte, full depth"
            charts.append(chart(title, "update", {"line": ("line", points), "measured": ("marks", points)}))
    return charts


def depth_charts(rows: Iterable[Mapping[str, Any]]) -> list[Chart]:
    """Quality against compute: the fixed exits joined by a line, the router's own choice as a mark beside it."""
    charts = []
    for key, title in (
        ("bpb text", "held-out text, bits a byte ↓"),
        ("vqa", "image questions, exact match ↑"),
        ("bleu", "summarisation, BLEU ↑"),
    ):
        found = [(float(row["flops_share"]), row[key], row["exit"]) for row in rows if _finite(row.get(key))]
        fixed = [point for point in found if point[2] != "auto"]
        if len(fixed) >= 2:
            curves = {
                "fixed depth": ("line", [p[:2] for p in fixed]),
                "router": ("marks", [p[:2] for p in found if p[2] == "auto"]),
            }
            charts.append(chart(title, "share of the FLOPs at full depth", curves, {p[:2]: p[2] for p in found}))
    return charts


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

    lines = []
    for name, (kind, points) in curves.items():
        places = [at(point) for point in points]
        marks = [(*at(point), names[point]) for point in points if names and point in names]
        lines.append(Line(name, " ".join(f"{x},{y}" for x, y in places), kind, marks))
    return Chart(
        title,
        x_label,
        lines,
        [(at((x, y_low))[0], f"{x:g}") for x in ticks(x_low, x_high)],
        [(at((x_low, y))[1], f"{y:g}") for y in ticks(y_low, y_high)],
    )


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


def _smooth(points: Sequence[Point]) -> list[Point]:
    """Running average, without the pull to zero at the start."""
    memory = 1 - min(1.0, SMOOTHED / len(points))
    total = weight = 0.0
    out = []
    for x, y in points:
        total, weight = memory * total + y, memory * weight + 1
        out.append((x, total / weight))
    return out


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown_image(url: object) -> str:
    """`url` if it carries an image in itself; the page must fetch nothing."""
    return url if isinstance(url, str) and url.startswith("data:image/") else ""
