"""`shoal bench recipes`: the tables that compare recipes, out of the reports of their runs. Nothing is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.baselines import RULE
from recipes.measure import EARNED
from recipes.named import named
from recipes.run import INT8, OPEN, REPORT
from shoal.config import AUTO, FULL
from shoal.errors import DataError, UsageError

HEAD = ("in wordings that nobody learned from", "a keyword rule", "from nothing", "imported", "run")
WHOSE = ("who earned it, of the served model at full depth", *EARNED, "run")
NOT_RUN, NOT_KNOWN = "not run", "not known"
MODELS = (INT8, f"{OPEN} {INT8}")  # from nothing, and imported


def recipes_bench(runs: Sequence[Path]) -> None:
    """Print the tables in Markdown, and their rows as a last line of JSON. Raises DataError for a folder without a report, and
    for one whose report does not have what the tables say."""
    every = []
    for head, of in ((HEAD, rows_of), (WHOSE, earned_of)):
        rows = [row for run in runs for row in of(run)]
        print("\n".join(_line(row) for row in (head, ["---"] * len(head), *rows)) + "\n")
        every += [dict(zip(head, row, strict=True)) for row in rows]
    print(json.dumps(every, ensure_ascii=False))


def rows_of(run: Path) -> list[list[str]]:
    """The rows of a run, a cell for each of `HEAD`: of each suite, and of tokens a second. Raises DataError."""
    report = _report(run)
    try:
        return [*_suites(report, run.name), _speeds(report, run.name)]
    except (ValueError, KeyError, TypeError) as error:
        raise _no_report(run, error) from error


def _report(run: Path) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads((run / REPORT).read_text(encoding="utf-8"))
        if "headline" not in report:  # one of an earlier version
            recipe = named(str(report["recipe"]))
            report |= {"headline": recipe.headline, "depth": recipe.policy().depth}
        return report
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise _no_report(run, error) from error


def _no_report(run: Path, error: Exception) -> DataError:
    what = f"{type(error).__name__}: {error}"
    return DataError(f"{run} has no report of a recipe", got=what, do="let shoal recipe finish there")


def _suites(report: Mapping[str, Any], name: str) -> Iterator[list[str]]:
    # a folder whose suites an earlier version froze has none of those that came later
    for suite, measures in (one for one in report["headline"] if one[0] in report["suites"]):
        by = report["suites"][suite]
        told = [f"{report['recipe']}, {suite}: {'; '.join(measures)}", _figures(by[RULE], measures)]
        for model in MODELS:
            served = f"{model} {AUTO}" if report["depth"] != FULL and f"{model} {AUTO}" in by else model
            told.append(_figures(by[served], measures) if served in by else NOT_RUN)
        yield [*told, name]


def earned_of(run: Path) -> list[list[str]]:
    """The rows of a run, a cell for each of `WHOSE`; one of an earlier version says nothing of it. Raises DataError."""
    report, found = _report(run), []
    for suite, measures in report["headline"]:
        if suite in report["suites"]:
            by = report.get("earned", {}).get(suite, {})
            cells = (_figures(by[who], measures) if who in by else NOT_KNOWN for who in EARNED)
            found.append([f"{report['recipe']}, {suite}: {'; '.join(measures)}", *cells, run.name])
    return found


def _figures(figures: Mapping[str, Mapping[str, Any]], measures: Sequence[str]) -> str:
    told = [figures.get(measure) for measure in measures]
    return "; ".join("-" if one is None else f"{100 * one['value']:.0f} %" for one in told)


def _speeds(report: Mapping[str, Any], name: str) -> list[str]:
    told = [f"{report['recipe']}: MB; tokens a second at batch 1; 8", ""]
    for model in MODELS:
        cost = report["costs"].get(model)
        speeds = (f"{cost[f'tokens_per_s_{batch}']:,.0f}" for batch in (1, 8)) if cost else ()
        told.append("; ".join([f"{cost['bytes'] / 1e6:.1f}", *speeds]) if cost else NOT_RUN)
    return [*told, name]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
