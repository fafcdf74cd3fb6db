"""The page: everything escaped, nothing fetched, honest charts."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import page
from shoal.evaluate import report

EVIL = '"><script>alert(1)</script>'
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def stage(name: str, losses: list[float | None]) -> dict[str, Any]:
    curve = [{"step": i, "loss": loss, "bpb": None, "lr": 1e-3, "tokens_per_s": 1.0} for i, loss in enumerate(losses)]
    return {"name": name, "seconds": 61.0, "tokens": 1000, "metrics": curve}


def full() -> dict[str, Any]:
    row = {"metric": "bpb text", "unit": "bits/byte", "values": {"fp32": 2.0, "int8": 2.1}, "beside": {"gzip": 3.0}}
    exits = [
        {"exit": name, "layers": layers, "flops_share": layers / 8, "bpb text": bpb, "bpb code": None, "vqa": 0.5,
         "bleu": layers / 2, "tokens_per_s": 900.0}
        for name, layers, bpb in (("shallow", 2, 2.6), ("middle", 4, 2.3), ("full", 8, 2.0), ("auto", 5, None))
    ]  # fmt: skip
    sample = {"kind": "image", "question": EVIL, "image": PIXEL, "reference": EVIL, "answer": EVIL, "depth": EVIL,
              "tokens_per_s": 3.0}  # fmt: skip
    lost = {
        "depth_share": 0.625, "loss": 0.0123, "loss_interval": [0.0101, 0.0222], "above": 0.1, "above_interval": [0.05, 0.2],
    }  # fmt: skip
    return {
        "title": f"Run {EVIL}",
        "created": "2026-01-01",
        "machine": {"cpu": EVIL, "cores": 2},
        "weak": [f"BLEU is low {EVIL}"],
        "quality": {"columns": ["fp32", "int8"], "rows": [{**row, "note": EVIL}]},
        "depth": {"rows": exits},
        "tolerance": {
            "tolerance": 0.05,
            "by_task": [{**lost, "task": EVIL, "prompts": 31, "groups": 7}],
            "by_tolerance": [{**lost, "tolerance": 0.05}],
            "by_budget": [{"budget": 0.35, "depth_share": 0.349, "loss": 0.0456, "loss_interval": [0.0321, 0.0654]}],
        },
        "gates": [{"layer": 0, "gamma": [0.7, 0.25]}],
        "stages": [stage(f"pretrain {EVIL}", [5.0, 4.0, 3.0])],
        "samples": [sample, {**sample, "image": "https://example.org/x.png"}],
        "corpus": {
            "sources": {f"docs {EVIL}": {"licenses": [EVIL], "documents": {"train": 5, "heldout": 1}, "tokens": 70}},
            "drops": {"clean": {EVIL: 3}},
            "mix": {"text": 1.0},
        },
    }


def rendered(values: dict[str, Any], folder: Path) -> str:
    report.render(values, folder / "new" / "report.html")
    return (folder / "new" / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Tags and what they refer to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action")]


def test_no_markup_comes_out_of_the_data(tmp_path: Path) -> None:
    text = rendered(full(), tmp_path)
    assert "script" not in Page(text).tags and text.count("alert(1)") == text.count("&lt;script&gt;alert(1)") > 8


def test_the_page_fetches_nothing(tmp_path: Path) -> None:
    text = rendered(full(), tmp_path)
    assert Page(text).links == [PIXEL], "an image that a sample brings along, and none that lies elsewhere"
    assert "@import" not in text and "url(" not in text


def test_numbers_and_baselines_are_shown(tmp_path: Path) -> None:
    text = re.sub(r"\s+", " ", rendered(full(), tmp_path))
    for shown in ("2.000", "2.100", "gzip 3.000", "62.5%", "0.70", "1 min 01 s", "pretrain", "0.012", "34.9%", "0.046"):
        assert shown in text
    for interval in ("0.010 to 0.022", "5.0% to 20.0%", "0.032 to 0.065"):
        assert interval in text
    assert text.count("<polyline") == 5, "a raw and a smoothed loss, and three measures by depth"


def test_a_report_of_an_evaluation_alone(tmp_path: Path) -> None:
    text = rendered({"title": "Two models", "corpus": {}, "stages": []}, tmp_path)
    assert "Two models" in text and "Training" not in text and "Corpus" not in text


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.123, "share", "12.3%"), (4_100_000.0, "bytes", "4.10 MB"), (1234.6, "tokens/s", "1,235"), (2.5, "", "2.500"),
        (1234, "", "1,234"), (None, "share", "\N{EN DASH}"), (math.nan, "", "\N{EN DASH}"), (math.inf, "", "\N{EN DASH}"),
        ("x86", "", "x86"),
    ],
)  # fmt: skip
def test_numbers(value: object, unit: str, text: str) -> None:
    assert page.number(value, unit) == text


def test_a_chart_keeps_its_points_in_order_and_in_its_frame() -> None:
    chart = page.chart("t", "x", {"a": ("line", [(0.0, 5.0), (10.0, 1.0)])})
    (x0, y0), (x1, y1) = (tuple(map(float, pair.split(","))) for pair in chart.lines[0].points.split())
    assert (x0, x1) == (chart.left, chart.right)
    assert page.TOP <= y0 < y1 <= chart.bottom, "larger values are higher up"
    labels = [float(label) for _, label in chart.y_ticks]
    assert labels == sorted(labels) and all(0.5 <= label <= 5.5 for label in labels)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=2, unique=True))
def test_two_names_in_a_chart_lie_in_its_frame_and_not_over_each_other(points: list[page.Point]) -> None:
    names = dict(zip(points, ("middle", "router"), strict=True))
    frame = [(-0.01, -0.01), (1.01, 1.01)]
    curves = {"frame": ("line", frame), "a": ("marks", points[:1]), "b": ("marks", points[1:])}
    (one, other) = [mark for line in page.chart("t", "x", curves, names).lines for mark in line.marks]
    assert not one.covers(other) and not other.covers(one)
    for mark in (one, other):
        assert page.LEFT <= mark.left <= page.WIDTH - page.RIGHT - mark.wide
        assert 0 < mark.base < page.HEIGHT


@pytest.mark.parametrize("points", [[(0.0, 2.0), (1.0, 2.0)], [(3.0, 0.0), (3.0, 1.0)]])
def test_flat_curves_are_drawn(points: list[tuple[float, float]]) -> None:
    chart = page.chart("t", "x", {"a": ("line", points)})
    assert "nan" not in chart.lines[0].points and chart.y_ticks
