"""What `make mutate` counts: which mistakes there are, which tests reach them, and that what hangs or dies is noticed."""

from __future__ import annotations

import ast
import asyncio
import importlib
import itertools
import math
import os
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shoal.evaluate.intervals import exact
from tests.mutate import processes, reached
from tests.mutate.__main__ import UNSURE, named, noticing
from tests.mutate.changes import changes
from tests.mutate.covers import GROUPS, Group
from tests.mutate.processes import ROOT, SOURCES, apart, file_of, source
from tests.mutate.reached import Watch, reaching
from tests.mutate.results import equivalent, weighed

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


@pytest.mark.drill
def test_who_calls_compiled_code_that_is_changed_runs_the_change() -> None:
    """`product` calls `dots`, and what numba has kept of it calls that of the disk: nothing kept is read, though numba was
    imported before, as in what tries are forked from."""
    pytest.importorskip("numba")
    tree = ast.parse(source("model/cpu/floats").read_text("utf-8"))
    (change,) = [one for one in changes(tree) if one.name == "dots: m = 0 -> m = 1"]

    def tried(changed: bool) -> dict[str, Any]:
        processes.begin(GROUPS["tiles"])
        for name in [name for name in sys.modules if name.startswith("shoal.model.cpu")]:
            del sys.modules[name]
        if changed:
            change.apply()
            sys.meta_path.insert(0, processes.Changed("model/cpu/floats", tree))
        floats = importlib.import_module("shoal.model.cpu.floats")
        x, w, out = np.ones((3, 64), np.float32), np.ones((16, 64), np.float32), np.zeros((3, 16), np.float32)
        floats.product(x, w, out)
        kept = Path(floats.product._cache._cache_path)
        return {"right": bool((out == 64).all()), "here": kept.is_relative_to(tempfile.gettempdir())}

    for changed in (False, True):
        assert apart(lambda changed=changed: tried(changed), 200) == {"right": not changed, "here": True}


def test_names_of_changes_are_told_apart() -> None:
    assert names("f(a)\nf(a)") == ["module: f(a) -> pass", "module: f(a) -> pass (#2)"]


def test_every_module_is_in_one_group_and_everything_named_is_there() -> None:
    assert len(set(MODULES)) == len(MODULES)
    assert [path for path in map(source, MODULES) if not path.is_file()] == []
    assert [path for group in GROUPS.values() for path in map(file_of, group.tests) if not path.is_file()] == []


def test_no_module_of_the_model_or_of_engines_is_forgotten() -> None:
    there = [
        path for plane in ("model", "engine") for path in (SOURCES / plane).rglob("*.py") if path.parent.name != "gpu"
    ]
    names = {path.relative_to(SOURCES).with_suffix("").as_posix() for path in there if path.stem != "__init__"}
    assert names - set(MODULES) == set() and len(names) > 40


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


def test_a_constant_is_reached_by_the_tests_that_are_named_for_its_module_though_they_run_no_line_of_it() -> None:
    own, far, runs = (f"tests/unit/api/test_{name}.py::test_a" for name in ("limits", "rate_limits", "other"))
    file = {
        "together": 0.0,
        "seconds": {own: 0.1, far: 0.1, runs: 0.2},
        "lines": {own: [], far: [], runs: [["api/limits", 9]]},
    }
    constant, *_ = changes(ast.parse("X = 1 + 2"))
    inside, *_ = changes(ast.parse("def f(a):\n    return a"))
    group = Group(["api/limits"], [])
    assert list(reaching(group, "api/limits", constant, [file], 60)) == [own, runs]
    assert list(reaching(group, "api/limits", inside, [file], 60)) == []


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


@pytest.mark.drill
def test_a_test_that_is_too_slow_to_be_watched_is_ended_and_is_none(tmp_path: Path) -> None:
    (tmp_path / "test_two.py").write_text("def test_quick(): pass\ndef test_slow():\n    while True: pass\n")
    watch = Watch([], 0.1)
    alone = apart(lambda: {"by": pytest.main([str(tmp_path), *processes.QUIET], plugins=[watch]), **watch.found()}, 60)
    assert [name.rpartition("::")[2] for name in alone["seconds"]] == ["test_quick"]
    assert [name.rpartition("::")[2] for name in alone["left"]] == ["test_slow"]


