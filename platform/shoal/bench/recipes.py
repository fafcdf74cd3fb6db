"""`shoal bench recipes`: the table that compares recipes, out of the reports of their runs. Nothing is measured."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shoal.config import AUTO, FULL
from shoal.errors import DataError, UsageError
from shoal.recipes.baselines import RULE
from shoal.recipes.measure import ALONE, BOTH, EARNED, RULE_ALONE
from shoal.recipes.named import named
from shoal.recipes.run import INT8, OPEN, REPORT

HEAD = (
    "in wordings that nobody learned from", "a keyword rule", "from nothing, as served", "imported, as served",
    f"the served one, full depth: {ALONE}", RULE_ALONE, BOTH, "run",
)  # fmt: skip
NOT_RUN, NOT_KNOWN = "not run", "not known"
MODELS = (INT8, f"{OPEN} {INT8}")  # from nothing, and imported


def recipes_bench(runs: Sequence[Path]) -> None:
    """Print the table in Markdown, and its rows as a last line of JSON. Raises DataError for a folder without a report, and
    for one whose report does not have what the table says."""
    rows = [row for run in runs for row in rows_of(run)]
    print("\n".join(_line(row) for row in (HEAD, ["---"] * len(HEAD), *rows)))
    print(json.dumps([dict(zip(HEAD, row, strict=True)) for row in rows], ensure_ascii=False))


def rows_of(run: Path) -> list[list[str]]:
    """The rows of a run, a cell for each of `HEAD`: of each suite, and of tokens a second. Raises DataError."""
    try:
        report = json.loads((run / REPORT).read_text(encoding="utf-8"))
        if "headline" not in report:  # one of an earlier version
            recipe = named(str(report["recipe"]))
            report |= {"headline": recipe.headline, "depth": recipe.policy().depth}
        return [*_suites(report, run.name), _speeds(report, run.name)]
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"{run} has no report of a recipe", got=what, do="let shoal recipe finish there") from error


def _suites(report: Mapping[str, Any], name: str) -> Iterator[list[str]]:
    # a folder whose suites an earlier version froze has none of those that came later
    for suite, measures in (one for one in report["headline"] if one[0] in report["suites"]):
        by = report["suites"][suite]
        told = [f"{report['recipe']}, {suite}: {'; '.join(measures)}", _figures(by[RULE], measures)]
        for model in MODELS:
            served = f"{model} {AUTO}" if report["depth"] != FULL and f"{model} {AUTO}" in by else model
            told.append(_figures(by[served], measures) if served in by else NOT_RUN)
        earned = report.get("earned", {}).get(suite, {})  # one of an earlier version says nothing of it
        yield [*told, *(_figures(earned[who], measures) if who in earned else NOT_KNOWN for who in EARNED), name]


def _figures(figures: Mapping[str, Mapping[str, Any]], measures: Sequence[str]) -> str:
    told = [figures.get(measure) for measure in measures]
    return "; ".join("-" if one is None else f"{100 * one['value']:.0f} %" for one in told)


def _speeds(report: Mapping[str, Any], name: str) -> list[str]:
    told = [f"{report['recipe']}: MB; tokens a second at batch 1; 8", ""]
    for model in MODELS:
        cost = report["costs"].get(model)
        speeds = (f"{cost[f'tokens_per_s_{batch}']:,.0f}" for batch in (1, 8)) if cost else ()
        told.append("; ".join([f"{cost['bytes'] / 1e6:.1f}", *speeds]) if cost else NOT_RUN)
    return [*told, *[""] * len(EARNED), name]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
