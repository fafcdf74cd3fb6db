"""`shoal release`: the versions of a served model, which of them serves, and what was done with them."""

from __future__ import annotations

import json
import typing
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shoal.config import dump
from shoal.errors import UsageError
from shoal.loop.canary_state import PEOPLE, SHADOWS
from shoal.loop.release import Auto, Release, State
from shoal.loop.versions import Version, cut_lineage
from shoal.model.described import read_json
from shoal.options import Commands
from shoal.stages.stage import Json, ModelPlace, out, print_result

release = Commands(help="Versions of a served model: which serves, and what may take its place.", no_args_is_help=True)

Folder = Annotated[Path, typer.Option("--release", help="Folder of the release.")]
Why = Annotated[str, typer.Option(help="The reason, for the audit log.")]
Force = Annotated[bool, typer.Option("--force", help="Also what the gate did not let pass; the audit log says so.")]
Which = Annotated[str | None, typer.Argument(metavar="VERSION", help="Number, or X-Shoal-Version. [the candidate]")]

Taken = Annotated[
    str | None, typer.Argument(metavar="VERSION", help="What is to be taken back, and nothing else. [whichever it is]")
]


@release.command("list")
def list_(folder: Folder, as_json: Json = False) -> None:
    """All versions, and what each is."""
    held = Release(folder)
    state, found = held.state(), held.versions()
    if as_json:
        print(json.dumps({"release": told(held), "versions": [_row(version, state) for version in found]}))
        return
    table = Table(box=SIMPLE_HEAD)
    for name in ("version", "role", "made", "gate", "parent", "cut"):
        table.add_column(name)
    for version in found:
        row = _row(version, state)
        gate = {True: "passed", False: "refused", None: "not asked"}[row["passed"]]
        table.add_row(row["label"], row["role"], row["made"][:19], gate, str(row["parent"] or ""), row["cut"][:12])
    out.print(table)
    if state.held:
        out.print(f"held: {state.held}", highlight=False)


@release.command()
def show(
    version: Annotated[str, typer.Argument(help="Number, or what X-Shoal-Version of an answer says.")],
    folder: Folder,
    as_json: Json = False,
) -> None:
    """Where a version's weights came from, from the cut that they learned from to the hours in which they served."""
    held = Release(folder)
    found = held.version(version)
    found.verify()
    hours = held.served_hours().get(found.number, [])
    whole = {**_row(found, held.state()), "lineage": found.lineage, "gate": found.verdict, "served": hours}
    if as_json:
        print(json.dumps(whole))
        return
    cut = found.lineage.get("cut") or {}
    lines = [
        f"version   {found.label}, {whole['role'] or 'not in use'}, made {found.made[:19]}",
        f"cut       {cut.get('sha256', 'none')}  {cut.get('path', '')}",
        f"parent    {found.lineage.get('parent') or 'none'}",
        f"weights   {found.weights}",
        f"gate      {_gate(found)}",
        *[f"served    {begin[:19]} to {'now' if end is None else end[:19]}" for begin, end in hours],
    ]
    out.print("\n".join(lines), highlight=False, soft_wrap=True)


@release.command()
def log(
    folder: Folder,
    check: Annotated[
        bool,
        typer.Option("--check", help="Verify that no line and no version was changed, and print the last line's sum."),
    ] = False,
    as_json: Json = False,
) -> None:
    """What was done with the release, when, by whom and why."""
    held = Release(folder)
    if check:
        count = held.check()
        head = held.audit.head()
        print_result(
            {"lines": count, "head": head}, as_json, f"{count} lines and all versions are as they were; {head}"
        )
        return
    for entry in held.audit.entries():
        if as_json:
            print(json.dumps(entry))
        else:
            from_to = "" if entry["from"] == entry["to"] else f"  serves {entry['from'] or 'none'} -> {entry['to']}"
            forced = "  FORCED" if entry["figures"].get("forced") else ""
            line = f"{entry['at'][:19]}  {entry['who']}  {entry['what']} {entry['version']}{from_to}{forced}  {entry['why']}"
            out.print(line, highlight=False, soft_wrap=True)