PASSES, FAILS, HANGS = {"by": None}, {"by": "t::b"}, {"by": "a hang"}


def said(changed: list[dict[str, Any]], unchanged: list[dict[str, Any]]) -> tuple[str | None, list[list[str]]]:
    """What comes of tries that give these, and on which tests they were made; all are."""
    asked: list[list[str]] = []

    def gives(answers: list[dict[str, Any]]) -> Any:
        return lambda tests: asked.append(list(tests)) or answers.pop(0)

    found = noticing({"t::a": 1.0, "t::b": 1.0}, gives(changed), gives(unchanged), {})
    assert changed == unchanged == []
    return found, asked


def test_what_fails_or_hangs_is_noticed_only_if_it_is_no_accident() -> None:
    both, one = ["t::a", "t::b"], ["t::b"]
    assert said([PASSES], []) == (None, [both])
    assert said([FAILS], [PASSES]) == ("t::b", [both, one])
    assert said([FAILS, PASSES], [FAILS]) == (None, [both, one, ["t::a"]]), "it fails without the change, too"
    assert said([HANGS, HANGS], [PASSES]) == ("a hang", [both] * 3)
    assert said([HANGS, PASSES], []) == (None, [both] * 2), "once"
    assert said([HANGS, FAILS], [PASSES]) == ("t::b", [both, both, one])
    assert said([HANGS, HANGS], [HANGS]) == (UNSURE, [both] * 3)
    assert said([{"by": processes.UNFIT}], []) == (processes.UNFIT, [both])
    assert noticing({}, lambda _: FAILS, lambda _: PASSES, {}) is None


def test_a_share_of_all_changes_is_weighed_by_modules_and_as_sure_as_its_least_sampled_large_one() -> None:
    share, low, high = weighed([(900, 10, 9), (100, 10, 5)])
    assert share == pytest.approx(0.86)
    # exact, of 1 / (0.9 ** 2 / 10 + 0.1 ** 2 / 10) = 12.2 tries
    assert (low, high) == pytest.approx(exact(0.86 * 10 / 0.82, 10 / 0.82))


HELD = """
from shoal.evaluate.intervals import few
def test_of_none(tmp_path):
    (tmp_path / "there").mkdir()
    assert few(3) == "too few: 3 groups, at least 5"
"""

OTHER = "student: return float(special.stdtrit(freedom, below)) -> return None"
SEEN = ("few: return f'too few: {", "few: if groups < LEAST: -> if F", "few: if groups < LEAST: -> if groups >=")
SEEN += ("few: if groups is None: -> if T", OTHER)


@pytest.mark.drill
def test_a_change_is_put_in_place_after_its_tests_were_played_and_without_one_they_pass(tmp_path: Path) -> None:
    """In a process that has played them, as those are that a sample of changes is tried in."""
    (tmp_path / "test_held.py").write_text(HELD)
    module = "evaluate/intervals"

    def tries() -> dict[str, Any]:
        found: dict[str, Any] = {}

        def work(items: dict[str, pytest.Item]) -> None:
            tree = ast.parse(source(module).read_text("utf-8"))
            some, there = list(items.values()), processes.functions([module])[module]
            found["here"] = processes.play(some)
            for name, change in [("none", None), *((each.name, each) for each in changes(tree))]:
                if change is None or name.startswith(SEEN):
                    changed = change and (module, tree, change)
                    found[name] = apart(lambda c=changed: processes.in_place(some, c, there), 60)["by"]

        assert not pytest.main([str(tmp_path), *processes.QUIET, "-s"], plugins=[processes.Collected(work)])
        return found

    found = apart(tries, 120)
    assert (found.pop("here"), found.pop("none")) == (None, None)
    assert found.pop(OTHER) is None, "of another function"
    assert len(found) == 4 and all(by.endswith("test_held.py::test_of_none") for by in found.values()), found


