"""The oracle's answers where it is known what they ought to be: as sure, and by one look at the whole, not one a token.

`naive.generate` and `Model.generate_naive` run the whole model again for each token. A row of its logits follows from what
stands before it, so that all rows of a text come of one look at it, whoever wrote it: of the guess (what an engine said) those
are taken that follow a beginning which the oracle came to by itself. Where it says something else, the model is asked again,
as without a guess. So a wrong guess costs time and changes nothing (tests/unit/engine/test_naive.py). In float64, where rows of
a longer text are the same but for the last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoal import Model, Request
from shoal.config import FULL
from shoal.engine import naive
from shoal.engine.events import Completion
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.model.adapters import Adapter


class Ahead:
    """`model` as the two ask for it, which has looked at `text` already."""

    def __init__(self, model: Model, text: Sequence[int]) -> None:
        self._model, self._text = model, list(text)
        self._rows: dict[str | int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def logits(
        self, ids: list[int], depth: str | int, images: Sequence[Patches] | None, adapter: Adapter | None = None
    ) -> torch.Tensor:
        """Logits [T, V] of a text with the images and the adapter that all texts here have."""
        if ids != self._text[: len(ids)]:
            return self._model.logits(ids, depth, images, adapter)
        if depth not in self._rows:
            self._rows[depth] = self._model.logits(self._text, depth, images, adapter)
        return self._rows[depth][: len(ids)]


def answer(model: Model, request: Request, guess: Sequence[int], adapter: Adapter | None = None) -> Completion:
    """What `naive.generate` gives, where `guess` are the tokens that somebody else gave."""
    ahead = Ahead(model, [*model.encode(request.prompt).ids, *guess])
    return naive.generate(ahead, request, adapter)  # type: ignore[arg-type]


def greedy(
    model: Model, prompt: str | Sequence[int] | Encoded, tokens: int, guess: Sequence[int], depth: str | int = FULL
) -> list[int]:
    """What `Model.generate_naive` gives where nothing ends an answer early, with a guess as above."""
    ahead = Ahead(model, [*model.encode(prompt).ids, *guess])
    return Model.generate_naive(ahead, prompt, tokens, depth, ignore_eos=True)  # type: ignore[arg-type]
