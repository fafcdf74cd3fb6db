"""A stream of events that outlives the replica that gives it.

When a replica is lost in the middle of an answer, another goes on from the tokens that were already sent. Nothing is told
twice or left out: a token is a function of the weights, the tokens before it, the seed and the position, so another replica
of the same weights gives the very tokens that the lost one would have given. For that a request has its seed before it is
first sent, and keeps the depth that its first replica chose; a second look of the router that is still to come is the other's.
Prompt and answer are computed again there, as after a preemption. An answer with a tolerance keeps what it has spent of it; its
tokens also depend on what was drafted, and so on the replica. What has run for it is counted on.

Weights never mix: once anything of an answer was told, only a replica of the weights that it began with may go on, with any of
its choices. Where none is left, it ends with an error that says so.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from shoal.engine.events import Event, Finished, Request, Token
from shoal.errors import DeadlineError, EngineDeadError, EnginesLostError, QueueFullError
from shoal.on_ray.calls import Begun, OtherModelError, Wanted

log = logging.getLogger(__name__)

LOSSES = 2  # replicas that one request may lose: it may be what kills them
PATIENCE_SECONDS = 60.0  # for a replica that takes it, where the request has no deadline
PAUSES = (0.1, 0.25, 0.5, 1.0, 2.0)  # seconds before each try in a row that brought nothing; the last repeats

Batches = AsyncGenerator[list[Event], None]
Told = AsyncGenerator[list[Event | Begun], None]  # of one replica, `Begun` first


@dataclass
class _Refused(Exception):
    """A replica that cannot serve any more did not take the request."""

    error: EngineDeadError


@dataclass(eq=False)
class Pin:
    """The weights of one answer, which all its choices share."""

    weights: str | None = None  # None: nothing of it was told yet


@dataclass
class Progress:
    """How far one request has come, over all replicas that have worked for it."""

    request: Request
    pin: Pin
    reads: str  # `calls.reads` of the gateway
    began: float  # seconds, of a monotonic clock; so are the others
    last: float  # when its last event came, or it began
    resumed: float = 0.0  # when its present replica got it
    first: float | None = None  # when its first token came
    tokens: list[int] = field(default_factory=list)
    told: Token | None = None  # the last of them
    losses: int = 0
    tries: int = 0  # since the last event
    refused: frozenset[str] = frozenset()  # names of replicas that are not what it wants

    @property
    def call(self) -> str:
        """Another for each time that it is sent."""
        return f"{self.request.id}.{self.losses}.{self.tries}.{len(self.refused)}"

    def wanted(self) -> Wanted:
        """What a replica must be to take it from here on."""
        return Wanted(self.call, self.reads, self.pin.weights, self.refused)

    def refuse(self, error: OtherModelError) -> None:
        """A replica is not what this request wants. Raises `error` when the router had no other to ask."""
        if error.replica in self.refused:
            raise error
        self.refused |= {error.replica}

    def begin(self, told: Begun) -> None:
        """A replica answers. Raises `_Refused` where another choice was told with other weights meanwhile."""
        self.pin.weights = self.pin.weights or told.weights
        if self.pin.weights != told.weights:
            raise _Refused(other_weights(told.replica))

    def to_send(self, now: float) -> Request:
        """What a replica is to do from here on. Raises DeadlineError when its time is over."""
        self.resumed = now
        if not self.tries and not self.losses and not self.refused:
            return self.request
        left = None if self.request.deadline is None else self.request.deadline - (now - self.began)
        if left is not None and left <= 0:
            raise DeadlineError("the request ran out of its time", param="deadline", got=self.request.deadline)
        rest = replace(
            self.request,
            id=self.call,  # the lost replica may still be working for the old one
            deadline=left,
            priority=self.request.sooner,
        )
        return rest if self.told is None else rest.after(self.tokens, self.told)

    def patience(self, now: float) -> float:
        """Seconds that it may still wait for a replica, 0 or more: a full one may ask for any number."""
        deadline, began = self.request.deadline, self.began
        return max(0.0, self.last + PATIENCE_SECONDS - now if deadline is None else began + deadline - now)

    def take(self, event: Event, now: float) -> Event:
        """`event` as the first replica would have sent it."""
        self.tries, self.last = 0, now
        if isinstance(event, Token):
            self.tokens.append(event.token)
            self.told = event
            self.first = self.first or now
        if event.request == self.request.id:
            return event
        if isinstance(event, Token):
            return replace(event, request=self.request.id)
        lost = self.resumed - self.began
        first = event.first_token_seconds + lost if self.first is None else self.first - self.began
        return replace(
            event, request=self.request.id, first_token_seconds=first, total_seconds=event.total_seconds + lost
        )


async def unbroken(
    open_: Callable[[Request, Wanted], Told],
    request: Request,
    *,
    reads: str = "",
    pin: Pin | None = None,
    on_resume: Callable[[], None] = lambda: None,
) -> Batches:
    """The events of `request` in lists of what was ready, from as many replicas as it takes; closing the iterator closes the
    present one's.

    `open_` sends a request to some replica and gives its events in lists. An EngineDeadError, raised or in the last event,
    says that the replica was lost; `on_resume` is called when another is asked. Raises EnginesLostError after `LOSSES` of
    them, EngineDeadError when nobody takes the request in its time (DeadlineError if it has one); QueueFullError only for a
    request that no replica has lost; OtherModelError when no replica is left that reads what `reads` says and has the weights
    of `pin`, which the requests of one answer share; other errors as they come.
    """
    if request.sampling.seed is None:
        request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
    progress = Progress(request, pin or Pin(), reads, began := time.monotonic(), last=began, losses=request.losses)
    while True:
        lost = False
        try:
            async with aclosing(open_(progress.to_send(time.monotonic()), progress.wanted())) as stream:
                async for ready in _checked(stream, progress.begin):
                    events = [progress.take(event, time.monotonic()) for event in ready]
                    yield events
                    if isinstance(events[-1], Finished):
                        return
            raise EngineDeadError("the engine replica ended the stream without finishing the request")
        except QueueFullError as error:
            if not progress.losses:
                raise
            reason: Exception = error
            pause = error.retry_after or PAUSES[-1]
        except _Refused as refused:
            if isinstance(refused.error, OtherModelError):
                refused.error.taken = progress.losses > 0  # for whoever sends it to another version
                progress.refuse(refused.error)
                continue
            reason, pause = refused.error, PAUSES[min(progress.tries + 1, len(PAUSES) - 1)]
        except EngineDeadError as error:
            lost = error.taken
            progress.losses += lost
            if lost and progress.losses >= LOSSES:
                raise lost_twice(error) from error
            reason, pause = error, PAUSES[min(progress.tries + (not lost), len(PAUSES) - 1)]
        if request.deadline is None and time.monotonic() - progress.last > PATIENCE_SECONDS:
            raise reason
        progress.tries += 1
        # when a client leaves, Serve may end the replica's call before ours: then we end here
        await asyncio.sleep(min(pause, progress.patience(time.monotonic())))
        if lost:
            on_resume()
            log.warning("request %s goes on after %d tokens: %s", request.id, len(progress.tokens), reason)


async def _checked(stream: Told, begin: Callable[[Begun], None]) -> Batches:
    """The events of `stream`; `begin` gets what is said before them. Raises EngineDeadError for an end that only a lost replica
    gives, `_Refused` where no replica has said that it takes the request."""
    begun: Begun | None = None
    fresh = True
    async for told in stream:
        begun = next((item for item in told if isinstance(item, Begun)), begun)
        *before, last = [item for item in told if not isinstance(item, Begun)]
        loss = _loss(last, first=fresh and not before, taken=begun is not None)
        if begun is not None and (loss is None or before):
            begin(begun)
        if loss is None:
            yield [*before, last]
        elif before:
            yield before
        if loss is not None:
            raise loss
        fresh = False


def other_weights(replica: str) -> OtherModelError:
    """What `replica` says to a call whose answer began with weights that it does not have."""
    error = OtherModelError("the weights that this answer began with are served no more", do="send the request again")
    error.replica = replica
    return error


def lost_twice(error: EngineDeadError) -> EnginesLostError:
    """What a request is answered that was in `LOSSES` engines when they were lost, the last of them by `error`."""
    what = f"{LOSSES} engine replicas were lost while they had this request"
    return EnginesLostError(what, got=error.message, do="do not send it again as it is")


def _loss(event: Event, *, first: bool, taken: bool) -> Exception | None:
    """That a replica was lost, if the `event` tells it; `first`: it gave no event before; `taken`: it said that it begins."""
    if not isinstance(event, Finished):
        return None
    if first and isinstance(event.error, QueueFullError):
        return event.error  # as where no replica takes it at all
    if isinstance(event.error, EngineDeadError):
        return _Refused(event.error) if first and not taken else event.error
    # cancelled, and not by us: who cancels leaves, and sees no event
    return EngineDeadError("the engine replica was stopped") if event.reason == "cancelled" else None
