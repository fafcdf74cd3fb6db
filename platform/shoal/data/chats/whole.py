"""Rows that are learned from everywhere and not in answers alone: chats as the template writes them, and texts, in any of the
`forms`. For exits that learn what full depth says, any text like what will be served is good, and a longer one may be cut."""

from __future__ import annotations

import json
from pathlib import Path

from shoal.config import ModelConfig
from shoal.data.chats import forms
from shoal.data.chats.rows import ChatRows, Refused, flat, numbered, refusing
from shoal.errors import DataError
from shoal.inputs.chat import DEFAULT_TEMPLATE, Encoded, encode_chat
from shoal.inputs.tokenizer import Tokenizer

SHORTEST = 2  # tokens: one that is read, and one that follows


def read_whole(
    path: str | Path,
    tokenizer: Tokenizer,
    config: ModelConfig,
    *,
    template: str = DEFAULT_TEMPLATE,
    limit: int = 0,
) -> ChatRows:
    """The rows of a JSONL file, cut into pieces of at most `limit` tokens (0: the training length); one with images is refused
    where it is longer. Raises DataError when the file cannot be read, and when none of its rows can be used."""
    longest, refused = limit or config.train_length, Refused()
    kept: list[Encoded] = []
    for line, text in numbered(Path(path)):
        with refusing(line, refused):
            row = _encoded(text, tokenizer, config, template)
            if row.images and len(row.ids) > longest:
                raise DataError(f"longer than {longest} tokens, with images")
            for start in range(0, len(row.ids), longest):
                ids = row.ids[start : start + longest]
                if len(ids) >= SHORTEST:
                    kept.append(Encoded(ids, row.images, [True] * len(ids)))
    return flat(kept, config, refused, f"{path} holds no row to learn from")


def _encoded(text: bytes, tokenizer: Tokenizer, config: ModelConfig, template: str) -> Encoded:
    """Raises DataError or RequestError for a line that is of no form."""
    try:
        native = tokenizer.calls is not None
        row = forms.canonical(json.loads(text), native=native)
    except (ValueError, RecursionError) as error:
        raise DataError("broken JSON") from error
    if row.get("messages"):
        told = forms.offered(row) if native else None
        return encode_chat(
            row["messages"],
            tokenizer,
            config,
            template=template,
            add_generation_prompt=False,
            answers=False,
            tools=told,
        )
    return Encoded([*tokenizer.prompt(row["text"]), tokenizer.ends[0]])
