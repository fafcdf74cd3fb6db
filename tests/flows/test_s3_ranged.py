"""A corpus in S3 that is larger than this machine may hold: the same rows and the same updates, by ranges."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal import presets
from shoal.data import copies, ranged, remote
from shoal.data.batches import PretrainBatches
from shoal.data.documents import MODALITIES
from shoal.data.shards import SPLITS, Rows, open_index, write_index
from shoal.errors import DataError, ResourceError
from shoal.train.loop import fit
from shoal.train.plan import located, pretrain_plan
from tests.corpus import write_corpus
from tests.s3 import Service, at_once, service, upload

BLOCK = 1024  # bytes
URI = "s3://corpora/large"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"), documents=40, heldout=8)


@pytest.fixture(scope="module")
def s3(corpus: Path) -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="corpora")
        upload(corpus, URI, made.s3)
        yield made


@pytest.fixture(autouse=True)
def cache(s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of 64 KB: less than the corpus."""
    monkeypatch.setattr(ranged, "BLOCK", BLOCK)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SHOAL_CACHE_BYTES", str(64 * BLOCK))
    return tmp_path / "cache"


def blocks(cache: Path) -> list[Path]:
    return [path for path in cache.glob("blocks/*/*/*") if not path.name.startswith(".")]


@pytest.mark.drill
def test_every_row_is_what_it_is_in_a_copy_and_the_cache_has_a_bound(corpus: Path, cache: Path) -> None:
    folder, index = remote.local(URI), open_index(corpus)
    assert sum(shard.size for shard in index.shards) > 64 * BLOCK
    assert open_index(folder) == index and not list(folder.glob("*.arrow")) and (folder / "tokenizer.json").is_file()
    for split in SPLITS:
        for modality in MODALITIES:
            here, there = (Rows(of, index, split, modality) for of in (corpus, folder))
            assert len(here) == len(there) > 0
            for number in range(len(here)):
                for one, other in zip(here[number], there[number], strict=True):
                    assert one.dtype == other.dtype and one.shape == other.shape and (one == other).all()
                assert here.groups(number) == there.groups(number)
            assert 0 < sum(path.stat().st_size for path in blocks(cache)) <= 64 * BLOCK


@pytest.mark.drill
def test_a_run_reads_the_same_updates(corpus: Path, cache: Path, tmp_path: Path) -> None:
    plan = located(pretrain_plan("test", URI, str(tmp_path / "run"), steps=1))
    here, there = (PretrainBatches(of, batch_rows=8, seed=3).at(5)[0] for of in (corpus, plan.data))
    assert all((getattr(here, name) == getattr(there, name)).all() for name in ("tokens", "targets", "docs", "patches"))
    assert fit(plan).steps == 1 and blocks(cache)


def test_what_is_in_the_cache_is_not_asked_for_again(s3: Service, corpus: Path) -> None:
    rows = Rows(remote.local(URI), open_index(corpus), "train", "text")
    first = rows[0][0].tolist()
    s3.slow, s3.refused = 10**6, 0
    try:
        assert rows[0][0].tolist() == first and s3.refused == 0
    finally:
        s3.slow = 0


@contextmanager
def put(s3: Service, name: str, data: bytes | None) -> Iterator[None]:
    """Another object, or none, in the place of a shard."""
    client, key = s3.client, f"large/{name}"
    was = client.get_object(Bucket="corpora", Key=key)["Body"].read()
    client.delete_object(Bucket="corpora", Key=key)
    if data is not None:
        client.put_object(Bucket="corpora", Key=key, Body=data)
    yield
    client.put_object(Bucket="corpora", Key=key, Body=was)


def test_a_shard_that_is_not_what_its_index_says_is_one_line(s3: Service, corpus: Path) -> None:
    shard = open_index(corpus).of("train", "text")[0]
    data = (corpus / shard.file).read_bytes()
    folder = remote.local(URI)
    for other, said in [(data + b"x", "bytes, as its index says"), (data[:100], "as its index says"), (None, "missing"),
                        (b"\0" * len(data), "cannot be read")]:  # fmt: skip
        with put(s3, shard.file, other), pytest.raises(DataError, match=said) as caught:
            Rows(folder, open_index(folder), "train", "text")[0]
        assert shard.file in str(caught.value) and "\n" not in str(caught.value)
        for path in ranged.cache().glob(f"blocks/*/{shard.file}/*"):
            path.unlink()


