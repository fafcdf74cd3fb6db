"""Archives of all kinds: what belongs together, what is left out, what is held at once, and what a broken one costs."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shoal.data.documents import Document, Skipped
from shoal.data.sources import archive

MEMORY = 96 * 2**20  # bytes, while archives of gigabytes are read
READ = """
import sys, tracemalloc
from shoal.data.documents import SourceSpec
from shoal.data.sources.files import list_files
from shoal.data.sources.read import read

for folder in sys.stdin:
    (file,) = list_files(SourceSpec("s", folder.strip()))
    next(iter(read(file)))  # what is imported at the first use is none of the archive's
    tracemalloc.start()
    print(sum(1 for _ in read(file)), tracemalloc.get_traced_memory()[1], flush=True)
    tracemalloc.stop()
"""
Held = Callable[[Path], tuple[int, int]]


@pytest.fixture(scope="module")
def in_a_process_of_its_own() -> Iterator[Held]:
    """How many items the one archive in a folder has, and the most bytes that were held while it was read: beside other tests
    those of their threads would be counted."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", READ], stdin=pipe, stdout=pipe, text=True) as process:

        def held(folder: Path) -> tuple[int, int]:
            assert process.stdin is not None and process.stdout is not None
            print(folder, file=process.stdin, flush=True)
            count, peak = process.stdout.readline().split()
            return int(count), int(peak)

        yield held
        assert process.stdin is not None
        process.stdin.close()


def tar(members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tape:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tape.addfile(info, io.BytesIO(data))
    return out.getvalue()


def split(found: list[Document | Skipped]) -> tuple[dict[str, str], dict[str, str]]:
    """Text by origin, and the reasons of what was skipped."""
    documents = {item.origin.partition("#")[2]: item.text for item in found if isinstance(item, Document)}
    return documents, {item.origin.partition("#")[2]: item.reason for item in found if isinstance(item, Skipped)}


def test_no_text_is_lost_beside_a_json_or_an_image_of_its_name(tmp_path: Path, read_all, png) -> None:
    members = [
        ("config.json", b'{"debug": true}'), ("config.py", b"x = 1\n"),
        ("flow.md", b"# The flow\n"), ("flow.png", png()),
        ("page.html", b"<p>A page"), ("page.jpg", png("blue")), ("page.txt", b"a caption\n"), ("page.png", png("green")),
        ("two.text", b"the first\n"), ("two.txt", b"the second\n"), ("two.json", b"{}"),
        ("v1.2.png", png("white")), ("z.txt.gz", gzip.compress(b"packed\n")),
    ]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar(members))
    documents, skipped = split(read_all())
    assert documents == {
        "config.py": "x = 1\n", "flow.md": "# The flow\n", "flow": "", "page.html": "A page", "page": "a caption",
        "page.png": "", "two": "the first", "two.txt": "the second\n", "v1.2.png": "", "z.txt.gz": "packed\n",
    }  # fmt: skip
    assert skipped == {"config": "no text and no image"}


def test_what_a_source_leaves_out_is_left_out_of_its_archives(tmp_path: Path, read_all) -> None:
    names = (
        ".git/config.cfg",
        "./src/.hidden.py",
        "tests/a.py",
        "src/gen_a.py",
        "./src/a.py",
        "../up.py",
        "src/._a.py",
    )
    (tmp_path / "a.tar").write_bytes(tar([(name, b"x = 1\n") for name in names]))
    documents, skipped = split(read_all(exclude=("tests", "gen_*")))
    assert list(documents) == ["./src/a.py"]
    hidden, excluded = "name begins with a dot", "excluded by its source"
    assert skipped == {
        ".git/config.cfg": hidden, "./src/.hidden.py": hidden, "src/._a.py": hidden, "../up.py": hidden,
        "tests/a.py": excluded, "src/gen_a.py": excluded,
    }  # fmt: skip


def test_the_text_of_a_file_stands_before_that_of_its_json(tmp_path: Path, read_all, png) -> None:
    fields = ("a.json", json.dumps({"text": "of the json", "license": "CC0-1.0", "group": 0}).encode())
    text, image = ("a.txt", b"of the text"), ("a.png", png())
    for number, order in enumerate(([fields, text, image], [image, text, fields])):
        (tmp_path / f"{number}.tar").write_bytes(tar(order))
    found = read_all()
    assert [(d.text, d.license, d.group) for d in found] == [("of the text", "CC0-1.0", "s/0")] * 2


