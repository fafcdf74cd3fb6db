"""What the pages say of the models."""

from __future__ import annotations

import pytest

from ui import site
from ui.talk import Card


@pytest.mark.parametrize(("chosen", "kept"), [("shallow", "shallow"), ("deep", "auto"), ("auto", "auto")])
def test_a_chosen_depth_stays_where_the_next_model_has_it(chosen: str, kept: str) -> None:
    update = site.depths_of(Card("fish", 384, {"shallow": 1, "full": 4}, "none"), chosen)
    assert update["value"] == kept and kept in [value for _, value in update["choices"]]


def test_the_choices_of_depth_say_what_adapted_exits_are_worth() -> None:
    card = Card("fish", 384, {"shallow": 1, "full": 4}, "none", {"minutes": 2.0, "agreement": {"shallow": 0.356}})
    update = site.depths_of(card, "auto")
    labels = [label for label, _ in update["choices"]]
    assert "shallow, 1 of 4 layers, full depth's word at 36% of places" in labels and "full, 4 of 4 layers" in labels
    assert "for 2 minutes" in update["info"] and "shoal assistant --adapt 60" in update["info"]
    assert not site.depths_of(Card("fish", 384, {"shallow": 1, "full": 4}, "none"), "auto")["info"]
