"""Answers beside each other: all of them come, in turn or together, and none is left running."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from ui.compare import beside
from ui.talk import Said

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Source:
    def __init__(self, words: str, log: list[str], fails: bool = False) -> None:
        self.words, self.log, self.fails, self.open = words, log, fails, False

    async def stream(self) -> AsyncGenerator[Said, None]:
        self.open = True
        try:
            for end in range(1, len(self.words) + 1):
                await asyncio.sleep(0)
                self.log.append(self.words[end - 1])
                yield Said(self.words[:end])
            if self.fails:
                raise RuntimeError("lost")
        finally:
            self.open = False


async def test_together_they_alternate_and_all_end_complete() -> None:
    log: list[str] = []
    sources = [Source("aaa", log), Source("bbbbb", log)]
    states = [now async for now in beside([s.stream() for s in sources], together=True)]
    assert [said and said.text for said in states[-1]] == ["aaa", "bbbbb"]
    assert "".join(log).index("b") < 2, "the second does not wait for the first"


@pytest.mark.parametrize("together", [True, False])
async def test_a_page_that_takes_its_time_sees_the_last_words(together: bool) -> None:
    seen = None
    async for now in beside([Source(word, []).stream() for word in ("aaa", "bb")], together=together):
        seen = now
        await asyncio.sleep(0.01)  # meanwhile both streams come to their ends
    assert seen == [Said("aaa"), Said("bb")]


async def test_in_turn_the_second_begins_when_the_first_has_ended() -> None:
    log: list[str] = []
    sources = [Source("aaa", log), Source("bb", log)]
    states = [now async for now in beside([s.stream() for s in sources], together=False)]
    assert "".join(log) == "aaabb"
    assert states[0] == [Said("a"), None] and states[-1] == [Said("aaa"), Said("bb")]


@pytest.mark.parametrize("together", [True, False])
async def test_closing_it_closes_every_stream(together: bool) -> None:
    sources = [Source("a" * 1000, []), Source("b" * 1000, [])]
    running = beside([s.stream() for s in sources], together=together)
    async for _ in running:
        break
    await running.aclose()
    assert not any(source.open for source in sources)


async def test_an_error_of_one_is_raised_and_the_others_are_closed() -> None:
    sources = [Source("a", [], fails=True), Source("b" * 1000, [])]
    with pytest.raises(RuntimeError, match="lost"):
        async for _ in beside([s.stream() for s in sources], together=True):
            pass
    assert not sources[1].open
