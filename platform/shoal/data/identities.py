"""What is decided over all documents of a corpus: which equal an earlier one, and which side of the held-out split each is on.
By shuffles over spans of keys, whose results are a table of dropped documents a part and lists of the held-out ones.

    read     Identities.write   the tables of one part: fingerprints, and groups, each sorted by its key
    look     equal              a span of fingerprints of all parts ─> places of documents that equal an earlier one
             near.candidates    a band and a span of its keys       ─> pairs that could be near copies
    settle   settle             a part: its candidates compared     ─> what is dropped of it, and why
    sides    hold_out           a span of groups of all parts       ─> places of held-out documents; counts
             drawn_besides      the counts of all spans             ─> groups held out where a modality had none
    pack     splits             a part                              ─> the split of each document, or None

Notable: nobody holds more than a span, or a part; who asks for all this sees counts alone. The results are those of one look
at the list of all documents in their order, at any number of spans (`tests/unit/data/test_identities.py` has that look).
Letters: D documents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from shoal.data import tables
from shoal.data.documents import MODALITIES, Modality
from shoal.data.operators import near
from shoal.data.operators.pipeline import Operators
from shoal.data.shards import SPLITS
from shoal.data.tables import Parts, Span, Table

HELDOUT = 0.05  # share of the groups
FINGERPRINTS, GROUPS, DROPPED = ".fingerprints", ".groups", ".dropped"  # suffixes of a part's tables
KEPT, EQUAL, NEAR = range(3)  # what the table of dropped documents says of each
REASONS = {EQUAL: ("dedup", "equal to an earlier one"), NEAR: ("near dedup", "nearly equal to an earlier one")}
# Of a document: a hash of its group's name, another by the seed, its modality, and what its source says of its side.
KINDS = {"key": np.uint64, "draw": np.uint64, "modality": np.uint8, "said": np.int8}
UNSAID = -1  # where a source does not say which side it is on

Drops = dict[str, Counter[str]]  # operator -> reason -> documents


@dataclass(frozen=True)
class Identity:
    """What deciding about a document takes."""

    fingerprint: bytes
    group: str
    modality: Modality
    heldout: bool | None  # where its source says so


class Identities:
    """Collects the identities of one part, in the order of its documents. `seed`: of the draw of each group."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._prints: list[bytes] = []
        self._groups: list[tuple[int, int, int, int]] = []  # key, draw, modality, what its source says

    def __len__(self) -> int:
        return len(self._prints)

    def add(self, identity: Identity) -> None:
        name = identity.group.encode()
        said = UNSAID if identity.heldout is None else int(identity.heldout)
        key, draw = xxhash.xxh3_64_intdigest(name), xxhash.xxh3_64_intdigest(name, seed=self._seed)
        self._prints.append(identity.fingerprint.rjust(16, b"\0"))
        self._groups.append((key, draw, MODALITIES.index(identity.modality), said))

    def write(self, path: Path) -> None:
        """The tables beside a part's documents in `path`."""
        halves = np.frombuffer(b"".join(self._prints), dtype=">u8").astype(np.uint64).reshape(-1, 2)
        columns = zip(*self._groups, strict=True) if self._groups else ((),) * 4
        write_tables(path, halves, dict(zip(KINDS, columns, strict=True)))


def write_tables(path: Path, prints: np.ndarray, groups: Mapping[str, Sequence[int] | np.ndarray]) -> None:
    """The tables of the part in `path`, of documents in order: `prints` uint64 [D, 2], the halves of their fingerprints;
    `groups`: the columns in KINDS."""
    rows = np.arange(len(prints), dtype=np.uint32)
    order = np.argsort(prints[:, 0], kind="stable")  # equal ones stay in their order
    columns = {"key": prints[order, 0], "rest": prints[order, 1], "row": rows[order]}
    tables.write(path.with_suffix(FINGERPRINTS), columns)
    of = {name: np.asarray(groups[name], dtype=kind) for name, kind in KINDS.items()}
    order = np.argsort(of["key"])
    tables.write(path.with_suffix(GROUPS), {**{name: column[order] for name, column in of.items()}, "row": rows[order]})


