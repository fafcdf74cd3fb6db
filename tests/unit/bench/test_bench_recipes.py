"""The table that compares recipes says what their reports say, of what is served; the page's table has its columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.recipes import HEAD, NOT_KNOWN, NOT_RUN, WHOSE
from recipes.named import named, names
from shoal import cli


def shares(**values: float) -> dict[str, Any]:
    return {
        name.replace("_", " "): {"value": value, "interval": [0.0, 1.0], "rows": 9} for name, value in values.items()
    }


def report(folder: Path, recipe: str, suites: dict[str, Any], **costs: float) -> str:
    folder.mkdir()
    told = {
        label.replace("_", " "): {"bytes": size, "tokens_per_s_1": 1850, "tokens_per_s_8": 8400.4}
        for label, size in costs.items()
    }
    (folder / "report.json").write_text(json.dumps({"recipe": recipe, "suites": suites, "costs": told}))
    return str(folder)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def test_the_table_is_of_what_is_served_in_new_wordings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the policy's depth: the router's of customer service, full of medicine; imported weights have none."""
    shop = {
        "keyword rule": shares(exact_call=0.04, invented=0.0),
        "int8": shares(exact_call=0.99, invented=0.99),
        "int8 auto": shares(exact_call=0.11, invented=0.014),
        "open int8": shares(exact_call=0.5, invented=0.0),
    }
    ill = {"keyword rule": shares(urgency=0.15, abstained=1.0), "int8": shares(urgency=0.26, abstained=0.73)}
    known = {who: shares(exact_call=1.0, invented=1.0) for who in shop}
    runs = [
        report(
            tmp_path / "a",
            "customer-service",
            {"known-wordings": known, "new-wordings": shop},
            int8=1.07e6,
            open_int8=164e6,
        ),
        report(
            tmp_path / "b",
            "medicine",
            {"new-wordings": {**ill, "int8 auto": shares(urgency=0.9, abstained=0.9)}},
            int8=1e6,
        ),
    ]
    assert cli.main(["bench", "recipes", "--run", runs[0], "--run", runs[1]]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    table = [line for line in lines if line]
    assert [cells(line) for line in table] == [
        [*HEAD],
        ["---"] * len(HEAD),
        ["customer-service, new-wordings: exact call; invented", "4 %; 0 %", "11 %; 1 %", "50 %; 0 %", "a"],
        ["customer-service: MB; tokens a second at batch 1; 8", "", "1.1; 1,850; 8,400", "164.0; 1,850; 8,400", "a"],
        ["medicine, new-wordings: urgency; abstained", "15 %; 100 %", "26 %; 73 %", NOT_RUN, "b"],
        ["medicine: MB; tokens a second at batch 1; 8", "", "1.0; 1,850; 8,400", NOT_RUN, "b"],
        [*WHOSE],
        ["---"] * len(WHOSE),
        ["customer-service, new-wordings: exact call; invented", *[NOT_KNOWN] * 3, "a"],
        ["medicine, new-wordings: urgency; abstained", *[NOT_KNOWN] * 3, "b"],
    ]
    assert [list(row.values()) for row in json.loads(last)] == [cells(line) for line in table[2:6] + table[8:]]


def test_a_suite_that_the_folder_s_version_did_not_have_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's suites were frozen, then a version with another suite made its report: it "has no report of a recipe"."""
    ill = {who: shares(urgency=0.15, abstained=1.0) for who in ("keyword rule", "int8")}
    folder = report(tmp_path / "b", "medicine", {"new-wordings": ill}, int8=1e6)
    told = json.loads((tmp_path / "b" / "report.json").read_text())
    told |= {"headline": named("medicine").headline, "depth": "full"}
    assert len(told["headline"]) == 2
    (tmp_path / "b" / "report.json").write_text(json.dumps(told))
    assert cli.main(["bench", "recipes", "--run", folder]) == 0
    of = [cells(line)[0] for line in capsys.readouterr().out.splitlines()[:-1] if line]
    suite = "medicine, new-wordings: urgency; abstained"
    assert of == [HEAD[0], "---", suite, "medicine: MB; tokens a second at batch 1; 8", WHOSE[0], "---", suite]


def test_a_folder_without_a_whole_report_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partly = report(tmp_path / "a", "law", {"new-licences": {}})
    for folder in (str(tmp_path / "none"), partly):
        assert cli.main(["bench", "recipes", "--run", folder]) == 1
        assert f"{folder} has no report of a recipe" in capsys.readouterr().err


def test_what_leads_is_a_measure_of_a_suite_in_every_recipe() -> None:
    for recipe in map(named, names()):
        assert recipe.headline and all(set(some) <= set(recipe.measures) for _, some in recipe.headline)
