"""Packages of the extra `clients`, and commands beside them, which only tests need."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest


def package(name: str) -> Any:
    """The package; the test, or the module that asks for it, is skipped where it is not installed, but never in CI."""
    if "CI_CLIENTS_REQUIRED" in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="`make clients` installs it")


def guidellm() -> str:
    """The command, in an environment of its own: it wants other versions than are tested together here. Skips and fails as
    `package` does."""
    own = Path(__file__).parents[1] / ".venv-guidellm" / "bin"
    found = shutil.which("guidellm", path=f"{own}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None and "CI_CLIENTS_REQUIRED" not in os.environ:
        pytest.skip("`make clients` installs guidellm")
    assert found is not None, "guidellm is not installed"
    return found
