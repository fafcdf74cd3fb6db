"""One Ray for neighbouring files, since starting one takes longer than most of what runs on it."""

from __future__ import annotations

import pytest

from shoal.on_ray.resources import local_ray
from tests.neighbours import lend


@pytest.fixture(scope="module")
def shared_ray(request: pytest.FixtureRequest) -> None:
    """A local Ray that this process is connected to. What a file serves there ends with the file. Files that need another
    environment, or no Ray, do not ask for it: it ends before them."""
    lend(request, local_ray())
