"""What the formatter cannot see: comments that it tore off, and the clock of all threads set by a test."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator

from tests.contracts.test_repository import name_of, tracked

SOURCES = [path for path in tracked() if path.suffix == ".py"]
TOOLS = r"\s*(fmt|type|noqa|ruff|mypy)\b"
FOR_TOOLS = re.compile("#" + TOOLS)
# a line that may close a bracket of an earlier one and end in a comment: begun by it, or by the end of a long string
MAY_BE_TORN = re.compile(rf"^(\s*[)\]}}]|.*(\"\"\"|''')\s*[)\]}}]).*#(?!{TOOLS})", re.MULTILINE)

# without such a line a module, as ruff formats it, need not be taken apart, which takes seconds for all of them
BELOW = re.compile(rf"=\s*[(\\].*\n(\s*#.*\n)*[\s(]*[\w.\"'-].*#(?!{TOOLS})")  # a value below its name, and a comment
SETS_TIME = re.compile(r"setattr\(\s*[^\n]*\btime\b")


def nodes(source: str, only: re.Pattern[str]) -> Iterator[ast.AST]:
    """All of a module that has what `only` finds, else none."""
    return ast.walk(ast.parse(source)) if only.search(source) else iter(())


def torn(source: str) -> list[int]:
    """Lines that close a bracket of an earlier line and end in a comment: it was beside the code that it explains, until the
    formatter put that code on lines of its own."""
    if not MAY_BE_TORN.search(source):
        return bracketed(source)
    found, open_at = [], []
    first: dict[int, tokenize.TokenInfo] = {}
    closes: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT):
            first.setdefault(line, token)
        if token.type == tokenize.OP and token.string in "([{":
            open_at.append(line)
        elif token.type == tokenize.OP and token.string in ")]}":
            if open_at.pop() < line and first[line] is token:
                closes.add(line)
        elif token.type == tokenize.COMMENT and line in closes and not FOR_TOOLS.match(token.string):
            found.append(line)
    return found + bracketed(source)


def bracketed(source: str) -> list[int]:
    """Lines of values that stand in brackets below their name to make room for the comment behind them."""
    given = [node for node in nodes(source, BELOW) if isinstance(node, (ast.Assign, ast.AnnAssign))]
    values = [(node.lineno, node.value) for node in given if isinstance(node.value, ast.Constant)]
    below = [value.lineno for line, value in values if line < value.lineno == value.end_lineno]
    if not below:
        return []
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {
        token.start[0] for token in tokens if token.type == tokenize.COMMENT and not FOR_TOOLS.match(token.string)
    }
    return [line for line in below if line in comments]


def clocks_of_all(source: str) -> list[int]:
    """Lines of a test that set what is in the module `time` itself."""
    found = []
    for node in nodes(source, SETS_TIME):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "setattr":
            first = node.args[0]
            dotted = isinstance(first, ast.Constant)
            named = str(first.value).rpartition(".")[0] if dotted else ast.unparse(first)  # type: ignore[attr-defined]
            if named.rpartition(".")[2] == "time":
                found.append(node.lineno)
    return found


def test_no_comment_is_torn_from_what_it_explains() -> None:
    """Such a comment goes above the statement, and what it stood beside on one line again, where that has room."""
    assert [f"{name_of(path)}:{line}" for path in SOURCES for line in torn(path.read_text("utf-8"))] == []


def test_no_test_sets_the_clock_of_all() -> None:
    """A service beside it would wait for a time that does not come: `tests.clocks.tells` sets that of one module."""
    assert [f"{name_of(path)}:{line}" for path in SOURCES for line in clocks_of_all(path.read_text("utf-8"))] == []
