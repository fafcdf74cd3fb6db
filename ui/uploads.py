"""Pictures that people upload: where they lie, whose they are, and which of them a page's message may name.

Notable: Gradio takes any path of the server in a message, unless it launched the page itself. So no path goes to Gradio that is
not one of the session's own uploads, or a picture of the pages; and nothing else of a message's file goes on, such as a URL.
"""

from __future__ import annotations

import atexit
import mimetypes
import os
import shutil
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from ui.bubbles import LOST_PICTURE

IMAGES = (".png", ".jpg", ".jpeg", ".webp")  # what the API decodes
MOST_FILES, MOST_BYTES = 2000, 2**30  # of all uploads together
META = {"_type": "gradio.FileData"}  # what Gradio knows a file by


class Uploads:
    """The uploads that this process holds, by session. A message may name those of its own session, and `shown`: pictures of
    the pages."""

    def __init__(self, shown: Iterable[str | Path]) -> None:
        self._shown = {os.path.realpath(path) for path in (LOST_PICTURE, *shown)}
        self._owners: dict[str, set[str]] = {}  # path -> sessions

    def add(self, session: str, paths: Iterable[str]) -> None:
        """`session` has uploaded `paths`. Forgets files that are gone."""
        self._owners = {path: owners for path, owners in self._owners.items() if os.path.exists(path)}
        for path in paths:
            self._owners.setdefault(os.path.realpath(path), set()).add(session)

    def may_see(self, session: str, path: str) -> bool:
        """Whether `session` is given the file at `path`."""
        try:
            place = os.path.realpath(path)
            here = os.path.isfile(place)
        except (OSError, ValueError):  # too long, or no path at all
            return False
        if place in self._shown:
            return True
        mine = bool(session) and session in self._owners.get(place, ())
        return here and mine and Path(place).is_relative_to(os.path.realpath(folder()))

    def own(self, session: str, given: Any) -> Any:
        """What a page of `session` sent, with `LOST_PICTURE` for each file that is not its own: it was removed, or another
        server has it. Gradio would refuse all of the message, and with it a conversation that had a picture an hour ago.
        Raises ValueError for a component, which Gradio would make from what was sent."""
        if isinstance(given, list):
            return [self.own(session, item) for item in given]
        if not isinstance(given, dict):
            return given
        if "component" in given:
            raise ValueError("a page sends texts and pictures, and no components")
        if "path" not in given:
            return {name: self.own(session, value) for name, value in given.items()}
        path = str(given["path"])
        if not (path.lower().endswith(IMAGES) and self.may_see(session, path)):
            path = str(LOST_PICTURE)
        name = given.get("orig_name")
        kind = mimetypes.guess_type(path)[0]
        return {"path": path, "orig_name": name if isinstance(name, str) else None, "mime_type": kind, "meta": META}


@cache
def folder() -> Path:
    """Where this process keeps what is uploaded, below $GRADIO_TEMP_DIR or the system's; removed at its end."""
    made = tempfile.mkdtemp(prefix="shoal-pages-", dir=os.environ.get("GRADIO_TEMP_DIR"))
    os.environ["GRADIO_TEMP_DIR"] = made  # by which Gradio is told
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


def is_full() -> bool:
    """Whether `folder` has no room for another upload."""
    files, held = stored(folder())
    return files >= MOST_FILES or held >= MOST_BYTES


def stored(folder: Path) -> tuple[int, int]:
    """How many files a folder holds, and their bytes."""
    sizes = []
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                sizes.append(os.stat(os.path.join(place, name)).st_size)
            except OSError:  # removed meanwhile
                continue
    return len(sizes), sum(sizes)
