import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.neighbours import end_what_is_not_asked_for

if os.environ.get("PYTEST_XDIST_WORKER", "gw0") != "gw0":
    # numba's folder is not made for several processes: each but the first, with what it starts, has one of its own
    own = Path(__file__).parents[1] / ".pytest_cache" / f"numba-{os.environ['PYTEST_XDIST_WORKER']}"
    os.environ.setdefault("NUMBA_CACHE_DIR", str(own))

torch.set_num_threads(1)  # two compute threads on two cores stall each other as soon as anything else runs
# Nothing is timed: a busy machine must not fail a test.
settings.register_profile("shoal", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shoal")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    try:
        return (yield)
    finally:
        end_what_is_not_asked_for(item, nextitem)
