"""Answers of S3 that break off in the middle of an object's bytes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from shoal.data.place import Bucket
from shoal.data.ranged import BLOCK, Origin, _fetch
from shoal.data.sources import s3
from shoal.loop import bucket
from tests.s3 import Service, service

URI = "s3://ocean/x"


@pytest.fixture(scope="module")
def held() -> Iterator[tuple[Service, bytes, str]]:
    """A service with an object "a" at s3://ocean/x, its bytes and its tag."""
    with service() as made, TemporaryDirectory() as folder:
        made.client.create_bucket(Bucket="ocean")
        path = Path(folder, "a")
        path.write_bytes(random.Random(0).randbytes(300_000))
        yield made, path.read_bytes(), Bucket(URI, made.inside).put(path, "a")


@pytest.fixture
def gets(held: tuple[Service, bytes, str], tmp_path: Path) -> dict[str, tuple[Callable[[], bytes | None], bytes]]:
    """All that reads objects in one go, and what each is to give."""
    made, data, tag = held
    there, origin = Bucket(URI, made.s3), Origin(URI, made.endpoint)
    copy = bucket.Bucket(URI, made.s3)
    return {
        "text": (lambda: there.text("a"), data),
        "part": (lambda: there.part("a", 10, 200_000, tag=tag), data[10:200_000]),
        "block": (lambda: _fetch(origin, "a", len(data), 0), data[:BLOCK]),
        "capture": (lambda: copy._get("a")[0], data),
    }


@pytest.mark.parametrize("name", ["text", "part", "block", "capture"])
def test_an_answer_that_breaks_off_in_the_middle_is_asked_for_again(
    held: tuple[Service, bytes, str],
    gets: dict[str, tuple[Callable[[], bytes | None], bytes]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run that reads its rows by range asks for some thousands an hour: one connection that breaks must not end it."""
    monkeypatch.setattr(s3, "PAUSE", 0.0)
    get, wanted = gets[name]
    made = held[0]
    made.cut = s3.ATTEMPTS - 1
    assert (get() == wanted) is True and made.cut == 0  # no drawing of where so many bytes differ
    made.cut = s3.ATTEMPTS
    with pytest.raises(Exception, match=r"IncompleteRead|more expected"):
        get()
    assert made.cut == 0
