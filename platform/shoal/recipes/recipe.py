"""What a recipe is made of: the frame (`run`, `measure`) does the rest, the same for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import Preset
from shoal.evaluate.intervals import Figure

Row = Mapping[str, Any]  # a line of a suite: messages, of which the last is the reference, task, group
Messages = Sequence[dict[str, Any]]
# conversations so far -> the assistant's next answers, with calls as a model writes them
Answerer = Callable[[Sequence[Messages]], list[str]]

DEV = "dev.jsonl"  # held-out rows that the router is fitted to
SUITES = "suites"  # folder of frozen suites, as `shoal gate` takes it


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

    @abstractmethod
    def write(self, folder: Path, seed: int) -> None:
        """Write the lessons, `DEV`, and the files of `SUITES`."""

    @abstractmethod
    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        """What stands beside the model: by name, who answers without one."""

    @abstractmethod
    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        """The measures of answers to rows."""

    def play(self, rows: Sequence[Row], answerer: Answerer, seed: int) -> dict[str, Figure]:
        """The measures of whole conversations, of which `rows` are the last; none where a recipe has no such thing."""
        return {}
