"""The pages as an application of their own, below the path ``/ui`` of a service that several gateways serve.

A page keeps its session in the process that made it, so there is one such process. It speaks HTTP to the API, as any client.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.schema import ServeApplicationSchema
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal import config
from shoal.api.page import MOUNT, chat_page
from shoal.api.serve_args import ServeArgs
from shoal.on_ray.engines import LIFE, LOGGING

IMPORT_PATH = "shoal.on_ray.pages:app"
PATH = "/ui"


@dataclass(frozen=True)
class PagesArgs:
    """The ``args`` of this application in a Serve config."""

    api: str  # where the pages find the API; ends in /v1
    model: str | None = None  # named first; None: the service's first
    ui_mount: str = MOUNT


def app(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config whose ``import_path`` is this function, and whose ``route_prefix`` ends in `PATH`."""
    given = config.load(PagesArgs, args, "args")
    options: dict[str, Any] = {**LIFE, "logging_config": LOGGING, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(name="Pages", **options)(serve.ingress()(Pages)).bind(given)


def beside(application: ServeApplicationSchema, args: ServeArgs) -> ServeApplicationSchema | None:
    """The application of the pages of another, whose `args` these are; None where its gateway has them, or there are none."""
    if not args.ui or args.max_gateways == 1:
        return None
    prefix = (application.route_prefix or "").rstrip("/")
    values: dict[str, Any] = {
        "name": f"{application.name}-pages", "route_prefix": prefix + PATH, "import_path": IMPORT_PATH,
        "args": {"api": args.ui_api, "ui_mount": args.ui_mount},
    }  # fmt: skip
    return ServeApplicationSchema.model_validate(values)


class Pages:
    """The one process."""

    def __init__(self, args: PagesArgs) -> None:
        self._given = args

    def __serve_build_asgi_app__(self) -> ASGIApp:
        given = self._given
        pages = chat_page(given.api, given.model, given.ui_mount)(
            FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        )

        async def above(scope: Scope, receive: Receive, send: Send) -> None:
            """The pages know themselves below `PATH` of the service, which Serve has taken for their root."""
            if "root_path" in scope:
                scope = {**scope, "root_path": scope["root_path"].removesuffix(PATH)}
            await pages(scope, receive, send)

        return above
