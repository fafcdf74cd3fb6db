"""Forgetting in a bucket that several machines write: whoever forgets, and whoever is a moment late, no row of them survives
there, and none of anybody else is lost."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from shoal.cli import main
from shoal.data.sources.s3 import split
from shoal.loop import forget
from shoal.loop.capture import Capture, now_ms
from shoal.loop.cut import RECENT, TRAIN, cut
from shoal.loop.parts import write_part
from shoal.loop.rows import Row
from shoal.loop.texts import Texts
from shoal.loop.votes import Vote, Votes
from shoal.loop.writer import Writer
from tests.s3 import Service, service

ID = "chatcmpl-" + "0" * 31


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        yield made


@pytest.fixture
def uri(s3: Service, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"bucket-{abs(hash(request.node.name))}"
    s3.client.create_bucket(Bucket=name)
    monkeypatch.setattr("shoal.data.sources.s3.ATTEMPTS", 1)
    return f"s3://{name}/captured"


@pytest.fixture
def at(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Capture]:
    """The capture as the machine of this name sees it, which has a disk of its own."""

    def capture(machine: str, **how: bool) -> Capture:
        monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / machine))
        return Capture(uri, **how)

    return capture


def wrote(capture: Capture, subjects: str) -> None:
    """A part with a row of each of these persons, and a vote of each on it; sent."""
    writer = Writer(capture, start=False)
    for whose in subjects:
        writer.put(Row(f"of-{whose}", now_ms(), subject=whose))
        Votes(capture).put(Vote(f"of-{whose}", whose, correction=f"words of {whose}"))
    writer.close()
    capture.sent()


def there(s3: Service, uri: str) -> tuple[list[str], list[str]]:
    """Whose rows lie in the bucket, and whose votes."""
    bucket, key = split(uri)
    rows, votes = list[str](), list[str]()
    for item in s3.client.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", ()):
        body = s3.client.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
        if "/rows/" in item["Key"]:
            rows += pq.read_table(io.BytesIO(body))["subject"].to_pylist()
        if "/feedback/" in item["Key"]:
            votes += [whose for whose in "abcd" if f"words of {whose}".encode() in body]
    return sorted(rows), sorted(votes)


@pytest.mark.drill
def test_two_machines_that_forget_at_once_put_back_nobody(
    s3: Service, uri: str, at: Callable[..., Capture], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrote(at("gateway", create=True), "abc")
    one, two = at("one"), at("two")
    done = list[str]()

    def meanwhile(path: Path, table: object, **more: object) -> None:
        if not done:
            done.append("two")
            forget.forget(two, subject="b")
        write_part(path, table, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(forget, "write_part", meanwhile)
    forget.forget(one, subject="a")
    assert there(s3, uri) == (["c"], ["c"])


def test_what_becomes_a_part_before_its_machine_hears_of_it_goes_when_it_does(
    s3: Service, uri: str, at: Callable[..., Capture]
) -> None:
    gateway = at("gateway", create=True)
    writer = Writer(gateway, start=False)
    for whose in "ac":
        writer.put(Row(f"of-{whose}", now_ms(), subject=whose))
        Votes(gateway).put(Vote(f"of-{whose}", whose, correction=f"words of {whose}"))
    gateway.sent()
    forget.forget(at("one"), subject="a")
    Texts(gateway).put("", "a", [{"role": "user", "content": "hi"}], {"id": ID + "1", "choices": []}, {})
    writer.close()
    writer.send()
    assert there(s3, uri) == (["c"], ["c"])
    assert not [*gateway.folder.glob("texts/day=*/*.json")]


def test_who_is_forgotten_on_another_machine_while_a_cut_is_made_is_not_in_it(
    at: Callable[..., Capture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = at("gateway", create=True)
    for number in range(3):
        id_, whose = f"chatcmpl-{number:032x}", f"{number:032x}"
        answer = {"id": id_, "model": "fish", "choices": [{"message": {"content": "?"}}]}
        Texts(gateway).put("shop", whose, [{"role": "user", "content": f"secret {number}?"}], answer, {})
        Votes(gateway).put(Vote(id_, whose, correction="It is there."))
    gateway.sent()

    def meanwhile(*given: Any, **more: Any) -> Any:
        forget.forget(at("one"), subject=f"{1:032x}")
        return cut(*given, **more)

    at("curator")
    monkeypatch.setattr("shoal.loop.cut.cut", meanwhile)
    assert gateway.bucket is not None
    assert main(["curate", "--capture", gateway.bucket.uri, "--out", str(tmp_path / "cut"), "--heldout", "0"]) == 0
    found = "".join((tmp_path / "cut" / name).read_text() for name in (TRAIN, RECENT))
    assert "secret 1?" not in found and "secret 2?" in found
