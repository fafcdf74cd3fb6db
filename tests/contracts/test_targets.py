"""Every test is selected by exactly one command of the Makefile's targets: none is dropped, and none takes its time twice.
`.ci/run` runs `make test` and `make smoke`, which is a part of the others; `make nightly` runs the others."""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from _pytest.mark.expression import Expression

ROOT = Path(__file__).parents[2]
TARGETS = ("test", "drills", "test-vllm", "test-triton")
SMOKE_FOLDERS = ("browser", "contracts", "flows", "on_ray", "triton")
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


def commands(makefile: str) -> Iterator[tuple[str, list[str]]]:
    """(target, words after ``-m pytest``) of every command that runs pytest, variables filled in."""
    values = dict(re.findall(r"^(\w+) \??= (.*)$", makefile, re.MULTILINE))
    target = ""
    for line in makefile.splitlines():
        if head := re.match(r"([a-z-]+):", line):
            target = head[1]
        if line.startswith("\t"):
            while re.search(r"\$\((\w+)\)", line):
                line = re.sub(r"\$\((\w+)\)", lambda name: values.get(name[1], ""), line)
            if "-m pytest" in line:
                words = shlex.split(line.partition("-m pytest")[2].partition("||")[0])
                yield target, words


_read = functools.cache(Expression.compile)  # four of them, and thousands of tests


def selects(words: list[str], file: str, marks: set[str]) -> bool:
    """Whether pytest with `words` runs a test of `file` (from the root) that has `marks`."""
    where, without, wanted, take = [], [], "", iter(words)
    for word in take:
        if word == "-m":
            wanted = next(take)
        elif word in ("-n", "--dist", "--timeout"):
            next(take)
        elif word.startswith("--ignore="):
            without.append(word.removeprefix("--ignore="))
        else:
            assert not word.startswith("-"), f"what does {word} select?"
            where.append(word)
    inside = [any(Path(file).is_relative_to(folder) for folder in folders) for folders in (where or ["tests"], without)]
    return inside == [True, False] and (not wanted or _read(wanted).evaluate(lambda name: name in marks))


@functools.cache  # what is found, and not the trees: of all tests they are millions of objects
def read(text: str) -> tuple[list[tuple[str, set[str]]], list[bool]]:
    """(name, marks) of every test function of a module; and of each whether all its cases are drills."""
    module = ast.parse(text)
    shared = {mark for node in module.body for mark in marks(node) if isinstance(node, ast.Assign)}

    def within(body: list[ast.stmt], above: set[str]) -> Iterator[tuple[str, set[str], bool]]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test"):
                every_case = any(ast.unparse(by) == "pytest.mark.drill" for by in node.decorator_list)
                yield node.name, above | {mark for each in node.decorator_list for mark in marks(each)}, every_case
            elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
                own = {mark for each in node.decorator_list for mark in marks(each)}
                yield from within(node.body, above | own)

    found = list(within(module.body, shared))
    return [(name, has) for name, has, _ in found], ["drill" in shared or drill for *_, drill in found]


def marked(text: str) -> list[tuple[str, set[str]]]:
    return read(text)[0]


def drilled(text: str) -> list[bool]:
    return read(text)[1]


def marks(node: ast.AST) -> set[str]:
    """Names of the ``pytest.mark.NAME`` in a decorator, or in what is assigned to ``pytestmark``."""
    if isinstance(node, ast.Assign) and [getattr(target, "id", "") for target in node.targets] != ["pytestmark"]:
        return set()
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute) and is_mark(each.value)}


def is_mark(node: ast.expr) -> bool:
    """Is it ``pytest.mark``?"""
    return isinstance(node, ast.Attribute) and node.attr == "mark" and getattr(node.value, "id", "") == "pytest"


MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS = [(target, words) for target, words in commands(MAKEFILE) if target != "smoke"]


