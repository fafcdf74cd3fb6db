"""What a recipe is made of: the frame (`run`, `measure`) does the rest, the same for each."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.api.policy import Policy
from shoal.config import Preset
from shoal.engine.events import Guide
from shoal.evaluate.intervals import Figure
from shoal.machine import write_aside

Row = Mapping[str, Any]  # a line of a suite: messages, of which the last is the reference, task, group
Messages = Sequence[dict[str, Any]]
# conversations so far -> the assistant's next answers, with calls as a model writes them
Answerer = Callable[[Sequence[Messages]], list[str]]

DEV = "dev.jsonl"  # held-out rows that the router is fitted to
SUITES = "suites"  # folder of frozen suites, as `shoal gate` takes it
CALIBRATION = "calibration error"  # measure of models: a rule does not say how sure it is
POLICY = "policy.yaml"  # what `shoal serve --policy` is to read, written last


@dataclass(frozen=True)
class Lesson:
    """A file to learn from, and the share of the minutes."""

    file: str
    share: float


class Recipe(ABC):
    """An application: data by seed, a model's shape, how it is measured and what beside."""

    name: str
    told: str  # in a sentence
    preset: Preset  # of a model that is trained from nothing
    lessons: tuple[Lesson, ...]  # in order; an imported model learns from the last alone
    most_tokens: int  # of an answer
    measures: tuple[str, ...]
    least_is_best: tuple[str, ...] = ()
    served: str  # the measure by which depths are compared
    # of a suite, so many answers are asked of an imported model: it is a hundred times the size, and as much slower
    # (decision 0033)
    open_rows = 100
    # suites in wordings that nobody learned from, each with the measures that say most
    headline: tuple[tuple[str, tuple[str, ...]], ...] = ()
    always_full: tuple[str, ...] = ()  # workloads whose depth is full, whatever is measured

    @abstractmethod
    def write(self, folder: Path, seed: int) -> None:
        """Write the lessons, `DEV`, and the files of `SUITES`."""

    @abstractmethod
    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        """What stands beside the model: by name, who answers without one."""

    @abstractmethod
    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        """The measures of answers to rows."""

    def score_alone(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        """The same of answers as the model gave them, where `score` measures what a rule of the service made of them."""
        return self.score(rows, answers)

    @abstractmethod
    def rights(self, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        """Of each answer whether it is right: what the model's own probability of it is held against."""

    def source(self) -> str:
        """A digest of what the data are made of beside the seed; empty where Shoal itself makes them."""
        return ""

    def guide(self, messages: Messages) -> Guide | None:
        """What the answer to a conversation must be, as a service would guide it; None: words."""
        return None

    def workload(self, row: Row) -> str:
        """What a row is of, for depth by workload."""
        return self.name

    def policy(self) -> Policy:
        """What is served with the model, the words of its page among it: those that it was taught. Depths by workload are put
        to it as they are measured."""
        return Policy()

    def examples(self) -> Sequence[Messages]:
        """Conversations whose answers the report shows, good or bad."""
        return ()

    def shown(self, messages: Messages, answerer: Answerer) -> str:
        """What the report shows of the answer to an example: as it is served, with what came of it."""
        return answerer([messages])[0]

    def play(self, rows: Sequence[Row], answerer: Answerer, seed: int) -> dict[str, Figure]:
        """The measures of whole conversations, of which `rows` are the last; none where a recipe has no such thing."""
        return {}


def conversation(row: Row) -> str:
    """Which conversation a row is of: its group, unless it names another."""
    return str(row.get("conversation", row["group"]))


def conversations_of(rows: Sequence[Row]) -> list[object]:
    """Of each row which conversation it is of: one of its own, unless it names one. A group says what is not independent."""
    return [row.get("conversation", at) for at, row in enumerate(rows)]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write a file of rows, a line each, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
