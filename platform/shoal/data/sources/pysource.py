"""Python source as data, read with `ast` and never run: pages of docstrings, and functions apart from theirs."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

MOST_PARSED = 2 * 2**20  # characters: a tree takes 225 times as many bytes
Definition = ast.FunctionDef | ast.AsyncFunctionDef


_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Function:
    """A function or method with a docstring."""

    signature: str  # ``def name(arguments) -> result:``, on one line
    summary: str  # the docstring's first paragraph, on one line
    code: str  # the source without the docstring, dedented


def parse(source: str) -> ast.Module | None:
    """The syntax tree, or None when the source is not Python of this version, or longer than `MOST_PARSED`."""
    if len(source) > MOST_PARSED:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code are not our user's concern
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def docstring_page(source: str, name: str) -> str | None:
    """All docstrings of a module as a page of reference text, each under the dotted name it documents.

    Empty when there are none; None when the source does not parse.
    """
    tree = parse(source)
    if tree is None:
        return None
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    sections = []
    for path, node in _documented(tree, module):
        doc = _docstring(node)
        if doc:
            arguments = f"({_spelt(node.args)})" if isinstance(node, Definition) else ""
            sections.append(f"{path}{arguments}\n\n{doc}\n")
    return "\n".join(sections)


def functions(source: str) -> list[Function]:
    """Functions and methods that have a docstring and do something, in source order; empty when nothing parses."""
    tree = parse(source)
    if tree is None:
        return []
    lines = source.replace("\r\n", "\n").split("\n")  # as Python counts them; splitlines would also split at form feeds
    found = []
    for node in ast.walk(tree):
        if isinstance(node, Definition) and (function := _function(node, lines)):
            found.append((node.lineno, function))
    return [function for _, function in sorted(found, key=lambda item: item[0])]


def topics(source: str) -> dict[str, str]:
    """The literal dictionary ``topics`` of ``pydoc_data/topics.py``: topic -> text. Empty when there is none."""
    tree = parse(source)
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "topics":
            return dict(ast.literal_eval(node.value))
    return {}


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Definition]]:
    """Public definitions with their dotted names, in source order, classes' members included."""
    yield module, tree

    def inside(node: ast.Module | ast.ClassDef, path: str) -> Iterator[tuple[str, ast.ClassDef | Definition]]:
        for child in node.body:
            if isinstance(child, ast.ClassDef | Definition) and not child.name.startswith("_"):
                here = f"{path}.{child.name}"
                yield here, child
                if isinstance(child, ast.ClassDef):
                    yield from inside(child, here)

    yield from inside(tree, module)


def _function(node: Definition, lines: list[str]) -> Function | None:
    doc = _docstring(node)
    first, rest = node.body[0], node.body[1:]
    if not doc or not rest or node.decorator_list or node.end_lineno is None or first.end_lineno is None:
        return None
    if first.lineno == node.lineno or rest[0].lineno == first.end_lineno:
        return None  # shares a line with something else, so it cannot be cut out by lines
    summary = " ".join(doc.split("\n\n", 1)[0].split())
    kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
    code = textwrap.dedent("\n".join(line.rstrip() for line in kept))
    if not summary or parse(code) is None:
        return None
    head = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {_spelt(node.returns)}" if node.returns else ""
    return Function(f"{head} {node.name}({_spelt(node.args)}){result}:", summary, code)


def _docstring(node: ast.Module | ast.ClassDef | Definition) -> str | None:
    """Half a surrogate pair, which an escape can spell and no file can hold, becomes U+FFFD."""
    doc = ast.get_docstring(node)
    return _HALF.sub("\ufffd", doc) if doc else doc


def _spelt(node: ast.AST) -> str:
    """The node's source on one line; three dots where it is nested too deeply to be told."""
    try:
        return _HALF.sub("\ufffd", ast.unparse(node))
    except RecursionError:
        return "..."
