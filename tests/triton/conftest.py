"""The Triton kernels on this CPU, in Triton's interpreter; `make test-triton` runs them. It must be on before Triton is
imported, so these tests have a process of their own, and are skipped in any other."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

from shoal.model.cpu import fused
from shoal.model.gpu import launch
from tests.triton.seen import Seen

LACKS = None
if importlib.util.find_spec("triton") is None:
    LACKS = "Triton is not installed: pip install '.[gpu]'"
elif os.environ.get("TRITON_INTERPRET") != "1":
    LACKS = "runs with TRITON_INTERPRET=1 alone: make test-triton"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors of the CPU take the way of those of a GPU."""
    if LACKS:
        pytest.skip(LACKS)
    monkeypatch.setattr(launch, "ON", {"cpu"})
    monkeypatch.setattr(fused, "usable", lambda x: False)
    monkeypatch.setattr(fused, "few", lambda rows: False)
    yield


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    from shoal.model.gpu import attention

    made = Seen(attention._attend)
    monkeypatch.setattr(attention, "_attend", made)
    return made
