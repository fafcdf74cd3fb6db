"""What goes from the host to a device, with a GPU that is pretended (`tests/pretend_gpu.py`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shoal.model.sending import pins, send, sent
from tests import pretend_gpu


def test_what_is_sent_is_not_waited_for_and_may_be_changed_at_once() -> None:
    values = np.array([3, 1, 2])
    with pretend_gpu.pretended() as gpu:
        made: Any = sent(values, gpu)
        into: Any = torch.zeros(3, dtype=torch.int64, device=gpu)
        few: Any = sent([1.5, 2.5], gpu, torch.float64)
        pretend_gpu.waited.clear()
        send(values, into)
        assert pretend_gpu.waited == [], "a graph's step would stand still for each"
        assert len(pretend_gpu.copying) == 3, "of what was sent before nobody waited either"
        values[:] = 9
        pretend_gpu.wait("the end of the step")
    assert made.held.tolist() == into.held.tolist() == [3, 1, 2]
    assert (few.held.tolist(), few.dtype) == ([1.5, 2.5], torch.float64)


def test_on_a_cpu_an_array_is_seen_and_nothing_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    here, values = torch.device("cpu"), np.array([3, 1, 2])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not pins(here) and pins(torch.device("cuda")) and not pins(torch.device("meta"))
    seen = sent(values, here)
    values[0] = 7
    assert seen.tolist() == [7, 1, 2]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not pins(torch.device("cuda"))
