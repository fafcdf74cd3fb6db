"""A cut: what one retraining learns from, and what it is measured on afterwards; written once, and never changed.

    CUT/  train.jsonl      labelled chats, then as many of the old mix (replay), so that what was learned stays
          recent.jsonl     chats of other people, held out: a suite for the gate ("recent-...")
          cut.json         last: counts, hashes of both files, of the requests and of the people in them, settings

People are split, never rows: two wordings of one person's question are on one side. What a suite asks, or an earlier cut held
out, is not trained on; and who was trained on by an earlier cut is not held out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shoal.data.chats.rows import group_of, is_augmented, lines, task_of
from shoal.data.documents import Document
from shoal.data.operators.grams import words
from shoal.data.operators.near import BANDS, LEAST_WORDS, WIDTH, nearly_equal, signature
from shoal.errors import DataError, ResourceError, UsageError
from shoal.evaluate.halves import asked_groups
from shoal.loop import caps, suites
from shoal.loop.asked import Asked, asked_in, asks, chats_of, user
from shoal.loop.labels import LABELS, UP, Found, Labelled
from shoal.loop.paired import LEAST_RECENT
from shoal.machine import see_on_disk, sha256_of, write_aside, write_json

FORMAT, VERSION = "shoal.cut", 1
TRAIN, RECENT, MANIFEST = "train.jsonl", "recent.jsonl", "cut.json"
REPLAY = "replay"
NAME = re.compile(r"[0-9a-f]{16}")  # of `name_of`
LEARNED = 2.0  # the draw of who was trained on: above any share


@dataclass(frozen=True)
class Settings:
    """How a cut is made."""

    # share of the people that are held out; None: a fifth, or what the gate asks for (`_share`)
    heldout: float | None = None
    up: float = 0.2  # share of the rows to train on that may be the model's own answers, liked
    # rows of the old mix for each new one; fewer are known by heart before they hold anything back
    replay: float = 10.0
    seed: int = 0
    shares: caps.Shares = field(default_factory=caps.Shares)  # that one key, and one user, may have of either file

    def __post_init__(self) -> None:
        given = (("--heldout", self.heldout or 0.0, 0.9), ("--up", self.up, 1.0), ("--replay", self.replay, 100))
        for name, value, most in given:
            if not 0 <= value <= most:
                raise UsageError(name, got=value, allowed=f"0 to {most:g}")


@dataclass(frozen=True)
class Learned:
    """What earlier cuts trained on."""

    people: Collection[str] = ()  # their names (`name_of`)
    asked: Asked = field(default_factory=Asked)

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row that is held out was trained on: of such a person, or asked by one."""
        return person_of(row) in self.people or self.asked.holds(asked_in(row))


