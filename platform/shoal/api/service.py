"""What the routes share: a body read, the work of a request run through the engine, errors in OpenAI's envelope.

An error anywhere before the first token becomes its HTTP status; after it, one ``data: {"error": ...}`` event ends the stream,
since the status is already sent.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response
from starlette.requests import ClientDisconnect

from shoal.api.access import Access
from shoal.api.answers import Answer, Store
from shoal.api.bodies import ChatRequest
from shoal.api.capture import Recorder, beginning
from shoal.api.client import ClientGone, EngineClient, Events, gather, while_connected
from shoal.api.entry import Entry
from shoal.api.fresh import Fresh
from shoal.api.json_text import dumps
from shoal.api.last_look import LastLook
from shoal.api.limits import Limits
from shoal.api.messages import errors
from shoal.api.metrics import Metrics
from shoal.api.policy import WORKLOAD
from shoal.api.requests import EngineCall
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.sent import Sent, in_json
from shoal.api.served import ServedModel
from shoal.api.split import Note, Split
from shoal.api.storing import Storing
from shoal.api.wire import MediaTypeError, ModelNotFoundError, RateLimitError, W, Wire, envelope, parse, unused
from shoal.engine.events import Finished, Token
from shoal.engine.metrics import Samples
from shoal.errors import ConfigError, DeadlineError, EnginesLostError, RequestError, ShoalError, frames
from shoal.loop.votes import Vote

T = TypeVar("T")


class Generates(Protocol):
    """What the bodies have in common that are answered by generated tokens."""

    model: str
    stream: bool


G = TypeVar("G", bound=Generates)

log = logging.getLogger("shoal.api")

BODY_SECONDS = 60.0  # for a body to arrive
SHORT_BODY = 2**15  # bytes, which take at most 10 ms to parse; one of 16 MiB takes up to 5 s
# requests that are parsed (longer ones) and encoded at once, short and long ones each: more share Python's lock
AT_ONCE = 2
LONGEST_SAID = 4096  # characters of a message that tell its chat from others


class Hosted:
    """A model, and the engine that runs it."""

    def __init__(self, served: ServedModel, client: EngineClient) -> None:
        self.served, self.client = served, client
        self.held = 0  # requests that are answered by it
        self.stats = Fresh(lambda: client.stats())
        self.info = Fresh(lambda: client.info())
        self.health = Fresh(self._healthy)

    def beside(self, served: ServedModel, client: EngineClient) -> Hosted:
        """An adapter of it: `served` over `client`, on the same engine."""
        adapter = copy.copy(self)
        adapter.served, adapter.client, adapter.held = served, client, 0
        return adapter

    def cache_salt(self, access: Access) -> str:
        """As `Request.cache_salt`, of a request."""
        return "" if access.key is None or self.served.shared_prefix_cache else access.key.cache_salt

    async def _healthy(self) -> str:
        await self.client.check_health()
        return "ok"


class Service:
    """What the routes share."""

    def __init__(self, models: Sequence[Hosted], limits: Limits, recorder: Recorder | None = None) -> None:
        """The first of `models` is meant where a request may leave its name out. Raises ConfigError for a name given twice."""
        self.models, self.limits, self.recorder = tuple(models), limits, recorder
        self.storing = None if recorder is None else Storing(recorder)
        self.last_look = None if recorder is None else LastLook(recorder)
        self.names = {name: hosted for hosted in models for name in hosted.served.names}
        if not models or len(self.names) < sum(len(hosted.served.names) for hosted in models):
            got = [name for hosted in models for name in hosted.served.names]
            raise ConfigError("names of the served models", got=got, do="give at least one model, and each name once")
        if recorder is not None:
            recorder.reruns.hosts = self.names.values
        if self.storing is not None:
            self.storing.heard = self._voted
        self.metrics = Metrics()
        self._short, self._long = Entry(AT_ONCE), Entry(AT_ONCE)  # else a few long ones would be before all short ones

    def counted(self) -> Samples:
        """What this process counts of what it does: errors, and captured rows."""
        return self.metrics.samples() | ({} if self.recorder is None else self.recorder.samples())

    def _voted(self, vote: Vote) -> None:
        """What a canary on trial is judged by, too."""
        for hosted in self.models:
            if isinstance(hosted.client, Split) and (vote.rating is not None or vote.empty):
                hosted.client.voted(vote.id, vote.subject, vote.rating)

    def hosted(self, request: Request, name: str | None) -> Hosted:
        """The model that `request` asks for by `name`. Raises ModelNotFoundError."""
        hosted = self.models[0] if name is None else self.names.get(name)
        if hosted is None:
            raise ModelNotFoundError(
                f"model {(name or '')[:100]!r} does not exist", param="model", allowed=[*self.names]
            )
        access: Access = request.state.access
        access.served = hosted.served.parent or hosted.served.name
        hosted.held += 1
        access.holds.append(hosted)
        return hosted

    async def read_body(self, request: Request, kind: type[W]) -> W:
        """The request's body as `kind`. Raises MediaTypeError, or RequestError from `wire.parse`."""
        if self.recorder is not None and "stream" in kind.model_fields:
            self.recorder.refused(request.state.access)
        kind_given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind_given != "application/json":
            raise MediaTypeError("Content-Type", got=kind_given[:80], allowed="application/json")
        try:
            async with asyncio.timeout(BODY_SECONDS):
                data = await request.body()
        except TimeoutError:
            raise DeadlineError("the body did not arrive", do=f"send it within {BODY_SECONDS:g} s") from None
        except ClientDisconnect:
            raise ClientGone from None
        request.state.long = len(data) > SHORT_BODY or b"data:image" in data
        if len(data) <= SHORT_BODY:
            body, changes_nothing = _read(kind, data)
        else:
            body, changes_nothing = await self.prepared(request, partial(_read, kind, data))
        access: Access = request.state.access
        access.facts |= {
            "user": getattr(body, "user", None),
            "model": (getattr(body, "model", None) or "")[:100] or None,
        }
        access.unused = [name for name in changes_nothing if not self._is_used(name, body, access)]
        return body

    def _is_used(self, name: str, body: Wire, access: Access) -> bool:
        """Whether a field that changes nothing elsewhere does here, where texts are kept, or a policy knows the workload."""
        if not isinstance(body, ChatRequest):
            return False
        hosted = self.names.get(body.model)
        known = hosted.served.policy.workloads if hosted is not None and hosted.served.policy is not None else {}
        if name == "metadata" and body.metadata.get(WORKLOAD) in known:
            return True
        return name in ("store", "metadata") and bool(self._store_of(body, access))

    def _store_of(self, body: object, access: Access) -> Store | None:
        """What keeps the texts of a request and its answer; None unless it says so, and may."""
        if isinstance(body, (ChatRequest, ResponsesRequest)) and body.store and self.storing is not None:
            return partial(self.storing.store, access, body) if self.storing.may_store(access) else None
        return None

    async def prepared(self, request: Request, work: Callable[[], T]) -> T:
        """What `work` gives, in a thread, when it is the turn of who asks; the body must have been read. Raises ClientGone."""
        payer, of = _shares(request, request.state.access)
        entry = self._long if request.state.long else self._short
        return await entry.run(payer, of, request.receive, work)

    async def generated(
        self,
        request: Request,
        body: G,
        to_call: Callable[[G, ServedModel, Limits], EngineCall],
        kind: Callable[[EngineCall, ServedModel], Answer],
    ) -> Response:
        """The answer to `body`, in the form of `kind`: `to_call` makes its prompts in the caller's turn, and they run.
        Raises ModelNotFoundError, ClientGone, and what `to_call` and the engine raise."""
        hosted = self.hosted(request, body.model)
        access: Access = request.state.access

        def work() -> tuple[EngineCall, Answer, int]:
            call = to_call(body, hosted.served, self.limits).salted(hosted.cache_salt(access))
            size = 0 if self.recorder is None else self.recorder.bytes_of(call, hosted.served)
            return call, kind(call, hosted.served), size

        call, answer, prompt_bytes = await self.prepared(request, work)
        if self.recorder is not None:
            self.recorder.answered(access, body, call, answer, hosted.client, prompt_bytes)
        if self.storing is not None:
            self.storing.saw(access, answer.id)
        answer.store = self._store_of(body, access)
        client, note = hosted.client, Note()
        if isinstance(client, Split):
            note.conversation, note.id = _conversation(request, body, self.recorder) if client.trial else b"", answer.id
            note.person, note.api_key = access.person, "" if access.key is None else access.key.digest.hex()
            if self.recorder is not None:
                note.shadowed = partial(self.recorder.shadowed, access, call, answer)
            client = client.asked(note)
        return await self._answer(request, client, call, answer, note, stream=body.stream)

    async def _answer(
        self,
        request: Request,
        client: EngineClient,
        call: EngineCall,
        answer: Answer,
        note: Note,
        *,
        stream: bool,
    ) -> Response:
        """Runs `call` and sends `answer` whole or as a stream; a client that leaves cancels it at any point. `note` is filled
        meanwhile."""
        access: Access = request.state.access
        access.read(call.prompt_tokens)
        access.unused += call.unused
        payer, of = _shares(request, access)
        told = self.recorder is not None
        # each choice has a turn of its own
        requests = [
            replace(
                each,
                payer=payer,
                client=of,
                priority=access.priority,
                deadline=access.seconds_left or each.deadline,
                signals=told,
            )
            for each in call.requests
        ]
        events = _counted(gather(client, requests), call, access, note)
        if not stream:
            whole = await while_connected(request.receive, answer.whole(events))
            _tell_calls(answer, note)
            access.facts["depth"] = answer.depth()
            return await in_json(request, whole, _told_of(answer.depth(), note))
        chunks = answer.chunks(events)
        first = await while_connected(request.receive, anext(chunks))  # until here an error has its own status
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **_told_of(answer.early_depth(), note)}
        return Sent(self._guarded(first, chunks, answer, access, note), headers, access, "text/event-stream")

    async def embed(
        self, request: Request, client: EngineClient, ids: list[list[int]], depth: str | int
    ) -> tuple[list[list[float]], dict[str, str]]:
        """A vector for each of `ids`, and headers of the answer; a client that leaves ends it. Raises DeadlineError."""
        access: Access = request.state.access
        access.read(sum(map(len, ids)))
        payer, of = _shares(request, access)
        note = Note()
        client = client.asked(note) if isinstance(client, Split) else client

        async def vectors() -> list[list[float]]:
            async with asyncio.timeout(access.seconds_left or self.limits.seconds):
                return await client.embed(ids, depth, payer=payer, client=of, priority=access.priority)

        try:
            found = await while_connected(request.receive, vectors())
        except TimeoutError:
            raise DeadlineError("the request ran out of its time", do="send fewer inputs") from None
        access.facts |= note.facts()
        access.columns |= note.facts()
        return found, _told_of(None, note)

    def failed(self, error: Exception, access: Access) -> Response:
        """Any error as OpenAI's envelope with its status."""
        if isinstance(error, ClientGone):
            return Response(status_code=499)  # for the log; nobody is there to read it
        status, body = self._describe(error, access)
        headers = {"Retry-After": _retry_after(error)} if status in (429, 503) else {}
        if isinstance(error, EnginesLostError):
            headers["x-should-retry"] = "false"  # which clients of OpenAI and Anthropic heed
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return Response(dumps(body), status, headers, "application/json")

    async def _guarded(
        self, first: bytes, chunks: AsyncGenerator[bytes, None], answer: Answer, access: Access, note: Note
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(chunks):
            try:
                yield first
                async for chunk in chunks:
                    yield chunk
                _tell_calls(answer, note)
                access.facts["depth"] = answer.depth()
            except Exception as error:
                yield answer.failed(self._describe(error, access)[1])

    def _describe(self, error: Exception, access: Access) -> tuple[int, dict[str, Any]]:
        """The status and the envelope of an error, which is counted and noted in the request's log line."""
        if isinstance(error, RequestError):
            status, body = error.status, envelope(error.message, error.status, param=error.param, code=error.code)
        elif isinstance(error, ShoalError):
            log.error("request failed: %s", error)
            status, body = 500, envelope(error.message, 500, code="internal_error")
        else:  # a bug: its text may hold anything, the prompt too
            log.error("request failed\n%s", frames(error))
            status, body = 500, envelope("internal error; the server's log has the details", 500, code="internal_error")
        access.error = body["error"]["code"] or body["error"]["type"]
        access.facts["param"] = body["error"]["param"]
        self.metrics.failed(access.served, body["error"]["code"] or str(status))
        return status, errors.as_theirs(body, status, access.id) if errors.is_theirs(access.path) else body


def _read(kind: type[W], data: bytes) -> tuple[W, list[str]]:
    """A body, and the fields in it that change nothing."""
    body = parse(kind, data)
    return body, unused(body)


def _shares(request: Request, access: Access) -> tuple[str, str]:
    """Whose turn it is: a key's, and of it a user's; without keys an address's, since anybody can say another user. What may
    wait is counted apart: it costs the key's live requests no turn."""
    later = "later " if access.priority else ""
    if access.key is None:
        return later, request.client.host if request.client else ""
    return later + access.key.digest.hex()[:16], access.facts.get("user") or ""


def _tell_calls(answer: Answer, note: Note) -> None:
    """Tells a trial what became of the calls of tools in an answer that has ended, where it has one author."""
    if note.on_calls is not None and not note.resumed and (valid := answer.calls_valid()) is not None:
        note.on_calls(valid)


def _conversation(request: Request, body: object, recorder: Recorder | None = None) -> bytes:
    """What tells a chat from others, the same at each of its turns: who asks, and all up to the first thing that a user said;
    empty where `body` is no chat."""
    access: Access = request.state.access
    said = [*_shares(request, access)]
    if isinstance(body, ResponsesRequest):  # the turns before may be stored, with what tells their chat
        of = beginning(vars(body)) if recorder is None else recorder.conversation(access, body)
        known = access.columns.get("conversation") or of
        return "\0".join([*said, known]).encode("utf-8", "surrogatepass") if known else b""
    for message in getattr(body, "messages", ()):
        said.append(repr(_beginning(message))[:LONGEST_SAID])
        if getattr(message, "role", None) == "user":
            return "\0".join(said).encode("utf-8", "surrogatepass")
    return b""


def _beginning(value: Any) -> Any:
    """A message, or a part of one, without the ends of long texts: an image may be one of megabytes."""
    if isinstance(value, Wire):
        return [_beginning(each) for each in vars(value).values()]
    if isinstance(value, list):
        return [_beginning(each) for each in value[:LONGEST_SAID]]
    return value[:LONGEST_SAID] if isinstance(value, str) else value


def _told_of(depth: str | None, note: Note) -> dict[str, str]:
    """Headers of an answer: what is known of it when they are sent."""
    told = {"X-Shoal-Depth": depth, "X-Shoal-Version": note.version}
    return {name: value for name, value in told.items() if value}


async def _counted(events: Events, call: EngineCall, access: Access, note: Note) -> Events:
    """`events`, their tokens counted, and what `note` says kept for the log and the captured row. An error names a field of the
    body, where the engine has another name for it: the field that a grammar came from, and none for a deadline, which the
    server sets."""
    async with aclosing(events):
        try:
            async for index, ready in events:
                access.wrote(sum(isinstance(event, Token) for event in ready))
                access.ends += [(index, time.perf_counter(), end) for end in ready if isinstance(end, Finished)]
                yield index, ready
        except RequestError as error:
            error.param = {"guided": call.guided_by, "banned": "bad_words", "deadline": None}.get(
                error.param or "", error.param
            )
            raise
        finally:
            access.facts |= note.facts()
            access.columns |= note.facts()


def _retry_after(error: Exception) -> str:
    """Whole seconds for the header of that name: when a key's minute has room again; else a guess, from 1 to a minute."""
    seconds = max(1, math.ceil(getattr(error, "retry_after", None) or 0))
    return str(seconds if isinstance(error, RateLimitError) else min(60, seconds))
