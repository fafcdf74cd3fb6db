"""What the pages say of the models."""

from __future__ import annotations

import pytest

from ui import site
from ui.talk import Card


@pytest.mark.parametrize(("chosen", "kept"), [("shallow", "shallow"), ("deep", "auto"), ("auto", "auto")])
def test_a_chosen_depth_stays_where_the_next_model_has_it(chosen: str, kept: str) -> None:
    update = site.depths_of(Card("fish", 384, {"shallow": 1, "full": 4}, "none"), chosen)
    assert update["value"] == kept and kept in [value for _, value in update["choices"]]
