"""A clock for one module. `time` is one for the whole process: who sets what is in it sets it for every event loop of a service
that lives beside the test, whose timers then wait for a time that does not come."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest


def tells(patch: pytest.MonkeyPatch, module: str, **functions: Callable[..., object]) -> None:
    """Gives the `module` of this dotted name, which says ``import time``, a `time` of its own with other `functions`."""
    patch.setattr(f"{module}.time", SimpleNamespace(**{**vars(time), **functions}))
