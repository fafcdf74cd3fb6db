"""Questions that nobody may be trained on: what a suite asks, or a cut holds out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.data.chats.augment import asked_about
from shoal.data.chats.rows import lines
from shoal.data.operators.decontaminate import GRAM, LEAST
from shoal.data.operators.grams import grams, words
from shoal.errors import DataError
from shoal.loop import suites


@dataclass
class Asked:
    """Questions that nobody may be trained on: what a suite or a held-out file asks."""

    whole: set[str] = field(default_factory=set)
    turns: set[str] = field(default_factory=set)  # of talks of several: nobody else asks one of them alone
    runs: dict[int, set[int]] = field(default_factory=dict)  # words in a run -> hashes

    def add(self, messages: Sequence[Mapping[str, Any]]) -> None:
        self.whole.add(asked_about(list(messages)))  # type: ignore[arg-type]
        self.turns.update(asked_about([one]) for one in messages if one.get("role") == "user")  # type: ignore[list-item]
        found = words(user(messages))
        if len(found) >= LEAST:
            size = min(GRAM, len(found))
            self.runs.setdefault(size, set()).update(grams(found, size).tolist())

    def holds(self, messages: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these ask it, all together or in one of their turns."""
        turns = [[message] for message in messages if message.get("role") == "user"]
        if len(turns) == 1 and asked_about(turns[0]) in self.turns:  # type: ignore[arg-type]
            return True
        if any(asked_about(list(some)) in self.whole for some in (messages, *turns)):  # type: ignore[arg-type]
            return True
        found = words(user(messages))
        return any(not known.isdisjoint(grams(found, size).tolist()) for size, known in self.runs.items())


def forbidden(folder: Path | None, files: Iterable[Path] = ()) -> Asked:
    """What the frozen suites in `folder`, and these files of chats, ask. Raises DataError for what cannot be read."""
    paths = [folder / suite.file for suite in suites.read(folder)] if folder is not None else []
    found = Asked()
    for path in [*paths, *files]:
        for line in lines(path):
            with chats_of(path):
                found.add(asked_in(json.loads(line)))
    return found


def asks(row: Mapping[str, Any], apart: Sequence[Asked]) -> bool:
    """Whether a chat asks what is in any of these."""
    return any(some.holds(asked_in(row)) for some in apart)


def asked_in(row: Mapping[str, Any]) -> list[Any]:
    """The messages of a chat that are none of the model's."""
    return [one for one in row["messages"] if one.get("role") != "assistant"]


@contextmanager
def chats_of(path: Path) -> Iterator[None]:
    """Raises DataError for a row of `path`, read in this block, that is none."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} holds a row that is no chat", got=str(error), do="mend it") from error


def user(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user said, in order."""
    said = (message.get("content") for message in messages if message.get("role") == "user")
    return "\n".join(text for text in said if isinstance(text, str))
