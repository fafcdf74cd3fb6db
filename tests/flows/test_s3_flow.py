"""A corpus from S3 to S3 without Ray: sources read in place, the finished corpus copied out and in; and S3 on a bad day."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from shoal import presets
from shoal.data import remote
from shoal.data.documents import Document, Skipped, SourceSpec
from shoal.data.shards import INDEX, open_index
from shoal.data.sources.files import list_files
from shoal.data.sources.read import read
from shoal.data.sources.s3 import S3
from shoal.errors import DataError
from shoal.train.loop import fit
from shoal.train.plan import located, pretrain_plan
from tests.corpus import write_corpus
from tests.s3 import Service, service, upload


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="corpora")
        yield made


@pytest.fixture(autouse=True)
def cache(s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    s3.slow = 0
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"), documents=20, heldout=6)


def test_a_prefix_is_read_like_a_folder(s3: Service, tmp_path: Path) -> None:
    for name, data in {
        "b.py": b"x = 1\n", "a.md": b"# Title\n", "in/c.jsonl": b'{"image": "d.png", "text": "a box"}\n{broken\n',
        "in/bad.txt": b"\xff", ".hidden/e.txt": b"no", "skip/f.txt": b"no", "empty.txt": b"",
    }.items():  # fmt: skip
        s3.client.put_object(Bucket="corpora", Key=f"raw/{name}", Body=data)
    Image.new("RGB", (24, 24)).save(tmp_path / "d.png")
    s3.client.upload_file(str(tmp_path / "d.png"), "corpora", "raw/in/d.png")
    spec = SourceSpec("s", "s3://corpora/raw", exclude=("skip",))
    found = [item for file in list_files(spec) for item in read(file)]
    kept = {d.origin: d.modality for d in found if isinstance(d, Document)}
    assert kept == {"a.md": "text", "b.py": "code", "in/c.jsonl#1": "image", "in/d.png": "image"}
    skipped = {item.origin: item.reason for item in found if isinstance(item, Skipped)}
    assert skipped == {"empty.txt": "empty", "in/bad.txt": "not UTF-8", "in/c.jsonl#2": "broken JSON"}
    (only,) = list_files(SourceSpec("s", "s3://corpora/raw/a.md"))
    assert only.name == "a.md"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://nobody-made-this/x", "the bucket does not exist"),
        ("s3://nobody-made-this", "does not exist"),
        ("s3://corpora/nothing/here", "does not exist"),
    ],
)
def test_a_missing_bucket_or_prefix_is_one_line(s3: Service, uri: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        list_files(SourceSpec("notes", uri))
    assert "notes" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.drill
def test_slow_down_for_a_while_costs_time_and_nothing_else(s3: Service) -> None:
    s3.client.put_object(Bucket="corpora", Key="slow/a.txt", Body=b"still here\n")
    s3.slow, s3.refused = 2, 0
    (file,) = list_files(SourceSpec("s", "s3://corpora/slow"))
    s3.slow = 2
    (document,) = read(file)
    assert isinstance(document, Document) and document.text == "still here\n" and s3.refused == 4


def test_slow_down_without_end_is_one_line(s3: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.data.sources.s3.ATTEMPTS", 2)
    s3.slow = 10**6
    with pytest.raises(DataError, match="asked to slow down"):
        list_files(SourceSpec("s", "s3://corpora/slow"), S3(s3.endpoint, "eu-west-1"))  # a client of its own


def test_a_good_file_that_s3_does_not_give_ends_the_run_and_is_not_left_out(
    s3: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.data.sources.s3.ATTEMPTS", 2)
    for name in ("a.txt", "b.parquet"):
        s3.client.put_object(Bucket="corpora", Key=f"given/{name}", Body=b"good\n")
    files = list_files(SourceSpec("s", "s3://corpora/given"), S3(s3.endpoint, "eu-north-1"))
    s3.slow = 10**6
    for file in files:
        with pytest.raises(DataError, match=f"source s: {file.name}: S3 still asked to slow down|{file.name}: .*slow"):
            list(read(file))


def test_a_corpus_goes_out_and_comes_in_whole(s3: Service, corpus: Path, cache: Path) -> None:
    uri = "s3://corpora/made/one"
    assert not remote.exists(uri, S3())
    upload(corpus, uri, S3())
    assert remote.exists(uri, S3())
    folder = remote.local(uri)
    assert folder.is_relative_to(cache) and open_index(folder) == open_index(corpus)
    for path in corpus.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    times = {path: path.stat().st_mtime_ns for path in folder.glob("[!.]*")}
    assert remote.local(uri) == folder and times == {path: path.stat().st_mtime_ns for path in times}
    assert remote.local(corpus) == corpus  # a local one is itself


def test_a_corpus_without_its_index_or_with_another_shard_is_refused(s3: Service, corpus: Path, tmp_path: Path) -> None:
    uri = "s3://corpora/made/two"
    upload(corpus, uri, S3())
    shard = open_index(corpus).shards[0]
    broken = bytearray((corpus / shard.file).read_bytes())
    broken[len(broken) // 2] ^= 1
    s3.client.put_object(Bucket="corpora", Key=f"made/two/{shard.file}", Body=bytes(broken))
    shutil.rmtree(remote.cache(), ignore_errors=True)
    with pytest.raises(DataError, match=f"sha256 of {shard.file}"):
        remote.local(uri)
    upload(corpus, uri, S3())
    assert open_index(remote.local(uri)) == open_index(corpus)  # what was refused is not taken again
    s3.client.delete_object(Bucket="corpora", Key=f"made/two/{INDEX}")
    with pytest.raises(DataError, match="holds no prepared corpus"):
        remote.local(uri)
    with pytest.raises(DataError, match="the bucket does not exist"):
        remote.local("s3://nobody-made-this/x")


def test_a_run_trains_on_its_own_copy_of_a_corpus_in_s3(s3: Service, corpus: Path, tmp_path: Path) -> None:
    uri = "s3://corpora/made/three"
    upload(corpus, uri, S3())
    plan = located(pretrain_plan("test", uri, str(tmp_path / "run"), steps=1))
    assert plan.data == str(remote.local(uri)) and fit(plan).steps == 1
    assert located(plan) == plan


def test_the_empty_object_that_a_console_makes_of_a_folder_is_no_file(s3: Service, corpus: Path) -> None:
    for key in ("made/four/", "made/four/in/", "made/four/.hidden"):
        s3.client.put_object(Bucket="corpora", Key=key, Body=b"")
    upload(corpus, "s3://corpora/made/four", S3())
    assert open_index(remote.local("s3://corpora/made/four")) == open_index(corpus)
    s3.client.put_object(Bucket="corpora", Key="console/", Body=b"")
    s3.client.put_object(Bucket="corpora", Key="console/a.txt", Body=b"fine\n")
    (file,) = list_files(SourceSpec("s", "s3://corpora/console"))
    assert [item.text for item in read(file) if isinstance(item, Document)] == ["fine\n"]


def test_a_fetch_that_is_killed_while_it_checks_leaves_nothing_to_be_taken(
    s3: Service, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "s3://corpora/made/five"
    upload(corpus, uri, S3())
    shard = open_index(corpus).shards[0]
    broken = bytearray((corpus / shard.file).read_bytes())
    broken[len(broken) // 2] ^= 1
    s3.client.put_object(Bucket="corpora", Key=f"made/five/{shard.file}", Body=bytes(broken))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(remote.hashlib, "file_digest", killed)
        with pytest.raises(KeyboardInterrupt):
            remote.local(uri)
    assert not list(cache.rglob(INDEX))
    with pytest.raises(DataError, match=f"sha256 of {shard.file}"):
        remote.local(uri)


def test_an_index_that_names_files_elsewhere_is_refused_and_nothing_is_touched(
    s3: Service, corpus: Path, tmp_path: Path
) -> None:
    outside = tmp_path / "precious"
    outside.write_text("keep me")
    upload(corpus, "s3://corpora/made/seven", S3())
    index = (corpus / INDEX).read_text().replace(open_index(corpus).shards[0].file, str(outside))
    s3.client.put_object(Bucket="corpora", Key=f"made/seven/{INDEX}", Body=index.encode())
    with pytest.raises(DataError, match="names of files in its folder"):
        remote.local("s3://corpora/made/seven")
    assert outside.read_text() == "keep me"
