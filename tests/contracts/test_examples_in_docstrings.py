"""The examples in the docstrings of the public names, run as they stand there (docs/reference/python.md shows them)."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import shoal

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "python.md"
SHOWN = re.findall(r"^::: (\S+)", PAGE.read_text(), re.MULTILINE)
WITH_EXAMPLES = [*shoal.__all__, "Guide", "load"]


def module_of(name: str) -> ModuleType:
    """The module that a dotted name of the page lies in, or is."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return importlib.import_module(name.rpartition(".")[0])


MODULES = sorted({module_of(name).__name__ for name in SHOWN})


def examples(module: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("name", SHOWN)
def test_what_the_page_shows_is_there_and_says_what_it_is(name: str) -> None:
    module = module_of(name)
    shown = module if module.__name__ == name else getattr(module, name.rpartition(".")[2])
    assert shown.__doc__


@pytest.mark.parametrize("module", MODULES)
def test_examples_give_what_they_say(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # some write a model
    for test in examples(module):
        said: list[str] = []
        result = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
        assert result.failed == 0, "".join(said)


def test_the_public_names_have_examples() -> None:
    having = {test.name for module in MODULES for test in examples(module)}
    for name in WITH_EXAMPLES:
        assert any(re.search(rf"\.{name}(\.|$)", where) for where in having), f"{name}: no example"
