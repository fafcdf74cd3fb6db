"""The pages of docs/ name places in the code as `file:symbol`. Each of them exists, and the table of architecture.md answers
what readers have asked."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "platform" / "shoal"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
PLACE = re.compile(r"`([\w./-]+\.(?:py|js|css|ya?ml|toml|json)):([A-Za-z_][\w.]*)`")
ASKED = (
    "top_p", "freed", "unknown field", "lost stream", "normalised", "FSDP", "router sees", "60/20/20", "metric's name",
    "chat history",
)  # fmt: skip


@cache
def symbols(path: Path) -> set[str]:
    """Names that the module at `path` defines at its top, and as ``Class.member`` those of its classes. The table alone names
    some modules a dozen times."""
    found: set[str] = set()

    def add(body: list[ast.stmt], before: str) -> None:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(before + node.name)
                if isinstance(node, ast.ClassDef):
                    add(node.body, f"{before}{node.name}.")
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found.update(
                    before + name.id for each in targets for name in ast.walk(each) if isinstance(name, ast.Name)
                )

    add(ast.parse(path.read_text()).body, "")
    return found


def missing(text: str) -> list[str]:
    """What of the places in `text` is not there."""
    lost = []
    for name, symbol in PLACE.findall(text):
        path = next((base / name for base in (PACKAGE, ROOT) if (base / name).is_file()), None)
        if path is None:
            lost.append(f"{name}: no such file")
        elif path.suffix == ".py":
            lost += [] if symbol in symbols(path) else [f"{name}: no {symbol}"]
        elif not re.search(rf"\b{re.escape(symbol)}\b", path.read_text()):
            lost.append(f"{name}: no {symbol}")
    return lost


def test_every_symbol_that_a_page_names_is_there() -> None:
    assert [f"{page.relative_to(ROOT)}: {lost}" for page in PAGES for lost in missing(page.read_text())] == []


def test_a_symbol_that_is_not_there_is_found() -> None:
    wrong = (
        "`engine/sampler.py:Sampler.nose` `engine/sampler.py:Sampler.noise` `engine/brew.py:x` `pyproject.toml:shoall`"
    )
    assert missing(wrong) == [
        "engine/sampler.py: no Sampler.nose", "engine/brew.py: no such file", "pyproject.toml: no shoall",
    ]  # fmt: skip


def test_the_table_answers_what_readers_asked() -> None:
    (table,) = re.findall(r"^## Where is \.\.\.\n(.*?)^## ", (ROOT / "docs/architecture.md").read_text(), re.M | re.S)
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")][1:]
    answered = [(asked, places) for asked, places in rows if "**" not in asked]
    assert len(answered) >= 30
    for asked, places in answered:
        assert PLACE.search(places) or re.search(r"`[\w/]+\.js`", places), f"{asked.strip()}: where?"
    for words in ASKED:
        assert sum(words in asked for asked, _ in answered) == 1, words
