"""A release: a folder that says which version of a model serves, which served before, and which may take its place.

    RELEASE/  release.json   the truth: stable, previous, candidate, canary; written aside and renamed
              audit.jsonl    who changed what, when, from what to what, and why (`audit`)
              versions/      what can serve, never changed (`versions`)

A change writes its line of the audit log first, with all that ``release.json`` will say, then that file, both onto the disk:
what was interrupted between the two is finished by the next change. One change at a time: a second one is refused.
"""

# long: each change of a release, with what it refuses

from __future__ import annotations

import getpass
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from shoal import config
from shoal.data.alone import alone
from shoal.errors import CheckpointError, ConfigError, DataError, ResourceError, UsageError
from shoal.loop import versions
from shoal.loop.audit import FIRST, Audit
from shoal.loop.canary_state import PEOPLE, SHADOWS, Canary, need_few, with_people
from shoal.loop.versions import Version
from shoal.machine import write_aside

STATE, AUDIT, LOCK = "release.json", "audit.jsonl", ".lock"
FORMAT, VERSION = "shoal.release", 1
WAIT_SECONDS = 2.0  # for another change to end

# how far a candidate goes without a person: not even its making, its making, its canary, all
Auto = Literal["off", "candidate", "canary", "promote"]


@dataclass(frozen=True)
class State:
    """What serves. Versions go by number."""

    number: int = 0  # of the change that made it so
    stable: int | None = None
    previous: int | None = None  # what a rollback goes back to
    candidate: int | None = None  # the newest that is to be decided on
    canary: Canary | None = None  # what part of the traffic a candidate has
    held: str | None = None  # why nothing goes on by itself
    auto: Auto = "candidate"
    audit: str = ""  # sha256 of the last line of the audit log


class ChangedError(UsageError):
    """What was decided by a state that is no more."""


