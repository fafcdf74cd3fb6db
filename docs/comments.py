"""For mkdocstrings: the comment beside a field, or right above it, says what it means (as in `shoal/config.py`). So it is its
docstring."""

from __future__ import annotations

import ast
import io
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

import griffe


@cache
def comments(path: Path) -> dict[int, tuple[str, bool]]:
    """Line -> (comment, does it stand alone?) of a file."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.COMMENT:
            found[token.start[0]] = (token.string.lstrip("# ").strip(), token.line.lstrip().startswith("#"))
    return found


class Comments(griffe.Extension):
    def on_attribute_instance(self, *, node: ast.AST | griffe.ObjectNode, attr: griffe.Attribute, **_: Any) -> None:
        if attr.docstring or not isinstance(attr.filepath, Path) or attr.lineno is None or attr.endlineno is None:
            return
        said = comments(attr.filepath)
        above, line = list[str](), attr.lineno - 1
        while said.get(line, ("", False))[1]:
            above.insert(0, said[line][0])
            line -= 1
        beside, alone = said.get(attr.endlineno, ("", False))
        words = " ".join([*above, *([] if alone or not beside else [beside])])
        if words:
            attr.docstring = griffe.Docstring(words[0].upper() + words[1:] + ".", parent=attr)
