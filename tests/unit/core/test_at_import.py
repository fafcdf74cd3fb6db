"""Modules are changed in every test, also where the test itself is the first to import them."""

from __future__ import annotations

import gc
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.at_import import AtImport, compiled_once, one_thread


def test_who_imports_it_first_has_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weaver.py").write_text("threads = 2\n\ndef set_num_threads(n):\n    global threads\n    threads = n\n")
    finder = AtImport("weaver", one_thread)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    made = importlib.import_module("weaver")
    assert made.threads == 1 and finder not in sys.meta_path
    made.set_num_threads(2)
    assert sys.modules.pop("weaver").threads == 2, "what a test chooses stays"


def test_a_package_that_is_not_there_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [AtImport("weaver_of_nobody", one_thread), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("weaver_of_nobody")


def test_this_process_asked_for_it() -> None:
    torch = importlib.import_module("torch")
    assert torch.get_num_threads() == 1


def test_all_runs_of_this_process_have_one_rate_of_matrix_products() -> None:
    torch, loop = importlib.import_module("torch"), importlib.import_module("shoal.train.loop")
    assert loop.matmul_rate(torch.device("cpu")) == loop.matmul_rate(torch.device("cpu"))


def test_what_an_engine_runs_when_it_is_made_runs_once_for_each_kind() -> None:
    ran, kinds = list[str](), ("a", "b", "a")
    runner = SimpleNamespace(Runner=type("Runner", (), {"_compile": lambda self: ran.append(self.config)}))
    compiled_once(runner)  # type: ignore[arg-type]
    for dtype in (1, 2):
        for kind in kinds:
            made = runner.Runner()
            made.config, made.net, made.device = kind, SimpleNamespace(dtype=dtype), "cpu"
            made.cache = SimpleNamespace(kv=SimpleNamespace(dtype=dtype))
            made._compile()
    assert ran == ["a", "b", "a", "b"]


def test_what_all_files_have_imported_stays_hidden_from_the_collector_where_a_service_settles() -> None:
    hidden = gc.get_freeze_count()
    importlib.import_module("shoal.engine.front").settle()
    assert 0.9 * hidden < gc.get_freeze_count() <= hidden, "some of it goes when nobody has it any more"
