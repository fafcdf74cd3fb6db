"""The report page, drawn from the report's plain values.

What the page shows is decided in ``report.html``; here are its tables and charts, in `shoal.page` their look.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.evaluate.intervals import few
from shoal.machine import write_aside
from shoal.page import Chart, Point, chart, number, write
from shoal.progress import duration

SMOOTHED = 25  # independent stretches of a curve that are left when it is smoothed
LOWER_IS_BETTER = ("bits/byte", "MSE", "bytes")  # units


def write_report(path: Path, report: dict[str, Any]) -> None:
    """``report.json`` and beside it ``report.html``; the JSON last, since its presence means complete."""
    report = {"created": time.strftime("%Y-%m-%d %H:%M"), **report}
    render(report, path.with_suffix(".html"))
    write_aside(path, json.dumps(report, indent=1, default=str) + "\n")


def render(report: Mapping[str, Any], out_html: Path) -> None:
    """Write the page of `report` (see `evaluation` and `shoal.quickstart` for its keys; what is missing is left out)."""
    stages = [{**stage, "charts": stage_charts(stage)} for stage in report.get("stages", ())]
    depth = report.get("depth") or {}
    write(
        Path(__file__).with_name("report.html"),
        out_html,
        r=report,
        stages=stages,
        quality=quality_rows(report.get("quality") or {}),
        facts=headline(report),
        depth_charts=depth_charts(depth.get("rows", ())),
        frontier_chart=frontier_chart(report.get("frontier") or {}),
        sources=source_rows(report.get("corpus") or {}),
        few=few,
    )


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


def frontier_chart(found: Mapping[str, Any]) -> Chart | None:
    """Gap against compute by policy, with the router's intervals; None when it was not measured."""
    if not found:
        return None
    fixed = [(row["flops_share"], row["gap"]) for row in found["fixed"]]
    names: dict[Point, str] = {point: row["exit"] for point, row in zip(fixed, found["fixed"], strict=True)}
    curves: dict[str, tuple[str, list[Point]]] = {"fixed depth": ("marks", fixed)}
    for place, (name, points) in enumerate(found["curves"].items()):
        drawn = [(point["flops_share"], point["gap"]) for point in points]
        curves[name] = ({"router": "line", "oracle": "dash"}.get(name, "faint"), drawn)
        inner = drawn[1:-1] if name != "random" else []  # the line between the fixed exits needs no name
        if inner:  # the labels of curves that lie close together stand at different places
            names[inner[(place + 1) * len(inner) // (len(found["curves"]) + 1)]] = name
    for row in found["at"]["router"] if found["at"]["router"][0]["low"] is not None else []:
        curves[f"95 % at {row['flops_share']}"] = ("faint", [(row["flops_share"], row[end]) for end in ("low", "high")])
    return chart(
        "gap, nats a token above full depth \N{DOWNWARDS ARROW}", "share of the FLOPs at full depth", curves, names
    )


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
