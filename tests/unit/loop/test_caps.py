"""No key, and no user of one, has most of what a model learns from, however many names the user gives."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UsageError
from shoal.loop import caps
from shoal.loop.capture import Capture
from shoal.loop.cut import TRAIN, Settings, cut
from shoal.loop.labels import CORRECTION, UP, Found, Kept, Labelled, Said, kept_texts, labelled
from shoal.loop.texts import Texts

Clients = Mapping[tuple[str, str], int]  # (key, user) -> rows


def found_of(clients: Clients) -> Found:
    """So many corrected answers of each client."""
    whose = [client for client, count in clients.items() for _ in range(count)]
    kept = [
        Kept(f"id-{i}", [{"role": "user", "content": f"Where is order {i}?"}], "I know", f"{key} {user}", at=i, key=key)
        for i, (key, user) in enumerate(whose)
    ]
    return labelled(kept, {one.id: Said("down", f"It is in box {one.id}.") for one in kept}, {})


def made_of(found: Found, out: Path, **settings: Any) -> tuple[dict[str, Any], Counter[str], Counter[str]]:
    """The manifest of their cut, and the shares of keys and users in what is trained on."""
    made = cut(found, out, Settings(**settings))
    whose = {row.id: row for row in found.rows}
    rows = [whose[json.loads(line)["id"]] for line in (out / TRAIN).read_text().splitlines()]
    return made, Counter(row.key for row in rows), Counter(row.person for row in rows)


def test_one_user_of_3000_among_3232_rows_does_not_own_the_retraining(tmp_path: Path) -> None:
    clients = {("app", "flood"): 3000} | {("app", f"u{i}"): 1 for i in range(232)}
    made, _, users = made_of(found_of(clients), tmp_path / "cut")
    assert max(users.values()) <= 0.1 * users.total(), "of what is left, not of what came in"
    assert users.total() > 150, "the others stay"
    assert made["caps"]["left_out"]["user"] > 2900 and made["caps"]["key"] == {"share": 0.25, "allowed": 1, "keys": 1}
    assert made["caps"]["largest"]["train"] == {"key": 1, "user": round(max(users.values()) / users.total(), 4)}
    assert "no cap for the only key" in caps.line(made["caps"]) and "10%" in caps.line(made["caps"])


def test_sixty_invented_users_of_one_key_have_no_more_than_their_key(tmp_path: Path) -> None:
    honest = {(f"key-{k}", f"u{i}"): 2 for k in range(8) for i in range(5)}
    made, keys, _ = made_of(found_of({("bad", f"invented-{i}"): 50 for i in range(60)} | honest), tmp_path / "cut")
    assert keys["bad"] <= made["caps"]["key"]["allowed"] * keys.total()
    assert made["caps"]["key"]["allowed"] == 0.25 and made["caps"]["left_out"]["key"] > 2900
    assert keys.total() - keys["bad"] > 50, "of the others nothing went"
    assert "25% for a key" in caps.line(made["caps"])


def test_the_same_rows_stay_each_time_the_best_and_newest_of_each(tmp_path: Path) -> None:
    rows = [Labelled([], CORRECTION, person, f"{person}{i}", i, "k") for person in "abc" for i in range(9, -1, -1)]
    rows += [Labelled([], CORRECTION, "d", f"d{i}", i, "k") for i in range(99, -1, -1)]
    kept, left = caps.capped(rows, caps.Shares())
    assert left == {"user": 80} and [row.at for row in kept if row.person == "d"] == [*range(99, 79, -1)]
    clients = {("k", "a"): 300, ("k", "b"): 30, ("l", "c"): 40}
    texts = [cut(found_of(clients), tmp_path / name, Settings(heldout=0)) and (tmp_path / name / TRAIN).read_bytes()
             for name in "xy"]  # fmt: skip
    assert texts[0] == texts[1]


@given(
    clients=st.dictionaries(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from("uvwxyz")), st.integers(1, 60), min_size=1
    ),
    up=st.integers(0, 40),
    own=st.integers(0, 40),
    shares=st.builds(caps.Shares, st.floats(0.05, 1), st.floats(0.05, 1)),
)
def test_shares_hold_of_what_is_left_whoever_asks(clients: Clients, up: int, own: int, shares: caps.Shares) -> None:
    rows = [Labelled([], CORRECTION, f"{key}{user}", f"{key}{user}{i}", i, key)
            for (key, user), count in clients.items() for i in range(count)]  # fmt: skip
    rows += [Labelled([], UP, "au", f"up{i}", i, "a") for i in range(up)]
    rows += [Labelled([], CORRECTION, "imported", "", i) for i in range(own)]
    kept = caps.to_train_on(rows, 0.2, shares, found := Found())
    captured = [row for row in kept if row.id]
    keys = Counter(row.key for row in captured)
    assert captured and len(kept) - len(captured) == own, "an operator's own are not capped"
    assert all(count <= caps.allowed(shares.key, len(keys)) * len(kept) + 1e-6 for count in keys.values())
    for key, of in keys.items():
        users = Counter(row.person for row in captured if row.key == key)
        assert all(count <= caps.allowed(shares.user, len(users)) * of + 1e-6 for count in users.values())
    assert sum(row.label == UP for row in kept) <= 0.25 * sum(row.label != UP for row in kept) + 1
    assert len(rows) - len(kept) == sum(found.left_out.values()), "each that goes is counted"


def test_few_users_of_one_key_keep_nearly_all(tmp_path: Path) -> None:
    """An internal deployment: one key, five users, of whom one has asked little."""
    clients = {("app", f"u{i}"): 100 for i in range(4)} | {("app", "late"): 3}
    made, _, users = made_of(found_of(clients), tmp_path / "cut", heldout=0)
    assert users.total() == 403 and not any(made["caps"]["left_out"].values())


def test_a_text_that_was_kept_says_of_which_key_it_is(tmp_path: Path) -> None:
    capture = Capture(tmp_path, create=True)
    answer = {"id": f"chatcmpl-{'a' * 32}", "choices": [{"message": {"content": "Here."}}]}
    Texts(capture).put("owner-of-a-key", "ann", [{"role": "user", "content": "Where?"}], answer, {})
    (one,) = kept_texts(capture)
    assert (one.key, one.subject) == ("owner-of-a-key", "ann")
    assert labelled([one], {one.id: Said("up")}, {}).rows[0].key == "owner-of-a-key"


@pytest.mark.parametrize("value", [0.0, -1.0, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(UsageError, match="--user-share"):
        caps.Shares(user=value)
