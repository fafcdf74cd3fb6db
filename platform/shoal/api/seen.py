"""What the gateways of a service see of one canary: a file each in the release's folder, which the others read.

    RELEASE/canary-NAME.json   what one gateway has counted of a trial, written aside and renamed, by nobody else

Together the files are the evidence, whoever looks. What a gateway saw that has ended meanwhile counts on, and one that starts
knows it: of a service with one gateway as well. A file of another trial, of the same version too, says nothing.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.loop.canary_state import Canary
from shoal.loop.evidence import Person, dumped, joined, loaded
from shoal.machine import write_aside

log = logging.getLogger("shoal.api")


class Seen:
    """Of one gateway, in the folder of its release."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / f"canary-{uuid.uuid4().hex}.json"
        self._written, self._said = "", ""

    def tell(self, canary: Canary, own: dict[str, Person], waited: float = 0.0) -> None:
        """The people that this gateway has counted of `canary` so far, and how many seconds of its present step gateways have
        seen. Raises OSError."""
        minutes = int(waited / 60)  # so that it is written once a minute where nobody asks anything
        text = json.dumps({**asdict(canary), "people": dumped(own), "minutes": minutes})
        if text != self._written:
            write_aside(self._file, text + "\n")
            self._written = text

    def others(self, canary: Canary) -> dict[str, Person]:
        """The people that all others counted of `canary`, each where it was first."""
        found = dict[str, Person]()
        for _, people in self._told(canary):
            found = joined(found, people)
        return found

    def waited(self, canary: Canary) -> float:
        """Seconds of the present step of `canary` that others have seen, those too that have ended: by their steady clocks, and
        not by what the time of day was, which somebody may have set."""
        now = (
            told
            for told, _ in self._told(canary)
            if (told.get("step"), told.get("since")) == (canary.step, canary.since)
        )
        return 60.0 * max((int(told.get("minutes", 0)) for told in now), default=0)

    def _told(self, canary: Canary) -> Iterator[tuple[dict[str, Any], dict[str, Person]]]:
        """What the others wrote of this trial. A file that cannot be read counts nothing, and the log says so once."""
        for path in self._files():
            if path == self._file:
                continue
            try:
                told = json.loads(path.read_text(encoding="utf-8"))
                same = (told["version"], told["began"]) == (canary.version, canary.began)
                people = loaded(told["people"]) if same else None
            except FileNotFoundError:  # the trial ends
                continue
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                if path.name != self._said:
                    log.error("%s: what a gateway saw of the canary is lost: %s", path, type(error).__name__)
                self._said = path.name
                continue
            if people is not None:
                yield told, people

    def forget(self) -> None:
        """There is no trial: takes the files away. Raises OSError."""
        for path in self._files():
            path.unlink(missing_ok=True)
        self._written = ""

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("canary-*.json"))