def tables_of(path: Path) -> list[Path]:
    """The files that `Identities.write` makes."""
    return [path.with_suffix(FINGERPRINTS), path.with_suffix(GROUPS)]


def equal(parts: Parts, span: Span, out: Path) -> int:
    """Write the places (part and row) of the documents with a fingerprint in `span` that equal an earlier one; how many."""

    def of(number: int, path: Path) -> Table:
        table = tables.read(path.with_suffix(FINGERPRINTS))
        at = span.of(table["key"])
        return {**{n: c[at] for n, c in table.items()}, "part": np.full(at.stop - at.start, number, np.uint32)}

    found = tables.gathered((of(*each) for each in enumerate(parts)), ("key", "rest", "part", "row"))
    order = np.lexsort((found["rest"], found["key"]))
    again = np.zeros(len(order), dtype=bool)
    again[1:] = True
    for name in ("key", "rest"):
        again[1:] &= found[name][order[1:]] == found[name][order[:-1]]
    return _write_places(out, found["part"], found["row"], order[again])


def settle(parts: Parts, number: int, equals: Sequence[Path], candidates: Sequence[Path]) -> Drops:
    """Write the table of what is dropped of part `number`, and count it by reason. `equals`, `candidates`: what `equal` and
    `near.candidates` wrote for all spans."""
    path = parts[number]
    codes = np.zeros(len(tables.read(path.with_suffix(FINGERPRINTS))["row"]), dtype=np.uint8)
    for place in equals:
        codes[tables.of_part(place, number)["row"]] = EQUAL
    codes[near.confirmed(parts, number, candidates, codes != KEPT)] = NEAR
    tables.write(path.with_suffix(DROPPED), {"code": codes})
    counts = {code: int((codes == code).sum()) for code in REASONS}
    return {operator: Counter({why: counts[code]}) for code, (operator, why) in REASONS.items() if counts[code]}


@dataclass
class Side:
    """What a span of groups holds of one modality."""

    groups: int = 0
    heldout: int = 0  # groups that are held out, for this modality or another
    first: tuple[int, ...] = ()  # place of its first document; empty where there is none
    # of the groups whose source says nothing, the one that is drawn first: draw, key, bits of its modalities
    free: tuple[int, ...] = ()

    def add(self, other: Side) -> None:
        self.groups += other.groups
        self.heldout += other.heldout
        self.first = min(filter(None, (self.first, other.first)), default=())
        self.free = min(filter(None, (self.free, other.free)), default=())


def hold_out(parts: Parts, span: Span, out: Path) -> list[Side]:
    """Write the places of the kept documents of the groups in `span` that are held out; what there is of each modality.

    All documents of a group are on one side: where its source says so of its newest document, on that one, else as drawn.
    """

    def of(number: int, path: Path) -> Table:
        table, codes = tables.read(path.with_suffix(GROUPS)), tables.read(path.with_suffix(DROPPED))["code"]
        some = {n: c[span.of(table["key"])] for n, c in table.items()}
        kept = codes[some["row"]] == KEPT
        some = {n: c[kept] for n, c in some.items()}
        return {**some, "part": np.full(len(some["row"]), number, np.uint32)}

    names = ("key", "modality", "draw", "said", "part", "row")
    found = tables.gathered((of(*each) for each in enumerate(parts)), names)
    order = np.lexsort((found["row"], found["part"], found["modality"], found["key"]))
    key, modality, draw, said, part, row = (found[name][order] for name in names)
    last = np.ones(len(key), dtype=bool)  # of a group's documents of one modality
    last[:-1] = (key[1:] != key[:-1]) | (modality[1:] != modality[:-1])
    drawn = np.where(said == UNSAID, draw.astype(np.float64) / tables.KEYS < HELDOUT, said == 1)
    names_, group = np.unique(key, return_inverse=True)
    heldout, bits = np.zeros(len(names_), dtype=bool), np.zeros(len(names_), dtype=np.uint8)
    np.logical_or.at(heldout, group[last], drawn[last])
    np.bitwise_or.at(bits, group[last], np.left_shift(1, modality[last]).astype(np.uint8))
    _write_places(out, part, row, np.flatnonzero(heldout[group]))
    sides = []
    for number in range(len(MODALITIES)):
        ours = last & (modality == number)
        some = np.flatnonzero(modality == number)
        first = min(zip(part[some].tolist(), row[some].tolist(), strict=True), default=())
        free = np.flatnonzero(ours & (said == UNSAID))
        at = free[np.lexsort((key[free], draw[free]))]
        drawn_first = tuple(int(c[at[0]]) for c in (draw, key, bits[group])) if len(at) else ()
        sides.append(Side(int(ours.sum()), int(heldout[group[ours]].sum()), first, drawn_first))
    return sides


