"""A capture in S3: several machines write, others read and forget, and a bucket that does not answer costs no row."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shoal.cli import main
from shoal.data.sources.s3 import split
from shoal.errors import DataError
from shoal.loop import writer
from shoal.loop.capture import ABOUT, JOURNAL, Capture, now_ms
from shoal.loop.forget import forget
from shoal.loop.rows import Row
from shoal.loop.texts import Texts
from shoal.loop.votes import Vote, Votes
from shoal.loop.watch import Watch
from shoal.loop.writer import Bounds, Writer
from tests.s3 import Service, service

ID = "chatcmpl-" + "0" * 31
COMPLETION = {"choices": [{"message": {"content": "yes"}}]}


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        yield made


@pytest.fixture
def uri(s3: Service, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket of its own, asked once and not again: what does not answer is told at once."""
    s3.slow = 0
    name = f"bucket-{abs(hash(request.node.name))}"
    s3.client.create_bucket(Bucket=name)
    monkeypatch.setattr("shoal.data.sources.s3.ATTEMPTS", 1)
    return f"s3://{name}/captured"


@pytest.fixture
def on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """What follows runs on the machine of this name: with a disk of its own."""
    return lambda machine: monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / machine))


def names(s3: Service, uri: str) -> list[str]:
    bucket, key = split(uri)
    found = s3.client.list_objects_v2(Bucket=bucket, Prefix=key).get("Contents", ())
    return sorted(item["Key"].removeprefix(f"{key}/") for item in found)


def wrote(uri: str, count: int, subject: str = "ann", begins: str = "a") -> Capture:
    """Rows that became a part and were sent."""
    capture = Capture(uri, create=True)
    made = Writer(capture, start=False)
    for number in range(count):
        made.put(Row(f"{begins}{number}", now_ms(), subject=subject, weights="aa", status=200, prompt_tokens=5))
    made.close()
    capture.sent()
    return capture


def until(true: Callable[[], bool]) -> None:
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it does not come")


@pytest.mark.drill
def test_machines_write_beside_each_other_and_anybody_reads_and_forgets(
    s3: Service, uri: str, on: Callable[[str], None]
) -> None:
    on("one")
    one = wrote(uri, 3)
    Votes(one).put(Vote("a0", "ann", "up"))
    Texts(one).put("", "ann", [{"role": "user", "content": "hi"}], {"id": ID + "1", **COMPLETION}, {})
    one.sent()
    on("two")
    two = wrote(uri, 2, "bob", "b")
    assert two.salt == one.salt and two.folder != one.folder
    assert Votes(two).knows("a0") and not Votes(two).knows("z9"), "another machine captured it"
    Votes(two).put(Vote("a0", "bob", "down"))
    stored = Texts(two).get("", ID + "1")
    assert stored is not None and stored["subject"] == "ann"
    two.sent()
    there = names(s3, uri)
    assert sum(name.startswith("rows/") for name in there) == 2 and sum("votes-" in name for name in there) == 2

    on("reader")
    read = Capture(uri)
    assert sorted(read.rows()["id"].to_pylist()) == ["a0", "a1", "a2", "b0", "b1"]
    assert [(vote.subject, vote.rating) for vote in Votes(read).all()] == [("ann", "up"), ("bob", "down")]
    told = forget(read, subject="ann")
    assert (told.rows, told.texts, told.votes) == (3, 1, 2)  # bob's too: it is on ann's answer
    assert [name for name in names(s3, uri) if name.startswith("texts/")] == []
    bucket, _ = split(uri)
    left = [name for name in names(s3, uri) if name.startswith("rows/")]
    bodies = [s3.client.get_object(Bucket=bucket, Key=f"captured/{name}")["Body"].read() for name in left]
    assert len(left) == 1 and b"ann" not in b"".join(bodies)
    on("one")
    again = Capture(uri)
    assert again.folder == one.folder and again.rows()["subject"].to_pylist() == ["bob", "bob"]
    again.sent()
    assert [name for name in names(s3, uri) if name.startswith("rows/")] == left, "what is gone stays gone"