def test_a_disk_that_is_full_is_one_line_and_leaves_no_half_of_a_block(
    corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[Path]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield path

    folder = remote.local(URI)
    monkeypatch.setattr(ranged, "aside", full)
    with pytest.raises(ResourceError, match=r"disk of the cache at .*full.*SHOAL_CACHE_BYTES lower") as caught:
        Rows(folder, open_index(folder), "train", "text")[0]
    assert "\n" not in str(caught.value) and not blocks(cache)


@pytest.mark.parametrize("said", ["many", "1000", "-1"])
def test_a_bound_of_the_cache_that_is_none_is_one_line(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE_BYTES", said)
    with pytest.raises(ResourceError, match="SHOAL_CACHE_BYTES"):
        remote.local(URI)


def test_a_block_that_is_cut_short_on_this_disk_is_fetched_anew(corpus: Path, cache: Path) -> None:
    """A machine that lost its power has the name of a file and not all of its bytes: these were taken for the shard's."""
    folder, index = remote.local(URI), open_index(corpus)
    here, there = (Rows(of, index, "train", "text") for of in (corpus, folder))
    wanted = [here[number][0].tolist() for number in range(3)]
    assert [there[number][0].tolist() for number in range(3)] == wanted
    for block in blocks(cache):
        block.write_bytes(block.read_bytes()[:100])
    there = Rows(folder, index, "train", "text")
    assert [there[number][0].tolist() for number in range(3)] == wanted


@pytest.mark.drill
def test_copies_are_within_the_bound_together_and_one_that_is_in_use_stays(
    s3: Service, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is room for two and a half: of the third the shards stay in S3, and the fourth takes the place of one that no
    process uses any more."""
    size = sum(file.stat().st_size for file in corpus.iterdir())
    monkeypatch.setenv("SHOAL_CACHE_BYTES", str(5 * size // 2))
    held: dict[Path, int] = {}
    monkeypatch.setattr(copies, "_held", held)

    def copy(seed: int) -> Path:
        made = Path(shutil.copytree(corpus, tmp_path / str(seed)))
        write_index(made, dataclasses.replace(open_index(made), seed=seed))
        upload(made, f"s3://corpora/{seed}", s3.s3)
        return remote.local(f"s3://corpora/{seed}")

    def is_whole(folder: Path) -> bool:
        return len(list(folder.glob("*.arrow"))) == len(open_index(folder).shards)

    try:
        first, second, third = copy(11), copy(12), copy(13)
        assert is_whole(first) and is_whole(second) and not list(third.glob("*.arrow"))
        here, there = (Rows(folder, open_index(folder), "train", "text")[0] for folder in (first, third))
        assert all((one == other).all() for one, other in zip(here, there, strict=True))
        os.close(held.pop(first))  # as the end of its process does
        fourth = copy(14)
        assert is_whole(second) and is_whole(fourth) and not first.exists()
        assert sum(copies.size(folder) for folder in (second, third, fourth)) <= 5 * size // 2
        assert remote.local("s3://corpora/14") == fourth and is_whole(fourth)
    finally:
        for lock in held.values():
            os.close(lock)


@pytest.fixture
def large(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the corpus, in a cache that has room for one and a half."""
    size = sum(file.stat().st_size for file in corpus.iterdir())
    monkeypatch.setenv("SHOAL_CACHE_BYTES", str(3 * size // 2))
    return size


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name != copies.USED)


@pytest.mark.usefixtures("large")
def test_who_was_killed_while_it_fetched_leaves_room_for_the_next_and_nothing_else(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had reserved was counted beside what the next one needs, which then read all of its rows by range for good."""

    def killed(client: object, bucket: str, key: str, folder: Path, files: dict[str, int]) -> None:
        (folder / "train-text-00000.arrow.5eC0nD5").write_bytes(bytes(BLOCK))
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(remote, "_fetch", killed)
            remote.local(URI)
        finally:
            os._exit(1)
    os.waitpid(child, 0)
    assert names(remote.local(URI)) == sorted(file.name for file in corpus.iterdir() if not file.name.startswith("."))


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("kind", ["shard", "index"])
def test_a_copy_that_is_cut_short_on_this_disk_is_fetched_anew(corpus: Path, kind: str) -> None:
    """A machine that lost its power has the name of a file and not all of its bytes."""
    folder, index = remote.local(URI), open_index(corpus)
    name = index.shards[0].file if kind == "shard" else "index.json"
    (folder / name).write_bytes(b"")
    assert remote.local(URI) == folder and (folder / name).read_bytes() == (corpus / name).read_bytes()
    assert open_index(folder) == index


def test_a_file_that_is_replaced_while_it_is_fetched_is_not_kept_as_the_one_before(s3: Service) -> None:
    """Its copy has a name that follows from the tag that was listed, and held what another had put meanwhile."""
    key = {"Bucket": "corpora", "Key": "chats/c.jsonl"}
    s3.client.put_object(**key, Body=b"{1}\n")

    def replaced(method: str, path: str, port: int) -> None:
        if "list-type" in path:
            s3.before = at_once
            s3.client.put_object(**key, Body=b"{2}\n")

    s3.before = replaced
    try:
        with pytest.raises(DataError, match=r"c\.jsonl was replaced while it was fetched: run it again"):
            remote.local("s3://corpora/chats/c.jsonl")
    finally:
        s3.before = at_once
    assert remote.local("s3://corpora/chats/c.jsonl").read_bytes() == b"{2}\n"
    s3.client.put_object(**key, Body=b"{1}\n")
    assert remote.local("s3://corpora/chats/c.jsonl").read_bytes() == b"{1}\n"


def test_a_file_for_which_there_is_no_room_is_one_line(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.client.put_object(Bucket="corpora", Key="chats/a.jsonl", Body=bytes(64 * BLOCK + 1))
    with pytest.raises(ResourceError, match=r"a\.jsonl does not fit the cache: got '65537 bytes'") as caught:
        remote.local("s3://corpora/chats/a.jsonl")
    assert "\n" not in str(caught.value)
