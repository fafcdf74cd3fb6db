"""How a service on Ray ends: its gateways take no new work, what runs has its time, and then Serve goes.

Serve's own shutdown ends the HTTP proxies first, and with them every stream, so it comes last. A Ray that has ended itself is
noticed at once: asked anything, it would be waited for for a minute.
"""

from __future__ import annotations

import signal
import time
from contextlib import suppress
from typing import Any, NoReturn

import ray
from ray import serve
from ray._private import worker
from ray._private.node import Node
from ray.exceptions import RayError
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import ReplicaID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.exceptions import RayServeException

from shoal.api.drain import STREAM_SECONDS
from shoal.errors import ResourceError
from shoal.on_ray import keys, quotas
from shoal.on_ray.serve_config import GATEWAY

POLL_SECONDS = 0.25
ASK_SECONDS = 5.0  # for a gateway or the controller to answer
STOP_SECONDS = 30.0  # for Serve to end when nothing runs any more


def end_by_signals() -> None:
    """From now on Ctrl-C and SIGTERM, which is how a job is stopped, raise KeyboardInterrupt in the main thread: also where a
    shell that started this in the background has it ignore the first."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


def stop() -> None:
    """Stops Serve on the Ray that is running; does nothing when none runs. No new work is taken, and requests that run have
    `STREAM_SECONDS` to end. KeyboardInterrupt meanwhile ends all at once, and is raised on.

    Raises ResourceError when Serve does not end within `STOP_SECONDS` after that, or when its Ray has ended before it.
    """
    need_ray()
    client = running()
    if client is None:
        return
    worker.print_to_stdstream = _print_but_for_polls
    try:
        _drain(time.monotonic() + STREAM_SECONDS)
        # `serve.shutdown` waits inside a call that the controller's own end breaks off, which Ray prints as a failure
        ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=ASK_SECONDS)
        _kill("replicas")  # whose time was over; the others have nothing to do
        _wait_for_the_controller()
        keys.forget()
        quotas.end()
    except KeyboardInterrupt:
        need_ray()
        _kill("all")
        keys.forget()
        quotas.end()
        raise
    finally:
        _disconnect()  # type: ignore[no-untyped-call]  # forgets the Serve that was


_print = worker.print_to_stdstream


def _print_but_for_polls(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Prints what Ray has to say, but not that polls of a controller that has ended "failed", on stdout."""
    if not any("listen_for_change" in line for line in data["lines"]):
        _print(data, ignore_prefix)


def running() -> ServeControllerClient | None:
    """Of the Serve that runs on this Ray; None where none does. What is kept of one may be of another that has ended."""
    _disconnect()  # type: ignore[no-untyped-call]
    return _get_global_client(raise_if_no_controller_running=False)


def need_ray() -> None:
    """Raises ResourceError where a Ray of our own has ended, as by a signal to all processes of a service manager's unit."""
    node: Node | None = worker._global_node
    if node is not None and node.dead_processes():  # type: ignore[no-untyped-call]
        raise ResourceError(
            "Ray has ended before the service",
            do="if the streams are to end first, signal this process alone (systemd: KillMode=mixed)",
        )


def _drain(until: float) -> None:
    """Closes all gateways, and returns when no request is with them, or at `until`."""
    while (running := _close_gateways()) and time.monotonic() < until:
        need_ray()
        time.sleep(POLL_SECONDS)
    if not running:
        time.sleep(POLL_SECONDS)  # for the last words to pass the proxy


def _close_gateways() -> int:
    """Closes the gateways there are, and returns how many requests are with them; 1 more for each that does not say."""
    running = 0
    with suppress(RayError, RayServeException):
        for name, application in serve.status().applications.items():
            if GATEWAY not in application.deployments:
                continue
            answers: list[Any] = []
            with suppress(RayServeException):  # it has no replica
                broadcast = serve.get_deployment_handle(GATEWAY, name).broadcast("close")
                try:
                    answers = broadcast.results(timeout_s=ASK_SECONDS, return_exceptions=True)
                except TimeoutError:
                    running += 1
            # else it is gone, and its work with it
            running += sum(answer for answer in answers if isinstance(answer, int))
    return running


def _wait_for_the_controller() -> None:
    until = time.monotonic() + STOP_SECONDS
    while _controller_lives():
        need_ray()
        if time.monotonic() > until:
            raise ResourceError("Serve does not end", got=f"alive after {STOP_SECONDS:g} s", do="stop its Ray")
        time.sleep(POLL_SECONDS)


def _controller_lives() -> bool:
    try:
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return False
    return True


def _kill(what: str) -> None:
    """Ends Serve's replicas at once; or all of its actors, the controller first, which would start others."""
    names = [
        actor["name"]
        for actor in ray.util.list_named_actors(all_namespaces=True)
        if actor["namespace"] == SERVE_NAMESPACE
    ]
    chosen = sorted(names, key=lambda name: name != SERVE_CONTROLLER_NAME)
    for name in chosen if what == "all" else filter(ReplicaID.is_full_id_str, chosen):
        with suppress(ValueError):  # it has just gone
            ray.kill(ray.get_actor(name, namespace=SERVE_NAMESPACE))