@pytest.mark.drill
def test_rows_go_to_the_bucket_by_themselves_and_wait_where_it_does_not_answer(
    s3: Service, uri: str, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(writer, "SEND_SECONDS", 0.02)
    monkeypatch.setattr(writer, "LOOK_SECONDS", 0.02)
    on("gateway")
    capture = Capture(uri, create=True)
    made = Writer(capture, Bounds(journal_seconds=0.0))
    s3.slow = 10**9
    for number in range(50):
        made.put(Row(f"a{number}", now_ms()))
    until(lambda: made.waiting > 0 and "until the bucket takes them" in caplog.text)
    assert made.rows == 50 and not made.dropped and names(s3, uri) == [ABOUT, "salt"]
    assert len(capture.rows()) == 50
    s3.slow = 0
    until(lambda: made.waiting == 0 and any(name.startswith("rows/") for name in names(s3, uri)))
    made.put(Row("last", now_ms()))
    made.close()
    on("reader")
    assert len(Capture(uri).rows()) == 51


def test_days_that_are_too_old_go_from_the_bucket_as_well(s3: Service, uri: str, on: Callable[[str], None]) -> None:
    on("gateway")
    capture = Capture(uri, create=True)
    made = Writer(capture, Bounds(keep_days=2), start=False)
    made.put(Row("old", now_ms() - 5 * 86_400_000))
    made.put(Row("new", now_ms()))
    made.close()
    capture.sent()
    made.tidy()
    capture.sent()
    on("reader")
    assert Capture(uri).rows()["id"].to_pylist() == ["new"]


def test_a_start_needs_the_bucket_once(s3: Service, uri: str, on: Callable[[str], None]) -> None:
    on("gateway")
    s3.slow = 10**9
    with pytest.raises(DataError, match="S3 still asked to slow down"):
        Capture(uri, create=True)
    s3.slow = 0
    with pytest.raises(DataError, match=f"no {ABOUT}"):
        Capture(uri)
    Capture(uri, create=True)
    s3.slow = 10**9
    Writer(Capture(uri, create=True), start=False).close()


def test_what_leads_elsewhere_is_not_fetched(s3: Service, uri: str, on: Callable[[str], None]) -> None:
    bucket, _ = split(uri)
    on("gateway")
    capture = wrote(uri, 1)
    for name in ("rows/day=2026-01-01/../../x", "rows/x", "salt2", "rows/day=2026-01-01/.hidden"):
        s3.client.put_object(Bucket=bucket, Key=f"captured/{name}", Body=b"x")
    on("reader")
    read = Capture(uri)
    assert len(read.rows()) == 1 and capture.folder != read.folder
    files = {path.relative_to(read.folder).parts[0] for path in read.folder.rglob("*") if path.is_file()}
    assert files == {ABOUT, "salt", "rows", ".bucket.json", ".bucket.lock"}


@pytest.mark.drill
def test_watch_and_the_commands_read_it(
    s3: Service, uri: str, on: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    on("gateway")
    wrote(uri, 30)
    on("reader")
    assert main(["watch", "--capture", uri, "--once", "--learn", "200"]) == 0
    assert "2 of the 200 sessions" in capsys.readouterr().out
    watch = Watch(uri, learn=200)
    s3.slow = 10**9
    report = watch.look()
    assert report.requests == 2 and "what was fetched before was looked at" in report.warnings[-1]
    assert main(["watch", "--capture", uri, "--once"]) == 1 and "S3 still asked" in capsys.readouterr().err
    s3.slow = 0
    assert main(["forget", "--capture", uri, "--id", "a3"]) == 0 and "1 rows" in capsys.readouterr().out
    on("gateway")
    assert len(Capture(uri).rows()) == 29 and not [*Path(Capture(uri).folder / JOURNAL).glob("*")]
    part = next((Capture(uri).folder / "rows").rglob("*.parquet"))
    assert "a3" not in pq.read_table(part, partitioning=None)["id"].to_pylist()


@pytest.mark.parametrize("what", [
    "[!.]*", "rows/*",
    *(pytest.param(each, marks=pytest.mark.drill) for each in ("rows", "feedback/*", "texts", "forgotten.jsonl")),
])  # fmt: skip
def test_what_somebody_removed_from_the_copy_to_make_room_stays_in_the_bucket(
    s3: Service, uri: str, on: Callable[[str], None], what: str
) -> None:
    """All of the copy but its hidden files, a kind, its days, or a file that several append to."""
    on("gateway")
    capture = wrote(uri, 3)
    Votes(capture).put(Vote("a0", "ann", "up"))
    for number in "12":
        Texts(capture).put("", "ann", [], {"id": ID + number, **COMPLETION}, {})
    Texts(capture).delete("", ID + "1")
    capture.sent()
    assert len(names(s3, uri)) == 6
    for path in capture.folder.glob(what):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = wrote(uri, 1, "bob", "b")
    Votes(again).put(Vote("b0", "bob", "down"))
    Texts(again).put("", "bob", [], {"id": ID + "3", **COMPLETION}, {})
    Texts(again).delete("", ID + "3")
    again.sent()
    on("reader")
    read = Capture(uri)
    assert sorted(read.rows()["id"].to_pylist()) == ["a0", "a1", "a2", "b0"]
    assert sorted(vote.id for vote in Votes(read).all()) == ["a0", "b0"]
    assert read.forgotten().ids == {ID + "1", ID + "3"}, "else what was deleted would be seen again"
    assert Texts(read).get("", ID + "2") is not None and len(names(s3, uri)) >= 7
    on("gateway")
    assert Capture(uri).forgotten().ids == {ID + "1", ID + "3"}


def test_a_text_that_was_deleted_is_not_fetched_back_before_the_bucket_has_heard_of_it(
    s3: Service, uri: str, on: Callable[[str], None]
) -> None:
    on("gateway")
    capture = Capture(uri, create=True)
    for number in "12":
        Texts(capture).put("", "ann", [], {"id": ID + number, **COMPLETION}, {})
    capture.sent()
    assert Texts(capture).delete("", ID + "1")
    assert Texts(capture).get("", ID + "9") is None, "the bucket is looked at for it"
    assert [path.stem for path in capture.folder.rglob("chatcmpl-*")] == [ID + "2"]
    capture.sent()
    assert [name for name in names(s3, uri) if ID in name] == [name for name in names(s3, uri) if ID + "2" in name]
