"""Versions of a release on Ray Serve: replicas follow the stable one by themselves, and a canary is an application of its own.

It has no route: gateways alone send it requests, and to take it back is to delete it. Within the service's application its
failure to start would be the service's. Of several gateways one starts it, under a lock in the release's folder, and the others
find it by its name, which has the version's number; what the release has on trial nobody deletes.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.api.served import ServedModel
from shoal.api.trial import Weighed
from shoal.data.alone import alone
from shoal.errors import EngineDeadError, ResourceError, ShoalError
from shoal.loop.release import Release
from shoal.loop.versions import Version
from shoal.on_ray.calls import reads, weights_of
from shoal.on_ray.clients import ReplicaClient
from shoal.on_ray.engines import EngineReplica, engine_options

START_SECONDS = 180.0  # for a canary to load, and for the cluster to find room for it
POLL_SECONDS = 0.25
LOCK = ".canary.lock"
LOCK_SECONDS = 90.0  # for another gateway, which deletes one: its streams have 60 to end
THERE = (ApplicationStatus.DEPLOYING, ApplicationStatus.RUNNING)


class OnServe:
    """`api.follow.Deploys` on the Serve that runs here."""

    def __init__(self, args: ServeArgs, application: str) -> None:
        """`args` of the service, which is `application`, and follows a release."""
        assert args.release is not None
        self._args, self._prefix, self._release = args, f"{application}-canary-", Release(args.release)
        busy = ResourceError("another gateway is at the canary", do="wait: it is tried again")
        self._alone = partial(alone, Path(args.release) / LOCK, busy, wait=LOCK_SECONDS)

    async def serve(self, version: Version) -> None:
        """Its replicas follow the release by themselves, each as it has loaded it."""

    async def begin(self, version: Version) -> Weighed:
        """Raises ResourceError where it does not start, or finds no room."""
        served = ServedModel.load(version.served)
        handle = await asyncio.to_thread(
            self._deploy, self._name(version.number), str(version.served), served.config.page
        )
        client = ReplicaClient(handle, may_be_none=False, reads=reads(served, version.served))
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                await client.check_health()
                return client
            except ShoalError as error:
                if time.monotonic() > until:
                    raise ResourceError("the canary does not answer", got=error.message) from error
            await asyncio.sleep(POLL_SECONDS)

    async def end(self) -> None:
        await asyncio.to_thread(self._delete)

    def weights(self, version: Version) -> str:
        return weights_of(version.weights, self._args)

    def _name(self, number: int) -> str:
        return f"{self._prefix}{number}"

    def _deploy(self, name: str, directory: str, page: int) -> DeploymentHandle[Any]:
        args = replace(self._args, release=None, model=directory, min_replicas=1, max_replicas=1)
        options = engine_options(args, directory, page)
        deployment = serve.deployment(name=ENGINE, **options)(EngineReplica)
        with self._alone():
            if self._status(name) not in THERE:
                serve._run(deployment.bind(args, directory), _blocking=False, name=name, route_prefix=None)
        until = time.monotonic() + START_SECONDS
        while (status := self._status(name)) != ApplicationStatus.RUNNING:
            if status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY) or time.monotonic() > until:
                do = "look at Serve's log: it failed, or the cluster has no room for one more replica"
                raise ResourceError("the canary", got="nothing" if status is None else status.value, do=do)
            time.sleep(POLL_SECONDS)
        return serve.get_deployment_handle(ENGINE, name)

    def _status(self, name: str) -> ApplicationStatus | None:
        with suppress(RayError, RayServeException):
            found = serve.status().applications.get(name)
            return None if found is None else found.status
        return None

    def _delete(self) -> None:
        try:
            if self._unwanted():
                with self._alone():
                    for name in self._unwanted():
                        serve.delete(name)
        except (RayError, RayServeException, TimeoutError) as error:
            raise EngineDeadError("the canary is not gone", got=type(error).__name__) from error

    def _unwanted(self) -> list[str]:
        """Canaries that run, but for the one that the release has on trial."""
        canary = self._release.state().canary
        kept = None if canary is None else self._name(canary.version)
        return [name for name in serve.status().applications if name.startswith(self._prefix) and name != kept]
