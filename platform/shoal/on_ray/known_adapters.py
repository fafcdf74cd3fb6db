"""The adapters that a service has, kept by Ray for all its gateways, and for gateways and engines that start later.

They are those that it was started with until requests load and drop some. Each state has an entry of its own, whose number only
one gateway can write; the newest counts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.exceptions import RayError
from ray.experimental import internal_kv
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from shoal.api.adapter_names import Change, Known, State
from shoal.api.serve_args import ServeArgs
from shoal.errors import EngineDeadError
from shoal.on_ray.loaded import NAMESPACE
from shoal.open_weights import adapter_place

KEPT = 64  # states, so that the newest is never away while it is looked for


class KnownAdapters:
    """Of the service that this process is a replica of, as long as it runs and starts with the same ones."""

    def __init__(self, args: ServeArgs) -> None:
        self._started_with = args.adapters
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        told = [controller._actor_id.hex(), serve.get_replica_context().app_name, args.model, args.adapters]
        self._key = hashlib.sha256(json.dumps(["adapters", *told], sort_keys=True).encode()).hexdigest()

    def get(self) -> State:
        """The newest state. Raises CheckpointError for an adapter that the service starts with and that cannot be read,
        EngineDeadError where the cluster's head does not answer."""
        found = self._newest()
        if found is None:
            now = int(time.time())
            known = {
                name: Known(adapter_place.read(directory).identity, directory, now)
                for name, directory in self._started_with.items()
            }
            self._put(State(0, time.time_ns() // 1000, known))  # unless another process was first
            found = self._newest()
        if found is None:
            raise EngineDeadError("the list of adapters is lost with the Ray that held it", do="try again")
        return found

    def change(self, change: Change) -> State:
        """As `Names.change`."""
        while True:
            before = self.get()
            at = max(before.at + 1, time.time_ns() // 1000)
            after = State(before.number + 1, at, change(before.known))
            if self._put(after):
                return after

    def _numbers(self) -> list[int]:
        with _reached():
            names = internal_kv._internal_kv_list(f"{self._key}:", namespace=NAMESPACE)
        return sorted(int(name.decode().rpartition(":")[2]) for name in names)

    def _newest(self) -> State | None:
        for number in reversed(self._numbers()):
            with _reached():
                kept: bytes | None = internal_kv._internal_kv_get(self._name(number), namespace=NAMESPACE)
            if kept is not None:
                told = json.loads(kept)
                return State(number, told["at"], {name: Known(**each) for name, each in told["known"].items()})
        return None

    def _put(self, state: State) -> bool:
        """Keep `state`, unless there is another of its number, or was."""
        known = {name: dataclasses.asdict(each) for name, each in state.known.items()}
        name, text = self._name(state.number), json.dumps({"at": state.at, "known": known})
        with _reached():
            there = internal_kv._internal_kv_put(name, text, overwrite=False, namespace=NAMESPACE)
            if there:  # by this very call, where its first answer was lost and Ray asked again
                there = internal_kv._internal_kv_get(name, namespace=NAMESPACE) != text.encode()
            numbers = self._numbers()
            late = not there and numbers[-1] >= state.number + KEPT  # its entry had been removed before
            for number in [each for each in numbers if each <= numbers[-1] - KEPT]:
                internal_kv._internal_kv_del(self._name(number), namespace=NAMESPACE)
        return not there and not late

    def _name(self, number: int) -> str:
        return f"{self._key}:{number}"


@contextmanager
def _reached() -> Iterator[None]:
    try:
        yield
    except RayError as error:
        raise EngineDeadError(
            "the list of adapters cannot be reached", got=type(error).__name__, do="try again"
        ) from error
