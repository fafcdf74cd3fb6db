"""The pages import gradio without what it does for editors."""

from __future__ import annotations

import importlib.util
import sys

import pytest

import ui

pytest.importorskip("gradio")


def test_no_component_s_source_is_taken_apart_for_a_stub(monkeypatch: pytest.MonkeyPatch) -> None:
    finder = ui._NoStubs()
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert finder.find_spec("gradio.events", None) is None and finder in sys.meta_path
    found = finder.find_spec("gradio.component_meta", None)
    assert found is not None and found.loader is not None and finder not in sys.meta_path
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    made.create_or_modify_pyi(None, "a class of no file", [])
    assert made.ComponentMeta.__module__ == "gradio.component_meta", "the rest is gradio's"
