"""The audit log of a release: one JSON line a change, which holds the sha256 of the line before it.

A line that was changed, left out, moved or added breaks the chain; what ends the log too early is found by who keeps the
sha256 of its last line elsewhere, as ``release.json`` does. Who may write all files can write a whole new chain: keep that
sha256, which ``shoal release log --check`` prints, where he cannot.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from shoal.errors import DataError
from shoal.machine import write_aside

FIRST = "0" * 64  # what the first line has before it


class Audit:
    """The log in one file, which may not be there yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[str]:
        """As they stand in the file, without line ends. Raises DataError for one that cannot be read."""
        try:
            return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {self.path}", got=type(error).__name__, do="look at what is there") from error

    def entries(self) -> list[dict[str, Any]]:
        """What the lines say. Raises DataError naming the first that is no line of a log."""
        found = []
        for number, line in enumerate(self.lines(), 1):
            try:
                entry = json.loads(line)
            except ValueError:
                entry = None
            if not isinstance(entry, dict):
                raise DataError(f"{self.path}, line {number}: not a line of an audit log", do="it was changed by hand")
            found.append(entry)
        return found

    def added(self) -> set[int]:
        """The numbers of all versions that were ever added. Raises DataError as `entries`."""
        return {entry["version"] for entry in self.entries() if entry["what"] == "add"}

    def head(self) -> str:
        """The sha256 of the last line, in hexadecimal digits."""
        lines = self.lines()
        return digest(lines[-1]) if lines else FIRST

    def append(self, entry: dict[str, Any], before: str) -> str:
        """Adds a line after the one whose sha256 is `before`, and returns its own. Where the last line is another, somebody
        changed the log, and `check` says so for good. Written aside, so a line is never half there,
        and on the disk when this returns; one writer at a time."""
        lines = self.lines()
        line = json.dumps({**entry, "before": before}, sort_keys=True)
        write_aside(self.path, "".join(f"{each}\n" for each in (*lines, line)), sync=True)
        return digest(line)

    def check(self, head: str | None = None) -> int:
        """How many lines there are, all in one chain that ends in `head`. Raises DataError naming the first line that does
        not follow from those before it."""
        before, lines = FIRST, self.lines()
        for number, (line, entry) in enumerate(zip(lines, self.entries(), strict=True), 1):
            if entry.get("before") != before:
                raise DataError(
                    f"{self.path}: line {number} does not follow line {number - 1}",
                    got=str(entry.get("before"))[:12], allowed=before[:12], do="a line was changed, left out or added",
                )  # fmt: skip
            before = digest(line)
        if head is not None and before != head:
            what = f"{self.path}: the last line is another"
            raise DataError(what, got=before[:12], allowed=head[:12], do="the end of the log was changed or cut off")
        return len(lines)


def digest(line: str) -> str:
    """sha256 of a line, in hexadecimal digits."""
    return hashlib.sha256(line.encode()).hexdigest()