def test_the_targets_that_run_tests_are_known_and_ci_or_the_nightly_run_has_each() -> None:
    assert {target for target, _ in COMMANDS} == set(TARGETS)
    in_ci = re.findall(r"^make ([a-z -]+)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    at_night = re.search(r"^nightly:([a-z -]+)##", MAKEFILE, re.MULTILINE)
    assert at_night is not None and {"test", "smoke"} <= {target for line in in_ci for target in line.split()}
    assert {"test", *at_night[1].split()} == {*TARGETS, "simulations"}


def test_ci_runs_one_drill_of_each_kind_at_least() -> None:
    """Marked test by test, so that a new one of a file that is all drills is not run by CI by accident."""
    smoke = {file: [has for _, has in marked((ROOT / file).read_text()) if "smoke" in has] for file in FILES}
    assert [
        file for file, found in smoke.items() for has in found if "drill" not in has and "/triton/" not in file
    ] == []
    for folder in SMOKE_FOLDERS:
        assert any(found for file, found in smoke.items() if file.startswith(f"tests/{folder}/")), folder


def test_every_test_is_run_by_exactly_one_command() -> None:
    wrong = list[str]()
    for file in FILES:
        found = dict(marked((ROOT / file).read_text())) or {"what the file makes": set[str]()}
        by = {
            some: [target for target, words in COMMANDS if selects(words, file, set(some))]
            for some in {frozenset(has) for has in found.values()}
        }
        for name, has in found.items():
            who = by[frozenset(has)]
            wrong += [f"{file}: {name} with {sorted(has)} is run by {who}"] * (len(who) != 1)
    assert wrong == []


def test_what_make_test_keeps_has_a_real_path_of_each_kind() -> None:
    """Plans of training that a real Ray refuses, serving on it, and the pages in a real browser. That ranks train is held
    without it (`unit/train/test_parallel.py`)."""
    for place, mark in (("on_ray/test_train", "ray"), ("on_ray/test_serve", "ray"), ("browser/", "browser")):
        kept = [
            name
            for file in FILES
            if file.startswith(f"tests/{place}")
            for name, has in marked((ROOT / file).read_text())
            if mark in has and "drill" not in has
        ]
        assert kept, place


def test_of_every_plane_by_itself_make_test_keeps_a_test_of_each_file() -> None:
    """Where one takes long it is a drill, and a quicker one stays beside it (CONTRIBUTING.md)."""
    units = [file for file in FILES if file.startswith("tests/unit/")]
    assert [file for file in units if (found := drilled((ROOT / file).read_text())) and all(found)] == []


def test_a_drill_is_one_with_all_its_cases() -> None:
    case = '@pytest.mark.parametrize("a", [1, pytest.param(2, marks=pytest.mark.drill)])\ndef test_a(a): ...\n'
    assert drilled(f"{case}@pytest.mark.drill\n@pytest.mark.timeout(9)\ndef test_b(): ...\n") == [
        False,
        True,
    ]
    assert drilled(f"pytestmark = pytest.mark.drill\n{case}def helper(): ...\n") == [True]


def test_the_marks_of_a_test_are_found() -> None:
    text = """
pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
@pytest.mark.drill
@pytest.mark.parametrize("a", [1])
async def test_a(): ...
class TestB:
    def test_b(self): ...
def helper(): ...
"""
    assert dict(marked(text)) == {"test_a": {"ray", "timeout", "drill", "parametrize"}, "test_b": {"ray", "timeout"}}


def test_what_a_command_selects_is_understood() -> None:
    makefile = (
        'A = ray\nRUN = python -m pytest --ignore=tests/c\ntest: x  ## y\n\t@$(RUN) -n 2 -m "not ($(A))" || s=$?\n'
    )
    ((target, words),) = commands(makefile)
    assert target == "test"
    assert selects(words, "tests/a/test_b.py", set()) and not selects(words, "tests/a/test_b.py", {"ray"})
    assert not selects(words, "tests/c/test_b.py", set()), "it is ignored"
    assert not selects(["tests/a"], "tests/c/test_b.py", set()) and selects(["tests/a"], "tests/a/test_b.py", {"ray"})
