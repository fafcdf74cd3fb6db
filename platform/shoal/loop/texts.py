"""Texts of requests that were to be stored: a file each, so that one is found, changed and deleted by itself.

    CAPTURE/texts/day=2026-11-27/chatcmpl-....json
        {"id", "at", "owner", "subject", "messages", "completion", "metadata", "scrubbed"}
    CAPTURE/texts/day=2026-11-27/resp_....json
        {"id", "at", "owner", "subject", "previous", "conversation", "items", "response", "scrubbed"}

A response has the items of its own turn alone, and the id of the one before it: each text lies in one place, and is gone when
that is.

Notable: personal data is taken out before the disk (`data.operators.pii`); `scrubbed` says how often, by kind, of the messages
and of the answer. What was written in another form stays: names and postal addresses do, always. A row whose answer was
scrubbed must not be trained on: the model would learn to say "[email]".
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from shoal.data.operators import pii
from shoal.errors import DataError, RequestError
from shoal.inputs.tools import written
from shoal.loop.capture import FORGOTTEN, TEXTS, Capture, append, day_of, now_ms
from shoal.machine import write_aside

PULL_SECONDS = 1.0
HEX = re.compile(r"[0-9a-f]{32}", re.ASCII)
Stored = dict[str, Any]


class Texts:
    """The chats that are stored in a capture."""

    prefix = "chatcmpl-"  # of their ids

    def __init__(
        self, capture: Capture, wall: Callable[[], int] = now_ms, added: Callable[[int], None] = lambda size: None
    ) -> None:
        """`added`: told of the bytes that are put on the disk."""
        self._capture, self._wall, self._added, self._pull_again = capture, wall, added, 0.0
        self._folder = capture.folder / TEXTS

    def put(
        self,
        owner: str,
        subject: str | None,
        messages: list[Any],
        completion: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> bool:
        """Store one, for `owner` alone to see; false of a `subject` that was forgotten. Raises OSError."""
        asked, answered = Counter[str](), Counter[str]()
        found = {
            "messages": _scrubbed(messages, asked),
            "completion": {**_worded(completion), "choices": _scrubbed(_worded(completion)["choices"], answered)},
            "metadata": _scrubbed(dict(metadata), asked),
            "scrubbed": {"messages": dict(asked), "answer": dict(answered)},
        }
        return self._write(completion["id"], owner, subject, found)

    def _write(self, id_: str, owner: str, subject: str | None, texts: Stored) -> bool:
        at = self._wall()
        found = {"id": id_, "at": at, "owner": owner, "subject": subject, **texts}
        if self._capture.forgotten().hides(found):
            return False
        folder = self._folder / f"day={day_of(at)}"
        self._folder.mkdir(exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        path, data = folder / f"{id_}.json", json.dumps(found) + "\n"
        write_aside(path, data)
        self._added(len(data))  # letters of ASCII
        if self._capture.forgotten().hides(found):  # by somebody who looked before it was there
            path.unlink(missing_ok=True)
            return False
        return True

    def get(self, owner: str, id_: str) -> Stored | None:
        """The one with this id, where `owner` has it, and nobody forgot it."""
        path = self._path(id_)
        found = None if path is None else _read(path)
        there = found is not None and found["owner"] == owner and not self._capture.forgotten().hides(found)
        return found if there else None

    def owner_of(self, id_: str) -> str | None:
        """Whose the one with this id is; None where there is none."""
        path = self._path(id_)
        found = None if path is None else _read(path)
        return None if found is None else str(found["owner"])

    def tag(self, owner: str, id_: str, metadata: Mapping[str, str]) -> Stored | None:
        """Give it this metadata in place of what it has; returns it. Raises OSError."""
        path, found = self._path(id_), self.get(owner, id_)
        if path is None or found is None:
            return None
        found["metadata"] = _scrubbed(dict(metadata), Counter())
        write_aside(path, json.dumps(found) + "\n")
        if self._capture.forgotten().hides(found):  # deleted meanwhile: what was written brought it back
            path.unlink(missing_ok=True)
            return None
        return found

    def delete(self, owner: str, id_: str) -> bool:
        """Delete it, and hide its row and all that was made of it from every reader; false where `owner` has none. Raises
        OSError."""
        path = self._path(id_)
        if path is None or self.get(owner, id_) is None:
            return False
        append(self._capture.folder / FORGOTTEN, {"id": id_, "at": self._wall()}, sync=True)
        path.unlink(missing_ok=True)
        return True

    def drop(self, id_: str) -> None:
        """Take back what was stored a moment ago: its row stays. Raises OSError."""
        if (path := self._path(id_)) is not None:
            path.unlink(missing_ok=True)

    def all(self, owner: str | None = None, *, newest: bool = False) -> Iterator[Stored]:
        """All that `owner` has [anybody], by the time at which they were stored; none that is forgotten."""
        forgotten = self._capture.forgotten()
        for day in sorted(self._capture.days(TEXTS), reverse=newest):
            some = [_read(path) for path in (self._folder / f"day={day}").glob(f"{self.prefix}*.json")]
            kept = [one for one in some if one is not None and not forgotten.hides(one)]
            for one in sorted(kept, key=lambda one: (one["at"], one["id"]), reverse=newest):
                if owner is None or one["owner"] == owner:
                    yield one

    def _path(self, id_: str) -> Path | None:
        if not (id_.startswith(self.prefix) and HEX.fullmatch(id_.removeprefix(self.prefix))):
            return None
        found = next(iter(self._folder.glob(f"day=*/{id_}.json")), None)
        # another machine may have stored it; who asks for what there is not has the bucket listed no more often than that
        if found is None and self._capture.bucket is not None and time.monotonic() > self._pull_again:
            self._pull_again = time.monotonic() + PULL_SECONDS
            with suppress(DataError):
                self._capture.bucket.pull("texts/", only=f"/{id_}.json")
            found = next(iter(self._folder.glob(f"day=*/{id_}.json")), None)
        return found


class Responses(Texts):
    """The responses that are stored in a capture."""

    prefix = "resp_"

    def put_response(
        self,
        owner: str,
        subject: str | None,
        items: list[Any],
        response: Mapping[str, Any],
        *,
        previous: str | None,
        conversation: str | None,
    ) -> bool:
        """As `put`: the `items` of this turn's input, and what was answered; `conversation` is that of the captured rows."""
        asked, answered = Counter[str](), Counter[str]()
        output = _scrubbed([_item_worded(item) for item in response["output"]], answered)
        found = {
            "previous": previous,
            "conversation": conversation,
            "items": _scrubbed(items, asked),
            "response": {**_scrubbed({**response, "output": []}, asked), "output": output},
            "scrubbed": {"messages": dict(asked), "answer": dict(answered)},
        }
        return self._write(response["id"], owner, subject, found)

    def back(self, owner: str, id_: str, most: int, most_items: int) -> Iterator[Stored | None]:
        """The response `id_`, the one before it, and so on to the first; None in place of one that is not there, or not of
        `owner`. Raises RequestError before more than `most` bytes are read, or than `most_items` items up to the answer of
        `id_`: each turn is a file, and thousands of tiny ones are few bytes."""
        size, items, name = 0, 0, id_
        while name is not None:
            found = self.get(owner, name)
            if found is None:
                yield None
                return
            size += len(json.dumps(found))
            items += len(found["items"]) + (len(found["response"]["output"]) if name != id_ else 0)
            do = "send the items that matter as `input`, without previous_response_id"
            if size > most:
                raise RequestError("the turns before are too long", got=f"{size} bytes", allowed=f"{most}", do=do)
            if items > most_items:
                what = "too many items with those of the turns before"
                raise RequestError(what, got=items, allowed=f"at most {most_items}", do=do)
            yield found
            name = found["previous"]