def test_an_image_is_none_the_worse_for_a_bad_caption(tmp_path: Path, read_all, png) -> None:
    members = [
        ("a.png", png()),
        ("a.txt", b"\xff"),
        ("b.txt", b"x" * 50),
        ("b.png", png()),
        ("c.json", b"{}"),
        ("c.txt", b"\xff"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(members))
    documents, _ = split(read_all())
    assert list(documents) == ["a", "b"]
    assert [s.reason for s in read_all() if isinstance(s, Skipped)] == ["caption: not UTF-8", "not UTF-8"]


@pytest.mark.parametrize(
    "suffix", ["{:06}.txt", *(pytest.param(each, marks=pytest.mark.drill) for each in ("{:06}.bin", "png.{:06}"))]
)
def test_many_small_members_of_one_name_are_not_held(
    tmp_path: Path, suffix: str, in_a_process_of_its_own: Held
) -> None:
    def bare(name: str) -> bytes:
        info = tarfile.TarInfo(name)
        info.size = 1
        return info.tobuf(tarfile.USTAR_FORMAT) + b"x" + bytes(511)

    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as out:
        for number in range(6_000):
            out.write(bare("a." + suffix.format(number)))
        out.write(bytes(1024))
    count, peak = in_a_process_of_its_own(tmp_path)
    # The list that tarfile keeps takes 2.8 more than the 1.2 that are held.
    assert count == 6_000 and peak < 2.5 * 2**20


def header(name: str, size: int, kind: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [
    tarfile.XHDTYPE, *(pytest.param(kind, marks=pytest.mark.drill) for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE)),
])  # fmt: skip
def test_a_name_of_gigabytes_is_not_held(tmp_path: Path, read_all, kind: bytes, in_a_process_of_its_own: Held) -> None:
    with gzip.open(tmp_path / "a.tar.gz", "wb", compresslevel=1) as out:
        out.write(tar([("before.txt", b"before\n")])[:1024])
        out.write(header("long", 2**29, kind))
        for _ in range(2**9):
            out.write(bytes(2**20))
    assert split(read_all()) == ({"before.txt": "before\n"}, {"": "broken archive"})
    _, peak = in_a_process_of_its_own(tmp_path)
    assert peak < MEMORY


def test_a_broken_header_is_counted_and_does_not_end_an_archive_without_a_word(tmp_path: Path, read_all) -> None:
    data = bytearray(tar([(f"{n}.txt", b"text %d\n" % n) for n in range(4)]))
    data[2 * 1024 + 10] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    documents, skipped = split(read_all())
    assert documents == {"0.txt": "text 0\n", "1.txt": "text 1\n"} and skipped == {"": "broken archive"}


def test_archives_one_after_the_other_are_all_read(tmp_path: Path, read_all) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("a.txt", b"one\n")]) + tar([("b.txt", b"two\n")]))
    assert split(read_all()) == ({"a.txt": "one\n", "b.txt": "two\n"}, {})


@pytest.mark.parametrize(
    "bad",
    [
        header("a.txt", 0, tarfile.REGTYPE)[:124] + b"\xff" * 12 + header("a.txt", 0, tarfile.REGTYPE)[136:],  # a size below 0
        header("notes", 10, tarfile.XHDTYPE) * 2000,
        header("notes", 30, tarfile.XHDTYPE) + b"30 GNU.sparse.map=1,x,3,y,5,6\n".ljust(512, b"\0") + bytes(512),
        b"\xff" * 512,
        b"garbage" * 100,
    ],
)  # fmt: skip
def test_a_hostile_header_costs_what_follows_and_ends(tmp_path: Path, read_all, bad: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(tar([("a.txt", b"before\n")])[:1024] + bad)
    documents, skipped = split(read_all())
    assert documents == {"a.txt": "before\n"} and skipped == {"": "broken archive"}


def test_members_that_are_no_files_are_counted(tmp_path: Path, read_all) -> None:
    kinds = {"a.txt": tarfile.SYMTYPE, "b.txt": tarfile.LNKTYPE, "c.txt": tarfile.FIFOTYPE, "d.txt": tarfile.CHRTYPE}
    data = b"".join(header(name, 0, kind) for name, kind in kinds.items())
    (tmp_path / "a.tar").write_bytes(data + header("folder.txt", 0, tarfile.DIRTYPE) + tar([("e.txt", b"fine\n")]))
    documents, skipped = split(read_all())
    assert documents == {"e.txt": "fine\n"} and skipped == dict.fromkeys(kinds, "not a regular file")


def test_a_member_that_is_too_large_costs_itself(tmp_path: Path, read_all, monkeypatch, png) -> None:
    monkeypatch.setattr(archive, "MAX_ROW", 2**20)
    large = b"x" * (2**20 + 1)
    (tmp_path / "a.tar").write_bytes(tar([("a.txt", large), ("b.png", png()), ("b.txt", large), ("c.txt", b"fine\n")]))
    documents, _ = split(read_all())
    assert documents == {"b": "", "c.txt": "fine\n"}
    assert [s.reason for s in read_all() if isinstance(s, Skipped)] == [
        "larger than 1 MiB",
        "caption: larger than 1 MiB",
    ]