def drawn_besides(found: Iterable[Sequence[Side]]) -> list[int]:
    """Keys of groups that are held out besides: a modality that no group was held out of gives the one drawn first, as long as
    it has two. `found`: what `hold_out` counted in each span."""
    total = [Side() for _ in MODALITIES]
    for sides in found:
        for side, other in zip(total, sides, strict=True):
            side.add(other)
    keys: list[int] = []
    taken = 0  # bits of the modalities that such groups are of
    for number in sorted(range(len(total)), key=lambda n: total[n].first):
        side = total[number]
        if side.groups > 1 and side.free and not side.heldout and not taken >> number & 1:
            keys.append(side.free[1])
            taken |= side.free[2]
    return keys


def splits(parts: Parts, number: int, heldout: Sequence[Path], besides: Sequence[int]) -> list[str | None]:
    """The split of each document of part `number`, None where it was dropped. `heldout`: what `hold_out` wrote for
    all spans; `besides`: what `drawn_besides` gave."""
    path = parts[number]
    codes = tables.read(path.with_suffix(DROPPED))["code"]
    side = np.zeros(len(codes), dtype=bool)
    for place in heldout:
        side[tables.of_part(place, number)["row"]] = True
    if besides:
        groups = tables.read(path.with_suffix(GROUPS))
        side[groups["row"][np.isin(groups["key"], np.array(besides, dtype=np.uint64))]] = True
    return [SPLITS[held] if code == KEPT else None for code, held in zip(codes.tolist(), side.tolist(), strict=True)]


def choose(parts: Parts, operators: Operators = Operators(), spans: int = 1) -> tuple[list[list[str | None]], Drops]:
    """All of it in this process, for a corpus of few parts: for each document its split, or None where it was dropped; and how
    many were."""
    drops: Drops = {}
    some = [Span(number, spans) for number in range(spans)]

    def beside(name: str, span: Span) -> Path:
        return parts.folder / f"{name}-{span.number}"

    equals = [beside("equal", span) for span in some] if operators.dedup else []
    for out, span in zip(equals, some, strict=False):
        equal(parts, span, out)
    pairs = [beside("pairs", span) for span in some] if operators.near_dedup else []
    for out, span in zip(pairs, some, strict=False):
        near.candidates(parts, range(near.BANDS), span, out)
    for number in range(len(parts)):
        for operator, reasons in settle(parts, number, equals, pairs).items():
            drops.setdefault(operator, Counter()).update(reasons)
    besides = drawn_besides([hold_out(parts, span, beside("heldout", span)) for span in some])
    heldout = [beside("heldout", span) for span in some]
    return [splits(parts, number, heldout, besides) for number in range(len(parts))], drops


def _write_places(out: Path, part: np.ndarray, row: np.ndarray, at: np.ndarray) -> int:
    order = np.lexsort((row[at], part[at]))
    tables.write(out, {"part": part[at][order], "row": row[at][order]})
    return len(at)
