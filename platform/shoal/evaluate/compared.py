"""The pieces that `evaluation.compare` consists of: what each does with a model, and how the parts of one figure are put
together. Rows of a modality and questions of a task are cut into parts of one size, so that no figure depends on who
measures.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.data.chats.heldout import Question
from shoal.data.models import here
from shoal.data.remote import local
from shoal.data.shards import open_index, token_bytes
from shoal.engine.engine import Engine
from shoal.evaluate import measures
from shoal.evaluate.answering import decode_speed, gates, generate, interleaved_speed, machine
from shoal.evaluate.int8_cost import int8_cost
from shoal.evaluate.intervals import Figure
from shoal.evaluate.measures import Answer, HeldoutRows, Sums
from shoal.evaluate.pieces import Models, Piece, Run
from shoal.evaluate.prompts import Prompts, together
from shoal.evaluate.routing import asked_gaps, heldout_sides
from shoal.evaluate.texts import modalities, rows_of
from shoal.inputs.chat import Encoded
from shoal.model import files
from shoal.model.described import Described

ROWS = 128  # packed rows of a piece
PROMPTS = 64  # questions of a piece
Tell = Callable[[str, int, int], None]  # what, done, total


@dataclass
class Todo:
    """Pieces, each with what it is called; and what came of them, once they are done."""

    pieces: list[Piece] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    found: list[Any] = field(default_factory=list)

    def all(self, name: str, pieces: Sequence[Piece]) -> Callable[[], list[Any]]:
        """What comes of `pieces`, to be called when they are done."""
        start = len(self.pieces)
        self.pieces += pieces
        self.names += [name] * len(pieces)
        return lambda: self.found[start : start + len(pieces)]

    def one(self, name: str, do: Callable[..., Any], *args: Any) -> Callable[[], Any]:
        found = self.all(name, [Piece(do, args)])
        return lambda: found()[0]

    def do(self, run: Run, tell: Tell) -> None:
        """All of them; `tell` hears of each before it is waited for."""
        results = run(self.pieces)
        for number, name in enumerate(self.names):
            tell(name, number, len(self.names))
            self.found.append(next(results))
        for _ in results:  # none: it ends, and lets its workers go
            pass

    def bits(
        self, name: str, place: str, exits: Sequence[int], data: Path, at: str, most: int
    ) -> Callable[[], dict[str, dict[int, Figure]]]:
        """Bits per byte of what `data`, which lies `at`, holds out, `most` rows of each modality, by modality and exit."""
        found = {
            modality: self.all(
                name, [Piece(_bits, (place, at, modality, most, part)) for part in _parts(data, modality, most)]
            )
            for modality in modalities(data)
        }

        def done() -> dict[str, dict[int, Figure]]:
            figures = {modality: measures.bits_of(sums(), exits) for modality, sums in found.items()}
            return {modality: by_exit for modality, by_exit in figures.items() if by_exit}

        return done

    def patches(self, name: str, place: str, data: Path, at: str, most: int) -> Callable[[], dict[str, Figure]]:
        """The next-patch error, of the model and of always saying zero; nothing without images of more than a patch."""
        parts = _parts(data, "image", most) if "image" in modalities(data) else []
        found = self.all(name, [Piece(_patches, (place, at, most, part)) for part in parts])
        return lambda: measures.patch_error_of(found())

    def answers(
        self, name: str, place: str, asked: Mapping[str, Sequence[Question]], tokens: Mapping[str, int], depth: str
    ) -> Callable[[], dict[str, list[Answer]]]:
        """Answers at a depth to the questions of each task, of so many `tokens` at most."""
        found = {
            task: self.all(name, [
                Piece(_answers, (place, [q.prompt for q in questions[start : start + PROMPTS]], tokens[task], depth))
                for start in range(0, len(questions), PROMPTS)
            ])
            for task, questions in asked.items()
        }  # fmt: skip
        return lambda: {task: [answer for part in parts() for answer in part] for task, parts in found.items()}

    def routing(
        self, name: str, place: str, model: Described, heldout: Path, after: int | None
    ) -> Callable[[], tuple[Prompts, ...]]:
        """Prompts as of `routing.heldout_prompts`, whose router looks again `after` tokens; none where there are too few."""
        sides = zip(heldout_sides(model, heldout), (None, after), strict=False)
        found = [(rows, self.all(name, asked_gaps(place, rows, at))) for rows, at in sides]
        return lambda: tuple(together(rows, parts()) for rows, parts in found)


def facts(models: Models, place: str) -> dict[str, Any]:
    """What is looked up: the model's ``router``, its ``gates``, and the ``bytes`` of its weights."""
    (model,) = models(place)
    router = None if model.router is None else copy.deepcopy(model.router).cpu()
    return {"router": router, "gates": gates(model), "bytes": float(files.weight_bytes(here(place)))}


def speeds(models: Models, of: Mapping[str, str], served: str, tokens: int) -> dict[str, Any]:
    """Decoded tokens a second of all models, as `interleaved_speed`, and of the one `served` ``by_exit`` at batch 8; and on
    which ``machine``."""
    held = dict(zip(of, models(*of.values()), strict=True))
    found = interleaved_speed(held, tokens=tokens)
    last = held[served]
    by_exit = {layers: decode_speed(Engine(last), 8, tokens, layers) for layers in last.config.exits}
    return {"by_label": found, "by_exit": by_exit, "machine": machine()}


def int8(models: Models, fp32: str, rounded: str, at: str, rows: int) -> list[dict[str, Any]]:
    """As `int8_cost`. Weights are rounded before they are moved to a GPU, where they would have lost digits."""
    return int8_cost(models.read(fp32), models.read(rounded), local(at), rows=rows, placed=models.placed)


def _parts(data: Path, modality: str, most: int) -> list[slice]:
    """The held-out rows of a modality, cut; those of a file stay together."""
    if data.is_file():
        return [slice(None)]
    rows = min(most, open_index(data).total("rows", "heldout", modality))
    return [slice(start, start + ROWS) for start in range(0, rows, ROWS)]


def _bits(models: Models, place: str, at: str, modality: str, most: int, part: slice) -> Sums:
    (model,) = models(place)
    rows = rows_of(local(at), modality, model, most, part)
    return measures.bit_sums(model.net, rows, model.config.exits, token_bytes(model.tokenizer))


def _patches(models: Models, place: str, at: str, most: int, part: slice) -> Sums:
    (model,) = models(place)
    return measures.patch_sums(model.net, HeldoutRows(local(at), "image", most, part=part))


def _answers(models: Models, place: str, prompts: Sequence[Encoded], tokens: int, depth: str) -> list[Answer]:
    (model,) = models(place)
    return generate(Engine(model), prompts, tokens, depth)