def cut(
    found: Found,
    out: Path,
    settings: Settings,
    *,
    replay: Path | None = None,
    never: Asked | None = None,
    before: Asked | None = None,
    learned: Learned | None = None,
    told: Any = None,
) -> dict[str, Any]:
    """Write the cut of the labelled rows in `found` to the folder `out`, and return its manifest. `replay`: the chats of the
    old mix; `never`: what is not in it at all; `before`: what is not trained on, and may be held out again; `learned`: what is
    not held out; `told`: what is kept in the manifest beside. Raises DataError where `out` exists, and where nothing is left to
    train on."""
    if out.exists():
        raise DataError(f"{out} exists", do="choose another --out: a cut is never changed")
    if not found.rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in found.left_out.items()) or "no text was kept"
        do = "collect corrections, or give --teacher or --import"
        raise DataError("no row with a label", got=f"{found.texts} texts: {reasons}", do=do)
    rows = _distinct(found)
    train, recent = _split(rows, settings, found, never or Asked(), before or Asked(), learned or Learned())
    train = caps.to_train_on(train, settings.up, settings.shares, found)
    recent = caps.within(recent, settings.shares, found)
    for name, some in (("to train on", train), ("held out", recent)):
        if not some and (name == "to train on" or settings.heldout != 0):
            people = len({row.person for row in rows})
            raise DataError(
                f"no row {name}", got=f"{len(rows)} rows of {people} people", do="collect more, of more people"
            )
    apart = [never or Asked(), before or Asked(), _asked_by(recent)]
    held = {name_of(row.person) for row in recent}
    old = _replayed(replay, round(settings.replay * len(train)), settings.seed, apart, held) if replay else []
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(partial / TRAIN, [*map(_line, train), *old])
        _write(partial / RECENT, map(_line, recent))
        manifest = _manifest(partial, train, recent, old, found, settings) | {"of": told or {}}
        write_json(partial / MANIFEST, manifest)
        see_on_disk(partial)
        try:
            partial.rename(out)
        except OSError as error:
            raise DataError(
                f"{out} exists", got=error.strerror, do="choose another --out: another was quicker"
            ) from error
        see_on_disk(out.parent)
    except FileNotFoundError as error:  # `learned.forget` leaves nothing that is half written
        do = "give the same command again, or another --out"
        raise DataError(f"{out}: somebody was forgotten there, or another cut was made, meanwhile", do=do) from error
    except OSError as error:
        raise ResourceError(
            f"{out} cannot be written", got=error.strerror, do="make room, or give another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def read(out: Path) -> dict[str, Any]:
    """The manifest of a cut. Raises DataError for a folder that is none, and for files that are not as they were."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        form, hashes = (manifest["format"], manifest["version"]), manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out} is no cut", got=str(error), do="make one: shoal curate") from error
    if form != (FORMAT, VERSION):
        raise DataError(f"{out}", got=f"{form[0]} {form[1]}", allowed=f"{FORMAT} {VERSION}")
    for name, wanted in hashes.items():
        if not (out / name).is_file() or sha256_of(out / name) != wanted:
            raise DataError(f"{out / name} is not what it was when the cut was made", do="make another: shoal curate")
    return dict(manifest)


def known_of(out: Path, learned: Learned) -> int:
    """How many rows that a cut holds out were trained on by earlier ones, as of one that was made without these. Raises
    DataError for what is no chat."""
    with chats_of(out / RECENT):
        return sum(learned.holds(json.loads(line)) for line in lines(out / RECENT))


def asked(out: Path, never: Asked) -> int:
    """How many rows that a cut trains on ask what is in `never`, as of one that was made without that. Raises DataError for
    what is no chat."""
    new, old = _new_and_old(out)
    with chats_of(out / TRAIN):
        found = sum(never.holds(json.loads(line)["messages"][:-1]) for line in new)
        return found + sum(asks({"messages": (), **json.loads(line)}, [never]) for line in old)


def mixed(out: Path, to: Path, share: float, never: Asked | None = None) -> tuple[int, int]:
    """Write to the file `to` what a cut holds to train on, its new rows as often as it takes for `share` of all characters to
    be theirs; returns how often, and how many rows were left out for asking what is in `never`. Some hundred rows are soon
    learned, and as many old ones hold back nothing. Raises DataError for what is no chat, and where no new row is left."""
    both, apart = _new_and_old(out), [never or Asked()]
    with chats_of(out / TRAIN):
        new, old = ([one for one in rows if not asks({"messages": (), **json.loads(one)}, apart)] for rows in both)
    if not new:
        got = f"none of {len(both[0])}"
        raise DataError(f"{out}: rows that no earlier cut held out", got=got, do="curate another with --release")
    long, longer = (max(1, sum(map(len, rows))) for rows in (new, old))
    times = max(1, round(share / (1 - share) * longer / long)) if old else 1
    write_aside(to, "".join(line + "\n" for line in [*new * times, *old]))
    return times, sum(map(len, both)) - len(new) - len(old)


def asked_of_both(
    out: Path, to: Path, *, held: Path | None = None, never: Asked | None = None, tasks: Collection[str] = ()
) -> None:
    """Write to the file `to` what depth "auto" is fitted to after a training on a cut: of what it holds out the half that the
    gate does not ask about the router, and old chats, for a service goes on to be asked these. `held`: chats that the old
    corpus holds out; of these the half that evaluation does not ask. Where there are none, the cut's own old rows, which were
    trained on: at what it knows by heart a model loses less by leaving out layers than at what it will be asked. Nothing of all
    is in `never`, or asked by the gate's half. Of the old only `tasks`, which say what the service is for, where there are any
    of these: what is promised is a mean, and of another mix it says nothing. Raises DataError for what is no chat."""
    apart = [never or Asked(), _gated(out / RECENT)]
    recent = _fitted_to(out / RECENT, suites.looked_at(out / RECENT), apart)
    old = _fitted_to(held, asked_groups(held), apart) if held is not None and held.is_file() else []
    old = old or [row for row in map(json.loads, _new_and_old(out)[1]) if _can_be_asked(row) and not asks(row, apart)]
    old = [row for row in old if task_of(row) in tasks] or old
    write_aside(to, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*recent, *old]))


def _gated(recent: Path) -> Asked:
    """What the gate asks about the router: another person may have asked the same."""
    half, found = suites.looked_at(recent), Asked()
    for line in lines(recent):
        if group_of(row := json.loads(line)) in half:
            found.add(asked_in(row))
    return found


def _fitted_to(held: Path, half: Container[int], apart: Sequence[Asked]) -> list[dict[str, Any]]:
    found = []
    for line in lines(held):
        with chats_of(held):
            json.dumps([row := json.loads(line), task_of(row)], ensure_ascii=False).encode()
            if _can_be_asked(row) and group_of(row) not in half and not asks(row, apart):
                found.append(row)
    return found


def _new_and_old(out: Path) -> tuple[list[str], list[str]]:
    """The lines to train on that have a label of their own, and those of the old mix."""
    rows = [line for line in (out / TRAIN).read_text(encoding="utf-8").split("\n") if line]
    is_old = [json.loads(line).get("label") == REPLAY for line in rows]
    both = list(zip(rows, is_old, strict=True))
    return [line for line, old in both if not old], [line for line, old in both if old]


def _can_be_asked(row: Mapping[str, Any]) -> bool:
    return not is_augmented(row) and any(one.get("role") == "assistant" for one in row.get("messages") or ())


def name_of(text: str) -> str:
    """The hash under which a manifest knows a request or a person."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def person_of(row: Mapping[str, Any]) -> str | None:
    """The name of the person whose chat this row of a cut is; None for an old one that no cut had from anybody."""
    group = row.get("group")
    return group if isinstance(group, str) and NAME.fullmatch(group) else None


def _distinct(found: Found) -> list[Labelled]:
    """The rows without copies: the same question with the same answer, and near copies of longer ones; the newest of each."""
    kept, seen = [], set[tuple[str, str]]()
    buckets: dict[tuple[int, bytes], list[np.ndarray]] = {}
    for row in sorted(found.rows, key=lambda row: (LABELS.index(row.label), -row.at)):
        key = (row.question, row.answer)
        if key in seen:
            found.leave("a copy of another")
            continue
        seen.add(key)
        text = f"{user(row.messages)}\n{row.answer}"
        mark = signature(Document(row.id, row.person, "", "", "text", "", text))
        of = words(text)
        bands = [] if mark is None else [(i, mark[1 + i * WIDTH : 1 + (i + 1) * WIDTH].tobytes()) for i in range(BANDS)]
        if len(of) >= LEAST_WORDS and any(nearly_equal(of, other) for band in bands for other in buckets.get(band, ())):
            found.leave("nearly a copy of another")
            continue
        for band in bands:
            buckets.setdefault(band, []).append(of)
        kept.append(row)
    return kept


def _split(
    rows: Sequence[Labelled], settings: Settings, found: Found, never: Asked, before: Asked, learned: Learned
) -> tuple[list[Labelled], list[Labelled]]:
    """Rows to train on and rows that are held out, of other people; neither asks what is forbidden, and what is held out is
    nothing that is asked in training; to train on there is nothing of `before`, and nothing of `learned` is held out."""
    allowed = [row for row in rows if not never.holds(row.messages[:-1])]
    found.leave("asked by a suite", len(rows) - len(allowed))
    # here too, for whose rows go in any case are to keep nobody else's from being held out
    allowed = caps.within(allowed, settings.shares, found)
    names = {row.person: row.person.encode("utf-8", "surrogatepass") for row in allowed}
    draws = {person: xxhash.xxh3_64_intdigest(name, settings.seed) / 2**64 for person, name in names.items()}
    draws |= {person: LEARNED for person in draws if name_of(person) in learned.people}
    barred = {id(row) for row in allowed if before.holds(row.messages[:-1])}
    known = {id(row) for row in allowed if learned.asked.holds(row.messages[:-1])}
    share = settings.heldout
    if share is None:
        share = _share(allowed, draws, barred, known, settings.shares)
    train, recent = _apart(allowed, draws, share, barred, known)
    earlier = sum(draws[row.person] >= share and id(row) in barred for row in allowed)
    found.leave("held out by an earlier cut", earlier)
    others = len(allowed) - len(train) - len(recent) - earlier
    found.leave("held out, but asked in training by another person", others)
    # what the model said itself measures nothing
    return train, [row for row in recent if row.label != UP]


def _apart(
    rows: Sequence[Labelled], draws: dict[str, float], share: float, barred: Collection[int], known: Collection[int]
) -> tuple[list[Labelled], list[Labelled]]:
    """The rows of people whose draw is `share` or more, without those whose `id` is `barred`, and of the others those that ask
    nothing of these, without those whose `id` is `known`."""
    train = [row for row in rows if draws[row.person] >= share and id(row) not in barred]
    asked = _asked_by(train)
    held = [row for row in rows if draws[row.person] < share and id(row) not in known]
    return train, [row for row in held if not asked.holds(row.messages[:-1])]


def _asked_by(rows: Iterable[Labelled]) -> Asked:
    found = Asked()
    for row in rows:
        found.add(row.messages[:-1])
    return found


def _share(
    rows: Sequence[Labelled],
    draws: dict[str, float],
    barred: Collection[int],
    known: Collection[int],
    shares: caps.Shares,
) -> float:
    """A fifth of the people, or as many more as leave a tenth more rows than the gate asks for: with fewer it can say nothing,
    however much was learned. Where half of the rows would not do, a fifth: the next cut will."""

    def rows_of(share: float) -> int:
        held = _apart(rows, draws, share, barred, known)[1]
        return len(caps.within([row for row in held if row.label != UP], shares))

    possible = (math.nextafter(draw, 2) for draw in draws.values() if draw < LEARNED)
    sizes = [0.2, *sorted(share for share in possible if share > 0.2)]
    share = sizes[min(bisect_left(sizes, 1.1 * LEAST_RECENT, key=rows_of), len(sizes) - 1)]
    return share if 2 * sum(draws[row.person] < share for row in rows) <= len(rows) else 0.2


def _replayed(path: Path, count: int, seed: int, apart: Sequence[Asked], held: Collection[str]) -> list[str]:
    """`count` rows of the old mix, or all of them, drawn by `seed`; none that asks what is kept `apart`, or that an earlier cut
    had from one of the people who are `held` out, by their names."""
    every = []
    for line in lines(path):
        with chats_of(path):
            row = json.loads(line)
            if person_of(row) not in held and not asks({"messages": (), **row}, apart):
                every.append(json.dumps({**row, "label": REPLAY}, ensure_ascii=False).encode().decode())
    order = np.random.default_rng(seed).permutation(len(every))[:count]
    return [every[place] for place in sorted(order.tolist())]


def _line(row: Labelled) -> str:
    """Of a captured chat the last answer alone is labelled: what the model said before is read, and not learned."""
    before = [{**one, "weight": 0} if row.id and one.get("role") == "assistant" else one for one in row.messages[:-1]]
    told = {"messages": [*before, row.messages[-1]], "task": "recent", "group": name_of(row.person), "label": row.label}
    return json.dumps(told | ({"id": row.id} if row.id else {}), ensure_ascii=False)


def _write(path: Path, rows: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(row + "\n")
        file.flush()
        os.fsync(file.fileno())


def _manifest(
    folder: Path,
    train: Sequence[Labelled],
    recent: Sequence[Labelled],
    old: Sequence[str],
    found: Found,
    settings: Settings,
) -> dict[str, Any]:
    both = [*train, *recent]
    ids, people = _named(old)
    return {
        "format": FORMAT, "version": VERSION, "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "train": len(train), "replay": len(old), "recent": len(recent), "people": len({row.person for row in both}),
        "labels": dict(Counter(row.label for row in train)), "left_out": dict(sorted(found.left_out.items())),
        "texts": found.texts, "sha256": {name: sha256_of(folder / name) for name in (TRAIN, RECENT)},
        "requests": sorted({name_of(row.id) for row in both if row.id} | ids),
        "persons": sorted({name_of(row.person) for row in both} | people),
        "caps": caps.told(train, recent, settings.shares, found),
        "settings": {name: getattr(settings, name) for name in ("heldout", "up", "replay", "seed")},
    }  # fmt: skip


def _named(old: Sequence[str]) -> tuple[set[str], set[str]]:
    """The names of requests and persons in rows of the old mix that are an earlier cut's."""
    rows = [row for row in map(json.loads, old) if person_of(row)]
    return {name_of(str(row["id"])) for row in rows if row.get("id")}, {row["group"] for row in rows}
