"""Which replica gets a request: the one that has its beginning in the prefix cache, unless that one has too much to do.

    beginnings   a chained hash for each full page of the prompt, an image's hash in the page where it starts
    known        the replica that last got the longest of these beginnings: a conversation stays where it was, and a system
                 prompt where it is cached
    otherwise    rendezvous hashing of the first page: every gateway sends a new beginning to the same replica, and a replica
                 that comes or goes moves only its own share
    bound        a replica with more than `SHARE` of its fair part of the requests is passed over, from `SPARE` requests on
    one moment   a request counts as load of the replica that it is about to be given, before Serve has sent it there: so
                 those that come together are spread as those that come one after the other
    silent       a replica that does not answer (`pulse`) gets nothing while others do; nor one that has refused the call
    refused      a request that would wait behind `queue` others. Who waits only until he is handed to a replica that has room
                 is none of these: Serve's own ``max_queued_requests`` counts him, and so refuses a burst that there is room for

`Affinity` is the decision, plain Python; `AffinityRouter` is what Ray Serve runs beside the gateway's handle.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from array import array
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from ray.exceptions import RayError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError
from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from shoal.engine.events import Request
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import IMG_ID
from shoal.on_ray.absence import Absence
from shoal.on_ray.calls import Wanted
from shoal.on_ray.pulse import TICK_SECONDS, pulse_of

SHARE = 1.25  # of the mean number of requests a replica
SPARE = 4  # requests that a replica takes in any case: a batch of a few costs hardly more than one
PAGES = 64  # of a prompt that are looked at
KNOWN = 65_536  # beginnings that are remembered


def beginnings(request: Request, page: int) -> list[bytes]:
    """A hash for each of the first full pages of `page` tokens: equal if all tokens and images up to its end are, the adapter
    and the cache salt. A prompt shorter than a page has one, of all its tokens; a prompt of text, which nobody has encoded, has
    none."""
    if isinstance(request.prompt, str):
        return []
    ids = request.prompt.ids if isinstance(request.prompt, Encoded) else request.prompt
    images = request.prompt.images if isinstance(request.prompt, Encoded) else []
    names = iter([image.sha256().encode() for image in images])
    found, chain = list[bytes](), repr((request.adapter, request.cache_salt)).encode()
    for start in range(0, max(1, min(len(ids) - page + 1, PAGES * page)), page):
        tokens = ids[start : start + page]
        data = array("q", tokens).tobytes() + b"".join(next(names, b"") for token in tokens if token == IMG_ID)
        chain = hashlib.blake2b(chain + data, digest_size=16).digest()
        found.append(chain)
    return found


class Affinity:
    """Remembers who got which beginning."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, str] = OrderedDict()

    def ranked(self, keys: Sequence[bytes], loads: Mapping[str, int]) -> list[str]:
        """All replicas of `loads` (name -> requests there now), the one to try first in front: those below the bound by
        affinity, then the others by load."""
        most = max(SPARE, math.ceil(SHARE * (sum(loads.values()) + 1) / max(1, len(loads))))
        fair = [name for name, load in loads.items() if load < most]
        over = sorted((name for name in loads if loads[name] >= most), key=lambda name: loads[name])
        if not keys:
            return sorted(fair, key=lambda name: loads[name]) + over
        last = next((name for key in reversed(keys) if (name := self._known.get(key)) in loads), None)
        return sorted(fair, key=lambda name: (name != last, _weight(keys[0], name))) + over

    def remember(self, keys: Sequence[bytes], name: str) -> None:
        """`name` got a request that begins so."""
        for key in keys:
            self._known[key] = name
            self._known.move_to_end(key)
        while len(self._known) > KNOWN:
            self._known.popitem(last=False)


def eligible(names: Collection[str], refused: Collection[str], silent: Collection[str]) -> list[str]:
    """Those of `names` that may get a call: none that refused it, and of the others none that is silent, as long as any is left
    either way."""
    willing = [name for name in names if name not in refused] or list(names)
    return [name for name in willing if name not in silent] or willing


