"""An answer as blocks, one after the other: stretches of text, and calls. So the Messages and the Responses API send one.

Notable: a whole answer is what a stream would have sent, put together; the two protocols differ in how they write a block's
beginning, its pieces and its end.
"""

from __future__ import annotations

import uuid
from abc import abstractmethod
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from shoal.api.answers import Answer
from shoal.api.calls import Delta
from shoal.api.client import Events
from shoal.api.json_text import paced, spread
from shoal.engine.events import Event, Finished, TokenLogprob

Moment = Literal["opened", "more", "closed"]


@dataclass
class Block:
    """`text` so far, or the arguments of a call of the function `name` so far."""

    index: int
    call: str | None = None  # its id
    name: str = ""
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the tokens of a text, where they are asked for
    told: int = 0  # of them, to a stream


class Blocks:
    """The blocks of one answer, made of its deltas."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self.held: list[TokenLogprob] = []  # of tokens whose text has not come yet

    def take(self, deltas: Iterable[Delta]) -> Iterator[tuple[Moment, Block, str]]:
        """What becomes of the blocks: one opens, has more text, closes before the next."""
        for delta in deltas:
            if delta.get("content"):
                if not self.all or self.all[-1].call is not None:
                    yield from self._open(Block(len(self.all)))
                yield self._more(delta["content"])
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    yield from self._open(Block(len(self.all), call["id"], call["function"]["name"]))
                if call["function"]["arguments"]:
                    yield self._more(call["function"]["arguments"])

    def end(self) -> Iterator[tuple[Moment, Block, str]]:
        """The last one closes; an answer of nothing is an empty text."""
        if not self.all:
            yield from self._open(Block(0))
        yield "closed", self.all[-1], ""

    def _open(self, block: Block) -> Iterator[tuple[Moment, Block, str]]:
        if self.all:
            yield "closed", self.all[-1], ""
        self.all.append(block)
        yield "opened", block, ""

    def _more(self, text: str) -> tuple[Moment, Block, str]:
        self.all[-1].text += text
        self.all[-1].logprobs += [] if self.all[-1].call is not None else self.held
        self.held = []
        return "more", self.all[-1], text


class BlockAnswer(Answer):
    """One choice, sent as the events of its blocks."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.blocks = Blocks()
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"

    async def whole(self, events: Events) -> dict[str, Any]:
        """The complete answer."""
        async with aclosing(self.chunks(events)) as chunks:
            async for _ in chunks:
                pass
        return self._whole()

    async def chunks(self, events: Events) -> AsyncGenerator[bytes, None]:
        """As of `Answer`."""
        (choice,), begun = self.choices, False
        async with aclosing(events):
            async for _, ready in events:
                choice.depth = ready[0].depth
                sent = [part async for part in paced(self._sent(ready, begun))]
                begun = True
                if choice.finished is not None:
                    await self.ended()
                    end = [part async for part in paced(self._end())]
                    sent[-1:] = [b"".join((*sent[-1:], end[0])), *end[1:]]
                async for part in spread(sent):
                    yield part

    def _sent(self, ready: Iterable[Event], begun: bool) -> Iterator[bytes]:
        (choice,) = self.choices
        if not begun:
            yield from self._begin()
        for event in ready:
            known = len(choice.logprobs)
            deltas = choice.take(event)
            self.blocks.held += [entry for entry, _ in choice.logprobs[known:]]
            for moment in self.blocks.take(deltas):
                yield from self._block(*moment)
            if isinstance(event, Finished):
                for moment in self.blocks.end():
                    yield from self._block(*moment)

    @abstractmethod
    def _begin(self) -> Iterator[bytes]:
        """The events before the first block."""

    @abstractmethod
    def _block(self, moment: Moment, block: Block, text: str) -> Iterator[bytes]:
        """The events of what became of a block; `text` is what it has more."""

    @abstractmethod
    def _end(self) -> Iterator[bytes]:
        """The events after the last block."""
