"""What is decided over all documents, by spans of keys: what one look at the list of all of them gives, at any number of spans
and parts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.data import identities, tables
from shoal.data.identities import HELDOUT, Drops, Identities, Identity, choose
from shoal.data.operators.pipeline import Operators
from shoal.data.shards import SPLITS
from shoal.data.tables import Parts, Span, spans
from shoal.errors import DataError

EXACT = Operators(near_dedup=False)
IDENTITIES = st.builds(
    Identity,
    st.integers(0, 20).map(lambda content: xxhash.xxh3_128_digest(bytes([content]))),
    st.integers(0, 12).map("group {}".format),
    st.sampled_from(["text", "code", "image"]),
    st.sampled_from([None, None, None, True, False]),
)


def looked_at(parts: Sequence[Sequence[Identity]], seed: int, dedup: bool) -> tuple[list[list[str | None]], Drops]:
    """The definition: one look at all documents in their order."""
    seen: set[bytes] = set()
    kept: list[list[Identity | None]] = []
    drops: Drops = {}
    for part in parts:
        kept.append([])
        for identity in part:
            again = dedup and identity.fingerprint in seen
            if again:
                drops.setdefault("dedup", Counter())["equal to an earlier one"] += 1
            kept[-1].append(None if again else identity)
            seen.add(identity.fingerprint)
    groups: dict[str, dict[str, bool | None]] = defaultdict(dict)  # modality -> group -> what its source says
    for identity in (i for part in kept for i in part if i):
        groups[identity.modality][identity.group] = identity.heldout
    draws = {g: xxhash.xxh3_64_intdigest(g.encode(), seed=seed) / 2**64 for of in groups.values() for g in of}
    heldout = {g for of in groups.values() for g, s in of.items() if (draws[g] < HELDOUT if s is None else s)}
    for of in groups.values():
        free = [group for group, said in of.items() if said is None]
        if len(of) > 1 and free and not heldout & of.keys():
            heldout.add(min(free, key=lambda group: draws[group]))
    return [[SPLITS[i.group in heldout] if i else None for i in part] for part in kept], drops


def written(folder: Path, found: Sequence[Sequence[Identity]], seed: int = 0) -> Parts:
    parts = Parts(folder, len(found))
    for path, some in zip(parts, found, strict=True):
        tables_of_part = Identities(seed)
        for identity in some:
            tables_of_part.add(identity)
        tables_of_part.write(path)
    return parts


@given(
    st.lists(st.lists(IDENTITIES, max_size=25), min_size=1, max_size=4), st.integers(0, 5), st.booleans(),
    st.sampled_from([1, 2, 7]),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_what_is_chosen_is_what_one_look_at_all_documents_chooses(
    found: list[list[Identity]], seed: int, dedup: bool, count: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        parts = written(Path(folder), found, seed)
        assert choose(parts, Operators(dedup=dedup, near_dedup=False), count) == looked_at(found, seed, dedup)


def of(pairs: Sequence[tuple[int, int]], modality: str = "text", heldout: bool | None = None) -> list[Identity]:
    """Documents of such contents and groups."""
    return [Identity(content.to_bytes(2), f"g{group}", modality, heldout) for content, group in pairs]


def test_about_as_many_groups_are_held_out_as_said_and_the_seed_chooses_them(tmp_path: Path) -> None:
    chosen = []
    for seed in (0, 1):
        ((splits,), _) = choose(written(tmp_path, [of([(n, n) for n in range(4000)])], seed), EXACT)
        chosen.append({i for i, split in enumerate(splits) if split == "heldout"})
    assert all(abs(len(some) / 4000 - HELDOUT) < 0.02 for some in chosen) and HELDOUT == 0.05
    assert chosen[0] != chosen[1]


def test_a_source_that_says_its_side_has_it(tmp_path: Path) -> None:
    found = [of([(1, 1), (2, 2)], "image", False), of([(3, 3)], "image", True), of([(4, 4)])]
    assert choose(written(tmp_path, found), EXACT)[0] == [["train", "train"], ["heldout"], ["train"]]


@pytest.mark.parametrize("seed", range(8))
def test_where_nobody_is_held_out_one_group_is_but_none_whose_source_says_otherwise(seed: int, tmp_path: Path) -> None:
    """And none more where a source says that one of its own is. None of these draws is below the share that is held out."""

    def chosen(*found: list[Identity]) -> list[list[str | None]]:
        return choose(written(tmp_path, found, seed), EXACT, 3)[0]

    says, free = of([(n, n) for n in range(1, 9)], "image", False), of([(9, 9)], "image")
    assert chosen(says, free) == [["train"] * 8, ["heldout"]] and chosen(says) == [["train"] * 8]
    held, free = of([(1, 1)], "image", True), of([(n, n) for n in (20, 21, 22)], "image")
    assert chosen(held, free) == [["heldout"], ["train"] * 3]
    assert chosen(of([(1, 1)], "image"), of([(2, 2)], "text")) == [["train"], ["train"]]
    # one of each, where none is of both; of groups that are of both one is enough for both
    apart = [
        of([(n, n) for n in ours], name) for name, ours in (("text", (30, 31)), ("code", (32, 33)), ("image", (34, 35)))
    ]
    assert [sorted(map(str, part)) for part in chosen(*apart)] == [["heldout", "train"]] * 3
    (text, code) = chosen(
        *(of([(n, n % 10) for n in ours], name) for name, ours in (("text", (41, 42)), ("code", (51, 52))))
    )
    assert text == code and sorted(map(str, text)) == ["heldout", "train"]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50), st.integers(1, 9))
def test_every_key_is_in_one_span(keys: list[int], count: int) -> None:
    some = np.array(sorted([*keys, 0, 2**64 - 1]), dtype=np.uint64)
    found = [some[Span(number, count).of(some)] for number in range(count)]
    assert np.concatenate(found).tolist() == some.tolist()


def test_there_are_as_many_spans_as_leave_each_few_documents() -> None:
    assert [len(spans(documents, 100)) for documents in (0, 1, 100, 101, 1000)] == [1, 1, 1, 2, 10]
    assert [len(spans(documents)) for documents in (2**21, 2**21 + 1, 2**24)] == [1, 2, 8]
    assert spans(250, 100) == [Span(0, 3), Span(1, 3), Span(2, 3)]


def test_a_table_that_is_gone_or_cut_off_is_one_line(tmp_path: Path) -> None:
    parts = written(tmp_path, [of([(1, 1)])])
    path = parts[0].with_suffix(identities.FINGERPRINTS)
    for data in (path.read_bytes()[:-30], b""):
        path.write_bytes(data)
        with pytest.raises(DataError, match="cannot be read") as caught:
            tables.read(path)
        assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        choose(parts, EXACT)


MEMORY = """
import sys
from pathlib import Path
from shoal.data import identities
from shoal.data.tables import Parts, spans

