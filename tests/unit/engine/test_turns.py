"""Turns of payers and clients: each has the next of its own, however much another has."""

from __future__ import annotations

import pytest

from shoal.engine.turns import Turns


def filled(*puts: str) -> Turns[str]:
    """`puts` are payer, client and the item's own letter."""
    turns = Turns[str]()
    for item in puts:
        turns.put(item, item[0], item[1])
    return turns


def test_payers_take_turns_and_of_each_its_clients() -> None:
    turns = filled("Axa", "Axb", "Axc", "Aya", "Bxa", "Bxb", "Cza")
    assert len(turns) == 7
    order = [turns.take() for _ in range(7)]
    assert order == ["Axa", "Bxa", "Cza", "Aya", "Bxb", "Axb", "Axc"]
    assert len(turns) == 0
    with pytest.raises(IndexError):
        turns.take()


def test_who_comes_again_and_again_comes_after_who_waits() -> None:
    turns = filled("Axa", "Bxa", "Bxb")
    order = []
    for again in range(4):
        order.append(turns.take())
        turns.put(f"Ax{again}", "A", "x")
    assert order == ["Axa", "Bxa", "Ax0", "Bxb"]


def test_the_last_of_who_has_most_gives_its_place() -> None:
    turns = filled("Axa", "Axb", "Aya", "Axc", "Bxa", "Bxb")
    assert turns.give_place("C") == "Axc"  # of the client that has most
    assert turns.give_place("B", "x") is None  # which would have as many as A, and has no other client
    assert turns.give_place("C") in ("Axb", "Aya")
    assert len(turns) == 4
    assert Turns[str]().give_place("A") is None


def test_what_was_taken_counts_no_more() -> None:
    turns = filled("Axa", "Axb", "Axc", "Bxa")
    assert turns.take() == "Axa"
    assert turns.give_place("B") is None and turns.give_place("C") == "Axc"
    assert [turns.take() for _ in range(len(turns))] == ["Bxa", "Axb"]
    assert Turns[str]().give_place("A") is None


def test_the_last_of_who_has_most_is_given_back_whoever_asks() -> None:
    turns = filled("Bxa", "Axa", "Ayb", "Aya", "Bxb")
    assert [turns.give_last() for _ in range(2)] == ["Aya", "Bxb"], "of the client that has most of it"
    assert len(turns) == 3 and Turns[str]().give_last() is None


def test_of_one_payer_the_client_that_has_most_gives_its_last_place() -> None:
    """Without keys all are of one payer, and one address could have all places for as long as it liked."""
    turns = filled("Axa", "Axb", "Axc", "Aya", "Bxa", "Bxb")
    assert turns.give_place("A", "z") == "Axc"
    assert turns.give_place("A", "y") is None  # which would have as many as x
    assert turns.give_place("A", "x") is None
    assert turns.give_place("A", "z") in ("Axb", None)


def test_a_place_is_given_by_who_has_two_more_and_of_others_to_the_last_one() -> None:
    """With the newcomer, who asks would have as many as who has one more."""
    assert filled("Axa").give_place("B") is None
    assert filled("Axa", "Aya").give_place("B") == "Axa", "the larger payer's, though each of its clients has one"
    assert filled("Axa", "Axb", "Bxa").give_place("B") is None
    assert filled("Axa", "Axb", "Axc", "Bxa").give_place("B") == "Axc"
    assert filled("Axa").give_place("A", "y") is None
    assert filled("Axa", "Axb").give_place("A", "y") == "Axb"