class Release:
    """The release in `directory`."""

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.audit = Audit(self.directory / AUDIT)

    def state(self) -> State:
        """What serves now. Raises UsageError for a folder that is no release, DataError for one of another format."""
        path = self.directory / STATE
        if not path.exists():
            what = f"{self.directory} is not a release"
            raise UsageError(what, got=f"no {STATE}", do="make one: shoal release add --release DIR --model MODEL")
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            kind, version = told.pop("format"), told.pop("version")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"cannot read {path}", got=type(error).__name__, do="look at what is there") from error
        if (kind, version) != (FORMAT, VERSION):
            raise DataError(f"{path}: format", got=f"{kind} version {version}", allowed=f"{FORMAT} version {VERSION}")
        return config.load(State, with_people(told), str(path))

    def versions(self) -> list[Version]:
        """All there are, the oldest first."""
        folder = self.directory / versions.FOLDER
        return [versions.read(each) for each in sorted(folder.glob("[0-9]*"))] if folder.is_dir() else []

    def left(self) -> list[Path]:
        """Folders of versions that no line of the audit log has added: of a command that was killed, or that adds one now; none
        where the log does not hold, for nothing is to be taken for that."""
        try:
            self.audit.check(self.state().audit if (self.directory / STATE).exists() else None)
        except DataError:
            return []
        known = self.audit.added()
        return [each.directory for each in self.versions() if each.number not in known]

    def version(self, name: int | str) -> Version:
        """By number, or by what ``X-Shoal-Version`` says. Raises UsageError for one that is not there."""
        number, _, digest = str(name).partition(".")
        folder = self.directory / versions.FOLDER / f"{int(number):06d}" if number.isdecimal() else None
        if folder is None or not (folder / versions.MANIFEST).exists():
            there = [each.number for each in self.versions()]
            raise UsageError("version", got=name, allowed=there or "none is there")
        found = versions.read(folder)
        if digest and not found.sha256.startswith(digest):
            raise UsageError("version", got=name, allowed=f"{found.label} in this release")
        return found

    def stable(self) -> Version:
        """Raises UsageError where none is there yet."""
        state = self.state()
        if state.stable is None:
            raise UsageError(f"{self.directory} has no stable version", do="add one: shoal release add")
        return self.version(state.stable)

    def add(
        self,
        model: str | Path,
        *,
        fp32: str | Path | None = None,
        lineage: dict[str, Any] | None = None,
        verdict: dict[str, Any] | None = None,
        why: str = "added",
        who: str | None = None,
    ) -> Version:
        """A model directory as a new version: the candidate, or the stable one where there is none. A release that is not there
        is made. Raises CheckpointError for a broken model, or one that could not take the place of the stable version."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._changing(make=True) as before:
            if before.stable is not None:
                versions.need_same(Path(model), self.version(before.stable).served)
            versions.need_asked(verdict, Path(model))
            for left in self.left():  # of a command that was killed before the log had its line
                shutil.rmtree(left)
            made = versions.write(
                self.directory / versions.FOLDER,
                max({0, *self.audit.added(), *(each.number for each in self.versions())})
                + 1,  # of one that is gone, too
                Path(model),
                fp32=None if fp32 is None else Path(fp32),
                lineage={"parent": before.stable, **(lineage or {})},
                verdict=verdict,
                made=now(),
            )
            role = {"stable": made.number} if before.stable is None else {"candidate": made.number}
            self._change(before, "add", why, who, made.number, {"sha256": made.sha256}, **role)
        return made

    def promote(
        self,
        name: int | str | None = None,
        *,
        why: str,
        force: bool = False,
        who: str | None = None,
        figures: dict[str, Any] | None = None,
        seen: int | None = None,
    ) -> Version:
        """Makes a version (None: the candidate) the stable one; `figures` are for the audit log. Raises UsageError for one that
        the gate did not let pass, unless `force` is set, which the audit log then says; for one that is stable already; and
        CheckpointError for one that was changed since. `seen`: as of `step`."""
        with self._changing(seen) as before:
            chosen = self._chosen(name, before)
            if chosen.number == before.stable:
                raise UsageError("version", got=chosen.number, do="it is the stable one already")
            forced = self._need_passed(chosen, before, force)
            self._need_unchanged(chosen)
            if before.stable is not None:
                versions.need_same(chosen.served, self.version(before.stable).served)
            left = before.candidate if before.candidate != chosen.number else None
            roles = {
                "stable": chosen.number,
                "previous": before.stable,
                "candidate": left,
                "canary": None,
                "held": None,
            }
            figures = {**(figures or {}), **forced}
            self._change(before, "promote", why, who, chosen.number, figures, **roles)
        return chosen

    def rollback(
        self,
        name: int | str | None = None,
        *,
        why: str,
        who: str | None = None,
        figures: dict[str, Any] | None = None,
        seen: int | None = None,
    ) -> Version:
        """Takes back what was done last: a canary that runs, else the last promotion. Returns the version that serves then.
        Raises UsageError where there is neither, and where that would take back another version than `name` (None: whichever):
        whoever takes back a canary that has just ended by itself would take back what serves. `seen`: as of `step`."""
        with self._changing(seen) as before:
            last = before.stable if before.canary is None else before.canary.version
            if name is not None and self.version(name).number != last:
                do = "look at shoal release list, and say which"
                raise UsageError("what would be taken back is another version", got=name, allowed=last, do=do)
            if before.canary is not None:
                taken = before.canary.version
                self._change(before, "rollback", why, who, taken, figures, canary=None, candidate=None)
                assert before.stable is not None
                return self.version(before.stable)
            if before.previous is None:
                do = "promote the version that is to serve: shoal release promote N"
                raise UsageError("nothing to roll back", do=do)
            back = self.version(before.previous)
            self._need_unchanged(back)
            self._change(before, "rollback", why, who, before.stable, figures, stable=back.number, previous=None)
        return back

    def hold(self, *, why: str, who: str | None = None, seen: int | None = None) -> None:
        """Nothing goes on by itself from now on, but that a canary which its checks condemn ends. `seen`: as of `step`."""
        with self._changing(seen) as before:
            self._change(before, "hold", why, who, before.candidate, held=why)

    def begin(
        self,
        name: int | str | None = None,
        *,
        why: str,
        force: bool = False,
        who: str | None = None,
        seen: int | None = None,
        shadows: int = SHADOWS,
        people: int = PEOPLE,
    ) -> Version:
        """Starts the canary of a version (None: the candidate), with so many people a step at least, `shadows` in the first; or
        lets one go on that is held, as it began. Raises as `promote`, and UsageError for too many people."""
        need_few(shadows, people)
        with self._changing(seen) as before:
            chosen = self._chosen(name, before)
            if before.canary is not None and before.canary.version == chosen.number and before.held is not None:
                again = replace(before.canary, since=now())  # else a day without traffic holds it a second later
                self._change(before, "canary", why, who, chosen.number, held=None, canary=again)
                return chosen
            if before.canary is not None:
                raise UsageError("a canary runs already", got=before.canary.version, do="roll it back, or promote it")
            if chosen.number == before.stable:
                raise UsageError("version", got=chosen.number, do="it is the stable one already")
            forced = self._need_passed(chosen, before, force)
            self._need_unchanged(chosen)
            assert before.stable is not None
            versions.need_same(chosen.served, self.version(before.stable).served)
            canary = Canary(chosen.number, 0, now(), shadows, people, began=before.number + 1)
            self._change(before, "canary", why, who, chosen.number, forced, canary=canary, held=None)
        return chosen

    def step(self, canary: Canary, *, why: str, figures: dict[str, Any] | None = None, seen: int | None = None) -> None:
        """The canary's next step, by evidence. Raises UsageError where another or none runs. `seen`: number of the state that
        it was decided by; where there is another ChangedError says so, for what goes on by itself must not undo what a person,
        or another gateway, did meanwhile: two who take back one canary would take back what served before it as well."""
        with self._changing(seen) as before:
            if not canary.same(before.canary):
                raise UsageError("another canary runs", got=before.canary and before.canary.version)
            self._change(before, "step", why, "shoal", canary.version, figures, canary=canary)

    def set_auto(self, auto: Auto, *, why: str, who: str | None = None) -> None:
        """How far a candidate goes without a person."""
        with self._changing() as before:
            self._change(before, "auto", why, who, before.candidate, {"auto": auto}, auto=auto)

    def check(self) -> int:
        """How many lines the audit log has, none of which was changed. Raises DataError, and CheckpointError for a version
        that was changed."""
        count = self.audit.check(self.state().audit)
        for version in self.versions():
            self._need_unchanged(version)
        return count

    def served_hours(self, until: datetime | None = None) -> dict[int, list[tuple[str, str | None]]]:
        """For each version from when to when it was the stable one; None: it still is."""
        found, stable = dict[int, list[tuple[str, str | None]]](), None
        for entry in self.audit.entries():
            after = entry["state"]["stable"]
            if after == stable:
                continue
            if stable is not None:
                found[stable][-1] = (found[stable][-1][0], entry["at"])
            if after is not None:
                found.setdefault(after, []).append((entry["at"], None))
            stable = after
        return found

    def _chosen(self, name: int | str | None, state: State) -> Version:
        name = state.candidate if name is None else name
        if name is None:
            raise UsageError("there is no candidate", do="name a version, or add one: shoal release add")
        return self.version(name)

    def _need_unchanged(self, version: Version) -> None:
        """Raises CheckpointError where its files are not those that were added, by themselves or by the audit log."""
        version.verify()
        added = [one for one in self.audit.entries() if (one["what"], one["version"]) == ("add", version.number)]
        for entry in added:
            known = entry["figures"].get("sha256", version.sha256)  # logs of before do not say
            if known != version.sha256:
                what = f"version {version.number} was changed, and its sha256 with it"
                raise CheckpointError(what, got=version.sha256[:12], allowed=known[:12], do="promote another")

    def _need_passed(self, version: Version, state: State, force: bool) -> dict[str, bool]:
        """What the audit log says of a version that is to serve though the gate did not let it pass beside what serves: that
        it was forced. Raises UsageError where it is not."""
        objection = self._objection(version, state)
        if objection is not None and not force:
            raise objection
        return {"forced": True} if force and (objection is not None or not version.passed) else {}

    def _objection(self, version: Version, state: State) -> UsageError | None:
        if version.number == state.previous:
            return None
        beside = ((version.verdict or {}).get("stable") or {}).get("weights_sha256")
        if version.passed and beside and state.stable is not None and beside != self.version(state.stable).weights:
            what = f"the gate held version {version.number} against another than the stable one"
            do = "ask it again (shoal gate), and add it with that verdict; or give --force with the reason as --why"
            return UsageError(what, got=beside[:12], allowed=self.version(state.stable).weights[:12], do=do)
        if version.passed:
            return None
        refused = f"refused: {', '.join(version.failed) or 'no reason given'}"
        got = "it was not asked" if version.passed is None else refused
        do = "ask it first (shoal gate), or give --force with the reason as --why"
        return UsageError(f"the gate did not let version {version.number} pass", got=got, do=do)

    @contextmanager
    def _changing(self, seen: int | None = None, *, make: bool = False) -> Iterator[State]:
        """The state before a change, while nobody else may change it: milliseconds, but for a copy of a new version. Who comes
        meanwhile waits a little, and is refused then. Raises ChangedError where it is not `seen`, UsageError for no release."""
        if not (make or self.audit.path.exists()):
            self.state()
        do = "wait for it, and look at shoal release list"
        busy = ResourceError(f"{self.directory} is being changed by another command", do=do)
        with alone(self.directory / LOCK, busy, wait=WAIT_SECONDS):
            state = self._finished()
            if seen not in (None, state.number):
                raise ChangedError("the release was changed meanwhile", got=f"change {state.number}", allowed=seen)
            try:
                yield state
            except OSError as error:
                got, do = error.strerror or type(error).__name__, "make room, and see what serves: shoal release list"
                raise ResourceError(f"{self.directory} cannot be written", got=got, do=do) from error

    def _finished(self) -> State:
        """The state, after what an interrupted change had still to write; by the audit log where its file is gone."""
        entries = self.audit.entries()
        if not (self.directory / STATE).exists() and not entries:
            return State()
        lost = not (self.directory / STATE).exists()
        known = State() if lost else self.state()
        last = entries[-1] if entries else {}
        # a line that does not follow from what is known was not written here, whatever its number
        follows = (last.get("number"), last.get("before")) == (known.number + 1, known.audit or FIRST)
        if follows or lost:
            known = replace(
                config.load(State, with_people(last["state"]), str(self.audit.path)), audit=self.audit.head()
            )
            self._write(known)
        return known

    def _change(
        self,
        before: State,
        what: str,
        why: str,
        who: str | None,
        version: int | None,
        figures: dict[str, Any] | None = None,
        /,
        **changed: Any,
    ) -> None:
        if not why.strip():
            raise ConfigError("why", got=why, do="give the reason: it is what the audit log is for")
        after = replace(before, number=before.number + 1, audit="", **changed)
        entry = {
            "number": after.number,
            "at": now(),
            "who": who or _user(),
            "what": what,
            "version": version,
            "from": before.stable,
            "to": after.stable,
            "why": why,
            "figures": figures or {},
            "state": config.dump(after),
        }
        head = self.audit.append(entry, before.audit or FIRST)
        self._write(replace(after, audit=head))

    def _write(self, state: State) -> None:
        told = {"format": FORMAT, "version": VERSION, **config.dump(state)}
        write_aside(self.directory / STATE, json.dumps(told, indent=1) + "\n", sync=True)


def _user() -> str:
    """Whose process this is, as the system says."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return f"user {os.getuid()}"


def now() -> str:
    """UTC, ISO 8601, in milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
