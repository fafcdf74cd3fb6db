"""The tasks that a corpus is made by. Each result is kept in the work folder by a digest of what it follows from (`data.kept`),
so that a run that was killed goes on where it was; a task gets a few numbers and gives counts, whatever the corpus holds.
What files are called follows from these numbers in each process, since each machine has a folder of its own where the corpus is
made in S3 (`data.place`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from shoal.config import ModelConfig, dump
from shoal.data import identities, parts
from shoal.data.chats.recipes import ASKED, CHATS, FILES, write_chats
from shoal.data.identities import DROPPED, Drops, Side
from shoal.data.kept import digest, kept
from shoal.data.operators import decontaminate, near
from shoal.data.operators.decontaminate import Known, Runs
from shoal.data.operators.near import SIGNATURES
from shoal.data.operators.pipeline import Operators, Pipeline
from shoal.data.parts import Found, Packed
from shoal.data.place import put
from shoal.data.sources.files import File
from shoal.data.tables import Parts, Span, spans
from shoal.inputs.tokenizer import Tokenizer

TASKS_OF_BANDS = 8  # that find candidates for near copies, of each span of keys


@dataclass(frozen=True)
class Evaluation:
    """What evaluation sets hold, found by tasks: `collect` for each part of their files, then `merge` for each span."""

    places: Parts
    key: str  # of the files, and of the code

    def collect(self, number: int, files: Sequence[File]) -> Runs:
        """`decontaminate.collect`, unless it is done."""
        path = self._part(number)

        def find() -> Runs:
            return decontaminate.collect(files, path)

        def made(found: Runs) -> list[Path]:
            return [decontaminate.table_of(path, table) for table in range(found.tables)]

        return kept(path.with_suffix(".json"), digest(self.key, number), Runs, find, made)

    def merge(self, span: Span, tables: Sequence[int]) -> int:
        """`decontaminate.merge`, unless it is done. `tables`: how many each part has."""
        out = self.span(span.number)

        def find() -> int:
            some = ((part, table) for part, count in enumerate(tables) for table in range(count))
            return decontaminate.merge(
                (decontaminate.table_of(self._part(part), table) for part, table in some), span, out
            )

        key = digest(self.key, list(tables), span.number, span.count)
        return kept(out.with_suffix(".json"), key, int, find, lambda _: [out])

    def _part(self, number: int) -> Path:
        return self.places.folder / f"sets-{number:05}.part"

    def span(self, number: int) -> Path:
        """The table of a span."""
        return self.places.folder / f"known-{number:05}.runs"


@dataclass(frozen=True)
class Sets:
    """What a reader takes of evaluation sets: where, in how many spans, and how many words runs have."""

    evaluation: Evaluation
    spans: int
    lengths: tuple[int, ...]

    @property
    def known(self) -> Known:
        """Where it lies on this machine."""
        return Known(tuple(map(self.evaluation.span, range(self.spans))), self.lengths)


class Reader:
    """`parts.read_part`, unless it is done. What its operators hold, a model or `sets`, each process loads once."""

    def __init__(self, operators: Operators, places: Parts, seed: int, sets: Sets | None = None) -> None:
        self._operators, self._places, self._seed, self._sets = operators, places, seed, sets
        self.holds_state = bool(operators.languages or operators.evaluation)

    @cached_property
    def _pipeline(self) -> Pipeline:
        return Pipeline(self._operators, self._sets.known if self._sets is not None else None)

    def __call__(self, files: Sequence[File], number: int, key: str) -> Found:
        path, near_copies = self._places[number], self._operators.near_dedup
        made = [path, *identities.tables_of(path), *([path.with_suffix(SIGNATURES)] if near_copies else [])]

        def read() -> Found:
            return parts.read_part(files, path, self._pipeline, seed=self._seed, near_copies=near_copies)

        def holds(found: Found) -> bool:
            return found.holds(files)

        return kept(path.with_suffix(".read.json"), key, Found, read, lambda _: made, holds)


@dataclass(frozen=True)
class Decision:
    """What is decided over all documents, see `identities`: the tasks of it, and where each leaves what it found."""

    parts: Parts
    key: str  # of all that was read
    operators: Operators
    documents: int

    @property
    def spans(self) -> list[Span]:
        return spans(self.documents)

    @property
    def looks(self) -> list[tuple[str, Span, range | None]]:
        """Jobs of `look`."""
        equals = [(place.name, span, None) for place, span in zip(self._equals, self.spans, strict=False)]
        bands = [(span, some) for span in self.spans for some in near.shares(TASKS_OF_BANDS)]
        return equals + [(place.name, span, some) for place, (span, some) in zip(self._pairs, bands, strict=False)]

    def look(self, name: str, span: Span, bands: range | None) -> int:
        """`identities.equal`, or of some bands `near.candidates`, unless it is done."""
        place = self.parts.folder / name

        def find() -> int:
            if bands is None:
                return identities.equal(self.parts, span, place)
            return near.candidates(self.parts, bands, span, place)

        return kept(place.with_suffix(".json"), self.key, int, find, lambda _: [place])

    def settle(self, number: int) -> Drops:
        """`identities.settle`, unless it is done."""
        path = self.parts[number]

        def settle() -> Drops:
            return identities.settle(self.parts, number, self._equals, self._pairs)

        return kept(path.with_suffix(".settle.json"), self.key, Drops, settle, lambda _: [path.with_suffix(DROPPED)])

    def hold_out(self, span: Span) -> list[Side]:
        """`identities.hold_out`, unless it is done."""
        place = self._places("heldout")[span.number]

        def draw() -> list[Side]:
            return identities.hold_out(self.parts, span, place)

        return kept(place.with_suffix(".json"), self.key, list[Side], draw, lambda _: [place])

    def splits(self, number: int, besides: Sequence[int]) -> list[str | None]:
        """`identities.splits`."""
        return identities.splits(self.parts, number, self._places("heldout"), besides)

    @property
    def _equals(self) -> list[Path]:
        return self._places("equal") if self.operators.dedup else []

    @property
    def _pairs(self) -> list[Path]:
        return self._places("pairs", TASKS_OF_BANDS) if self.operators.near_dedup else []

    def _places(self, name: str, times: int = 1) -> list[Path]:
        return [self.parts.folder / f"{name}-{number:05}.table" for number in range(times * len(self.spans))]


def fit_whole(decision: Decision, besides: Sequence[int], vocab: int) -> str:
    """A tokenizer's JSON, fitted to `parts.sample`, unless it is done."""

    def fit() -> str:
        of = [decision.splits(number, besides) for number in range(len(decision.parts))]
        return Tokenizer.train(parts.sample(decision.parts, of), vocab).json

    key = digest(decision.key, list(besides), vocab)
    return kept(decision.parts.folder / "tokenizer.json", key, str, fit, lambda _: [])


