"""Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.inputs.tokenizer import Tokenizer


class TextStream:
    """The text of one answer. What it gives out does not depend on how the text was cut into tokens: the answer ends
    where the first stop string becomes complete, and the stop string is part of it only with `keep`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), keep: bool = False) -> None:
        self._decoder = tokenizer.stream()
        self._stop, self._keep = tuple(stop), keep
        self._longest = max(map(len, self._stop), default=0)
        self._stopped = False
        self._held = ""  # the longest end of the text so far that a stop string begins with

    def push(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended the answer. With `may_stop` false (too few
        tokens yet) the text passes unsearched."""
        text = self._held + self._decoder.push(token)
        self._held = ""
        if not may_stop:
            return text, False
        return self._search(text)

    def finish(self) -> str:
        """The rest, once the answer has ended: what was held back, and U+FFFD for half a character, which completes no stop
        string any more; empty after one."""
        text, self._held = self._held + self._decoder.finish(), ""
        return "" if self._stopped else text

    def _search(self, text: str) -> tuple[str, bool]:
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        if found:
            self._stopped = True
            end, start = min(found)
            return text[: end if self._keep else start], True
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                self._held = text[-size:]
                return text[:-size], False
        return text, False
