"""What an engine refuses before it begins, of its own settings."""

from __future__ import annotations

from typing import Any

import pytest

from shoal import Engine, Model
from shoal.errors import ConfigError

MODEL = Model.from_preset("test", seed=3)
PAGE = MODEL.config.page


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"max_batch": 0}, "max_batch: got 0; allowed: 1 or more"),
        ({"max_queue": 0}, "max_queue: got 0; allowed: 1 or more"),
        (
            {"max_batch": 3, "max_batch_tokens": 2 + PAGE},
            f"max_batch_tokens: got {2 + PAGE}; allowed: {3 + PAGE} or more",
        ),
        ({"units": 1}, "units: got 1; allowed: 2 or more"),
        ({"speculative": -1}, "speculative: got -1; allowed: 0 to 16"),
        ({"speculative": 17}, "speculative: got 17"),
        ({"compute_budget": 0}, "compute_budget: got 0; allowed: above 0, at most 1"),
        ({"compute_budget": 1.01}, "compute_budget: got 1.01"),
        ({"compute_budget": 1}, "compute_budget: got 1; fit a router first"),
    ],
)
def test_settings_that_cannot_work_are_named(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Engine(MODEL, **{"units": 8, **given})
    assert str(caught.value).startswith(says)
