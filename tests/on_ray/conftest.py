"""One Ray for neighbouring files, since starting one takes longer than most of what runs on it."""

from __future__ import annotations

import pytest

from shoal.on_ray.resources import local_ray
from tests.neighbours import lend


@pytest.fixture(scope="module")
def cluster(request: pytest.FixtureRequest) -> None:
    """A local Ray. A file that serves or stores on it leaves nothing there. One that needs another environment or no Ray does
    not ask for it, and this one then ends before."""
    lend(request, local_ray())
