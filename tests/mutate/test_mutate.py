"""What `make mutate` counts: which mistakes there are, which tests reach them, and that what hangs or dies is noticed."""

from __future__ import annotations

import ast
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.mutate import processes
from tests.mutate.__main__ import equivalent, named
from tests.mutate.changes import changes
from tests.mutate.covers import GROUPS, Group
from tests.mutate.processes import ROOT, apart, file_of, source
from tests.mutate.reached import Watch, reaching

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


def test_what_noticed_other_changes_comes_sooner_and_a_slow_test_after_the_quick_ones_of_all_files() -> None:
    one, other = (
        {"together": 0.0, "seconds": taken, "lines": {name: [["m", 3]] for name in taken}}
        for taken in ({"a::x": 0.1, "a::y": 0.2, "a::slow": 5.0}, {"b::x": 0.3})
    )
    (change, *_) = changes(ast.parse("def f(a):\n\n    return a"))
    group = Group(["m"], [])
    assert list(reaching(group, "m", change, [one, other], 60)) == ["a::x", "a::y", "b::x", "a::slow"]
    assert list(reaching(group, "m", change, [one, other], 60, {"b::x": 9})) == ["b::x", "a::x", "a::y", "a::slow"]
    assert list(reaching(group, "m", change, [one, other], 0.6, {"a::slow": 99})) == ["a::slow"], "whatever it takes"


def test_a_result_stands_while_its_test_and_what_that_uses_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    texts = {
        "old": "X = 1\ndef test_a(): f()\ndef test_b(): pass",
        "more": "X = 1\n\n\ndef test_c(): pass\ndef test_a(): f()",
        "used": "X = 2\ndef test_a(): f()\ndef test_b(): pass",
        "own": "X = 1\ndef test_a(): g()\ndef test_b(): pass",
    }
    found = {}
    for name, written in texts.items():
        (tmp_path / f"{name}.py").write_text(written)
        found[name] = processes.digest_of_test(f"{name}.py::test_a[1]")
    assert found["old"] == found["more"] and len(set(found.values())) == 3


def test_every_line_that_a_test_runs_is_seen_and_a_loop_that_was_seen_is_looked_at_no_longer() -> None:
    looked: list[bool] = []

    def loops() -> None:
        for _ in range(3):
            looked.append(bool(sys._getframe().f_trace_lines))

    watch = Watch([])
    watch.modules = {__file__: "m"}
    first = loops.__code__.co_firstlineno
    for _ in range(2):
        watch._begin()
        sys.settrace(watch.trace)
        try:
            loops()
        finally:
            sys.settrace(None)
        assert {at - first for of, at in watch.lines if of == "m"} >= {0, 1, 2}
    assert looked == 6 * [False], "of its last line the first event ends it"


def test_a_test_that_is_too_slow_to_be_watched_is_ended_and_is_none(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text("def test_quick(): pass\ndef test_slow():\n    while True: pass\n")
    watch = Watch([], 0.1)
    alone = apart(lambda: {"by": pytest.main([str(tmp_path), *processes.QUIET], plugins=[watch]), **watch.found()}, 60)
    assert [name.rpartition("::")[2] for name in alone["seconds"]] == ["test_quick"]
    assert [name.rpartition("::")[2] for name in alone["left"]] == ["test_slow"]


def test_a_change_that_no_function_takes_is_no_result() -> None:
    tree = ast.parse(source("engine/text").read_text("utf-8"))
    change = next(each for each in changes(tree) if each.lines is not None)
    assert processes.in_place("engine/text", tree, change, [], []) == {"by": processes.UNFIT}


def test_a_module_is_asked_for_by_its_folders_too() -> None:
    assert named("data/operators/near") == {"data/operators/near", "data/operators/", "data/"}


def test_a_process_gives_what_it_found_and_what_hangs_or_dies_is_noticed() -> None:
    here = os.getpid()
    assert apart(lambda: {"by": os.getpid() != here}, 60) == {"by": True}
    assert apart(lambda: {"by": time.sleep(600)}, 0.1) == {"by": "a hang"}
    assert apart(lambda: {"by": sum(itertools.count())}, 1) == {"by": "a hang"}
    assert apart(lambda: os._exit(3), 60) == {"by": "a crash"}
    assert apart(lambda: {"by": 1 / 0}, 60) == {"by": "a crash"}


def test_what_is_kept_is_not_tracked() -> None:
    assert ".mutate/" in (ROOT / ".gitignore").read_text().splitlines()
