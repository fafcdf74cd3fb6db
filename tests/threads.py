"""One compute thread for the process of the tests: two on two cores stall each other as soon as anything else runs. Who needs
no torch does not wait for it, and processes that tests start choose for themselves."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType


class OneThread(importlib.abc.MetaPathFinder):
    """At the head of `sys.meta_path`: the package `name` computes with one thread, whoever imports it and when."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found is not None and found.loader is not None:
            run = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                module.set_num_threads(1)

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found
