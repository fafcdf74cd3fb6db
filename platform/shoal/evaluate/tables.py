"""The report in a terminal: its tables, and what is weak, in plain words."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoal.evaluate import int8_cost
from shoal.evaluate.intervals import few


def print_tables(report: dict[str, Any], console: Console) -> None:
    """The quality table, the depth table, how held-out quality came about, and what is weak, in plain words."""
    labels = report["quality"]["columns"]
    table = Table("held-out [95 %]", "unit", "n / documents", *labels, box=SIMPLE_HEAD, pad_edge=False)
    for row in report["quality"]["rows"]:
        values = [_with_interval(row, label) for label in labels]
        count = f"{row['rows']:,} / {row['groups']:,}" if "rows" in row else ""
        table.add_row(row["metric"], row["unit"], count, *values)
    console.print(table)
    for row in report["quality"]["rows"]:
        if row["beside"]:
            rivals = ", ".join(f"{name} {_number(value, row['unit'])}" for name, value in row["beside"].items())
            _say(console, f"beside {row['metric']}: {rivals}")
    columns = {"FLOPs by tokens": "flops_share", "bpb text": "bpb text", "bpb code": "bpb code", "vqa": "vqa", "BLEU": "bleu",
               "tok/s": "tokens_per_s"}  # fmt: skip
    table = Table(f"depth ({labels[-1]})", "layers", *columns, box=SIMPLE_HEAD, pad_edge=False)
    units = {"flops_share": "share", "vqa": "share", "tokens_per_s": "tokens/s"}
    for row in report["depth"]["rows"]:
        cells = ["" if row[key] is None else _number(row[key], units.get(key, "")) for key in columns.values()]
        table.add_row(row["exit"], f"{row['layers']:g}", *cells)
    console.print(table)
    for stage in report.get("stages", ())[:1]:
        for modality in ("text", "code"):
            values = [f"{measured[modality]:.2f}" for measured in stage["heldout"] if modality in measured]
            _say(console, f"held-out bpb of {modality} in {stage['name']}: {' > '.join(values[-8:])}")
    if kept := report.get("tolerance"):
        said = [f"{row['task']} {row['loss']:.3f} (n = {row['prompts']})" for row in kept["by_task"]]
        _say(console, f"lost at the tolerance {kept['tolerance']:g}, mean, nats a token: {'  '.join(said)}")
    if tax := report.get("exit_tax"):
        said = [f"{r['modality']} {r['with']:.3f} / {r['without']:.3f} ({r['tax']:+.1%})" for r in tax["rows"]]
        _say(console, f"exit tax, held-out bpb with / without early exits at step {tax['step']}: {'  '.join(said)}")
    for row in report.get("int8", ()):
        _say(console, f"INT8, held-out bpb: {int8_cost.said(row)}")
    for sentence in report["weak"]:
        _say(console, f"weak: {sentence}")


def _with_interval(row: dict[str, Any], label: str) -> str:
    value, intervals = _number(row["values"][label], row["unit"]), row.get("intervals", {})
    if label not in intervals:
        return value
    ends = intervals[label]
    said = " to ".join(_number(end, row["unit"]) for end in ends) if ends else few(row["groups"])
    return f"{value} [{said}]"


def _number(value: float, unit: str) -> str:
    return {"share": f"{value:.1%}", "bytes": f"{value:,.0f}", "tokens/s": f"{value:,.0f}"}.get(unit, f"{value:.3f}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
