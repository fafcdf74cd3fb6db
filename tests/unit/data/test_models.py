"""Model directories in S3: there whole or not at all, and fetched once by a machine. Machines are caches here."""

from __future__ import annotations

import errno
import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.data import models
from shoal.data.place import Bucket
from shoal.data.sources.s3 import S3
from shoal.errors import CheckpointError, ConfigError, DataError, ResourceError
from shoal.model.files import write_manifest
from tests.s3 import Service, service

URI = "s3://ocean/models/a"
MIB = 2**20


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        yield made


@pytest.fixture(autouse=True)
def empty(s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    bucket = Bucket("s3://ocean", s3.inside)
    bucket.remove([name for name, _ in bucket.sizes()])


def directory(at: Path, seed: int, size: int = 1000) -> Path:
    """What looks like a model directory from here."""
    at.mkdir()
    (at / "config.json").write_text(json.dumps({"format": "shoal-model", "seed": seed}))
    (at / "README.md").write_text("# a model\n")
    (at / "model.safetensors").write_bytes(random.Random(seed).randbytes(size))
    write_manifest(at)
    return at


def files(at: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in at.iterdir()}


def names(s3: Service) -> list[str]:
    return sorted(name for name, _ in Bucket(URI, s3.inside).sizes())


def test_what_was_put_is_read_on_every_machine_as_it_was(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = directory(tmp_path / "made", 1)
    models.put(made, URI)
    made_at = set[float]()
    for machine in ("one", "two"):
        monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / machine))
        read = models.here(URI)
        assert read.is_relative_to(tmp_path / machine) and files(read) == files(made)
        made_at.add((read / "config.json").stat().st_mtime)
    assert len(made_at) == 1, "all machines say alike when it was made"
    assert models.here(made) == made and models.here(str(made)) == made


def test_a_directory_that_was_copied_there_by_hand_is_read_too(s3: Service, tmp_path: Path) -> None:
    made = directory(tmp_path / "made", 1)
    for path in made.iterdir():
        Bucket(URI, s3.inside).put(path, path.name)
    assert files(models.here(URI)) == files(made)


