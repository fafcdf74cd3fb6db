"""Files that no reader may stumble over, made when a test needs them; the large ones are holes on disk.

Each goes into a folder with a good document before and after it, so that a lost one shows.
"""

import gzip
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

GOOD = "The tide was out, and the boats lay on the sand until the evening.\n"
LONG = 2**28  # bytes of a line: sixteen times what one may have, and twice what its reader may hold in its test


def make(folder: Path) -> dict[str, str]:
    """Fill `folder` with bad files; the reason that is counted for each, by the name as it is shown."""
    rows = "".join(json.dumps({"text": f"{n} {GOOD}"}) + "\n" for n in range(2000)).encode()
    plain: dict[str, tuple[bytes, str]] = {
        "binary.txt": (bytes(range(256)) * 20, "binary"),
        "latin.md": (("caf\u00e9 " * 20).encode("latin-1"), "not UTF-8"),
        "zero.txt": (b"", "empty"),
        "zero.jsonl": (b"", "empty"),
        "zero.parquet": (b"", "broken Parquet"),
        "none.png": (b"", "empty"),
        "zero.tar": (b"", "broken archive"),
        "zero.jsonl.gz": (b"", "empty"),
        "cut.txt.gz": (gzip.compress(os.urandom(200_000).hex().encode())[:100_000], "compressed data is cut off"),
        "cut.jsonl.zst": (bytes(pa.compress(rows, "zstd", asbytes=True))[:-9], "compressed data is cut off"),
        "no.txt.gz": (b"this was never compressed", "broken compressed data"),
        "no.txt.zst": (b"this was never compressed", "broken compressed data"),
        "rows.jsonl": (b'{"text": "' + GOOD.strip().encode() + b'"}\n{broken\n', "broken JSON"),
        "corrupt.png": (_png(64, 64)[:60], "image cannot be decoded"),
        "bomb.png": (_bomb(50_000, 50_000), "image has too many pixels"),
        "picture.webp": (b"RIFF0000WEBP", "image cannot be decoded"),
        "sound.mp3": (b"ID3", "suffix .mp3 is not read"),
    }  # fmt: skip
    for name, (data, _) in plain.items():
        (folder / name).write_bytes(data)
    pq.write_table(pa.table({"price": [1.5, 2.5]}), folder / "prices.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "numbers.parquet")
    _tar(folder / "torn.tar")
    _hole(folder / "line.txt", b"one line")
    _hole(folder / "line.jsonl", b'{"text": "')
    (folder / "dangling.txt").symlink_to(folder / "nowhere")
    (folder / "loop.txt").symlink_to(folder / "loop.txt")
    (folder / "loop").symlink_to(folder, target_is_directory=True)  # not entered
    os.mkfifo(folder / "pipe.txt")
    return {name: reason for name, (_, reason) in plain.items()} | {
        "rows.jsonl": "broken JSON",
        "prices.parquet": "no text or image column",
        "numbers.parquet": "text is not a string",
        "torn.tar": "broken archive",
        "line.txt": "line longer than 16 MiB",
        "line.jsonl": "row longer than 16 MiB",
        "dangling.txt": "not a regular file",
        "loop.txt": "cannot be read: Too many levels of symbolic links",
        "pipe.txt": "not a regular file",
    }


def odd_names(folder: Path) -> list[str]:
    """Good documents under names that are hard to say; the names as they are shown."""
    for name in (b"two\nlines.txt", b"caf\xe9.txt", "\u6f6e.txt".encode()):
        with open(os.fsencode(folder) + b"/" + name, "wb") as out:
            out.write(name + b" " + GOOD.encode() if name.isascii() else GOOD.encode() + str(len(name)).encode())
    return ["caf\\xe9.txt", "two\\nlines.txt", "\u6f6e.txt"]


def _png(width: int, height: int) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((width, height), 50).convert("RGB").save(out, "PNG")
    return out.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A few kilobytes that say they are billions of pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 10**6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _tar(path: Path) -> None:
    """Two members, the second cut off."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tape:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 4096
            text = " ".join(f"{name} {n} {n * n % 97}" for n in range(1000))
            tape.addfile(info, io.BytesIO(text.encode()[:4096]))
    path.write_bytes(out.getvalue()[: 512 + 4096 + 512 + 1000])


def _hole(path: Path, start: bytes) -> None:
    """A line of `LONG` that takes no room on disk, and a good one after it."""
    good = GOOD.strip().encode()
    last = (
        json.dumps({"text": f"after {path.name} {GOOD}"}).encode() if path.suffix == ".jsonl" else b"after it " + good
    )
    with path.open("wb") as out:
        out.write(start)
        out.seek(LONG)
        out.write(b"\n" + last + b"\n")
