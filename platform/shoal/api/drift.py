"""What `shoal watch` has found in what this service captures, for the page. It may hold words that people asked, so where there
are keys it is for those with ``admin=yes``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from shoal.api.document import ASKED, refused
from shoal.api.service import Service
from shoal.api.wire import ForbiddenError, NotFoundError
from shoal.errors import ShoalError

DO = "start the service with --capture DIR, or args.capture"


def drift_routes(service: Service) -> APIRouter:
    """Where nothing is captured it says so."""
    router = APIRouter(prefix="/v1/shoal/drift", tags=["drift"])

    @router.get("", responses=refused(403, *ASKED))
    async def get_drift(request: Request) -> dict[str, Any]:
        """The last look of `shoal watch`: its report, the evidence and each signal over time; null where nobody has looked.
        And what this gateway captured since its start."""
        key, look = request.state.access.key, service.last_look
        if key is not None and not key.admin:
            raise ForbiddenError("this key sees no drift", do="ask with a key of the key file that has admin=yes")
        if look is None:
            raise NotFoundError("nothing is captured", do=DO)
        given, outbox = look.recorder.given, look.recorder.outbox
        fault, found = None, None
        try:
            found = await look.get()
        except ShoalError as error:
            fault = error.message
        return {
            "object": "drift",
            "look": found,
            "fault": fault,
            "capture": {
                "rows": outbox.rows,
                "dropped": {name: count for name, count in outbox.dropped.items() if count},
                "lag_seconds": outbox.lag,
                "bytes": outbox.bytes,
                "keep_days": given.keep_days,
                "texts": given.texts,
                "texts_days": given.texts_days,
                "votes": dict(look.recorder.feedback),
            },
        }

    return router
