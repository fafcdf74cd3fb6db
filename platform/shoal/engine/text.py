"""Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.inputs.call_formats import Closing
from shoal.inputs.tokenizer import Tokenizer


class TextStream:
    """The text of one answer. What it gives out does not depend on how the text was cut into tokens: the answer ends
    where the first stop string becomes complete, and the stop string is part of it only with `keep`; or, with a `frame`, behind
    what closes what was opened."""

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), keep: bool = False, frame: tuple[str, str] | None = None
    ) -> None:
        self._decoder = tokenizer.stream()
        self._stop, self._keep = tuple(stop), keep
        self._frame = None if frame is None else _Frame(*frame)
        self._longest = max(map(len, self._stop), default=0)
        self._stopped = False
        self._held = ""  # the longest end of the text so far that a stop string begins with

    def push(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended the answer. With `may_stop` false (too few
        tokens yet) the text passes unsearched."""
        text, before, new = self._held, len(self._held), self._decoder.push(token)
        text, self._held = text + new, ""
        end = -1 if self._frame is None else self._frame.take(new)
        if not may_stop:
            return text, False
        return self._search(text, -1 if end < 0 else before + end)

    def finish(self) -> str:
        """The rest, once the answer has ended: what was held back, and U+FFFD for half a character, which completes no stop
        string any more; empty after one."""
        text, self._held = self._held + self._decoder.finish(), ""
        return "" if self._stopped else text

    def _search(self, text: str, framed: int) -> tuple[str, bool]:
        """`framed`: where in `text` what was opened is closed; -1: not in it."""
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop if stop in text]
        end, start = min(found, default=(len(text) + 1, 0))
        if 0 <= framed < end:
            self._stopped = True
            return text[:framed], True
        if found:
            self._stopped = True
            return text[: end if self._keep else start], True
        for size in range(min(len(text), self._longest - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self._stop):
                self._held = text[-size:]
                return text[:-size], False
        return text, False


class _Frame:
    """Looks for what opens JSON, and then for what closes it, which may be spelt in a text of that JSON."""

    def __init__(self, opens: str, closes: str) -> None:
        self._opens, self._closes = opens, closes
        self._text, self._opened = "", False  # what is looked at
        self._closing = Closing(closes)

    def take(self, text: str) -> int:
        """Where `text`, which comes next, has closed it; -1 where it has not."""
        before = len(self._text)
        self._text += text
        if not self._opened:
            at = self._text.find(self._opens)
            self._opened = at >= 0
            cut = at + len(self._opens) if self._opened else max(0, len(self._text) - len(self._opens) + 1)
            before, self._text = before - cut, self._text[cut:]
        if not self._opened:
            return -1
        end = self._closing.find(self._text)
        if end < 0:
            return -1
        end += len(self._closes)
        self._text, self._opened, self._closing = self._text[end:], False, Closing(self._closes)
        return end - before