def test_what_was_kept_of_calls_before_the_change_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    class Of:
        other = staticmethod(cache(object))

    there = ModuleType("made_up")
    there.__file__ = str(processes.TESTS / "made_up.py")
    there.one, there.Of = cache(object), Of  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, there.__name__, there)
    folder = SimpleNamespace(_basetemp="a folder")
    item: Any = SimpleNamespace(config=SimpleNamespace(_tmp_path_factory=folder))

    def look() -> dict[str, Any]:
        before = [there.one(), Of.other()]
        processes.as_new([item])
        return {"same": [there.one() in before, Of.other() in before], "folder": folder._basetemp}

    assert apart(look, 60) == {"same": [False, False], "folder": None}


def test_watching_goes_on_where_it_was_and_only_what_is_new_is_watched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of three tests one by one; then one of them is another; the modules are what they were. One that dies is left out."""
    monkeypatch.setattr(processes, "ROOT", tmp_path)
    monkeypatch.setattr(reached, "ROOT", tmp_path)
    monkeypatch.setattr(reached, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(reached, "file_of", lambda name: tmp_path / f"{name}.py")
    monkeypatch.setattr(reached, "digest_of_test", lambda test: digests[test])
    monkeypatch.setattr(reached, "CHUNK", -1.0)
    (tmp_path / "test_some.py").write_text("")
    group, played = Group(["engine/text"], []), tmp_path / "played"
    nodes = [f"test_some.py::test_{name}" for name in "abc"]
    digests = dict.fromkeys(nodes, "first")

    def play(items: list[str], watch: Watch, enough: Any) -> None:
        for item in items:
            if item.endswith("_c"):
                os._exit(3)
            with played.open("a") as file:
                file.write(item[-1])
            watch.tests[item] = (0.5, {("engine/text", 7)})
            if enough():
                return

    monkeypatch.setattr(reached, "play", play)
    items: Any = {node: node for node in nodes}

    def look(until: float) -> Any:
        return reached.watched(group, "test_some", items, ["engine/text", "engine/pace"], 1.0, until)

    assert look(0.0)["unseen"] == nodes and not played.exists(), "there was no time"
    found = look(math.inf)
    assert (found["unseen"], found["left"], list(found["seconds"])) == ([], nodes[2:], nodes[:2])
    assert played.read_text() == "ab" and look(math.inf) == found
    digests[nodes[1]] = "other"
    assert look(0.0)["unseen"] == nodes[1:2]
    assert look(math.inf)["unseen"] == [] and played.read_text() == "abb"
    monkeypatch.setattr(reached, "digest", lambda *_: "another module")
    assert look(0.0)["unseen"] == nodes


def test_a_change_that_no_function_takes_is_no_result() -> None:
    tree = ast.parse(source("engine/text").read_text("utf-8"))
    change = next(each for each in changes(tree) if each.lines is not None)
    assert processes.in_place([], ("engine/text", tree, change)) == {"by": processes.UNFIT}


def test_a_module_is_asked_for_by_its_folders_too() -> None:
    assert named("data/operators/near") == {"data/operators/near", "data/operators/", "data/"}


@pytest.mark.drill
def test_a_process_gives_what_it_found_and_what_hangs_or_dies_is_noticed() -> None:
    here = os.getpid()
    assert apart(lambda: {"by": os.getpid() != here}, 60) == {"by": True}
    assert apart(lambda: {"by": time.sleep(600)}, 0.1) == {"by": "a hang"}
    assert apart(lambda: {"by": sum(itertools.count())}, 1) == {"by": "a hang"}
    assert apart(lambda: os._exit(3), 60) == {"by": "a crash"}
    assert apart(lambda: {"by": 1 / 0}, 60) == {"by": "a crash"}


def test_what_does_not_come_is_not_waited_for_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "LATE", 0.01)

    async def until() -> None:
        async with asyncio.timeout(120):
            await asyncio.Event().wait()

    def waits() -> dict[str, Any]:
        processes.impatient()
        ended = 0
        for wait in (until, lambda: asyncio.wait_for(asyncio.Event().wait(), 120)):
            try:
                asyncio.run(wait())
            except TimeoutError:
                ended += 1
        return {"by": ended + asyncio.run(asyncio.wait_for(asyncio.sleep(0, 3), None))}

    assert apart(waits, 60) == {"by": 5}


def test_what_is_kept_is_not_tracked() -> None:
    assert ".mutate/" in (ROOT / ".gitignore").read_text().splitlines()
