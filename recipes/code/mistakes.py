"""One small mistake in a function: another comparison or operator, a number off by one, operands the other way round, a wrong
name, or a `return` that is missing. What a loop goes through is left alone,
and so is a list that grows, so that all of it ends."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Callable, Iterator

_OTHER: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Gt: (ast.Lt, ast.GtE), ast.Lt: (ast.Gt, ast.LtE), ast.Eq: (ast.NotEq,), ast.LtE: (ast.Lt,), ast.GtE: (ast.Gt,),
    ast.Add: (ast.Sub,), ast.Sub: (ast.Add,), ast.Mult: (ast.Add,), ast.Mod: (ast.FloorDiv,), ast.USub: (ast.UAdd,),
}  # fmt: skip


def mistaken(source: str, draws: random.Random) -> str:
    """`source` with one mistake, as `ast.unparse` writes it."""
    tree = ast.parse(source)
    places = sum(1 for _ in _mistakes(tree))
    wrong = copy.deepcopy(tree)
    chosen = draws.randrange(places)
    next(make for at, make in enumerate(_mistakes(wrong)) if at == chosen)()
    return ast.unparse(wrong)


def _mistakes(tree: ast.Module) -> Iterator[Callable[[], None]]:
    """Each mistake that can be made in `tree`, as what makes it."""
    looped = {id(node.iter) for node in ast.walk(tree) if isinstance(node, ast.For)}
    grow = {
        ast.unparse(node.targets[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.List)
    }
    names = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)} - grow)
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from (_setting(node, "ops", [other()]) for other in _OTHER[type(node.ops[0])])
        elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.UnaryOp)):
            yield from (_setting(node, "op", other()) for other in _OTHER[type(node.op)])
            if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Sub, ast.Mod)):
                yield _swapping(node)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield from (_setting(node, "value", value) for value in (node.value + 1, node.value - 1) if value >= 0)
        elif (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)
            and id(node) not in looped
            and node.id not in grow
        ):
            yield from (_setting(node, "id", other) for other in names if other != node.id)
        elif isinstance(node, ast.FunctionDef) and isinstance(last := node.body[-1], ast.Return) and last.value:
            yield _setting(node, "body", [*node.body[:-1], ast.Expr(last.value)])


def _setting(node: ast.AST, field: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _swapping(node: ast.BinOp) -> Callable[[], None]:
    def swap() -> None:
        node.left, node.right = node.right, node.left

    return swap
