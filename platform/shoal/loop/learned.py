"""Who has learned from what is forgotten: the rows of a cut, and the versions of a release that were trained on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shoal.errors import DataError
from shoal.loop import cut
from shoal.loop.capture import Forgotten
from shoal.loop.forget import Elsewhere
from shoal.loop.release import Release


def from_cut(folder: Path, releases: Sequence[Path]) -> Elsewhere:
    """For `forget.forget`: takes them out of the cut in `folder`, and names the versions of `releases` that have learned from
    it. Raises DataError for a folder that is no cut or no release."""
    if not (folder / cut.MANIFEST).is_file():
        raise DataError(f"{folder} is no cut", got=f"no {cut.MANIFEST}", do="give a folder of shoal curate")
    held = [Release(each) for each in releases]

    def forgotten(who: Forgotten) -> list[str]:
        said = cut.forget(folder, who)
        if not said:
            return []
        found = [(release, version) for release in held for version in release.learned_from(cut.before(folder))]
        do = "it does not forget them: train anew from the cut as it is now"
        return said + [
            f"{release.directory}: version {version.label} has learned from them; {do}" for release, version in found
        ]

    return forgotten
