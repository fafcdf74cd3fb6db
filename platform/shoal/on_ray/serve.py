"""The service on Ray Serve: a gateway that speaks HTTP, and engine replicas that hold the model.

    HTTP proxy -> Gateway (the app of `api.app`, no torch) -> handle stream -> EngineReplica (an `AsyncEngine`)
                     one for all models                        a deployment of its own for each model

`app` is what a Serve config names; `run` starts one on the Ray that runs here and watches over it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import httpx
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve._private.common import ReplicaState
from ray.serve.config import ControllerOptions, HTTPOptions, gRPCOptions
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeApplicationSchema, ServeDeploySchema

from shoal import config
from shoal.api import lifespan
from shoal.api.access import log_to_stderr
from shoal.api.app import UiMount, build_app
from shoal.api.drain import Drain
from shoal.api.follow import Follower
from shoal.api.limits import Limits
from shoal.api.middleware import OPEN_PATHS
from shoal.api.page import chat_page_elsewhere, chat_page_later
from shoal.api.quotas import Shared
from shoal.api.serve_args import ServeArgs
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.api.split import Split
from shoal.data.models import here
from shoal.data.sources.s3 import is_remote
from shoal.engine.metrics import Samples
from shoal.errors import ConfigError, ResourceError
from shoal.loop.release import Release
from shoal.machine import need_free_port
from shoal.model.files import check
from shoal.on_ray import keys, pages
from shoal.on_ray.calls import reads
from shoal.on_ray.canary import OnServe
from shoal.on_ray.clients import ReplicaClient
from shoal.on_ray.ending import end_by_signals, need_ray, running
from shoal.on_ray.ending import stop as stop
from shoal.on_ray.engines import EngineReplica, engine_options, surge
from shoal.on_ray.gateways import CpuUse, GatewayNames, counted, gateway_options, vote
from shoal.on_ray.known_adapters import KnownAdapters
from shoal.on_ray.quotas import ActorLink
from shoal.on_ray.serve_config import GATEWAY, IMPORT_PATH
from shoal.vllm_plugin import options

MODEL_VARIABLE = "SHOAL_MODEL"
SERVE_SETTINGS = {  # environment of Serve's processes, where a config gives no other
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # to the gateway, as the gateway does to engines (`clients.DIRECT`)
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # one that was killed is missed after three; Serve's 10 are half a minute
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "shoal.on_ray.proxy:middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on busy cores a proxy is killed after 5 s, before it has started
    # a replica has one loop for our code, Serve's and the router: in three threads a first token comes 2.6 ms later
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
POLL_SECONDS = 0.25


def app(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config whose ``import_path`` is this function; `args` are the fields of ServeArgs.

    Raises ConfigError for an unknown or wrong argument, CheckpointError for a model that cannot be served.
    """
    given = _with_model(config.load(ServeArgs, args, "args"))
    given = replace(given, api_keys=keys.referred(given.api_keys))
    if given.engine == "vllm":
        options.check(given.vllm)  # a slip is refused now as well
    given.begin_capture()
    if given.adapters:
        from shoal.open_weights import served_adapter  # which takes torch

        for directory in given.adapters.values():
            served_adapter.check(directory, str(here(str(given.model), weights=False)))
    engines = {}
    for name, directory in given.deployments().items():
        served = given.served(directory)  # refused now, in one line, and not by every replica again
        if given.engine == "shoal" and not is_remote(directory):
            check(Path(directory))  # as each replica does: while what serves is whole
        if given.engine == "vllm":
            options.check_depth(here(directory, weights=False), served.config, given.vllm)
        chosen = engine_options(given, directory, served.config.page) | surge(given)
        engines[name] = serve.deployment(name=name, **chosen)(EngineReplica).bind(given, directory)
    ingress = serve.ingress()(Gateway)  # builds its app where it runs
    return serve.deployment(name=GATEWAY, **gateway_options(given))(ingress).bind(engines, given)


