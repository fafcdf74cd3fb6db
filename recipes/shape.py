"""The shape of a recipe's model: `tiny`, in rows as long as the recipe's own, with many small updates."""

from __future__ import annotations

import dataclasses

from shoal import presets
from shoal.config import Preset


def shaped(name: str, row_tokens: int, batch_tokens: int, vocab: int | None = None) -> Preset:
    """`tiny` without images, with rows of so many tokens and so many tokens an update; `vocab`: [tiny's].

    Many small updates: copying begins after so many of them, whatever is in each (decision 0033).
    """
    tiny = presets.get("tiny")
    model = dataclasses.replace(
        tiny.model, train_length=row_tokens, window=64, block=8, vocab=vocab or tiny.model.vocab, image_size=0
    )
    train = dataclasses.replace(
        tiny.train, learning_rate=4e-3, optimizer="muon", batch_tokens=batch_tokens, accumulate=1
    )
    return Preset(name, model, train)
