"""Local names of Python code exchanged for others: other code that does the same.

A name is exchanged only where every place that spells it is a place that the syntax tree knows as that local name. So what is
called by keyword, spelt in a string, in a comment or in the text around the code keeps its name, and the rest still agrees.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import symtable
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from shoal.data.sources import pysource

NAMES = (
    "amount", "bound", "cell", "chunk", "current", "entry", "extra", "field", "found", "given", "head", "item", "known",
    "label", "last", "limit", "mark", "member", "number", "other", "outcome", "part", "piece", "place", "point", "record",
    "rest", "seen", "slot", "source", "step", "target", "taken", "total", "unit", "value", "which",
)  # fmt: skip
WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class _Code:
    """Python inside a text: where it starts, its syntax tree, and its names by scope."""

    start: int
    source: str
    tree: ast.Module
    names: symtable.SymbolTable


def renamed(texts: Sequence[str], draw: int) -> list[str] | None:
    """`texts` with the local names of their Python code exchanged alike in all of them, by the number `draw`; None when no name
    can be. What comes back parses to the same syntax tree, but for the names."""
    codes = [_code_in(text) for text in texts]
    spelt = Counter(word for text in texts for word in WORD.findall(text))
    places = Counter(name for code in codes if code for name, _ in _places(code))
    candidates = [name for name in _local_names(codes) if spelt[name] == places[name]]
    free = [name for name in NAMES if name not in spelt]
    if not candidates or len(free) < len(candidates):
        return None
    first = draw % len(free)
    new = dict(zip(candidates, free[first:] + free[:first], strict=False))
    out = [_exchange(text, code, new) if code else text for text, code in zip(texts, codes, strict=True)]
    return out if all(_agrees(code, text, new) for code, text in zip(codes, out, strict=True)) else None


def _code_in(text: str) -> _Code | None:
    """The Python at the end of a text, after at most a line or two that say what is wanted."""
    start = 0
    for _ in range(3):
        source = text[start:]
        tree = pysource.parse(source)
        if tree and any(isinstance(node, pysource.Definition) for node in ast.walk(tree)):
            try:
                return _Code(start, source, tree, symtable.symtable(source, "code", "exec"))
            except (SyntaxError, RecursionError):  # it parses, but is no program: def f(a, a)
                return None
        start = text.find("\n", start) + 1
        if not start:
            break
    return None


def _local_names(codes: Sequence[_Code | None]) -> list[str]:
    """Names that are local to functions and nothing else anywhere, sorted."""
    local: set[str] = set()
    other: set[str] = set(dir(builtins)) | set(keyword.kwlist) | {"self", "cls"}
    for code in codes:
        tables = [code.names] if code else []
        for table in tables:  # grows while it is walked
            tables += table.get_children()
            for symbol in table.get_symbols():
                inside = table.get_type() == "function" and not symbol.is_global() and not symbol.is_imported()
                (local if inside else other).add(symbol.get_name())
    return sorted(name for name in local - other if not name.startswith("_"))


def _places(code: _Code) -> list[tuple[str, tuple[int, int]]]:
    """Names with the line and UTF-8 column where the tree says that they stand, where the source agrees."""
    lines = [line.encode() for line in _lines(code.source)]
    found = []
    for node in ast.walk(code.tree):
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
        if name is not None:
            line, column = node.lineno - 1, node.col_offset  # type: ignore[attr-defined]
            if lines[line][column:].startswith(name.encode()):  # not so inside f-strings before Python 3.12
                found.append((name, (line, column)))
    return found


def _exchange(text: str, code: _Code, new: dict[str, str]) -> str:
    lines = [line.encode() for line in _lines(code.source)]
    for name, (line, column) in sorted(_places(code), key=lambda place: place[1], reverse=True):
        if name in new:
            end = column + len(name.encode())
            lines[line] = lines[line][:column] + new[name].encode() + lines[line][end:]
    return text[: code.start] + b"\n".join(lines).decode()


def _agrees(code: _Code | None, text: str, new: dict[str, str]) -> bool:
    """Whether the code in `text` is that of `code` with the `new` names."""
    if code is None:
        return True
    tree = pysource.parse(text[code.start :])
    for node in ast.walk(code.tree):
        if isinstance(node, ast.Name):
            node.id = new.get(node.id, node.id)
        elif isinstance(node, ast.arg):
            node.arg = new.get(node.arg, node.arg)
    try:
        return tree is not None and ast.dump(tree) == ast.dump(code.tree)
    except RecursionError:  # it parses and cannot be told: how deep either goes follows from what else was imported
        return False


def _lines(source: str) -> list[str]:
    """As Python counts them: splitlines would also split at form feeds."""
    return source.split("\n")
