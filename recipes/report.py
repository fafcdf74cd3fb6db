"""A recipe's report for people: the same tables on the terminal and in report.md. Its first lines say what is weak."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recipes.recipe import CALIBRATION, Recipe
from shoal.evaluate.intervals import between

_TAKEN = [
    "model", "weights, MB", "tokens/s, batch 1", "tokens/s, batch 8", "folder, MB", "served by --no-ray: resident, MB",
    "ready, s",
]  # fmt: skip


def show(recipe: Recipe, report: Mapping[str, Any], console: Console) -> None:
    for sentence in (*report["weak"], *report["notes"], *_took(report)):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    for title, head, rows in _tables(recipe, report):
        table = Table(title=Text(title, style="table.title"))
        for at, name in enumerate(head):
            table.add_column(name, justify="right" if at else "left")
        for row in rows:
            table.add_row(*map(Text, row))  # names are a user's own, and no markup
        console.print(table)


def markdown(recipe: Recipe, report: Mapping[str, Any]) -> str:
    """The page report.md."""
    lines = [f"# {recipe.name}: {recipe.told}", "", *(f"- {sentence}" for sentence in report["weak"])]
    lines += [
        "",
        "Synthetic data, made by template. Shares with their 95 % intervals over groups of what is not independent.",
    ]
    lines += ["", *report["notes"], *_took(report)]
    for title, head, rows in _tables(recipe, report):
        lines += ["", f"## {title}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    if report["examples"]:
        lines += ["", "## The examples, with what the served model says at full depth, good or bad", ""]
        lines += [f"- {_quoted(one['asked'])} → {_quoted(one['answered'])}" for one in report["examples"]]
    lines += ["", "## Some answers, good or bad", ""]
    for one in report["samples"]:
        lines += [f"- ({one['suite']}) {_quoted(one['asked'])} → {_quoted(one['answered'])}"]
    return "\n".join(lines) + "\n"


def _took(report: Mapping[str, Any]) -> list[str]:
    """A sentence on how long it took from an empty folder, or from where it was broken off."""
    steps: Mapping[str, float] = report.get("seconds", {})
    each = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in steps.items())
    if not steps:
        return []
    if broken := report.get("broken_off"):
        return [f"{each}. {', '.join(broken)}: broken off and gone on with, and what was before that is in no figure."]
    return [f"From an empty folder to this page in {sum(steps.values()) / 60:.1f} minutes: {each}."]


def _tables(recipe: Recipe, report: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of each table."""
    for suite, by in report["suites"].items():
        rows, groups = report["rows"][suite]
        yield _by_measure(f"{suite}: {rows} answers of {groups} groups", _measures(recipe), by)
        if earned := report.get("earned", {}).get(suite):
            yield _by_measure(f"{suite}: who earned it, of the served model at full depth", recipe.measures, earned)
    if spoken := report.get("languages"):
        kept = [name for name in recipe.measures if any(name in row for row in spoken)]
        yield (
            "by language",
            ["suite", "who", "language", "answers", *kept],
            [
                [row["suite"], row["who"], row["language"], str(row["rows"]), *(_shown(row.get(name)) for name in kept)]
                for row in spoken
            ],
        )
    columns = [name for name in _measures(recipe) if any(name in row for row in report["depths"])]
    yield (
        "by depth",
        ["suite", "model", "depth", "layers", "router's choice", *columns],
        [
            [
                row["suite"],
                row["model"],
                row["depth"],
                f"{row['layers']:.0%}",
                ", ".join(f"{exit} {share:.0%}" for exit, share in row.get("chosen", {}).items()) or "-",
                *(_value(row.get(name)) for name in columns),
            ]
            for row in report["depths"]
        ],
    )
    if report["workloads"]:
        depths = [*report["workloads"][0]["depths"]]
        yield (
            f"which depth to pick: {recipe.served} of the served model (policy.yaml has the picks)",
            ["workload", "answers", *depths, "layers at auto", "pick"],
            [
                [
                    row["workload"],
                    str(row["rows"]),
                    *(_shown({"value": row["depths"][d], "interval": row.get("intervals", {}).get(d)}) for d in depths),
                    f"{row['auto_layers']:.0%}" if row["auto_layers"] else "no router",
                    row["pick"] or "none serves",
                ]
                for row in report["workloads"]
            ],
        )
    yield "what it takes", _TAKEN, [_taken(label, one) for label, one in report["costs"].items()]


def _by_measure(
    title: str, measures: Sequence[str], by: Mapping[str, Mapping[str, Any]]
) -> tuple[str, list[str], list[list[str]]]:
    """A row for each measure that there is, a column for each of `by`."""
    kept = [name for name in measures if any(name in figures for figures in by.values())]
    return title, ["measure", *by], [[name, *(_shown(of.get(name)) for of in by.values())] for name in kept]


def _taken(label: str, cost: Mapping[str, Any]) -> list[str]:
    """A row of what a model takes; its folder served is not known of one that could not be served."""
    alone = cost["served"]
    return [
        label, f"{cost['bytes'] / 1e6:.2f}", f"{cost['tokens_per_s_1']:,.0f}", f"{cost['tokens_per_s_8']:,.0f}",
        *(
            [f"{alone['disk_bytes'] / 1e6:.1f}", f"{alone['resident_bytes'] / 1e6:.0f}", f"{alone['ready_s']:.1f}"]
            if "ready_s" in alone
            else [alone["failed"], "-", "-"]
        ),
    ]  # fmt: skip


def _measures(recipe: Recipe) -> tuple[str, ...]:
    return (*recipe.measures, CALIBRATION)


def _shown(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    ends = figure["interval"]
    return _value(figure) + f" ({between(ends and [100 * end for end in ends], '.0f', figure.get('groups'))})"


def _value(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None else f"{100 * figure['value']:.1f}"


def _cell(text: str) -> str:
    """In one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _quoted(text: str) -> str:
    """In one line of a list."""
    return f"`{text.replace('`', chr(39)).replace(chr(10), ' / ')}`"
