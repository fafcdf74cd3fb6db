"""What of a request is kept in words: its texts where three allow it, and votes on its answer.

A text is kept where the operator (``--capture-texts``), the key (``texts=yes``; without keys everybody's) and the request
(``store: true``) allow it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from shoal.api.access import Access
from shoal.api.answers import Answer
from shoal.api.bodies import ChatRequest, Metadata
from shoal.api.capture import Recorder
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.responses.items import kept_items
from shoal.api.wire import NotFoundError, Wire
from shoal.errors import RequestError
from shoal.loop.texts import Responses, Texts
from shoal.loop.votes import Vote, Votes

T = TypeVar("T")
STORE_SECONDS = 5.0  # that the end of an answer waits for its text to be stored
LOOKS, LOOK_SECONDS = 4, 0.25  # for the row of an answer that is voted on as soon as it is read, at another gateway


class FeedbackRequest(Wire):
    id: str = Field(pattern=r"^[!-~]{1,100}$", description="of the answer")
    rating: Literal["up", "down"] | None = Field(None, description="without any of these four a vote is withdrawn")
    score: float | None = Field(None, ge=-1, le=1, description="from -1 to 1")
    correction: str | None = Field(None, min_length=1, max_length=2**16, description="the better answer")
    comment: str | None = Field(None, min_length=1, max_length=2**12)
    user: str | None = Field(None, max_length=256, description="who says so, as in the request that was answered")
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"id": "chatcmpl-0123456789abcdef0123456789abcdef", "rating": "up"}]}
    )


class StoredUpdate(Wire):
    metadata: Metadata = Field(
        max_length=16, description="in place of what is there; `rating` up or down is a vote too"
    )
    model_config = ConfigDict(json_schema_extra={"examples": [{"metadata": {"rating": "up"}}]})


class Storing:
    """What the routes have of one capture."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        added = recorder.outbox.add
        self.texts, self.votes = Texts(recorder.capture, added=added), Votes(recorder.capture)
        self.responses = Responses(recorder.capture, added=added)
        self.counts = recorder.feedback
        self.heard: Callable[[Vote], None] = lambda vote: None  # told of each vote that is kept

    def may_store(self, access: Access) -> bool:
        """Whether operator and key allow texts."""
        return self._recorder.given.texts and (access.key is None or access.key.texts)

    @property
    def texts_days(self) -> int:
        """For how long texts are kept."""
        return self._recorder.given.texts_days

    def owner(self, access: Access) -> str:
        """Whose texts a request sees."""
        return self._recorder.subject(None if access.key is None else access.key.name, None) or ""

    def voter(self, access: Access, user: str | None) -> str | None:
        """Who votes."""
        return self._recorder.subject(None if access.key is None else access.key.name, user)

    def saw(self, access: Access, id_: str) -> None:
        """An answer of this id is being given to who asks."""
        self.votes.saw(id_, self.voter(access, access.facts.get("user")))

    async def need_own(self, access: Access, id_: str) -> None:
        """Raises NotFoundError for an answer whose text is stored for another key: a model may be trained on what is said of
        it."""
        of = self.responses if id_.startswith(Responses.prefix) else self.texts
        owner = await kept(partial(of.owner_of, id_))
        if owner not in (None, self.owner(access)):
            raise _unknown(id_)

    async def store(self, access: Access, body: ChatRequest | ResponsesRequest, answer: Answer) -> bool:
        """Keep the texts of an answer that is complete, and whether that was done; one that cannot be kept is counted, and its
        row says so."""
        if self._recorder.outbox.full:
            self._recorder.outbox.drop("bound", "as much is kept as may be, and texts are not stored")
            return False
        put = self._chat if isinstance(body, ChatRequest) else self._response
        said, one = list[bool](), threading.Lock()

        def work() -> bool:
            whole = answer.complete()
            stored = put(access, body, whole)  # type: ignore[arg-type]
            with one:  # who comes first says whether it is stored
                in_time = not said
                said.append(stored)
            if stored and not in_time:  # its answer has said that it is not
                (self.texts if put == self._chat else self.responses).drop(whole["id"])
            return stored

        try:
            async with asyncio.timeout(STORE_SECONDS):
                stored = await asyncio.to_thread(work)
        except (OSError, TimeoutError):
            with one:
                stored = bool(said and said[0])  # done when the time was over already
                said.append(False)
            if not stored:
                self._recorder.outbox.drop("texts")
                return False
        if stored:
            access.columns["stored"] = True
        return stored

    def _chat(self, access: Access, body: ChatRequest, answer: dict[str, Any]) -> bool:
        messages = [_plain(message.model_dump(mode="json", exclude_unset=True)) for message in body.messages]
        whose = self.voter(access, body.user)
        return self.texts.put(self.owner(access), whose, messages, answer, body.metadata)

    def _response(self, access: Access, body: ResponsesRequest, answer: dict[str, Any]) -> bool:
        talk = access.columns.get("conversation") or self._recorder.conversation(access, body)
        return self.responses.put_response(
            self.owner(access),
            self.voter(access, body.user),
            kept_items(body, answer["id"]),
            answer,
            previous=body.previous_response_id,
            conversation=talk,
        )

    async def vote(self, vote: Vote) -> None:
        """Raises NotFoundError for an answer that nobody captured, RequestError where no more may be kept."""
        if self._recorder.outbox.full:
            raise _no_room("as much is kept as may be", "wait until the oldest day goes")
        known = await asyncio.to_thread(self.votes.knows, vote.id)
        for _ in range(LOOKS):
            if known:
                break
            await asyncio.sleep(LOOK_SECONDS)
            known = await asyncio.to_thread(self.votes.comes, vote.id)
        if not known:
            raise _unknown(vote.id)
        await kept(partial(self.votes.put, vote))
        self._recorder.outbox.add(sum(len(text or "") for text in (vote.id, vote.correction, vote.comment)))
        self.counts[vote.rating or ("none" if vote.empty else "text")] += 1
        self.heard(vote)


def _unknown(id_: str) -> NotFoundError:
    do = "give the id of an answer that this service captured"
    return NotFoundError("no such answer", param="id", got=id_[:100], do=do)


async def kept(work: Callable[[], T]) -> T:
    """What `work` gives, in a thread. Raises RequestError where the disk does not take it."""
    try:
        return await asyncio.to_thread(work)
    except OSError as error:
        raise _no_room(error.strerror, "make room on the server's disk") from error


def _no_room(got: str | None, do: str) -> RequestError:
    refusal = RequestError("the capture cannot be written", got=got, do=do)
    refusal.status, refusal.code = 507, "no_room"
    return refusal


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message without its images, which are not kept."""
    if isinstance(message.get("content"), list):
        parts = [
            part if part.get("type") == "text" else {"type": "text", "text": "[image]"} for part in message["content"]
        ]
        message["content"] = parts
    return message
