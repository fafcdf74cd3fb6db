"""Kept results: taken again under the same key with the same files, and otherwise made."""

from __future__ import annotations

import json
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data.identities import Side
from shoal.data.kept import _plain, _typed, code_digest, digest, digest_of_list, kept
from shoal.data.parts import Packed
from shoal.data.shards import Shard

SHARD = Shard("a.arrow", "train", "text", 3, 90, 400, 1234, "ab", {"s": 90}, ("MIT", "CC0"))
PACKED = Packed(
    shards=[SHARD],
    drops={"read": Counter({"empty": 2})},
    documents=Counter({("train", "text", "s", "MIT"): 3}),
    packing=Counter(cut=1),
    lengths=Counter({("text", 5): 3}),
)


def make(folder: Path, key: str = "k", text: str = "data") -> tuple[list[str], bool]:
    """A result, and whether it had to be made."""
    made = False

    def task() -> list[str]:
        nonlocal made
        made = True
        (folder / "file").write_text(text)
        return [text]

    return kept(folder / "r.json", key, list[str], task, lambda _: [folder / "file"]), made


def test_a_result_is_made_once(tmp_path: Path) -> None:
    assert make(tmp_path) == (["data"], True)
    assert make(tmp_path) == (["data"], False)


def damage_file(folder: Path) -> None:
    (folder / "file").write_text("date")  # of equal size


def lose_file(folder: Path) -> None:
    (folder / "file").unlink()


def tear_result(folder: Path) -> None:
    (folder / "r.json").write_bytes((folder / "r.json").read_bytes()[:-5])


@pytest.mark.parametrize("damage", [damage_file, lose_file, tear_result])
def test_what_is_not_whole_is_made_again(tmp_path: Path, damage) -> None:
    make(tmp_path)
    damage(tmp_path)
    assert make(tmp_path) == (["data"], True) and (tmp_path / "file").read_text() == "data"


def test_another_key_is_another_result(tmp_path: Path) -> None:
    make(tmp_path)
    assert make(tmp_path, key="other", text="new") == (["new"], True)


def test_results_survive_a_moved_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    make(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert make(tmp_path / "b") == (["data"], False)


PLACES = st.lists(st.integers(0, 2**64 - 1), max_size=3).map(tuple)


@given(st.lists(st.builds(Side, st.integers(0), st.integers(0), PLACES, PLACES)))
def test_counts_come_back_as_they_were(found: list[Side]) -> None:
    value = (found, {"quality": Counter({"too short": 1})})
    kind = tuple[list[Side], dict[str, Counter[str]]]
    assert _typed(kind, json.loads(json.dumps(_plain(value)))) == value


def test_a_packed_part_comes_back_as_it_was() -> None:
    back = _typed(Packed, _plain(PACKED))
    assert back == PACKED and isinstance(back.packing, Counter) and isinstance(back.drops["read"], Counter)
    assert _typed(Packed, _plain(Packed())) == Packed()


def test_a_digest_tells_requests_apart() -> None:
    assert digest(1, "a") == digest(1, "a") != digest("a", 1)
    assert code_digest() == code_digest()


@pytest.mark.parametrize("name", ["ftfy", "tokenizers"])
def test_what_another_version_of_a_library_made_is_not_gone_on_with(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the texts of a corpus were mended by the one, and half by the other."""
    before, version = code_digest(), metadata.version
    monkeypatch.setattr(metadata, "version", lambda of: version(of) + ".1" * (of == name))
    assert code_digest() != before


@given(st.lists(st.lists(st.one_of(st.integers(), st.text(), st.dictionaries(st.text(), st.integers())))))
def test_the_digest_of_a_list_is_that_of_its_values_one_after_the_other(values: list[object]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for at_once in (1, 3, 1024):
            patch.setattr("shoal.data.kept.AT_ONCE", at_once)
            assert digest_of_list(iter(values)) == digest(values)