def run(
    deploy: ServeDeploySchema,
    *,
    blocking: bool = True,
    seconds: float = 180.0,
    on_ready: Callable[[str], None] | None = None,
) -> str:
    """Starts Serve on the Ray that is running, with the applications of a checked config, and returns the base URL of the first
    one that is ours, which ends in its ``route_prefix``.

    Returns once requests would be served, or raises when `seconds` are over; `on_ready` is called with the URL then.
    With `blocking` it stays until Ctrl-C (or SIGTERM) and stops Serve; without, `stop` does. Raises ResourceError for a port in
    use, a Serve that runs already, or an application that does not start; CheckpointError for a broken model.
    """
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it tells, this function tells
    options = deploy.http_options
    url = f"http://{'127.0.0.1' if options.host == '0.0.0.0' else options.host}:{options.port}"
    deploy = deploy.model_copy(deep=True)
    ours = [application for application in deploy.applications if application.import_path == IMPORT_PATH]
    for application in ours:
        application.args = _at_home(application.args, url + _prefix(application))
        if (its_pages := pages.beside(application, config.load(ServeArgs, application.args, "args"))) is not None:
            deploy.applications.append(its_pages)
    need_free_port(options.host, options.port)
    if running() is not None:
        raise ResourceError(
            "Serve is already running on this Ray", do="change it with `serve deploy`, or stop it first"
        )
    deadline = time.monotonic() + seconds
    if blocking:
        end_by_signals()
    try:
        serve.start(
            deploy.proxy_location,
            HTTPOptions(**options.model_dump()),
            gRPCOptions(**deploy.grpc_options.model_dump()),
            deploy.logging_config,
            deploy.tracing_config,
            ControllerOptions(runtime_env={"env_vars": {**SERVE_SETTINGS, **_environment(deploy)}}),
        )
        # what `serve deploy` sends through the dashboard: the file means the same here and there, overrides included
        client = running()
        assert client is not None  # it was started above
        client.deploy_apps(deploy)
        for application in deploy.applications:
            _wait_until_running(application.name, deadline)
        for application in ours:
            _wait_until_ready(url + _prefix(application), deadline)
        url += _prefix(ours[0]) if ours else ""
        with suppress(KeyboardInterrupt) if blocking else nullcontext():
            if on_ready:
                on_ready(url)
            if blocking:
                _wait_for_the_end()
    except BaseException:
        stop()
        raise
    if blocking:
        stop()
    return url


def _environment(deploy: ServeDeploySchema) -> dict[str, str]:
    """What the config gives to Serve's own processes; Ray lets it be nothing but variables."""
    given = deploy.controller_options and deploy.controller_options.runtime_env
    return (given or {}).get("env_vars") or {}


def _with_model(args: ServeArgs) -> ServeArgs:
    if args.models:
        return args
    if args.release:
        return args.at_stable()
    model = args.model or os.environ.get(MODEL_VARIABLE)
    if not model:
        raise ConfigError("args.model", got="nothing", do=f"give a model directory, there or in ${MODEL_VARIABLE}")
    return replace(args, model=model)


def _prefix(application: ServeApplicationSchema) -> str:
    """What the application's paths begin with; empty at the root."""
    return (application.route_prefix or "").rstrip("/")


def _at_home(args: dict[str, Any], url: str) -> dict[str, Any]:
    """`args` with what only the machine that starts the service knows: where its paths are, and its URL."""
    given = _with_model(config.load(ServeArgs, args, "args"))
    for directory in given.deployments().values():
        given.served(directory)
    absolute: dict[str, Any] = {}
    if given.release:
        absolute["release"] = str(Path(given.release).resolve())
    elif given.model:
        absolute["model"] = _resolved(given.model)
    absolute |= {"api_keys": keys.referred(given.api_keys)}
    if given.models:
        absolute["models"] = {name: _resolved(path) for name, path in given.models.items()}
    if given.policy:
        absolute["policy"] = str(Path(given.policy).resolve())
    if given.adapters:
        absolute["adapters"] = {name: _resolved(path) for name, path in given.adapters.items()}
    return {**args, **absolute, "ui_api": given.ui_api or f"{url}/v1"}


def _resolved(directory: str) -> str:
    return directory if is_remote(directory) else str(Path(directory).resolve())


def _wait_until_running(name: str, deadline: float) -> None:
    while True:
        status = serve.status().applications.get(name)
        if status is not None and status.status == ApplicationStatus.RUNNING:
            return
        if status is not None and status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            _did_not_start(name, status)
        if time.monotonic() > deadline:
            _did_not_start(name, status)
        time.sleep(POLL_SECONDS)


