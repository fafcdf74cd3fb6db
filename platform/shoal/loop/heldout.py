"""What the cuts of a release held out: no later version of it learns that, so that what once measured goes on measuring."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shoal.errors import DataError
from shoal.loop import cut
from shoal.loop.release import Release
from shoal.loop.versions import Version


def before(release: Release, but: Path | None = None) -> tuple[list[Path], list[Version]]:
    """The held-out chats of the cuts that versions of a release were made of, refused ones too, without those of the cut `but`;
    and the versions whose cut is not there any more, or is another."""
    found, lost = dict[Path, None](), []
    for version in release.versions():
        told = version.lineage.get("cut") or {}
        folder = Path(str(told.get("path", "")))
        if not told or (but is not None and folder.absolute() == but.absolute()):
            continue
        if _is(folder, told.get("rows")):
            found[folder.absolute() / cut.RECENT] = None
        else:
            lost.append(version)
    return [*found], lost


def _is(folder: Path, rows: str | None) -> bool:
    """Whether the cut in `folder` trains, or did before somebody was forgotten, on the rows of this sha256."""
    with suppress(DataError):
        manifest = cut.read(folder)
        return rows in (each.get(cut.TRAIN) for each in (manifest["sha256"], *manifest.get("before", ())))
    return False