@release.command()
def add(
    model: ModelPlace,
    folder: Folder,
    fp32: Annotated[
        str | None, typer.Option(help="Its fp32 parent, where it was rounded, or s3://... of it. [none]")
    ] = None,
    cut: Annotated[Path | None, typer.Option(help="The cut that it learned from. [none]")] = None,
    verdict: Annotated[Path | None, typer.Option(help="What `shoal gate --json` wrote. [not asked]")] = None,
    why: Why = "added",
    as_json: Json = False,
) -> None:
    """A model directory as a new version: the candidate, or the stable one of a release that has none yet."""
    from shoal.data.models import here

    given = None if verdict is None else need_verdict(read_json(verdict), verdict)
    parent = None if fp32 is None else here(fp32)
    made = Release(folder).add(here(model), fp32=parent, lineage=cut_lineage(cut), verdict=given, why=why)
    print_result({"version": made.number, "label": made.label}, as_json, f"version {made.label}")


@release.command()
def promote(folder: Folder, why: Why, version: Which = None, force: Force = False, as_json: Json = False) -> None:
    """Serve a version from now on; streams that run end on what they began with."""
    _say(folder, Release(folder).promote(version, why=why, force=force), "serves", as_json)


@release.command()
def rollback(folder: Folder, why: Why, version: Taken = None, as_json: Json = False) -> None:
    """Take back what was done last: the canary that runs, else the last promotion."""
    _say(folder, Release(folder).rollback(version, why=why), "serves", as_json)


HELD = (
    "held: nothing is promoted, and no canary takes another step, by itself; one that its checks condemn is taken back all "
    "the same"
)


@release.command()
def hold(folder: Folder, why: Why, as_json: Json = False) -> None:
    """Let nothing go on by itself, until `canary` or `promote`. A canary that its checks condemn is taken back all the same."""
    held = Release(folder)
    held.hold(why=why)
    print_result(told(held), as_json, HELD)


@release.command()
def canary(
    folder: Folder,
    why: Why,
    version: Which = None,
    force: Force = False,
    shadows: Annotated[int, typer.Option(help="People whose requests are copied at least, before 5 %.")] = SHADOWS,
    people: Annotated[
        int, typer.Option(help="The canary's people that each later step takes at least; with fewer less is found.")
    ] = PEOPLE,
    as_json: Json = False,
) -> None:
    """Give a version a growing part of the traffic, by evidence; or let a canary that is held go on."""
    begun = Release(folder).begin(version, why=why, force=force, shadows=shadows, people=people)
    _say(folder, begun, "is on trial", as_json)


@release.command()
def auto(
    how: Annotated[str, typer.Argument(help="off, candidate (a person promotes), canary, or promote.")],
    folder: Folder,
    why: Why,
    as_json: Json = False,
) -> None:
    """How far a candidate goes without a person [candidate]."""
    allowed = typing.get_args(Auto)
    if how not in allowed:
        raise UsageError("auto", got=how, allowed=allowed)
    held = Release(folder)
    held.set_auto(typing.cast(Auto, how), why=why)
    print_result(told(held), as_json, f"auto: {how}")


def told(held: Release) -> dict[str, Any]:
    """The state of a release as plain values."""
    return dump(held.state())


def need_verdict(given: dict[str, Any], where: Path) -> dict[str, Any]:
    """Raises UsageError for what no gate has written."""
    if not isinstance(given.get("passed"), bool):
        raise UsageError(
            f"{where}: passed", got=given.get("passed"), allowed="true or false", do="give what shoal gate wrote"
        )
    return given


def _say(folder: Path, version: Version, what: str, as_json: bool) -> None:
    result = {"version": version.number, "label": version.label, "release": told(Release(folder))}
    print_result(result, as_json, f"version {version.label} {what}")


def _row(version: Version, state: State) -> dict[str, Any]:
    roles = {"stable": state.stable, "previous": state.previous, "candidate": state.candidate}
    roles["canary"] = None if state.canary is None else state.canary.version
    return {
        "number": version.number,
        "label": version.label,
        "role": ", ".join(role for role, number in roles.items() if number == version.number),
        "made": version.made,
        "passed": version.passed,
        "parent": version.lineage.get("parent"),
        "cut": (version.lineage.get("cut") or {}).get("sha256", ""),
    }


def _gate(version: Version) -> str:
    if version.verdict is None:
        return "not asked"
    checks = version.verdict.get("checks", ())
    return f"passed, {len(checks)} checks" if version.passed else f"refused: {', '.join(version.failed)}"