def _did_not_start(name: str, status: ApplicationStatusOverview | None) -> NoReturn:
    """Raises ResourceError with the last line of Serve's own message, where a traceback says what happened."""
    messages = [] if status is None else [status.message, *(d.message for d in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    state = "unknown" if status is None else status.status.value
    raise ResourceError(
        f"application {name} did not start",
        got=f"{state}: {lines[-1][:300]}" if lines else state,
    )


def _wait_until_ready(url: str, deadline: float) -> None:
    while True:
        try:
            answer = httpx.get(f"{url}/ready", timeout=POLL_SECONDS * 20)
            if answer.status_code == 200:
                return
            got = answer.text[:200]
        except httpx.HTTPError as error:
            got = str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise ResourceError(f"{url} is not ready", got=got, do="give it more time")
        time.sleep(POLL_SECONDS)


def _wait_for_the_end() -> None:
    """Raises KeyboardInterrupt at Ctrl-C or SIGTERM, ResourceError when Ray has ended by itself."""
    while True:
        need_ray()
        time.sleep(1.0)


Engines = tuple[ServedModel, ReplicaClient]  # of one model


class Gateway:
    """The HTTP surface. Of several each holds for itself only what ends with its requests; what they share is in the count of
    `on_ray.quotas`, on the disk, or asked of all (`counted`). A chat page keeps its session in the process that made it."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, engines: dict[str, DeploymentHandle[Any]], args: ServeArgs
    ) -> None:
        """`engines`: a handle for each of `args.deployments()`.

        In an update that changes what engines read it waits for one of the new engines: until then the gateway before it
        serves, and for good if they do not start.
        """
        self._args, self._drain, self._cpu = args, Drain(OPEN_PATHS), CpuUse()
        replica = serve.get_replica_context()
        self._name, self._application = replica.replica_id.unique_id, replica.app_name
        self._split: Split | None = None
        self._telling: set[asyncio.Task[None]] = set()
        names: list[str | None] = [*args.models] or [args.name]
        self._models = [
            _hosted(engines[deployment], directory, name, args)
            for name, (deployment, directory) in zip(names, args.deployments().items(), strict=True)
        ]
        self._shared = Shared(ActorLink(self._application), self._name) if args.max_gateways > 1 else None
        self._keys = keys.keys_of(args.api_keys, self._shared)
        if self._shared is not None and self._keys is not None and self._keys.limited:
            await self._shared.begin()
        several = self._application if args.max_gateways > 1 else None
        self._names = GatewayNames(KnownAdapters(args), self._models[0][1].know, several)
        self._known = await self._names.get()
        while await _is_served_by_another() and not all([await client.same_model() for _, client in self._models]):
            await asyncio.sleep(POLL_SECONDS)

    def close(self) -> int:
        """Takes no new work from now on; returns how many requests are running."""
        self._drain.close()
        return self._drain.running

    def counted(self) -> tuple[str, Samples]:
        """Its name, and what it has counted."""
        resumed: Samples = {}
        for served, client in self._models:
            told = client.resumed() | ({} if self._split is None else self._split.counted())
            resumed |= {key.beside(model_name=served.name): value for key, value in told.items()}
        return self._name, {**self._app.state.service.counted(), **resumed}

    async def look_at_adapters(self) -> dict[str, str]:
        """`Adapters.look`: one of the gateways has changed them."""
        return dict(await self._app.state.adapters.look())

    def voted(self, answer: str, who: str | None, rating: str | None) -> None:
        """`who` rates an answer, at any gateway: counted where it was given."""
        if self._split is not None:
            self._split.counts_vote(answer, who, rating)

    def _vote_elsewhere(self, answer: str, who: str | None, rating: str | None) -> None:
        async def tell() -> None:
            try:
                await vote(self._application, answer, who, rating)
            except Exception as error:  # of Ray: it is evidence, and kept with the capture in any case
                logging.getLogger("ray.serve").warning("a vote is not told of: %s", type(error).__name__)

        self._telling.add(task := asyncio.ensure_future(tell()))
        task.add_done_callback(self._telling.discard)

    async def _all_counted(self) -> dict[str, Samples]:
        """What each gateway has counted, and this one in any case."""
        try:
            others = await counted(self._application)
        except Exception as error:  # of Ray, whose controller may be away
            logging.getLogger("ray.serve").warning("the other gateways are not told of: %s", type(error).__name__)
            others = {}
        return others | dict([self.counted()])

    async def record_autoscaling_stats(self) -> dict[str, float]:
        return self._cpu.told()

    def __serve_build_asgi_app__(self) -> FastAPI:
        log_to_stderr()
        args = self._args
        models = [Hosted(served, client) for served, client in self._models]
        follower: Follower | None = None
        if args.release:
            release, (served, client) = Release(args.release), self._models[0]
            split = Split(client, None if self._shared is None else self._vote_elsewhere)
            models = [Hosted(served, split)]
            deploys = OnServe(args, self._application)
            follower = Follower(release, split, deploys, serves=release.stable().number)
            self._split = split
        page: UiMount | None = chat_page_elsewhere if args.ui else None
        if args.ui and self._shared is None:
            at = args.ui_api or "http://127.0.0.1:8000/v1"
            page = chat_page_later(at, models[0].served.name, args.ui_mount)
        self._app = build_app(
            models,
            api_keys=self._keys,
            limits=Limits(seconds=args.seconds),
            metrics=args.metrics,
            cors=args.cors,
            runs=Path(args.runs) if args.runs else None,
            batches=Path(args.batches) if args.batches else None,
            at_once=args.max_batch * args.max_replicas * len(models),  # so that idle replicas are used
            capture=args.captured,
            adapters=self._known,
            adapters_from=args.adapters_from,
            adapter_names=self._names,
            follower=follower,
            run_code=args.run_code,
            tools=args.tools,
            ui_mount=page,
            answer_request_id=False,  # Serve's proxy does
            drain=self._drain,
            gateways=None if self._shared is None else self._all_counted,
        )
        if self._shared is not None:
            lifespan.beside(self._app, self._shared.run, asyncio.Task.cancel)
        return self._app


def _hosted(engine: DeploymentHandle[Any], directory: str, name: str | None, args: ServeArgs) -> Engines:
    served = args.served(directory, name)
    return served, ReplicaClient(
        engine,
        may_be_none=args.min_replicas == 0,
        reads=reads(served, directory),
        several=args.max_gateways > 1,
    )


async def _is_served_by_another() -> bool:
    """Whether a gateway of this application runs already."""
    application = serve.get_replica_context().app_name
    with suppress(RayError, RayServeException, KeyError):
        found = (await asyncio.to_thread(serve.status)).applications[application].deployments[GATEWAY]
        return found.replica_states.get(ReplicaState.RUNNING, 0) > 0
    return False
