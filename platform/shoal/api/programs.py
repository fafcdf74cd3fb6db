"""The route that runs a program in the sandbox; there only with `--run-code`. A program sees nothing of the service."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from pydantic import Field

from shoal.api.document import ASKED, POSTED, refused
from shoal.api.service import Service
from shoal.api.wire import Wire
from shoal.errors import QueueFullError, ResourceError
from shoal.sandbox import Limits, run
from shoal.sandbox import refused as no_sandbox
from shoal.sandbox.limits import MOST_PROGRAM

AT_ONCE = 2  # programs of all clients
LIMITS = Limits(seconds=2, wall=10.0, memory=256 * 2**20, output=16 * 2**10)


class ProgramRequest(Wire):
    program: str = Field(min_length=1, max_length=MOST_PROGRAM, description="in Python")


def program_routes(service: Service) -> APIRouter:
    """Raises ResourceError where there is no sandbox: then nothing is served."""
    if why := no_sandbox():
        raise ResourceError(f"--run-code: {why}")
    router = APIRouter(prefix="/v1/shoal/programs", tags=["programs"])
    running: set[object] = set()

    @router.get("", responses=refused(*ASKED))
    async def limits() -> dict[str, Any]:
        """That programs are run here, and how much one may take."""
        return {"object": "shoal.programs", **asdict(LIMITS)}

    @router.post("", responses=refused(*POSTED))
    async def run_program(request: Request) -> dict[str, Any]:
        """Runs a program in a process that can compute and print, and says what became of it: `how` (ended, failed, time,
        output, killed), its exit `code`, `out` and `err`, and `seconds`."""
        body, mark = await service.read_body(request, ProgramRequest), object()
        if len(running) >= AT_ONCE:
            full = QueueFullError("programs run", got=len(running), allowed=f"{AT_ONCE} at once", do="try again")
            full.retry_after = LIMITS.wall
            raise full
        running.add(mark)
        # whose client has left runs on, and is counted, until it has ended
        task = asyncio.ensure_future(asyncio.to_thread(run, body.program, (), LIMITS))
        task.add_done_callback(lambda _: running.discard(mark))
        told = asdict(await asyncio.shield(task))
        del told["values"]
        return {"object": "shoal.program", **told}

    return router
