"""The pages. They speak only HTTP to the API, through the `openai` client; gradio is imported nowhere else."""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: without it the page asks the internet


class _NoStubs(importlib.abc.MetaPathFinder):
    """Whenever it is imported gradio takes the source of each of its components apart, and writes a stub for editors beside it:
    two fifths of the time that its import takes."""

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != "gradio.component_meta":
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found is not None and found.loader is not None:
            run = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                module.create_or_modify_pyi = lambda *_: None  # type: ignore[attr-defined]

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


sys.meta_path.insert(0, _NoStubs())
