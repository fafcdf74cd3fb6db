"""A service whose engines cost nothing: it measures what passes their streams on (`shoal bench gateways`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.serve._private.common import ReplicaState

from shoal import config
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.engine.events import Event, Finished, Request, Token
from shoal.engine.metrics import Samples
from shoal.errors import ResourceError
from shoal.on_ray.calls import Begun, Wanted, reads
from shoal.on_ray.engines import HELD, LOGGING
from shoal.on_ray.gateways import gateway_options
from shoal.on_ray.routing import router_config
from shoal.on_ray.serve import Gateway
from shoal.on_ray.serve_config import GATEWAY

IMPORT_PATH = "shoal.on_ray.costless:app"
WORD = 65  # the token of all answers


class Costless:
    """In the place of an engine: a token whenever it is asked for one, in a list of its own."""

    def __init__(self, args: ServeArgs, model: str) -> None:
        self._reads = reads(args.served(model), model)

    async def generate(self, request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        """As `EngineReplica.generate`."""
        most = request.sampling.max_tokens or 1
        yield [Begun("costless", "none"), Token(request.id, WORD, "a", depth=1)]
        for _ in range(most - 1):
            await asyncio.sleep(0)  # others, and the end of a client that left
            yield [Token(request.id, WORD, "a", depth=1)]
        yield [Finished(request.id, "length", depth=1, prompt_tokens=4, completion_tokens=most)]

    async def reads(self) -> str:
        return self._reads

    async def check_reads(self, reads: str) -> None:
        """It reads all."""

    async def stats(self) -> Samples:
        return {}

    async def info(self) -> dict[str, str]:
        return {"quantization": "none", "weights": "none"}


def app(args: dict[str, Any]) -> serve.Application:
    """The service of `on_ray.serve.app`, with `Costless` in the place of its engines."""
    given = config.load(ServeArgs, args, "args")
    directory = str(given.model)
    page = given.served(directory).config.page
    options: dict[str, Any] = {
        "max_ongoing_requests": HELD,
        "num_replicas": given.max_replicas,
        "request_router_config": router_config(page, HELD, may_be_none=False),
        "logging_config": LOGGING,
        "ray_actor_options": {"num_cpus": 0},
    }
    engine = serve.deployment(name=ENGINE, **options)(Costless).bind(given, directory)
    ingress = serve.ingress()(Gateway)
    return serve.deployment(name=GATEWAY, **gateway_options(given))(ingress).bind({ENGINE: engine}, given)


def wait_for(number: int, seconds: float) -> None:
    """Returns once so many gateways are there. Raises ResourceError where they are not within `seconds`."""
    until = time.monotonic() + seconds
    while True:
        deployments = serve.status().applications["shoal"].deployments
        if deployments[GATEWAY].replica_states.get(ReplicaState.RUNNING, 0) >= number:
            return
        if time.monotonic() > until:
            raise ResourceError(f"{number} gateways did not start", got=f"silence for {seconds:g} s")
        time.sleep(0.25)