def test_the_http_side_fetches_no_weights_and_an_engine_beside_it_these_alone(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = directory(tmp_path / "made", 1)
    models.put(made, URI)
    lean = models.here(URI, weights=False)
    assert set(files(lean)) == {"config.json", "README.md", "manifest.json"}
    fetched, get = list[str](), Bucket.get_if_there

    def counted(bucket: Bucket, name: str, file: Path) -> bool:
        fetched.append(name.rpartition("/")[2])
        return get(bucket, name, file)

    monkeypatch.setattr(Bucket, "get_if_there", counted)
    assert models.here(URI) == lean and files(lean) == files(made) and fetched == ["model.safetensors"]


def test_a_machine_fetches_each_file_once_however_many_ask_at_once(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = directory(tmp_path / "made", 1)
    models.put(made, URI)
    fetched, get = Counter[str](), Bucket.get_if_there

    def counted(bucket: Bucket, name: str, file: Path) -> bool:
        fetched[name.rpartition("/")[2]] += 1
        return get(bucket, name, file)

    monkeypatch.setattr(Bucket, "get_if_there", counted)
    with ThreadPoolExecutor(4) as pool:
        (folder,) = set(pool.map(lambda _: models.here(URI), range(4)))
    assert files(folder) == files(made)
    assert fetched == {name: 1 for name in files(made) if name != "manifest.json"}


@pytest.mark.drill
def test_a_model_that_takes_anothers_place_is_read_whole_in_the_middle_of_a_fetch_too(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = directory(tmp_path / "first", 1), directory(tmp_path / "second", 2)
    models.put(first, URI)
    before = models.here(URI)
    models.put(second, URI)
    after = models.here(URI)
    assert files(after) == files(second) and files(before) == files(first)
    assert len(names(s3)) == 1 + 3, "of the first nothing is left in the bucket"
    get = Bucket.get_if_there

    def replaced(bucket: Bucket, name: str, file: Path) -> bool:
        monkeypatch.setattr(Bucket, "get_if_there", get)
        models.put(first, URI)
        return get(bucket, name, file)

    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "another"))
    monkeypatch.setattr(Bucket, "get_if_there", replaced)
    assert files(models.here(URI)) == files(first)
    assert [path.is_dir() for path in sorted((tmp_path / "another" / "models").iterdir())].count(True) == 2


@pytest.mark.drill
def test_who_is_killed_while_it_puts_leaves_the_model_before_it(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = directory(tmp_path / "first", 1), directory(tmp_path / "second", 2)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_text", killed)
        with pytest.raises(KeyboardInterrupt):
            models.put(first, URI)
        with pytest.raises(CheckpointError, match=r"holds no whole model: got '\w{16}/README.md, and no manifest.json"):
            models.here(URI)
    models.need_replaceable(URI)
    models.put(first, URI)
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "put_text", killed)
        with pytest.raises(KeyboardInterrupt):
            models.put(second, URI)
        assert files(models.here(URI)) == files(first)
    models.put(second, URI)
    assert files(models.here(URI)) == files(second) and len(names(s3)) == 4


def test_of_two_commands_that_write_there_one_is_told(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = directory(tmp_path / "mine", 1), directory(tmp_path / "other", 2)
    put = Bucket.put

    def beaten(bucket: Bucket, file: Path, name: str) -> str:
        monkeypatch.setattr(Bucket, "put", put)
        models.put(other, URI)
        return put(bucket, file, name)

    monkeypatch.setattr(Bucket, "put", beaten)
    with pytest.raises(CheckpointError, match="another command wrote a model to s3://ocean/models/a"):
        models.put(mine, URI)
    assert files(models.here(URI)) == files(other)


def test_who_has_just_put_a_model_removes_nothing_of_who_takes_its_place(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next command begins as soon as the first one's manifest is there."""
    mine, other = directory(tmp_path / "mine", 1), directory(tmp_path / "other", 2)
    text, put = Bucket.put_text, Bucket.put
    first: list[str] = []

    def crossed(bucket: Bucket, name: str, data: bytes, **only: str) -> str | None:
        tag = text(bucket, name, data, **only)
        monkeypatch.setattr(Bucket, "put_text", text)
        for file in sorted(other.iterdir()):
            if file.name != "manifest.json":
                first.append(f"{'a' * 16}/{file.name}")
                put(bucket, file, first[-1])
        return tag

    monkeypatch.setattr(Bucket, "put_text", crossed)
    models.put(mine, URI)
    there = {name for name, _ in Bucket(URI, s3.inside).sizes()}
    assert first and set(first) <= there


def test_an_answer_that_was_lost_and_the_same_model_again_change_nothing(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = directory(tmp_path / "made", 1)
    put = Bucket.put_text

    def twice(bucket: Bucket, name: str, data: bytes, **only: str) -> str | None:
        put(bucket, name, data, **only)
        return put(bucket, name, data, **only)

    monkeypatch.setattr(Bucket, "put_text", twice)
    models.put(made, URI)
    tag = Bucket(URI, s3.inside).tag("manifest.json")
    models.put(made, URI)
    assert Bucket(URI, s3.inside).tag("manifest.json") == tag and files(models.here(URI)) == files(made)


def test_a_model_some_of_whose_files_are_gone_is_put_again(s3: Service, tmp_path: Path) -> None:
    """By the manifest alone it would be there, and no command could mend it."""
    made = directory(tmp_path / "made", 1)
    models.put(made, URI)
    bucket = Bucket(URI, s3.inside)
    bucket.remove([name for name, _ in bucket.sizes() if name.endswith("config.json")])
    models.put(made, URI)
    assert files(models.here(URI)) == files(made)


def test_what_is_written_is_there_when_the_block_ends_and_not_when_it_fails(s3: Service, tmp_path: Path) -> None:
    with pytest.raises(ValueError), models.written(URI) as folder:
        directory(folder, 1)
        raise ValueError
    assert names(s3) == []
    with models.written(URI) as folder:
        directory(folder, 1)
    assert files(models.here(URI)) == files(directory(tmp_path / "same", 1))
    assert [path.name for path in (tmp_path / "cache" / "models").glob(".new-*")] == []
    with models.written(tmp_path / "plain") as folder:
        assert folder == tmp_path / "plain"


@pytest.mark.parametrize(
    "what",
    ["other bytes", "cut short", "missing", "nothing", "no bucket", "no manifest of a model", "a name that leads away"],
)
def test_what_is_no_whole_model_is_refused_in_a_line(s3: Service, tmp_path: Path, what: str) -> None:
    made = directory(tmp_path / "made", 1)
    uri = "s3://nowhere/models/a" if what == "no bucket" else URI
    if what not in ("nothing", "no bucket"):
        models.put(made, URI)
    weights = next((name for name in names(s3) if name.endswith("safetensors")), "")
    bucket = Bucket(URI, s3.inside)
    match what:
        case "other bytes":
            bucket.put_text(weights, random.Random(7).randbytes(1000))
        case "cut short":
            bucket.put_text(weights, (made / "model.safetensors").read_bytes()[:-1])
        case "missing":
            bucket.remove([weights])
        case "no manifest of a model":
            bucket.put_text("manifest.json", b'{"files": [1]}')
        case "a name that leads away":
            listed = {"../a": {"bytes": 1, "sha256": "0"}}
            bucket.put_text("manifest.json", json.dumps({"files": listed}).encode())
    says = {
        "other bytes": r"model.safetensors is not what its manifest says: got '1000 bytes, sha256 \w{16}'; allowed: 1000 bytes",
        "cut short": r"model.safetensors is not what its manifest says: got '999 bytes",
        "missing": r"s3://ocean/models/a lacks \w{16}/model.safetensors, which its manifest names",
        "nothing": "s3://ocean/models/a holds no model: got 'nothing'",
        "no bucket": "s3://nowhere/models/a: the bucket does not exist",
        "no manifest of a model": "manifest.json lists no files with bytes and sha256",
        "a name that leads away": "manifest.json: file: got '../a'",
    }[what]
    with pytest.raises(DataError if what == "no bucket" else CheckpointError, match=says) as met:
        models.here(uri)
    assert "\n" not in str(met.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors*")), "what is not what it should be does not stay"


def test_what_is_no_model_is_not_replaced(s3: Service, tmp_path: Path) -> None:
    bucket = Bucket(URI, s3.inside)
    models.need_replaceable(URI)
    bucket.put_text("index.json", b"{}")
    with pytest.raises(CheckpointError, match=r"is not a model that may be replaced: got 'index\.json'"):
        models.need_replaceable(URI)
    with pytest.raises(CheckpointError, match="may be replaced"), models.written(URI):
        raise AssertionError("nothing is made that could not be put there")
    with pytest.raises(DataError, match="the bucket does not exist"):
        models.need_replaceable("s3://nowhere/models/a")
    with pytest.raises(ConfigError, match="s3://BUCKET"):
        models.need_replaceable("s3://")


def test_a_full_disk_and_a_cache_that_is_too_small_are_said(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models.put(directory(tmp_path / "made", 1, 17 * MIB), URI)
    with monkeypatch.context() as patch:
        patch.setenv("SHOAL_CACHE_BYTES", str(16 * MIB))
        with pytest.raises(
            ResourceError, match=f"{URI} does not fit the cache: got '178.* allowed: {16 * MIB}; set SHOAL"
        ):
            models.here(URI)
    with monkeypatch.context() as patch:

        def full(*_: object) -> bool:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(Bucket, "get_if_there", full)
        with pytest.raises(ResourceError, match=r"disk of the cache at .*: got 'full"):
            models.here(URI)
    assert len(files(models.here(URI))) == 4


def test_copies_have_a_bound_and_the_one_that_was_not_used_goes(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_CACHE_BYTES", str(16 * MIB))
    for number in range(3):
        models.put(directory(tmp_path / f"{number}", number, 7 * MIB), f"{URI}{number}")
    old, used = models.here(f"{URI}0"), models.here(f"{URI}1")
    new = models.here(f"{URI}2")
    assert all(path.is_dir() for path in (old, used, new)), "those that are in use stay"
    for path, age in ((old, 3000), (used, 2000), (new, 1000)):
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert models.here(f"{URI}0") == old
    (new / "model.safetensors").unlink()
    assert models.here(f"{URI}2") == new
    assert old.is_dir() and new.is_dir() and not used.exists()


def test_another_service_with_a_bucket_of_that_name_has_another_copy(s3: Service, tmp_path: Path) -> None:
    models.put(directory(tmp_path / "made", 1), URI)
    assert models.here(URI) != models.here(URI, service=S3(s3.inside.endpoint))


THIN = "s3://ocean/adapters/a"
MOST = {"config.json": 100, "weights.bin": 3 * MIB}


def thin(s3: Service, tmp_path: Path, seed: int, size: int = 2 * MIB) -> dict[str, bytes]:
    """A directory without a manifest, at `THIN`."""
    held = {"config.json": b"{}", "weights.bin": random.Random(seed).randbytes(size)}
    for name, data in held.items():
        (tmp_path / name).write_bytes(data)
        Bucket(THIN, s3.inside).put(tmp_path / name, name)
    return held


def test_a_directory_without_a_manifest_is_fetched_once_and_anew_where_it_is_another(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "PIECE", MIB + 1)
    first = thin(s3, tmp_path, 1)
    at = models.some(THIN, MOST)
    fetched = Bucket.part
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "part", lambda *_, **__: pytest.fail("it is here"))
        assert files(models.some(f"{THIN}/", MOST)) == files(at) == first
    second = thin(s3, tmp_path, 2)
    other = models.some(THIN, MOST)
    assert other != at and files(other) == second and files(at) == first
    (other / "weights.bin").unlink()

    def replaced(bucket: Bucket, name: str, start: int, end: int, *, tag: str) -> bytes:
        if start:
            thin(s3, tmp_path, 3)
        return fetched(bucket, name, start, end, tag=tag)

    monkeypatch.setattr(Bucket, "part", replaced)
    with pytest.raises(DataError, match=r"weights\.bin"):
        models.some(THIN, MOST)
    assert [*files(other)] == ["config.json"], "no part of two files is left"


def test_of_a_directory_without_a_manifest_it_is_said_what_is_missing_or_too_large(s3: Service, tmp_path: Path) -> None:
    assert models.some(tmp_path, MOST) == tmp_path
    with pytest.raises(CheckpointError, match=rf"{THIN} lacks config\.json"):
        models.some(THIN, MOST)
    thin(s3, tmp_path, 1, 4 * MIB)
    with pytest.raises(CheckpointError, match=r"weights\.bin: got 4194304; allowed: at most 3145728 bytes"):
        models.some(THIN, MOST)
    # S3 does not say, of an object, that it is its bucket which is not there
    with pytest.raises(CheckpointError, match=r"s3://nowhere/a lacks config\.json"):
        models.some("s3://nowhere/a", MOST)


def test_where_the_disk_is_full_a_directory_without_a_manifest_is_a_line(
    s3: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    thin(s3, tmp_path, 1)

    def full(*_: object, **__: object) -> bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "part", full)
        with pytest.raises(ResourceError) as caught:
            models.some(THIN, MOST)
    assert "\n" not in str(caught.value)
    assert files(models.some(THIN, MOST)).keys() == MOST.keys()
