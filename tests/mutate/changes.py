"""The small mistakes that a module can be given, one at a time: what a tired engineer types.

A `Change` has a name that does not speak of lines, so that it stays the same while the file moves: where it is, the statement
before, and after. What only speaks to people or guards against ourselves is left alone: annotations, docstrings, decorators,
texts, what is raised (but that it is raised counts), `assert`, and `strict` of zip.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Node = ast.AST
COMPARED: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
NAMED = {"min": "max", "any": "all", "amin": "amax", "argmin": "argmax", "floor": "ceil", "minimum": "maximum"}
NAMED |= {after: before for before, after in NAMED.items()} | {"takewhile": "filter"}
GONE = ast.Expr, ast.AugAssign, ast.Delete, ast.Raise, ast.Assign  # statements that can be left out


@dataclass(frozen=True)
class Change:
    """One mistake. `lines` are those whose execution reaches it; none: it is read when the module is imported."""

    name: str
    lines: range | None
    body: range | None  # lines of the function around it
    apply: Callable[[], None]  # to the tree that `changes` was given


def changes(tree: ast.Module) -> list[Change]:
    """Every change of `tree`, in the order of the file. At most one of them may be applied."""
    found: list[Change] = []
    counted: Counter[str] = Counter()
    for where, function, statement, owner, field, index, new in _all(tree):
        before = _head(statement)
        old = _put(owner, field, index, new)
        after = _head(new if old is statement else statement)
        _put(owner, field, index, old)
        name = f"{where}: {before} -> {after}"
        counted[name] += 1
        name += f" (#{counted[name]})" if counted[name] > 1 else ""
        body = range(function.lineno, (function.end_lineno or 0) + 1) if function else None
        first = getattr(statement, "body", None)
        end = max(statement.lineno, first[0].lineno - 1) if isinstance(first, list) else statement.end_lineno
        lines = range(statement.lineno, (end or 0) + 1) if function and statement is not function else None

        def apply(owner: Any = owner, field: str = field, index: int | None = index, new: Node = new) -> None:
            _put(owner, field, index, new)
            ast.fix_missing_locations(tree)

        found.append(Change(name, lines, body, apply))
    return found


def _put(owner: Any, field: str, index: int | None, new: Any) -> Any:
    """Set a child of a node; returns what was there."""
    old = getattr(owner, field) if index is None else getattr(owner, field)[index]
    if index is None:
        setattr(owner, field, new)
    else:
        getattr(owner, field)[index] = new
    return old


def _head(statement: ast.stmt) -> str:
    """The statement in one line; of one that holds others, what is before the colon."""
    text = ast.unparse(statement)
    if hasattr(statement, "body"):
        text = next(line for line in text.splitlines() if not line.startswith("@"))
    return " ".join(text.split())


Site = tuple[str, Any, ast.stmt, Any, str, int | None, Any]  # the last four: what is replaced, and by what


def _all(tree: ast.Module) -> Iterator[Site]:
    def walk(node: Any, where: str, function: Any, statement: Any) -> Iterator[Site]:
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_comment", "bases", "type_params"):
                continue
            for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if not isinstance(child, ast.AST) or _left_alone(node, child, index):
                    continue
                place, inside = where, function
                current = child if isinstance(child, ast.stmt) else statement
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    place = f"{where}.{child.name}".lstrip(".")
                    inside = None if isinstance(child, ast.ClassDef) else child
                for new in _variants(child):
                    yield place or "module", function, current, node, field, index, new
                for site in _parts(child):
                    yield place or "module", function, current, *site
                if not isinstance(child, ast.Raise):
                    yield from walk(child, place, inside, current)

    yield from walk(tree, "", None, None)


def _left_alone(parent: Any, child: Any, index: int | None) -> bool:
    if isinstance(child, ast.Assert | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
        return True  # a docstring, or ...
    if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "__name__ == '__main__'"):
        return True
    if isinstance(child, ast.keyword) and child.arg == "strict":
        return True
    if isinstance(parent, ast.UnaryOp) and isinstance(parent.op, ast.USub):
        return isinstance(child, ast.Constant)  # changed as a whole
    return (
        isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name) and parent.targets[0].id == "__all__"
    )


def _variants(node: Any) -> Iterator[Any]:
    """What may stand in the place of `node`."""
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in COMPUTED and not (_text(left) or _text(right)):
            yield ast.BinOp(left, COMPUTED[type(op)](), right)
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in COMPUTED:
            yield ast.AugAssign(target, COMPUTED[type(op)](), value)
        case ast.BoolOp(op=op, values=values):
            yield ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int(value))):
            yield ast.UnaryOp(ast.USub(), ast.Constant(value + 1))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from (ast.Constant(new) for new in ((1,) if value == 0 else (0, 2) if value == 1 else (value + 1,)))
        case ast.Constant(value=float(value)):
            yield ast.Constant(2 * value if value else 1.0)
        case ast.IfExp(test=test, body=body, orelse=orelse):
            yield ast.IfExp(test, orelse, body)
        case ast.Name(id=name, ctx=ast.Load()) if name in NAMED:
            yield ast.Name(NAMED[name], ast.Load())
        case ast.Attribute(value=value, attr=name, ctx=ast.Load()) if name in NAMED:
            yield ast.Attribute(value, NAMED[name], ast.Load())
        case ast.Return(value=value) if value is not None and not (
            isinstance(value, ast.Constant) and value.value is None
        ):
            yield ast.Return(ast.Constant(None))
        case ast.Break() | ast.Continue():
            yield ast.Pass()
    if isinstance(node, GONE) and not (
        isinstance(node, ast.Assign) and any(isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
    ):
        yield ast.Pass()


def _parts(node: Any) -> Iterator[tuple[Any, str, int | None, Any]]:
    """Parts of `node` that may be left out or fixed: its owner, the field, the index, and what comes there."""
    match node:
        case ast.Slice():
            yield from ((node, field, None, None) for field in ("lower", "upper", "step") if getattr(node, field))
        case ast.Compare(ops=ops):
            yield from ((node, "ops", at, new()) for at, op in enumerate(ops) for new in COMPARED[type(op)])
        case ast.If():
            yield from ((node, "test", None, ast.Constant(fixed)) for fixed in (False, True))
        case ast.comprehension(ifs=ifs):
            yield from ((node, "ifs", index, ast.Constant(True)) for index in range(len(ifs)))
        case ast.Call(keywords=keywords):
            for left_out in keywords:
                if left_out.arg not in ("strict", None):
                    yield node, "keywords", None, [other for other in keywords if other is not left_out]
        case ast.BoolOp(values=values) if len(values) > 1:
            neutral = isinstance(node.op, ast.And)
            yield from ((node, "values", index, ast.Constant(neutral)) for index in range(len(values)))


def _text(node: Any) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))
