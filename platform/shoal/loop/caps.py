"""Caps on what one client may have of a set: each API key has at most a share of it, then within a key each user.

`user` is what a client says, so sixty users of one key are one client's, and have together no more than their key may have.
Shares are of what is left, not of what came in. Where there are few, nobody is held to less than twice the mean of the others:
of two keys one may have two thirds, of three a half; one alone is not capped. Rows that are of no request, such as
an operator's own labels, are not capped, and count in the set.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import UsageError
from shoal.loop.labels import UP, Found, Labelled

BEYOND_KEY, BEYOND_USER = "beyond the share of a key", "beyond the share of a user"


@dataclass(frozen=True)
class Shares:
    """The largest share of a set that one key, and of a key's rows that one user may have; 1: all."""

    key: float = 0.25
    user: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("--key-share", self.key), ("--user-share", self.user)):
            if not 0 < value <= 1:
                raise UsageError(name, got=value, allowed="above 0, and at most 1, which does not cap")


def allowed(share: float, among: int) -> float:
    """The share that one of so many may have: `share`, or twice the mean of the others, which is more where there are few."""
    return max(share, 2 / (among + 1))


def most(counts: Collection[int], share: float, beside: int = 0) -> int:
    """How many each may have for no one to have more than its `allowed` share of what is left then; `beside` are not capped.

    Examples:
        >>> from shoal.loop.caps import most
        >>> most([3000] + [1] * 232, 0.1), most([3000, 232], 0.25), most([3000], 0.25)
        (25, 464, 3000)
    """
    share = allowed(share, len(counts))

    def too_many(each: int) -> bool:
        return each > share * (beside + sum(min(count, each) for count in counts)) + 1e-9

    largest = max(counts, default=0)
    return bisect_right(range(1, largest + 1), False, key=too_many)


def capped(rows: Sequence[Labelled], shares: Shares) -> tuple[list[Labelled], Counter[str]]:
    """The `rows` that stay, and how many are beyond the share of a key and of a user. Of a user the first stay; of a key the
    first of each user, then the second of each, and so on."""
    left, kept, count = Counter[str](), list(rows), -1
    while count != len(kept):  # who is cut makes the others' shares larger
        count = len(kept)
        few = _by_key(kept, shares.key)
        fewer = _by_user(few, shares.user)
        left += Counter({"key": count - len(few), "user": len(few) - len(fewer)})
        kept = fewer
    return kept, left


def _by_key(rows: Sequence[Labelled], share: float) -> list[Labelled]:
    counts = Counter(_key(row) for row in rows if row.id)
    each = most(counts.values(), share, len(rows) - counts.total())
    turns, turn = Counter[str](), dict[int, int]()
    for row in rows:
        turn[id(row)] = turns[row.person]
        turns[row.person] += 1
    seen, gone = Counter[str](), set[int]()
    for row in sorted(rows, key=lambda row: turn[id(row)]):
        seen[row.key] += bool(row.id)
        if row.id and seen[row.key] > each:
            gone.add(id(row))
    return [row for row in rows if id(row) not in gone]


def _by_user(rows: Sequence[Labelled], share: float) -> list[Labelled]:
    users = defaultdict[str, Counter[str]](Counter)
    for row in rows:
        if row.id:
            users[row.key][row.person] += 1
    each = {key: most(counts.values(), share) for key, counts in users.items()}
    seen, kept = Counter[tuple[str, str]](), list[Labelled]()
    for row in rows:
        seen[row.key, row.person] += bool(row.id)
        if not row.id or seen[row.key, row.person] <= each[row.key]:
            kept.append(row)
    return kept


def within(rows: Sequence[Labelled], shares: Shares, found: Found | None = None) -> list[Labelled]:
    """As `capped`; what is left out is counted in `found`."""
    kept, left = capped(rows, shares)
    if found is not None:
        found.leave(BEYOND_KEY, left["key"])
        found.leave(BEYOND_USER, left["user"])
    return kept


def to_train_on(rows: Sequence[Labelled], up: float, shares: Shares, found: Found) -> list[Labelled]:
    """As `within`, and of these at most the share `up` are the model's own answers, the newest."""
    kept, count = list(rows), -1
    while count != len(kept):
        count = len(kept)
        kept = within(_few_liked(kept, up, found), shares, found)
    return kept


def _few_liked(rows: list[Labelled], up: float, found: Found) -> list[Labelled]:
    own = [row for row in rows if row.label == UP]
    others = len(rows) - len(own)
    most_own = len(own) if up >= 1 else int(up * others / (1 - up))
    dropped = {id(row) for row in own[most_own:]}
    found.leave("liked, but too many of these", len(dropped))
    return [row for row in rows if id(row) not in dropped]


def _key(row: Labelled) -> str:
    return row.key


def _user(row: Labelled) -> tuple[str, str]:
    return row.key, row.person


def told(train: Sequence[Labelled], recent: Sequence[Labelled], shares: Shares, found: Found) -> dict[str, Any]:
    """What a manifest says of the caps, and of the largest shares that are left."""
    keys = len({row.key for row in train if row.id})
    return {
        "key": {"share": shares.key, "allowed": round(allowed(shares.key, keys), 4), "keys": keys},
        "user": {"share": shares.user},
        "left_out": {"key": found.left_out.get(BEYOND_KEY, 0), "user": found.left_out.get(BEYOND_USER, 0)},
        "largest": {"train": _largest(train), "recent": _largest(recent)},
    }


def _largest(rows: Sequence[Labelled]) -> dict[str, float]:
    keys, users = (Counter(name(row) for row in rows if row.id) for name in (_key, _user))
    return {
        name: round(max(counts.values(), default=0) / max(len(rows), 1), 4)
        for name, counts in (("key", keys), ("user", users))
    }


def line(caps: Mapping[str, Any]) -> str:
    """The same for the terminal."""
    key, left, largest = caps["key"], caps["left_out"], caps["largest"]["train"]
    by_key = f"{key['allowed']:.0%} for a key" if key["keys"] > 1 else "no cap for the only key"
    return (
        f"caps: {by_key}, {caps['user']['share']:.0%} of its key's rows for a user (of few: twice the others' mean); "
        f"left out {left['key']} rows of keys and {left['user']} of users beyond; "
        f"the largest key now has {largest['key']:.0%} of what is trained on, the largest user {largest['user']:.0%}"
    )
