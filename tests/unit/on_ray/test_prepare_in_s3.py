"""A corpus that machines without a common folder make in S3: the bytes of one made in a folder, whatever is lost meanwhile.

Machines are folders here, and tasks run on one after the other in this process; on Ray it is `tests/on_ray/test_prepare_s3.py`.
"""

from __future__ import annotations

import itertools
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shoal import presets
from shoal.data import lease, parts, place, remote
from shoal.data.documents import SourceSpec
from shoal.data.lease import Lease
from shoal.data.needs import put_requests
from shoal.data.operators.pipeline import Operators
from shoal.data.place import WORK, Bucket
from shoal.data.shards import INDEX, open_index
from shoal.data.sources.s3 import S3
from shoal.errors import DataError, ResourceError
from shoal.on_ray.prepare import prepare
from tests.s3 import Service, service

ASK: dict[str, Any] = {"mix": {"text": 0.6, "image": 0.1, "code": 0.3}, "preset": presets.get("test"), "seed": 5}
URI = "s3://ocean/made/here"
PARTS = 3  # more than machines, so that what one machine made is read on the other


class Killed(BaseException):
    """What ends a command here as kill -9 does elsewhere."""


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        yield made


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("raw")
    for n in range(24):
        (root / f"{n}.md").write_text(f"Log {n}: the boat {n * 7} left at {n}, wind {n % 12}, and came home.\n" * 4)
        (root / f"{n}.py").write_text(
            f'def f{n}(a):\n    """Add {n} to it."""\n    return a + {n}\n\n\nprint(f{n}(1))\n'
        )
    (root / "same.md").write_text((root / "3.md").read_text())
    words = [f"word{n * n % 83}" for n in range(80)]
    (root / "long.md").write_text(" ".join(words))
    (root / "near.md").write_text(" ".join([*words[:30], "another", *words[32:]]))
    (root / "exam.md").write_text(
        "I know the answer that no model may have read before it is asked for it in the exam, said he."
    )
    for n in range(3):
        Image.new("RGB", (12, 12), (n, 2, 9)).save(root / f"{n}.png")
    (root / "rows.jsonl").write_text(json.dumps({"image": "0.png", "question": "what?", "answer": "a shade"}) + "\n")
    return root


