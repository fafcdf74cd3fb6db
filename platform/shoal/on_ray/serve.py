"""The service on Ray Serve: a gateway that speaks HTTP, and engine replicas that hold the model.

    HTTP proxy -> Gateway (the app of `api.app`, no torch) -> handle stream -> EngineReplica (an `AsyncEngine`)
                     one for all models                        a deployment of its own for each model

`app` is what a Serve config names; `run` starts one on the Ray that runs here and watches over it.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.config import BackpressureConfig, ControllerOptions, HTTPOptions, gRPCOptions
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeApplicationSchema, ServeDeploySchema

from shoal import config
from shoal.api.access import log_to_stderr
from shoal.api.app import build_app
from shoal.api.auth import ApiKeys
from shoal.api.limits import Limits
from shoal.api.page import chat_page
from shoal.api.service import Hosted
from shoal.errors import ConfigError, ResourceError
from shoal.on_ray.clients import ReplicaClient
from shoal.on_ray.engines import LIFE, LOGGING, EngineReplica, engine_options
from shoal.on_ray.resources import need_free_port
from shoal.on_ray.serve_config import GATEWAY, IMPORT_PATH, ServeArgs
from shoal.vllm_plugin import options

MODEL_VARIABLE = "SHOAL_MODEL"
GATEWAY_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 4096,  # connections that the gateway holds; what the engines take is bounded by `ServeArgs`
    "max_queued_requests": 4096,
    "max_surge_percent": 100,  # in an update the new one serves before the old one goes
    "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    **LIFE,
    "logging_config": LOGGING,
    "ray_actor_options": {"num_cpus": 0},
}
SERVE_SETTINGS = {  # environment of Serve's processes, where a config gives no other
    "RAY_SERVE_PROXY_USE_GRPC": "1",  # to the gateway, as the gateway does to engines (`clients.DIRECT`)
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # one that was killed is missed after three; Serve's 10 are half a minute
    # a replica has one loop for our code, Serve's and the router: in three threads a first token comes 2.6 ms later
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
POLL_SECONDS = 0.25
STREAM_SECONDS = 60.0  # that a service which is stopped gives to the streams that run
STOP_SECONDS = 90.0


def app(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config whose ``import_path`` is this function; `args` are the fields of ServeArgs.

    Raises ConfigError for an unknown or wrong argument, CheckpointError for a model that cannot be served.
    """
    given = _with_model(config.load(ServeArgs, args, "args"))
    if given.engine == "vllm":
        options.check(given.vllm)  # a slip is refused now as well
    engines = {}
    for name, directory in given.deployments().items():
        served = given.served(directory)  # refused now, in one line, and not by every replica again
        chosen = engine_options(given, directory, served.config.page)
        engines[name] = serve.deployment(name=name, **chosen)(EngineReplica).bind(given, directory)
    # a gateway that goes has the time of the longest request: its streams cannot go on at another
    gateway_options = {**GATEWAY_OPTIONS, "graceful_shutdown_timeout_s": max(given.seconds, STREAM_SECONDS)}
    ingress = serve.ingress()(Gateway)  # builds its app where it runs
    return serve.deployment(name=GATEWAY, **gateway_options)(ingress).bind(engines, given)


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
    With `blocking` it stays until Ctrl-C (or SIGTERM) and stops Serve; without, `stop` does. Raises ResourceError for a
    port in use, a Serve that runs already, or an application that does not start; CheckpointError for a broken model.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what it tells, this function tells
    options = deploy.http_options
    url = f"http://{'127.0.0.1' if options.host == '0.0.0.0' else options.host}:{options.port}"
    deploy = deploy.model_copy(deep=True)
    ours = [application for application in deploy.applications if application.import_path == IMPORT_PATH]
    for application in ours:
        application.args = _at_home(application.args, url + _prefix(application))
    need_free_port(options.host, options.port)
    if _get_global_client(raise_if_no_controller_running=False) is not None:
        raise ResourceError(
            "Serve is already running on this Ray", do="change it with `serve deploy`, or stop it first"
        )
    deadline = time.monotonic() + seconds
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
        client = _get_global_client()
        assert client is not None  # it raises instead
        client.deploy_apps(deploy)
        for application in deploy.applications:
            _wait_until_running(application.name, deadline)
        for application in ours:
            _wait_until_ready(url + _prefix(application), deadline)
        url += _prefix(ours[0]) if ours else ""
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


def stop() -> None:
    """Stops Serve on the Ray that is running; does nothing when none runs. Requests that run have `STREAM_SECONDS` to end.

    Raises ResourceError when it does not end within `STOP_SECONDS`.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return
    # `serve.shutdown` waits inside a call that the controller's own end breaks off, which Ray prints as a failure
    ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=STOP_SECONDS)
    began = time.monotonic()
    while _controller_lives():
        if time.monotonic() > began + STREAM_SECONDS:
            _kill_replicas()
        if time.monotonic() > began + STOP_SECONDS:
            raise ResourceError("Serve does not end", got=f"alive after {STOP_SECONDS:g} s", do="stop its Ray")
        time.sleep(POLL_SECONDS)
    _disconnect()  # type: ignore[no-untyped-call]  # forgets the Serve that was


def _environment(deploy: ServeDeploySchema) -> dict[str, str]:
    """What the config gives to Serve's own processes; Ray lets it be nothing but variables."""
    given = deploy.controller_options and deploy.controller_options.runtime_env
    return (given or {}).get("env_vars") or {}


def _controller_lives() -> bool:
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _kill_replicas() -> None:
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == SERVE_NAMESPACE and ReplicaID.is_full_id_str(actor["name"]):
            with suppress(ValueError):  # it has just gone
                ray.kill(ray.get_actor(actor["name"], namespace=SERVE_NAMESPACE))


def _with_model(args: ServeArgs) -> ServeArgs:
    if args.models:
        return args
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
    ApiKeys.load(given.api_keys)
    paths = {"model": given.model, "api_keys": given.api_keys}
    absolute: dict[str, Any] = {name: str(Path(path).resolve()) for name, path in paths.items() if path}
    if given.models:
        absolute["models"] = {name: str(Path(path).resolve()) for name, path in given.models.items()}
    return {**args, **absolute, "ui_api": given.ui_api or f"{url}/v1"}


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
    """Until Ctrl-C or SIGTERM, which is how a job is stopped."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # both: a shell that starts a command in the background has it ignore SIGINT
    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Gateway:
    """The HTTP surface. One replica: a chat page keeps its session in the process that made it."""

    def __init__(self, engines: dict[str, DeploymentHandle[Any]], args: ServeArgs) -> None:
        """`engines`: a handle for each of `args.deployments()`."""
        self._engines, self._args = engines, args

    def __serve_build_asgi_app__(self) -> FastAPI:
        log_to_stderr()
        args = self._args
        names: list[str | None] = [*args.models] or [args.name]
        models = [
            Hosted(
                args.served(directory, name),
                ReplicaClient(self._engines[deployment], may_be_none=args.min_replicas == 0),
            )
            for name, (deployment, directory) in zip(names, args.deployments().items(), strict=True)
        ]
        default = models[0].served.name
        page = chat_page(args.ui_api or "http://127.0.0.1:8000/v1", default, args.ui_mount) if args.ui else None
        return build_app(
            models,
            api_keys=ApiKeys.load(args.api_keys),
            limits=Limits(seconds=args.seconds),
            metrics=args.metrics,
            cors=args.cors,
            runs=Path(args.runs) if args.runs else None,
            ui_mount=page,
            answer_request_id=False,  # Serve's proxy does
        )