def clean(text: str, counts: Counter[str] | None = None) -> str:
    """`text` without personal data, as it may lie on the disk."""
    return pii.scrubbed(text, pii.ALL, Counter() if counts is None else counts)


def one_line(text: str) -> str:
    """`text` on one line, without what a terminal obeys: what a client says is printed where an operator watches."""
    return "".join(filter(str.isprintable, " ".join(text.split())))


def _worded(completion: Mapping[str, Any]) -> dict[str, Any]:
    """A completion without its tokens: a text that is cut into tokens, or told as ids, cannot be cleaned."""
    choices = [{name: None if name == "logprobs" else value for name, value in one.items() if name != "token_ids"}
               for one in completion["choices"]]  # fmt: skip
    kept = {name: value for name, value in completion.items() if name not in ("prompt_token_ids", "prompt_logprobs")}
    return kept | {"choices": choices}


def _item_worded(item: Mapping[str, Any]) -> dict[str, Any]:
    """As `_worded`, of an item of a response."""
    if "content" not in item:
        return dict(item)
    return {**item, "content": [{**part, "logprobs": []} for part in item["content"]]}


def _scrubbed(value: Any, counts: Counter[str]) -> Any:
    """`value`, JSON, with all of its texts clean."""
    if isinstance(value, str):
        return clean(value, counts)
    if isinstance(value, list):
        return [_scrubbed(each, counts) for each in _joined(value)]
    if not isinstance(value, dict):
        return value
    return _named(value, counts, lambda name, each: _arguments(each, counts)
                  if name == "arguments" and isinstance(each, str) else _scrubbed(each, counts))  # fmt: skip


def _named(value: dict[str, Any], counts: Counter[str], kept: Callable[[str, Any], Any]) -> dict[str, Any]:
    """What is `kept` of each of the values, by clean names: two that are one then are told apart by a number."""
    found = dict[str, Any]()
    for name, each in value.items():
        new = first = clean(name, counts)
        number = 2
        while new in found or (new != name and new in value):
            new, number = f"{first} {number}", number + 1
        found[new] = kept(name, each)
    return found


def _joined(parts: list[Any]) -> list[Any]:
    """The parts of a message; texts beside each other are one where it takes them together to see what must not stay: the model
    reads them as one."""
    found: list[Any] = []
    for is_text, run in groupby(parts, lambda part: isinstance(part, dict) and isinstance(part.get("text"), str)):
        some = [*run]
        texts = [part["text"] for part in some] if is_text else []
        apart = clean("".join(texts)) != "".join(map(clean, texts))
        found += [{**some[0], "text": "".join(texts)}] if apart else some
    return found


def _arguments(text: str, counts: Counter[str]) -> str:
    """The arguments of a call, clean, and JSON where they were JSON: a number that is somebody's becomes a text."""
    try:
        value = json.loads(text)
        kept = _clean_json(value, counts)
    except (ValueError, RecursionError):
        return clean(text, counts)
    return text if kept == value else written(kept)


def _clean_json(value: Any, counts: Counter[str]) -> Any:
    if isinstance(value, list):
        return [_clean_json(each, counts) for each in value]
    if isinstance(value, dict):
        return _named(value, counts, lambda name, each: _clean_json(each, counts))
    if isinstance(value, bool) or value is None:
        return value
    kept = clean(str(value), counts)
    return value if kept == str(value) else kept


def _read(path: Path) -> Stored | None:
    """None where it has just been deleted. Raises DataError for what nobody wrote here."""
    try:
        found: Stored = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError("capture", got=f"{path}: not JSON", do="move that file away") from error
    return found
