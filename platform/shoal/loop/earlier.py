"""What the cuts of a release trained on and held out.

No later version learns what was held out, so that it goes on measuring; and who was trained on is not held out: what a model
has learned measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from shoal.data.chats.rows import lines
from shoal.errors import DataError
from shoal.loop import cut
from shoal.loop.asked import Asked, asked_in, chats_of, forbidden
from shoal.loop.release import Release
from shoal.loop.versions import Version


@dataclass(frozen=True)
class Earlier:
    """The cuts that versions of a release were made of, refused ones too."""

    all: tuple[Path, ...]
    learned: tuple[Path, ...]  # by the weights: where the router alone was fitted, nobody was
    lost: tuple[Version, ...]  # whose cut is not there any more, or is another

    def held_out(self, files: Iterable[Path] = ()) -> Asked:
        """What they held out, and what these files of chats ask. Raises DataError for what cannot be read."""
        return forbidden(None, [*files, *(each / cut.RECENT for each in self.all)])

    def trained_on(self) -> cut.Learned:
        """Who was trained on, and what they asked; of the old chats beside them those alone that an earlier cut had from
        somebody. Raises DataError for what cannot be read."""
        people, asked = set[str](), Asked()
        for path in (each / cut.TRAIN for each in self.learned):
            for line in lines(path):
                with chats_of(path):
                    row = json.loads(line)
                    if name := cut.person_of(row):
                        people.add(name)
                    if name or row.get("label") != cut.REPLAY:
                        asked.add(asked_in(row))
        return cut.Learned(people, asked)


NONE = Earlier((), (), ())


def before(release: Release, but: Path | None = None) -> Earlier:
    """Those of a release, without the cut `but`."""
    every, learned, lost = dict[Path, None](), dict[Path, None](), []
    for version in release.versions():
        told = version.lineage.get("cut") or {}
        folder = Path(str(told.get("path", ""))).absolute()
        if not told or (but is not None and folder == but.absolute()):
            continue
        if not _is(folder, told.get("rows")):
            lost.append(version)
            continue
        every[folder] = None
        if version.lineage.get("kind") != "router":
            learned[folder] = None
    return Earlier(tuple(every), tuple(learned), tuple(lost))


def _is(folder: Path, rows: str | None) -> bool:
    """Whether the cut in `folder` trains, or did before somebody was forgotten, on the rows of this sha256."""
    with suppress(DataError):
        manifest = cut.read(folder)
        return rows in (each.get(cut.TRAIN) for each in (manifest["sha256"], *manifest.get("before", ())))
    return False