def _weight(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(key + name.encode(), digest_size=8).digest()


class AffinityRouter(FIFOMixin, RequestRouter):
    """`Affinity` as Ray Serve's request router of the engine replicas."""

    def _get_pending_request_matching_metadata(self, request_metadata: Any = None) -> PendingRequest | None:
        """The request that a replica was just chosen for. Serve would look for it by the id of the HTTP request, which the n
        choices of one share, and all but one of them would never be sent."""
        waiting: Iterable[PendingRequest] = self._pending_requests_to_fulfill
        return next((p for p in waiting if p.metadata is request_metadata and not p.future.done()), None)

    def initialize_state(self, page: int, queue: int, may_be_none: bool) -> None:  # type: ignore[override]
        """`page`: tokens of a page of the model; `queue`: requests that may wait while all replicas are full; `may_be_none`: as
        of `Absence`."""
        self._page, self._queue, self._affinity = page, queue, Affinity()
        self._absence = Absence(may_be_none)
        self._pulse = pulse_of(self._deployment_id.app_name, self._deployment_id.name)
        self._watching: asyncio.Task[None] | None = None
        self._free = 0  # places of the last replicas, while there is none
        # the requests that a replica is being chosen for, by id(), and which each is about to be given
        self._asked: dict[int, PendingRequest] = {}
        self._first: dict[int, str] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve has decided on other replicas."""
        if not replicas and self.curr_replicas:
            self._free = self._places()
        super().update_replicas(replicas)
        self._pulse.present([replica.replica_id.unique_id for replica in replicas])
        if replicas and (self._watching is None or self._watching.done()):
            self._watching = self._event_loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Asks each replica a word a second, one question at a time, for as long as there is any."""
        asked: dict[str, asyncio.Task[None]] = {}
        while replicas := list(self.curr_replicas.values()):
            for replica in replicas:
                name = replica.replica_id.unique_id
                if name in asked and not asked[name].done():
                    self._pulse.missed(name)
                else:
                    asked[name] = self._event_loop.create_task(self._ask(replica, name))
            self._pulse.cut_off()
            asked = {name: task for name, task in asked.items() if not task.done()}
            await asyncio.sleep(TICK_SECONDS)

    async def _ask(self, replica: RunningReplica, name: str) -> None:
        began = time.monotonic()
        with suppress(RayError):  # it has gone, which Serve finds out by itself
            await replica.get_queue_len(deadline_s=math.inf)
            self._pulse.answered(name, time.monotonic() - began)

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Raises BackPressureError for a new request that there is no room for, NoReplicaError where none is alive."""
        waiting = sum(not asked.future.done() for asked in self._asked.values())
        if is_retry:
            # Serve does so later, and until then it would count for who has just refused it
            pending_request.future = asyncio.get_running_loop().create_future()
        elif waiting >= self._room():
            raise BackPressureError(num_queued_requests=waiting, max_queued_requests=self._queue)
        key = id(pending_request)
        self._asked[key] = pending_request
        try:
            choosing = super()._choose_replica_for_request(pending_request, is_retry=is_retry)
            replica = await self._absence.bounded(choosing, lambda: bool(self.curr_replicas))
        finally:
            del self._asked[key]
            self._first.pop(key, None)
        if wanted := _wanted(pending_request):
            self._pulse.sent(wanted.call, replica.replica_id.unique_id)
        return replica

    def _room(self) -> int:
        """How many requests may be on their way to a replica: those that one would take now, and the queue. While there is none
        it is what the last would have taken: a replica that changes its weights is away for a moment, and no overload.
        `Absence` ends the wait for one that does not come back."""
        return self._queue + (self._places() if self.curr_replicas else self._free)

    def _places(self) -> int:
        given = Counter(self._given().values())
        free = [
            replica.max_ongoing_requests - self._sent(replica) - given[replica.replica_id.unique_id]
            for replica in self.curr_replicas.values()
        ]
        return sum(max(0, places) for places in free)

    def _sent(self, replica: RunningReplica) -> int:
        """Requests that Serve knows of there: it counts one when it is sent, and none that a replica was chosen for."""
        return self.replica_queue_len_cache.get(replica.replica_id) or 0

    def _given(self) -> dict[int, str]:
        """By request: the replica that was chosen for it, where it has not been sent yet."""
        futures = {key: asked.future for key, asked in self._asked.items()}
        chosen = {key: future for key, future in futures.items() if future.done() and not future.cancelled()}
        return {key: future.result().replica_id.unique_id for key, future in chosen.items()}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One replica a rank: Serve takes the first that accepts, and comes back when none does. What others of the same
        moment are given, or are about to be, counts as load: Serve may ask a replica first, and chooses for them all meanwhile.
        """
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # all replicas are in the ranks
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        wanted = _wanted(pending_request)
        may = eligible(replicas, wanted.avoid if wanted else (), self._pulse.silent())
        replicas = {name: replicas[name] for name in may}
        self._first.pop(id(pending_request), None)
        coming = Counter((self._first | self._given()).values())
        loads = {name: self._sent(replica) + coming[name] for name, replica in replicas.items()}
        ranked = self._affinity.ranked(self._keys(pending_request), loads)
        if id(pending_request) in self._asked:
            self._first[id(pending_request)] = ranked[0]
        return [[replicas[name]] for name in ranked]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        self._affinity.remember(self._keys(pending_request), replica_id.unique_id)

    def _keys(self, pending: PendingRequest | None) -> list[bytes]:
        request = pending.args[0] if pending is not None and pending.args else None
        return beginnings(request, self._page) if isinstance(request, Request) else []


def _wanted(pending: PendingRequest | None) -> Wanted | None:
    return next((item for item in pending.args if isinstance(item, Wanted)), None) if pending is not None else None


def router_config(page: int, queue: int, may_be_none: bool) -> RequestRouterConfig:
    """Serve's option that routes by `Affinity`, with what `AffinityRouter.initialize_state` takes."""
    values: dict[str, Any] = {"request_router_class": "shoal.on_ray.routing:AffinityRouter"}
    state = {"page": page, "queue": queue, "may_be_none": may_be_none}
    return RequestRouterConfig(**values, request_router_kwargs=state)