def draw(decision: Decision, number: int, besides: Sequence[int], shares: Mapping[str, float], seed: int) -> int:
    """`parts.draw_sample`, unless it is done; bytes."""
    path = decision.parts[number]
    out = path.with_suffix(".sample")

    def sample() -> int:
        return parts.draw_sample(path, decision.splits(number, besides), shares, seed, out).total()

    key = digest(decision.key, list(besides), dict(shares), seed)
    return kept(path.with_suffix(".sample.json"), key, int, sample, lambda _: [out])


def fit_drawn(decision: Decision, vocab: int, key: str) -> str:
    """A tokenizer's JSON, fitted to what `draw` left, unless it is done."""

    def fit() -> str:
        return Tokenizer.train(parts.sampled(path.with_suffix(".sample") for path in decision.parts), vocab).json

    return kept(decision.parts.folder / "tokenizer.json", digest(key, vocab), str, fit, lambda _: [])


def pack(decision: Decision, number: int, besides: Sequence[int], model: ModelConfig, seed: int, key: str) -> Packed:
    """`parts.pack_part`, unless it is done. `key`: what it follows from, but the splits."""
    path, of = decision.parts[number], decision.splits(number, besides)
    out = decision.parts.folder.parent

    def pack() -> Packed:
        return parts.pack_part(path, of, out, model, number, seed)

    def made(part: Packed) -> list[Path]:
        return [*(out / shard.file for shard in part.shards), *(path.with_suffix(suffix) for suffix in (CHATS, ASKED))]

    return kept(path.with_suffix(".pack.json"), digest(key, of, dump(model), seed), Packed, pack, made)


def chat_files(places: Parts, besides: Sequence[str]) -> dict[str, dict[str, int]]:
    """`recipes.write_chats` of all parts, and of what was saved `besides` under names in the work folder."""
    out = places.folder.parent
    counts = write_chats([*places, *(places.folder / name for name in besides)], out)
    for name in (FILES[split] for split in counts):
        put(out / name)
    return counts
