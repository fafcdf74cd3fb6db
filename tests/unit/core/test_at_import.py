"""Modules are changed in every test, also where the test itself is the first to import them."""

from __future__ import annotations

import asyncio
import gc
import importlib
import inspect
import socketserver
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.at_import import LOOK_SECONDS, AtImport, changed, compiled_once, one_thread, soon_left


def test_who_imports_it_first_has_one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weaver.py").write_text("threads = 2\n\ndef set_num_threads(n):\n    global threads\n    threads = n\n")
    finder = AtImport("weaver", one_thread)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    made = importlib.import_module("weaver")
    assert made.threads == 1 and finder not in sys.meta_path
    made.set_num_threads(2)
    assert sys.modules.pop("weaver").threads == 2, "what a test chooses stays"


def test_what_was_imported_before_is_changed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make mutate` imports torch, before it collects tests."""
    asked: list[int] = []
    monkeypatch.setitem(sys.modules, "weaver", SimpleNamespace(set_num_threads=asked.append))
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    changed({"weaver": one_thread, "weaver_of_nobody": one_thread})
    assert asked == [1] and sum(isinstance(each, AtImport) for each in sys.meta_path[:1]) == 1


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


def test_servers_look_often_whether_they_are_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is waited for so long when its test ends, and none is timed: by what they would wait."""
    waited, server = list[float](), SimpleNamespace()
    soon_left(server)  # type: ignore[arg-type]
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: asyncio.wait_for(looked(seconds), None))

    async def looked(seconds: float) -> None:
        waited.append(seconds)

    for seconds in (0.1, 0.0):
        asyncio.run(server.asyncio.sleep(seconds))
    assert waited == [LOOK_SECONDS, 0.0] and server.asyncio.wait_for is asyncio.wait_for
    uvicorn, werkzeug = (importlib.import_module(name) for name in ("uvicorn.server", "werkzeug.serving"))
    assert uvicorn.asyncio is not asyncio and isinstance(uvicorn.asyncio.CancelledError, type)
    for each in (socketserver.BaseServer, werkzeug.BaseWSGIServer):
        assert inspect.signature(each.serve_forever).parameters["poll_interval"].default == LOOK_SECONDS