folder, documents = Path(sys.argv[1]), int(sys.argv[2])
parts, some = Parts(folder, 8), spans(documents, 2**14)
equals = [folder / f"equal{span.number}" for span in some]
dropped = sum(identities.equal(parts, span, out) for span, out in zip(some, equals))
for number in range(len(parts)):
    identities.settle(parts, number, equals, [])
found = [identities.hold_out(parts, span, folder / "heldout") for span in some]
groups = sum(side.groups for sides in found for side in sides)
held = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]  # getrusage begins with the parent's
print(dropped, groups, int(held) * 1024)
"""


def tables_of(folder: Path, documents: int) -> None:
    """Eight parts of so many documents, a tenth of which are copies."""
    for number, path in enumerate(Parts(folder, 8)):
        keys = np.random.default_rng(number).integers(0, 2**64, (documents // 8, 2), dtype=np.uint64)
        keys[: documents // 80] = keys[documents // 80 : 2 * (documents // 80)]
        groups = {"key": keys[:, 0], "draw": keys[:, 1], "modality": keys[:, 0] % 2, "said": np.full(len(keys), -1)}
        identities.write_tables(path, keys, groups)


@pytest.mark.drill
def test_what_a_process_holds_does_not_grow_with_the_documents(tmp_path: Path) -> None:
    """Sixteen times as many documents, each of which 50 bytes would be seen."""
    found = []
    for size in (40_000, 640_000):
        (tmp_path / str(size)).mkdir()
        tables_of(tmp_path / str(size), size)
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(size)), str(size)]
        told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        dropped, groups, held = map(int, told.split())
        assert dropped == size // 10 and groups == size - dropped
        found.append(held)
    assert found[1] - found[0] < 30 * 10**6


def test_a_table_gives_the_columns_that_are_asked_for_and_the_rows_of_a_part(tmp_path: Path) -> None:
    path = tmp_path / "table"
    tables.write(path, {"part": np.array([0, 0, 2, 2, 3], np.uint32), "row": np.arange(10, dtype=np.uint32)[::2]})
    assert list(tables.read(path)) == ["part", "row"] and list(tables.read(path, ["row"])) == ["row"]
    found = [tables.of_part(path, number) for number in range(5)]
    assert [part["row"].tolist() for part in found] == [[0, 2], [], [4, 6], [8], []]
    nothing = tables.gathered([], ["a"])["a"]
    assert nothing.shape == (0,) and nothing.dtype == np.uint32
    twice = tables.gathered([tables.read(path)] * 2, ["row"])
    assert twice["row"].tolist() == [0, 2, 4, 6, 8] * 2
    parts = Parts(tmp_path, 2)
    assert [each.name for each in parts] == ["00000.arrow", "00001.arrow"] and len(parts) == 2
    for beyond in (-1, 2):
        with pytest.raises(IndexError):
            parts[beyond]


def test_what_is_dropped_says_why_and_near_copies_are_looked_for_in_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, told = written(tmp_path, [of([(1, 1), (2, 2)]), of([(3, 3), (4, 4), (1, 5), (2, 6)])]), list[list[bool]]()

    def confirmed(parts: Parts, number: int, candidates: Sequence[Path], dropped: np.ndarray) -> np.ndarray:
        told.append(dropped.tolist())
        return np.array([1] if number else [], dtype=np.int64)

    monkeypatch.setattr(identities.near, "confirmed", confirmed)
    assert identities.equal(parts, Span(0, 1), tmp_path / "equal") == 2
    drops = [identities.settle(parts, number, [tmp_path / "equal"], []) for number in (0, 1)]
    assert drops == [
        {},
        {
            "dedup": Counter({"equal to an earlier one": 2}),
            "near dedup": Counter({"nearly equal to an earlier one": 1}),
        },
    ]
    assert told == [[False, False], [False, False, True, True]]
    codes = [tables.read(path.with_suffix(identities.DROPPED))["code"].tolist() for path in parts]
    assert codes == [[0, 0], [0, 2, 1, 1]]
    assert identities.splits(parts, 1, [], []) == ["train", None, None, None]


@pytest.mark.parametrize("seed", range(12))
def test_the_modality_whose_first_document_comes_first_gives_a_group_first(seed: int, tmp_path: Path) -> None:
    """Of three groups the middle one is of both: whether it does for both depends on who is asked first."""
    for first, second in (("code", "text"), ("text", "code"), ("image", "text")):
        found = [of([(1, 1), (2, 2)], first), of([(3, 2), (4, 3)], second)]
        assert choose(written(tmp_path, found, seed), EXACT, 2) == looked_at(found, seed, True)


def test_of_many_equal_documents_the_earliest_stays_and_columns_are_as_small_as_they_may_be(tmp_path: Path) -> None:
    """Two contents in turn, so many that a sort which is not stable mixes them."""
    prints = np.array([[7, 1], [5, 2]] * 200, dtype=np.uint64)
    keys = np.arange(400, dtype=np.uint64)[::-1]
    groups = {"key": keys, "draw": keys, "modality": np.zeros(400, dtype=int), "said": np.full(400, -1)}
    parts = Parts(tmp_path, 1)
    identities.write_tables(parts[0], prints, groups)
    assert identities.equal(parts, Span(0, 1), tmp_path / "equal") == 398
    assert tables.read(tmp_path / "equal")["row"].tolist() == list(range(2, 400))
    assert identities.settle(parts, 0, [tmp_path / "equal"], []) == {"dedup": Counter({"equal to an earlier one": 398})}
    kinds = {
        "key": np.uint64,
        "draw": np.uint64,
        "modality": np.uint8,
        "said": np.int8,
        "row": np.uint32,
        "rest": np.uint64,
    }
    for suffix in (identities.FINGERPRINTS, identities.GROUPS):
        table = tables.read(parts[0].with_suffix(suffix))
        assert {name: column.dtype for name, column in table.items()} == {name: kinds[name] for name in table}
        assert table["key"].tolist() == sorted(table["key"].tolist())
    assert tables.read(parts[0].with_suffix(identities.DROPPED))["code"].dtype == np.uint8


def test_near_copies_are_looked_for_in_all_bands_of_every_span_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, asked = written(tmp_path, [of([(1, 1), (2, 2)]), of([(3, 3)])]), list[object]()

    def candidates(parts: Parts, bands: range, span: Span, out: Path) -> None:
        asked.append((bands, span, out))

    def confirmed(parts: Parts, number: int, candidates: Sequence[Path], dropped: np.ndarray) -> np.ndarray:
        asked.append(list(candidates))
        return np.array([0] if number else [], dtype=np.int64)

    monkeypatch.setattr(identities.near, "candidates", candidates)
    monkeypatch.setattr(identities.near, "confirmed", confirmed)
    splits, drops = choose(parts, Operators(), 2)
    out = [tmp_path / "pairs-0", tmp_path / "pairs-1"]
    assert asked == [(range(40), Span(0, 2), out[0]), (range(40), Span(1, 2), out[1]), out, out]
    assert splits[1] == [None] and drops == {"near dedup": Counter({"nearly equal to an earlier one": 1})}
    asked.clear()
    choose(parts, EXACT, 2)
    assert asked == [[], []]


def test_sides_add_up_and_the_tables_of_a_part_are_named(tmp_path: Path) -> None:
    side = identities.Side(1, 2, (0, 3), (5, 7, 1))
    side.add(identities.Side(2, 1, (0, 1), ()))
    assert side == identities.Side(3, 3, (0, 1), (5, 7, 1))
    side.add(identities.Side(0, 0, (), (4, 9, 2)))
    assert side == identities.Side(3, 3, (0, 1), (4, 9, 2))
    parts = written(tmp_path, [of([(1, 1)])])
    assert sorted(identities.tables_of(parts[0])) == sorted(tmp_path.iterdir())
