"""Who has learned from what is forgotten: the rows of a cut, the work of a retraining, and the versions of a release."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shoal.data.alone import alone
from shoal.errors import DataError, ResourceError
from shoal.loop import cut
from shoal.loop.capture import Forgotten
from shoal.loop.forget import Elsewhere
from shoal.loop.release import LOCK as CHANGES
from shoal.loop.release import Release
from shoal.machine import sha256_of, write_aside

LOST = "lost"  # in a manifest: names of what was taken out then
WORK, LOCK = "retrain", ".retrain.lock"  # of a release: where retrainings work, and what the one that runs holds
COPY_SECONDS = 120.0  # for a version to be copied
DO = "it does not forget them: train anew from the cut as it is now"


def forget(out: Path, who: Forgotten) -> list[str]:
    """Take what is of `who` out of a cut, the one change that it may see, and return a line that says so, or none. The hashes
    that it had stay in its manifest, for versions were trained on that. Killed in the middle, it is done again. What one that
    was killed while it wrote `out` has left goes as a whole."""
    for partial in out.parent.glob(f".{out.name}.*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    try:
        with _held(out):  # of two at once each would put back what the other takes out
            gone = _taken_out(out, who)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{out} is no cut", got=str(error), do="make one: shoal curate") from error
    except OSError as error:
        raise ResourceError(f"{out} cannot be written", got=error.strerror, do="make room, and do it again") from error
    return [] if gone is None else [f"{out}: {gone} rows taken out"]


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Nobody else is in this block with the same folder; where its file system has no locks, somebody may be."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _taken_out(out: Path, who: Forgotten) -> int | None:
    """How many rows went; None where it has nothing of `who`."""
    manifest = json.loads((out / cut.MANIFEST).read_text(encoding="utf-8"))
    requests, people = {cut.name_of(one) for one in who.ids}, {cut.name_of(one) for one in who.subjects}
    lost = (requests & set(manifest["requests"])) | (people & set(manifest["persons"]))
    if not lost:
        return None
    gone = 0
    for name in (cut.TRAIN, cut.RECENT):
        rows = [line for line in (out / name).read_text(encoding="utf-8").split("\n") if line]
        kept = [line for line in rows if not _is_of(json.loads(line), who.ids, people)]
        gone += len(rows) - len(kept)
        write_aside(out / name, "".join(line + "\n" for line in kept), sync=True)
    manifest["before"] = [*manifest.get("before", ()), {**manifest["sha256"], LOST: sorted(lost)}]
    manifest["sha256"] = {name: sha256_of(out / name) for name in (cut.TRAIN, cut.RECENT)}
    for kind in ("requests", "persons"):
        manifest[kind] = [one for one in manifest[kind] if one not in lost]
    write_aside(out / cut.MANIFEST, json.dumps(manifest, indent=1) + "\n", sync=True)
    return gone


def before(out: Path, names: Collection[str]) -> list[str]:
    """sha256 of the rows to train on that had requests or persons of these names (`cut.name_of`) that were taken out since."""
    times = cut.read(out).get("before", ())
    last = max((at for at, each in enumerate(times) if not set(names).isdisjoint(each.get(LOST, ()))), default=-1)
    return [str(each[cut.TRAIN]) for each in times[: last + 1]]


def _is_of(row: Mapping[str, Any], ids: Collection[str], people: Collection[str]) -> bool:
    return row.get("id") in ids or row.get("group") in people  # old chats may be an earlier cut's


def from_cuts(folders: Sequence[Path]) -> Elsewhere:
    """For `forget.forget`: takes them out of cuts. Raises DataError for a folder that is no cut."""
    for folder in folders:
        if not (folder / cut.MANIFEST).is_file():
            raise DataError(f"{folder} is no cut", got=f"no {cut.MANIFEST}", do="give a folder of shoal curate")
    return lambda who: [line for folder in folders for line in forget(folder, who)]


def by_releases(folders: Sequence[Path], cuts: Sequence[Path]) -> Elsewhere:
    """For `forget.forget`: takes away the work of retrainings that read them, and names the versions of releases that have
    learned from them, however often it is asked, and whether the cut is there yet or not. Of versions that do not say whom they
    learned from, by the `cuts`, which say whom they have lost. Raises UsageError for a folder that is no release."""
    held = [Release(each) for each in folders]
    for release in held:
        release.state()

    def named(who: Forgotten) -> list[str]:
        names = {cut.name_of(one) for one in (*who.ids, *who.subjects)}
        rows = {sha256 for folder in cuts for sha256 in before(folder, names)}
        found = [line for release in held for line in _work(release.directory, who)]
        for release in held:
            busy = ResourceError(f"{release.directory} is being changed", do="do it again: then its versions are named")
            # a version that is being added is one of them
            with alone(release.directory / CHANGES, busy, wait=COPY_SECONDS):
                learned = learners(release, names, rows)
            for number, how in learned.items():
                found.append(f"{release.directory}: version {release.version(number).label} {how}; {DO}")
        return found

    return named


def learners(release: Release, names: Collection[str], rows: Collection[str] = ()) -> dict[int, str]:
    """The versions of a release that have learned from requests or persons of these names (`cut.name_of`), or were made of one
    that has: by number, with how. Of versions that do not say whom they learned from, those of a cut whose rows to train on had
    one of the sha256 in `rows`. Raises DataError."""
    found = dict[int, str]()
    for each in release.versions():  # parents first
        known, parent = each.learned, each.lineage.get("parent")
        of = (each.lineage.get("cut") or {}).get("rows") in rows if known is None else not known.isdisjoint(names)
        if of:
            found[each.number] = "has learned from them"
        elif parent in found and "kind" in each.lineage:  # retrained, and not put beside it by hand
            found[each.number] = f"was made of version {parent}, which has learned from them"
    return found


def _work(release: Path, who: Forgotten) -> list[str]:
    """Takes away what retrainings that were ended have left of `who`, and says so, and that one runs that has read them."""
    found = [path for path in sorted((release / WORK).glob("*")) if _holds(path, who)]
    if not found:
        return []
    try:
        with alone(release / LOCK, ResourceError("a retraining runs")):
            for path in found:
                shutil.rmtree(path)
    except ResourceError:
        do = "end it; where its cut has lost them it makes no version, and says so"
        return [f"{release}: a retraining that runs has read them; {do}"]
    return [f"{path}: the work of a retraining that read them is gone" for path in found]


def _holds(work: Path, who: Forgotten) -> bool:
    people = {cut.name_of(one) for one in who.subjects}
    for path in work.glob("*.jsonl"):
        with suppress(FileNotFoundError):  # its retraining has just ended
            lines = filter(None, path.read_text(encoding="utf-8").split("\n"))
            if any(_is_of(json.loads(line), who.ids, people) for line in lines):
                return True
    return False
