"""The release that a service follows: its versions, what is on trial, the audit log; and its changes, for keys with
``admin=yes``.

A change is written into the release's folder, as `shoal release` writes it, and followed within a second.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request

from shoal.api.changes import ReleaseRequest
from shoal.api.document import ASKED, POSTED, body_of, refused
from shoal.api.follow import EVIDENCE
from shoal.api.service import Service
from shoal.api.wire import ForbiddenError
from shoal.config import dump
from shoal.errors import RequestError, ShoalError, UsageError
from shoal.loop.canary_state import SHARES
from shoal.loop.release import Release
from shoal.loop.versions import Version

MOST_ENTRIES = 100  # of the audit log that are told, the newest first


def release_routes(service: Service, release: Release) -> APIRouter:
    router = APIRouter(prefix="/v1/shoal/release", tags=["release"])

    @router.get("", responses=refused(*ASKED))
    async def get_release(request: Request) -> dict[str, Any]:
        """What serves, all versions with what the gate said of them, the canary with its evidence, the end of the audit log,
        and whether the key that asks may change any of it."""
        told = await asyncio.to_thread(_told, release)
        return {**told, "may_change": _is_admin(request)}

    def change(name: str, work: Callable[[ReleaseRequest, str], object], what: str) -> None:
        @router.post(
            f"/{name}", openapi_extra=body_of(ReleaseRequest), responses=refused(*POSTED, 403), description=what
        )
        async def changed(request: Request) -> dict[str, Any]:
            if not _is_admin(request):
                raise ForbiddenError(
                    "this key changes no release", do="ask with a key of the key file that has admin=yes"
                )
            body = await service.read_body(request, ReleaseRequest)
            who = request.state.access.key.name
            try:
                await asyncio.to_thread(work, body, who)
            except UsageError as error:
                raise RequestError(error.message) from error
            except ShoalError as error:
                refusal = RequestError(error.message)
                refusal.status = 409
                raise refusal from error
            return {**await asyncio.to_thread(_told, release), "may_change": True}

    def promote(body: ReleaseRequest, who: str) -> None:
        release.promote(body.version, why=body.why, force=body.force, who=who)

    def begin(body: ReleaseRequest, who: str) -> None:
        release.begin(body.version, why=body.why, force=body.force, who=who)

    change("promote", promote, "Serve a version from now on; streams that run end on what they began with.")
    change("canary", begin, "Give a version a growing share of the conversations; or let one that is held go on.")
    change(
        "rollback",
        lambda body, who: release.rollback(body.version, why=body.why, who=who),
        "Take back the canary, or the last promotion; where `version` is given, that one and no other.",
    )
    change("hold", lambda body, who: release.hold(why=body.why, who=who), "Let nothing go on by itself.")
    return router


def _is_admin(request: Request) -> bool:
    key = request.state.access.key
    return key is not None and bool(key.admin)


def _told(release: Release) -> dict[str, Any]:
    state = release.state()
    hours = release.served_hours()
    return {
        "object": "release",
        **dump(state),
        "share": None if state.canary is None else state.canary.share,
        "shares": list(SHARES),
        "evidence": _evidence(release),
        "versions": [_version(each, hours.get(each.number, [])) for each in release.versions()],
        "log": [
            {name: entry[name] for name in ("number", "at", "who", "what", "version", "from", "to", "why", "figures")}
            for entry in release.audit.entries()[: -MOST_ENTRIES - 1 : -1]
        ],
    }


def _version(version: Version, hours: list[tuple[str, str | None]]) -> dict[str, Any]:
    return {
        "number": version.number,
        "label": version.label,
        "made": version.made,
        "passed": version.passed,
        "checks": (version.verdict or {}).get("checks", []),
        "parent": version.lineage.get("parent"),
        "cut": (version.lineage.get("cut") or {}).get("sha256"),
        "served": hours,
    }


def _evidence(release: Release) -> dict[str, Any] | None:
    """What was seen of the canary; None where nothing was yet."""
    try:
        found: dict[str, Any] = json.loads((release.directory / EVIDENCE).read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError):
        return None
