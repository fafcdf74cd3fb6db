"""What `make mutate` counts: which mistakes there are, which tests reach them, and that what hangs or dies is noticed."""

from __future__ import annotations

import ast
import itertools
import os
import time
from typing import Any

import pytest

from tests.mutate.__main__ import equivalent
from tests.mutate.changes import changes
from tests.mutate.covers import GROUPS, Group
from tests.mutate.processes import ROOT, apart, file_of, source
from tests.mutate.reached import reaching

MODULES = [module for group in GROUPS.values() for module in group.modules]


def names(text: str) -> list[str]:
    return [change.name for change in changes(ast.parse(text))]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("x = a < b", ["x = a <= b", "x = a >= b"]),
        ("x = a + 1", ["x = a - 1", "x = a + 0", "x = a + 2"]),
        ("x = -1", ["x = -2"]),
        ("x = a and b", ["x = a or b", "x = True and b", "x = a and True"]),
        ("x = not a", ["x = a"]),
        ("x = a if b else c", ["x = c if b else a"]),
        ("x = min(a)", ["x = max(a)"]),
        ("x = a[b:]", ["x = a[:]"]),
        ("x = f(a, by=b)", ["x = f(a)"]),
        ("x = [a for a in b if c]", ["x = [a for a in b if True]"]),
        ("x = takewhile(f, a)", ["x = filter(f, a)"]),
        ("f(a)", ["pass"]),
        ("a.b = c", ["pass"]),
        ("a += b", ["a -= b", "pass"]),
        ("raise E('a' * 2)", ["pass"]),
        ("x: int = 'a' + b", []),
        ("x = zip(a, b, strict=True)", []),
        ("assert a < b", []),
        ("'a text'", []),
    ],
)
def test_a_statement_has_these_mistakes(before: str, after: list[str]) -> None:
    assert names(before) == [f"module: {before} -> {each}" for each in after]


def test_guards_returns_and_loops_are_changed() -> None:
    found = names("class A:\n def f(self, n=0):\n  while True:\n   if n:\n    break\n  return n")
    assert found == [
        "A.f: def f(self, n=0): -> def f(self, n=1):",
        "A.f: while True: -> while False:",
        "A.f: if n: -> if False:",
        "A.f: if n: -> if True:",
        "A.f: break -> pass",
        "A.f: return n -> return None",
    ]


def test_a_change_alone_is_applied_and_says_which_lines_reach_it() -> None:
    text = "def f(n):\n    if (\n        n < 3\n    ):\n        return 1\n    return 2\n"
    tree = ast.parse(text)
    (change,) = [each for each in changes(tree) if "<=" in each.name]
    assert ast.unparse(tree) == ast.unparse(ast.parse(text)), "to look is not to change"
    change.apply()
    space: dict[str, Any] = {}
    exec(compile(tree, "f", "exec"), space)
    assert [space["f"](n) for n in (2, 3, 4)] == [1, 1, 2]
    assert change.lines == range(2, 5) and change.body == range(1, 7)


def test_names_of_changes_are_told_apart() -> None:
    assert names("f(a)\nf(a)") == ["module: f(a) -> pass", "module: f(a) -> pass (#2)"]


def test_every_module_is_in_one_group_and_everything_named_is_there() -> None:
    assert len(set(MODULES)) == len(MODULES)
    assert [path for path in map(source, MODULES) if not path.is_file()] == []
    assert [path for group in GROUPS.values() for path in map(file_of, group.tests) if not path.is_file()] == []


def test_what_is_argued_is_a_change_and_has_a_reason() -> None:
    for module, argued in equivalent().items():
        there = {change.name for change in changes(ast.parse(source(module).read_text("utf-8")))}
        assert set(argued) - there == set(), module
        assert all(len(why) > 20 for why in argued.values()), module


def test_the_quickest_tests_that_reach_the_lines_are_run_and_what_a_file_sets_up_is_counted_once() -> None:
    lines = {"slow": [["m", 3]], "quick": [["m", 3], ["m", 9]], "other": [["m", 9]], "longest": [["m", 2]]}
    alone = {"together": 0.0, "seconds": {"slow": 5.0, "quick": 0.1, "other": 0.2, "longest": 9.0}, "lines": lines}
    shared = {"together": 4.0, "seconds": {"a": 0.5, "b": 0.1}, "lines": {"a": [["m", 3]], "b": [["m", 3]]}}
    (change, *_) = changes(ast.parse("def f(a):\n\n    return a"))

    def chosen(most: float, module: str = "m", compiled: bool = False) -> list[str]:
        group = Group([module], [], compiled=compiled)
        return list(reaching(group, module, change, [alone, shared], most))

    assert chosen(60) == ["quick", "b", "a", "slow"]
    assert chosen(9) == ["quick", "b", "a"]
    assert chosen(1) == ["quick"]
    assert chosen(60, "n") == []
    assert len(chosen(60, compiled=True)) == 6


def test_a_process_gives_what_it_found_and_what_hangs_or_dies_is_noticed() -> None:
    here = os.getpid()
    assert apart(lambda: {"by": os.getpid() != here}, 60) == {"by": True}
    assert apart(lambda: {"by": time.sleep(600)}, 0.1) == {"by": "a hang"}
    assert apart(lambda: {"by": sum(itertools.count())}, 1) == {"by": "a hang"}
    assert apart(lambda: os._exit(3), 60) == {"by": "a crash"}
    assert apart(lambda: {"by": 1 / 0}, 60) == {"by": "a crash"}


def test_what_is_kept_is_not_tracked() -> None:
    assert ".mutate/" in (ROOT / ".gitignore").read_text().splitlines()
