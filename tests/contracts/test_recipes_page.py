"""The table of docs/recipes.md that compares recipes has the columns that `shoal bench recipes` prints, and parses."""

import re
from pathlib import Path

from benchmarks.recipes import HEAD, NOT_RUN
from recipes.named import names

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"
SHARES = re.compile(r"\d{1,3} %(; \d{1,3} %)*(\. \d{1,3} %(; \d{1,3} %)*)?")


def rows() -> list[list[str]]:
    """The cells of the table, the head first."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(at for at, line in enumerate(lines) if line.startswith(f"| {HEAD[0]} |"))
    found = []
    for line in lines[first:]:
        if not line.startswith("|"):
            return found
        found.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return found


def test_the_columns_are_those_of_the_program() -> None:
    head, rule, *body = rows()
    assert len(head) == len(HEAD) and all(
        cell == name or re.match(rf"{name}[,:] ", cell) for cell, name in zip(head, HEAD, strict=True)
    )
    assert set(rule) == {"---"} and body and {len(row) for row in body} == {len(HEAD)}


def test_each_row_is_of_a_recipe_and_says_shares_or_that_it_was_not_run() -> None:
    of = set()
    for told, *figures, run in rows()[2:]:
        assert run.isdecimal(), told
        if told.startswith("tokens a second"):
            continue
        recipe = next((name for name in names() if told.replace(" ", "-").startswith(name)), None)
        assert recipe, told
        of.add(recipe)
        for cell in figures:
            assert cell == NOT_RUN or SHARES.fullmatch(cell), f"{told}: {cell}"
            assert all(int(share) <= 100 for share in re.findall(r"(\d+) %", cell)), cell
    assert of == set(names())
