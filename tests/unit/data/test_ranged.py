"""The cache of blocks has its bound on a machine, whoever adds to it; with S3 it is `tests/flows/test_s3_ranged.py`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.data import place, ranged
from shoal.data.place import Place
from shoal.data.ranged import BLOCK, Origin, RangedShard, _Blocks
from shoal.data.sources.s3 import S3
from shoal.errors import DataError

MOST = 64 * BLOCK
HERE = Origin("s3://ocean/corpus")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path))
    monkeypatch.setenv("SHOAL_CACHE_BYTES", str(MOST))
    monkeypatch.setattr(ranged, "_fetch", lambda origin, name, size, number: bytes(BLOCK))
    return tmp_path


def held(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize(("at_once", "blocks"), [(32, 6), (1, 2)])
def test_the_bound_is_of_the_machine_however_many_processes_read_and_however_short_they_live(
    cache: Path, at_once: int, blocks: int
) -> None:
    most = 0
    for turn in range(192 // (at_once * blocks)):
        processes = [_Blocks(cache / "blocks" / f"corpus{turn % 2}") for _ in range(at_once)]
        for number in range(blocks):
            for process, some in enumerate(processes):
                assert len(some.get(HERE, f"{turn}-{process}", 2**30, number)) == BLOCK
                most = max(most, held(cache))
    assert MOST // 2 < most <= MOST + BLOCK


def test_so_it_is_where_a_corpus_is_made(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "SPARED", -60.0)  # not even what was used just now
    here, most = Place("s3://ocean/made", S3("http://127.0.0.1:9"), "run"), 0
    for number in range(160):
        path = here.work / f"{number:05}.arrow"
        path.write_bytes(bytes(BLOCK))
        place._added(here, path)
        most = max(most, held(cache))
    assert MOST // 2 < most <= MOST + BLOCK


def test_what_lies_nowhere_else_yet_stays_however_long_its_task_takes(cache: Path) -> None:
    """The first shard of a part that takes ten minutes, or a file that is still written, went, and ended the command."""
    here = Place("s3://ocean/made", S3("http://127.0.0.1:9"), "run")
    only = [here.folder / name for name in ("train-text-00000-000.arrow", ".train-text-00000-001.arrow.5eC0.7.tmp")]
    for path in only:
        path.write_bytes(bytes(4 * BLOCK))
        os.utime(path, (1, 1))
    for number in range(160):
        path = here.work / f"{number:05}.arrow"
        path.write_bytes(bytes(BLOCK))
        os.utime(path, (2 + number, 2 + number))
        place._added(here, path)
    assert all(path.exists() for path in only) and held(cache) <= MOST + BLOCK


def test_two_services_may_have_corpora_of_one_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command at the one removed what this machine had made for the other."""
    monkeypatch.setattr(Place, "is_held", lambda place: True)
    one, other = (Place("s3://ocean/made", S3(f"http://127.0.0.1:{port}"), f"run{port}") for port in (8, 9))
    (one.work / "00000.arrow").write_bytes(b"documents")
    assert other.work != one.work and (one.work / "00000.arrow").read_bytes() == b"documents"
    other.leave()
    assert (one.work / "00000.arrow").exists() and not list(cache.rglob("run9"))


def test_what_a_killed_command_left_of_another_corpus_goes_once_nobody_used_it_for_a_day(cache: Path) -> None:
    """Each that was killed on a machine left as much there as the cache may hold, for good."""
    service, day = S3("http://127.0.0.1:9"), place.LEFT_BEHIND
    for name, age in (("killed", day + 60), ("working", day - 60)):
        made = Place(f"s3://ocean/{name}", service, name).work
        (made / "00000.arrow").write_bytes(bytes(BLOCK))
        for path in (made / "00000.arrow", made, made.parent):
            os.utime(path, 2 * (time.time() - age,))
    assert Place("s3://ocean/next", service, "next").work.is_dir()
    assert sorted(path.name for path in cache.glob("prepare/*/*")) == ["next", "working"]


def test_a_block_that_is_taken_away_while_it_is_written_is_read_nevertheless(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def emptied(path: Path, data: bytes) -> int:
        count = write(path, data)
        path.unlink()
        return count

    monkeypatch.setattr(Path, "write_bytes", emptied)
    assert _Blocks(cache / "blocks" / "corpus").get(HERE, "shard", 2**30, 3) == bytes(BLOCK)


def test_what_is_used_while_the_cache_is_looked_through_stays(cache: Path) -> None:
    """A reader finds its file and opens it a moment later: gone between the two, it ended the command that made a corpus."""
    used, old = cache / "used", cache / "old"
    for path in (used, old):
        path.write_bytes(bytes(BLOCK))
        os.utime(path, (1.0, 1.0))

    def looked() -> Iterator[Path]:
        yield used
        os.utime(used)  # by another process
        yield old

    ranged.trim(looked(), 0, before=time.time() - 600)
    assert used.exists() and not old.exists()


@pytest.mark.parametrize(("start", "length"), [(-8, 8), (2**20 - 4, 8), (0, 2**60), (8, -8)])
def test_what_a_broken_shard_says_of_itself_is_not_asked_of_s3(start: int, length: int) -> None:
    shard = RangedShard(HERE, "train-text-00000-000.arrow", 2**20, Path("corpus"))
    assert len(shard.read(2**20 - 8, 8)) == 8
    with pytest.raises(DataError, match=r"shard train-text-00000-000\.arrow: got 'a row at .* bytes'; allowed: "):
        shard.read(start, length)
