"""No function is longer than 60 lines and no module longer than 400, unless a reason stands beside it: ``# long: why it reads
better so``, on the line above a function's ``def`` or at a module's beginning."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = [path for folder in ("platform", "ui", "jobs", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
FUNCTION, MODULE = 60, 400  # lines
REASON = re.compile(r"\s*# long: \S+ \S+ \S+")
BEGINNING = 60  # lines in which a module's reason stands


def too_long(text: str) -> Iterator[str]:
    """What of a module's text is longer than it may be, without a reason."""
    lines = text.splitlines()
    if len(lines) > MODULE and not any(map(REASON.match, lines[:BEGINNING])):
        yield f"the module: {len(lines)} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION and not any(map(REASON.match, lines[max(0, first - 2) : node.lineno])):
                yield f"{node.name}: {count} lines"


def test_nothing_is_long_without_a_reason() -> None:
    assert [f"{path.relative_to(ROOT)}: {what}" for path in FILES for what in too_long(path.read_text())] == []
