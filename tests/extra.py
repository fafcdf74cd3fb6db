"""Packages of the extra `clients`, which only tests need."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest


def package(name: str) -> Any:
    """The package; the test, or the module that asks for it, is skipped where it is not installed, but never in CI."""
    if "CI_CLIENTS_REQUIRED" in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="`make clients` installs it")
