"""Tensors among what an operator is given and gives. torch's `tree_leaves` and `tree_map` know more kinds of trees; called for
each operator of a pretended GPU they took more than half of the time of the engines there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import _pytree


def tree_leaves(tree: Any) -> list[Tensor]:
    """All tensors of nested tuples, lists and dicts, in their order."""
    found: list[Tensor] = []
    _gather(tree, found)
    return found


def _gather(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for each in tree:
            _gather(each, found)
    elif isinstance(tree, dict):
        for each in tree.values():
            _gather(each, found)


def tree_map(change: Callable[[Any], Any], tree: Any) -> Any:
    """`tree` with what `change` makes of each tensor; all else is left as it is."""
    kind = type(tree)
    if isinstance(tree, Tensor):
        return change(tree)
    if kind is tuple or kind is list:
        return kind([tree_map(change, each) for each in tree])
    if kind is dict:
        return {name: tree_map(change, each) for name, each in tree.items()}
    if isinstance(tree, (tuple, list, dict)):  # with names, as of `topk`
        return _pytree.tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, tree)
    return tree
