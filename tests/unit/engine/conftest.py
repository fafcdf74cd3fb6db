from __future__ import annotations

import pytest

from shoal.engine import graphs
from shoal.model.cpu import fused


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled loops of a CPU are no part of it, and tables of several widths are recorded."""
    monkeypatch.setattr(fused, "usable", lambda x: False)
    monkeypatch.setattr(fused, "few", lambda rows: False)
    monkeypatch.setattr(graphs, "LEAST_TOKENS", 16)
