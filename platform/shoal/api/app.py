"""`build_app` makes the HTTP surface over any `EngineClient`: the same app for ``shoal serve --no-ray`` and for Ray Serve.

A request: `Gate` (id, key, size, log) -> `wire.parse` -> `requests` (to engine requests, in a thread) -> `client.gather`
(events) -> `answers` (JSON or SSE). `routes` says which request is which.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from shoal import __version__
from shoal.api.adapter_names import Names, State
from shoal.api.adapters import Adapters, adapter_routes
from shoal.api.auth import ApiKeys
from shoal.api.batches.inside import Inside, Open
from shoal.api.batches.routes import Kept, batch_routes
from shoal.api.batches.store import Store
from shoal.api.batches.worker import Worker
from shoal.api.capture import CaptureArgs, Recorder
from shoal.api.document import Documented
from shoal.api.drain import Drain
from shoal.api.drift import drift_routes
from shoal.api.executed import tool_routes
from shoal.api.feedback import feedback_routes
from shoal.api.follow import Follower
from shoal.api.lifespan import beside
from shoal.api.limits import Limits
from shoal.api.messages.routes import messages_routes
from shoal.api.middleware import OPEN_PATHS, Gate, Headed
from shoal.api.programs import program_routes
from shoal.api.releases import release_routes
from shoal.api.responses.routes import responses_routes
from shoal.api.routes import Gateways, openai_routes, status_routes, tokenizer_routes
from shoal.api.runs import runs_routes
from shoal.api.scores.routes import score_routes
from shoal.api.service import Hosted, Service
from shoal.api.wire import MethodError, NotFoundError
from shoal.errors import ConfigError, RequestError

AT_ONCE = 32  # lines of batches
FORM_BYTES = 2**16  # what a form has beside its file

# of every service
ROUTES = (
    openai_routes, responses_routes, messages_routes, score_routes, feedback_routes, drift_routes, tokenizer_routes,
)  # fmt: skip

UiMount = Callable[[FastAPI], FastAPI]

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[a-z0-9.-]+(:[0-9]+)?|[a-z]+://\[[0-9a-f:]+\](:[0-9]+)?")


# long: its options, each with its word in the docstring
def build_app(
    models: Sequence[Hosted],
    *,
    api_keys: ApiKeys | None = None,
    limits: Limits | None = None,
    metrics: bool = True,
    cors: Sequence[str] = (),
    runs: Path | None = None,
    batches: Path | None = None,
    at_once: int = AT_ONCE,
    capture: CaptureArgs | None = None,
    adapters: State | None = None,
    adapters_from: str | Path | None = None,
    adapter_names: Names | None = None,
    follower: Follower | None = None,
    run_code: bool = False,
    tools: str | None = None,
    ui_mount: UiMount | None = None,
    answer_request_id: bool = True,
    drain: Drain | None = None,
    gateways: Gateways | None = None,
) -> FastAPI:
    """The HTTP surface of `models`, found by their names; the first is meant where a request may leave its name out.

    `metrics`: answer /metrics; `cors`: origins, or ``*`` for any, whose pages may call the API; `runs`: a folder of training
    runs to show; `batches`: a folder of files and batches, run while the app is, `at_once` of their lines at a time; `capture`:
    what is kept of requests; `adapters`, `adapters_from`, `adapter_names`: as `Adapters` takes them; `follower` follows a
    release as long as the app runs; `run_code`: clients may run programs in the sandbox; `tools`: address of what executes
    some for the pages; `ui_mount` may add a page; `answer_request_id` is false behind a proxy that has its own; `drain`: how
    the caller ends it; `gateways`: what each of several has counted. Raises ConfigError, DataError, ResourceError.
    """
    limits, drain = limits or Limits(), drain or Drain(OPEN_PATHS)
    app: FastAPI = Documented(
        title="Shoal",
        version=__version__,
        docs_url=None,  # its page, and redoc's, load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # behind a proxy that ends TLS it goes to http://, and clients follow with their key
        model=models[0].served.name,
        keyed=api_keys is not None,
        open_paths=OPEN_PATHS,
    )
    service = Service(models, limits, _recorder(app, capture))
    for routes in ROUTES:
        app.include_router(routes(service))
    app.include_router(batch_routes(service, _kept(app, service, batches, api_keys, at_once, drain)))
    _adapters(app, service, Adapters(service, adapters, adapters_from, adapter_names), adapter_names)
    _follow(app, service, follower)
    app.include_router(status_routes(service, metrics=metrics, gateways=gateways))
    app.state.service = service
    _read_or_run(app, service, runs, run_code, tools)
    app = ui_mount(app) if ui_mount else app  # before the gate, which bounds their bodies too
    app.add_exception_handler(HTTPException, partial(_http_failed, service))
    app.add_middleware(Headed)
    app.add_middleware(drain.guard, failed=service.failed)
    app.add_middleware(
        Gate,
        keys=api_keys,
        body_bytes=limits.body_bytes,
        bodies_bytes=limits.bodies_bytes,
        failed=service.failed,
        answer_id=answer_request_id,
        longer={"/v1/files": limits.file_bytes + FORM_BYTES} if batches else {},
    )
    _open_to(app, cors)
    return app


def _read_or_run(app: FastAPI, service: Service, runs: Path | None, run_code: bool, tools: str | None) -> None:
    """The routes of training runs, of programs and of tools, each where it is wanted."""
    if tools is not None:
        app.include_router(tool_routes(service, tools))
    if runs is not None:
        app.include_router(runs_routes(runs))
    if run_code:
        app.include_router(program_routes(service))


def offline(models: Sequence[Hosted], limits: Limits) -> Inside:
    """What asks the routes of `models` and nothing else, with no server."""
    service = Service(models, limits)
    app = FastAPI(openapi_url=None)
    for routes in (openai_routes, responses_routes):
        app.include_router(routes(service))
    inside = Inside(app, service.failed)
    app.add_middleware(Open, take=inside.take)
    app.middleware_stack = app.build_middleware_stack()
    return inside


def _adapters(app: FastAPI, service: Service, adapters: Adapters, names: Names | None) -> None:
    """Their routes; where `names` are kept for several gateways, what others change is looked for while `app` runs."""
    app.state.adapters = adapters
    app.include_router(adapter_routes(service, adapters))
    if names is not None:
        beside(app, adapters.run, asyncio.Task.cancel)


def _recorder(app: FastAPI, given: CaptureArgs | None) -> Recorder | None:
    """What captures rows while `app` runs; none unless it is asked for."""
    if given is None:
        return None
    app.state.recorder = recorder = Recorder(given)
    beside(app, recorder.run, asyncio.Task.cancel)
    return recorder


def _follow(app: FastAPI, service: Service, follower: Follower | None) -> None:
    """The release that `follower` follows while `app` runs, where there is one."""
    if follower is not None:
        app.include_router(release_routes(service, follower.release))
        beside(app, follower.run, asyncio.Task.cancel)


def _kept(
    app: FastAPI, service: Service, folder: Path | None, keys: ApiKeys | None, at_once: int, drain: Drain
) -> Kept:
    """The files and batches in `folder`, which run while `app` does; none without one."""
    if folder is None:
        return Kept(None, None)
    store, inside = Store(folder, service.limits), Inside(app, service.failed)
    worker = Worker(store, inside, keys, service.limits, at_once=at_once, stopping=lambda: drain.closed)
    app.add_middleware(Open, take=inside.take)
    beside(app, worker.run, asyncio.Task.cancel)
    return Kept(store, worker)


def _open_to(app: FastAPI, cors: Sequence[str]) -> None:
    """Let pages of the origins `cors`, where there are any, call `app`."""
    if not cors:
        return
    app.add_middleware(
        CORSMiddleware,
        allow_origins=_origins(cors),
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["*"],
        expose_headers=["*"],
    )


def _origins(given: Sequence[str]) -> list[str]:
    """`given`, which browsers send letter by letter: a slash at the end would match none of them."""
    wrong = next((origin for origin in given if origin != "*" and not _ORIGIN.fullmatch(origin)), None)
    if wrong is not None:
        raise ConfigError("cors", got=wrong, allowed="SCHEME://HOST or SCHEME://HOST:PORT, without a path, or *")
    return list(given)


async def _http_failed(service: Service, request: Request, error: Exception) -> Response:
    """Starlette's own errors: no such route, wrong method."""
    assert isinstance(error, HTTPException)
    asked = f"{request.method} {request.url.path}"[:200]
    allow = (error.headers or {}).get("Allow")
    if error.status_code == 405:
        known: RequestError = MethodError("the method", got=asked, allowed=allow)
    elif error.status_code == 404:
        known = NotFoundError("no such path", got=asked, do="GET /openapi.json lists them")
    else:
        known = RequestError(error.detail[:200], got=asked)
        known.status = error.status_code
    answer = service.failed(known, request.state.access)
    answer.headers.update(error.headers or {})
    return answer