@pytest.fixture(scope="module")
def ask(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    exam = tmp_path_factory.mktemp("sets") / "exam.jsonl"
    exam.write_text(
        json.dumps({"prompt": "the answer that no model may have read before it is asked for it in the exam"})
    )
    return {"sources": [SourceSpec("raw", str(raw))], "operators": Operators(evaluation=(str(exam),)), **ASK}


class Machines:
    """Tasks go to one after the other. After each, `after` is called with its folder."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.folders = [root / name for name in ("one", "two")]
        self.after: Callable[[Path], None] = lambda folder: None
        self._patch, self._turns = patch, itertools.cycle(self.folders)

    def each(
        self, task: Callable[..., Any], jobs: Iterable[tuple[Any, ...]], sizes: list[int], what: str, on_progress: Any
    ) -> Iterator[Any]:
        for number, job in enumerate(jobs):
            on_progress(what, number, len(sizes))
            folder = next(self._turns)
            with self._patch.context() as here:
                here.setenv("SHOAL_CACHE", str(folder))
                result = task(*job)
            self.after(folder)
            yield result

    def everywhere(self, task: Callable[[], None]) -> None:
        for folder in self.folders:
            with self._patch.context() as here:
                here.setenv("SHOAL_CACHE", str(folder))
                task()
        task()


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    made = Machines(tmp_path, monkeypatch)
    monkeypatch.setattr(parts, "LEAST_PARTS", PARTS)
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "driver"))
    monkeypatch.setattr("shoal.on_ray.prepare.each", made.each)
    monkeypatch.setattr("shoal.on_ray.prepare.everywhere", made.everywhere)
    monkeypatch.setattr(lease, "SECONDS", 0.3)
    monkeypatch.setattr(lease, "LOOK", 0.05)
    monkeypatch.setattr(lease, "RENEWED", 10**6)
    return made


@pytest.fixture(scope="module")
def undisturbed(ask: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the same request makes in a folder."""
    with pytest.MonkeyPatch.context() as patch:
        made = Machines(tmp_path_factory.mktemp("machines"), patch)
        patch.setattr("shoal.on_ray.prepare.each", made.each)
        patch.setattr(parts, "LEAST_PARTS", PARTS)
        out = tmp_path_factory.mktemp("local")
        prepare(out, **ask)
    return {path.name: path.read_bytes() for path in out.iterdir() if not path.name.startswith("report.")}


@pytest.fixture
def bucket(s3: Service) -> Iterator[Bucket]:
    made = Bucket(URI, s3.inside)
    yield made
    made.remove([name for name, _ in made.sizes()])


def contents(bucket: Bucket) -> dict[str, bytes]:
    """All objects but the report, which holds the seconds that it took."""
    return {name: bucket.text(name) or b"" for name, _ in bucket.sizes() if not name.startswith("report.")}


@pytest.mark.drill
def test_the_corpus_is_that_of_a_folder_and_nothing_else_is_left(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    report = prepare(URI, **ask, s3=s3.inside)
    assert contents(bucket) == undisturbed and report["drops"].keys() == {"dedup", "near dedup", "decontamination"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "no machine keeps anything"
    assert prepare(URI, **ask, s3=s3.inside) == report  # it is there, and looked at
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(DataError, match=f"{URI} holds a corpus of another request: got 'other seed'"):
        prepare(URI, **{**ask, "seed": 6}, s3=s3.inside)
    assert open_index(remote.local(URI, s3.inside)).documents == report["documents"]


class Writes:
    """Ends a command before its write number `left`, or in the middle of it, when the object is there and nobody knows."""

    def __init__(self, patch: pytest.MonkeyPatch, *, left: int = 10**9, after: bool = False) -> None:
        self.left, self.after, self.dead = left, after, False
        for name in ("put", "put_text", "remove"):
            patch.setattr(Bucket, name, self._counted(getattr(Bucket, name)))
        end, leave = Lease.end, place.Place.leave
        patch.setattr(Lease, "end", lambda lease: lease._over.set() if self.dead else end(lease))
        patch.setattr(place.Place, "leave", lambda place: None if self.dead else leave(place))

    def _counted(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def counted(bucket: Bucket, *args: Any, **more: Any) -> Any:
            if lease.NAME in args and not self.dead:
                return write(bucket, *args, **more)
            self.left -= 1
            if self.left >= 0:
                return write(bucket, *args, **more)
            self.dead = True
            if self.after and self.left == -1:
                write(bucket, *args, **more)
            raise Killed

        return counted


@pytest.mark.drill
def test_a_command_that_is_killed_at_any_write_is_gone_on_with_to_the_same_bytes(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    some, kills = random.Random(1), 0
    while True:
        with pytest.MonkeyPatch.context() as patch:
            Writes(patch, left=some.randint(6, 30), after=some.random() < 0.5)
            try:
                prepare(URI, **ask, s3=s3.inside)
                break
            except Killed:
                kills += 1
        assert bucket.tag(INDEX) is None or contents(bucket).keys() >= undisturbed.keys()
        for folder in machines.folders[: kills % 3]:
            shutil.rmtree(folder, ignore_errors=True)
    assert kills > 2
    prepare(URI, **ask, s3=s3.inside)
    assert contents(bucket) == undisturbed


def interrupt(what: str, done: int, total: int) -> None:
    if what == "draw chats":
        raise KeyboardInterrupt


@pytest.mark.drill
def test_what_another_request_left_is_not_mixed_in(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(URI, **{**ask, "seed": 6}, s3=s3.inside, on_progress=interrupt)
    bucket.put_text("train-text-99999-000.arrow", b"of a larger corpus")
    bucket.put_text("notes.txt", b"somebody's")
    prepare(URI, **ask, s3=s3.inside)
    assert contents(bucket) == undisturbed | {"notes.txt": b"somebody's"}


@pytest.mark.drill
def test_a_part_that_was_changed_there_is_made_again(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any], undisturbed: dict[str, bytes]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(URI, **ask, s3=s3.inside, on_progress=interrupt)
    names = [name for name, _ in bucket.sizes()]
    for name in (
        min(n for n in names if n.endswith(".arrow") and WORK not in n),
        f"{WORK}/00001.arrow",
        f"{WORK}/00002.pack.json",
    ):
        data = bucket.text(name) or b""
        bucket.put_text(name, data[:-9] + b"x" * 9)
    prepare(URI, **ask, s3=s3.inside)
    assert contents(bucket) == undisturbed


@pytest.mark.drill
def test_two_commands_on_one_prefix_the_second_is_refused_and_a_dead_one_blocks_nobody(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "SECONDS", 20.0)
    monkeypatch.setattr(lease, "RENEWED", 0.1)
    refused = []

    def second(what: str, done: int, total: int) -> None:
        if not refused:
            with pytest.raises(DataError, match=f"another prepare is writing to {URI}: got 'process") as caught:
                prepare(URI, **ask, s3=s3.inside)
            refused.append(caught)

    prepare(URI, **ask, s3=s3.inside, on_progress=second)
    assert refused and bucket.tag(lease.NAME) is None


@pytest.mark.drill
def test_tasks_of_a_command_whose_lease_another_took_write_nothing(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any]
) -> None:
    """It was noticed when the corpus was to be completed: until then its shards came to lie over those of the other."""
    other = Lease(bucket, "another")

    def taken(what: str, done: int, total: int) -> None:
        if what == "encode and pack" and not done:
            other.take()

    with pytest.raises(DataError, match=f"another prepare took over {URI}") as caught:
        prepare(URI, **ask, s3=s3.inside, on_progress=taken)
    assert "\n" not in str(caught.value) and not [name for name, _ in bucket.sizes() if name.endswith("-000.arrow")]
    other.end()


@pytest.mark.parametrize("size", [10, 2**23 - 1, 2**23, 20_000_000])
def test_a_file_is_put_in_as_many_requests_as_are_said(bucket: Bucket, tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_bytes(bytes(size))
    asked = list[str]()
    bucket._client.meta.events.register("before-send.s3", lambda event_name, **_: asked.append(event_name))
    bucket.put(tmp_path / "file", "file")
    assert len(asked) == put_requests(size), asked


@pytest.mark.drill
def test_a_cache_has_its_bound_and_what_goes_is_fetched_again(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any], undisturbed: dict[str, bytes], monkeypatch
) -> None:
    most = 64 * place.ranged.BLOCK
    monkeypatch.setattr(place.ranged, "cache_bytes", lambda: most // 256)
    monkeypatch.setattr(place, "SPARED", -60.0)  # not even what was used just now
    sizes: list[int] = []
    machines.after = lambda folder: sizes.append(
        sum(path.stat().st_size for path in folder.rglob("*.*") if path.is_file())
    )
    prepare(URI, **ask, s3=s3.inside)
    assert contents(bucket) == undisturbed and max(sizes) < most // 128


def test_a_folder_that_cannot_be_written_is_one_line(
    bucket: Bucket,
    s3: Service,
    machines: Machines,
    ask: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "file" / "in"))
    with pytest.raises(ResourceError, match=r"cannot write to .*: got 'Not a directory'; set SHOAL_CACHE"):
        prepare(URI, **ask, s3=s3.inside)
    assert bucket.tag(lease.NAME) is None


@pytest.mark.parametrize("root", [b"", b'{"schema": 2, "shards": [', b'{"schema": 1}', b"[]"])
def test_a_root_that_is_half_written_or_another_is_one_line(
    bucket: Bucket, s3: Service, machines: Machines, ask: dict[str, Any], root: bytes
) -> None:
    bucket.put_text(INDEX, root)
    for look in (lambda: prepare(URI, **ask, s3=s3.inside), lambda: remote.local(URI, s3.inside)):
        with pytest.raises(DataError, match=f"{URI}/{INDEX}(: schema| is not an index of ours)") as caught:
            look()
        assert "\n" not in str(caught.value) and contents(bucket) == {INDEX: root}


def test_a_bucket_that_is_not_there_and_one_that_does_not_answer_are_one_line(
    s3: Service, machines: Machines, ask: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="the bucket does not exist"):
        prepare("s3://nobody-made-this/x", **ask, s3=s3.inside)
    monkeypatch.setattr("shoal.data.sources.s3.ATTEMPTS", 1)
    with pytest.raises(DataError, match="S3 does not answer") as caught:
        prepare(URI, **ask, s3=S3("http://127.0.0.1:9"))
    assert "\n" not in str(caught.value)
