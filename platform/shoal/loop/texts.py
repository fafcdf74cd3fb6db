"""Texts of requests that were to be stored: a file each, so that one is found, changed and deleted by itself.

    CAPTURE/texts/day=2026-11-27/chatcmpl-....json
        {"id", "at", "owner", "subject", "messages", "completion", "metadata", "scrubbed"}

Notable: personal data is taken out before the disk (`data.operators.pii`); `scrubbed` says how often, by kind, of the messages
and of the answer. What was written in another form stays: names and postal addresses do, always. A row whose answer was
scrubbed must not be trained on: the model would learn to say "[email]".
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from shoal.data.operators import pii
from shoal.errors import DataError
from shoal.loop.capture import FORGOTTEN, TEXTS, Capture, append, day_of, now_ms
from shoal.machine import write_aside

ID = re.compile(r"chatcmpl-[0-9a-f]{32}", re.ASCII)
Stored = dict[str, Any]


class Texts:
    """What is stored in a capture."""

    def __init__(self, capture: Capture, wall: Callable[[], int] = now_ms) -> None:
        self._capture, self._wall = capture, wall
        self._folder = capture.folder / TEXTS

    def put(
        self,
        owner: str,
        subject: str | None,
        messages: list[Any],
        completion: Mapping[str, Any],
        metadata: Mapping[str, str],
    ) -> None:
        """Store one, for `owner` alone to see. Raises OSError."""
        at, asked, answered = self._wall(), Counter[str](), Counter[str]()
        found = {
            "id": completion["id"],
            "at": at,
            "owner": owner,
            "subject": subject,
            "messages": _scrubbed(messages, asked),
            "completion": {**_worded(completion), "choices": _scrubbed(_worded(completion)["choices"], answered)},
            "metadata": _scrubbed(dict(metadata), asked),
            "scrubbed": {"messages": dict(asked), "answer": dict(answered)},
        }
        folder = self._folder / f"day={day_of(at)}"
        self._folder.mkdir(exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
        write_aside(folder / f"{completion['id']}.json", json.dumps(found) + "\n")

    def get(self, owner: str, id_: str) -> Stored | None:
        """The one with this id, where `owner` has it."""
        path = self._path(id_)
        found = None if path is None else _read(path)
        return found if found is not None and found["owner"] == owner else None

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
        append(self._capture.folder / FORGOTTEN, {"id": id_, "at": self._wall()})
        path.unlink(missing_ok=True)
        return True

    def all(self, owner: str | None = None, *, newest: bool = False) -> Iterator[Stored]:
        """All that `owner` has [anybody], by the time at which they were stored; none that is forgotten."""
        forgotten = self._capture.forgotten()
        for day in sorted(self._capture.days(TEXTS), reverse=newest):
            some = [_read(path) for path in (self._folder / f"day={day}").glob("chatcmpl-*.json")]
            kept = [one for one in some if one is not None and not forgotten.hides(one)]
            for one in sorted(kept, key=lambda one: (one["at"], one["id"]), reverse=newest):
                if owner is None or one["owner"] == owner:
                    yield one

    def _path(self, id_: str) -> Path | None:
        if not ID.fullmatch(id_):
            return None
        return next(iter(self._folder.glob(f"day=*/{id_}.json")), None)


def clean(text: str, counts: Counter[str] | None = None) -> str:
    """`text` without personal data, as it may lie on the disk."""
    return pii.scrubbed(text, pii.ALL, Counter() if counts is None else counts)


def _worded(completion: Mapping[str, Any]) -> dict[str, Any]:
    """A completion without its tokens: a text that is cut into tokens, or told as ids, cannot be cleaned."""
    choices = [{name: None if name == "logprobs" else value for name, value in one.items() if name != "token_ids"}
               for one in completion["choices"]]  # fmt: skip
    kept = {name: value for name, value in completion.items() if name not in ("prompt_token_ids", "prompt_logprobs")}
    return kept | {"choices": choices}


def _scrubbed(value: Any, counts: Counter[str]) -> Any:
    """`value`, JSON, with all of its texts clean."""
    if isinstance(value, str):
        return clean(value, counts)
    if isinstance(value, list):
        return [_scrubbed(each, counts) for each in _joined(value)]
    return (
        {clean(name, counts): _scrubbed(each, counts) for name, each in value.items()}
        if isinstance(value, dict)
        else value
    )


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


def _read(path: Path) -> Stored | None:
    """None where it has just been deleted. Raises DataError for what nobody wrote here."""
    try:
        found: Stored = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DataError("capture", got=f"{path}: not JSON", do="move that file away") from error
    return found
