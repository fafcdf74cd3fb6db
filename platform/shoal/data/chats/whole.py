"""Rows that are learned from everywhere and not in answers alone: chats as the template writes them, and texts, in any of the
`forms`. For exits that learn what full depth says, any text like what will be served is good, and a longer one may be cut."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from shoal.config import ModelConfig
from shoal.data.chats import forms
from shoal.data.chats.rows import ChatRows, flat, numbered
from shoal.errors import DataError, RequestError
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
    longest = limit or config.train_length
    refused: Counter[str] = Counter()
    refused_at: dict[str, int] = {}
    kept: list[Encoded] = []
    for line, text in numbered(Path(path)):
        try:
            row = _encoded(text, tokenizer, config, template)
            if row.images and len(row.ids) > longest:
                raise DataError(f"longer than {longest} tokens, with images")
        except (DataError, RequestError, UnicodeEncodeError) as error:
            unicode = isinstance(error, UnicodeEncodeError)  # half a surrogate
            reason = "text that is no Unicode" if unicode else str(error.args[0]).split(":")[0]
            refused[reason] += 1
            refused_at.setdefault(reason, line)
            continue
        for start in range(0, len(row.ids), longest):
            ids = row.ids[start : start + longest]
            if len(ids) >= SHORTEST:
                kept.append(Encoded(ids, row.images, [True] * len(ids)))
    if not kept:
        first = min(refused_at.items(), key=lambda found: found[1], default=("nothing in it", 1))
        raise DataError(f"{path} holds no row to learn from", got=f"line {first[1]}: {first[0]}", allowed=forms.KNOWN)
    return flat(kept, config, refused, refused_at)


def _encoded(text: bytes, tokenizer: Tokenizer, config: ModelConfig, template: str) -> Encoded:
    """Raises DataError or RequestError for a line that is of no form."""
    try:
        row = forms.canonical(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise DataError("broken JSON") from error
    if row.get("messages"):
        return encode_chat(
            row["messages"], tokenizer, config, template=template, add_generation_prompt=False, answers=False
        )
    return Encoded([*tokenizer.prompt(row["text"]), tokenizer.ends[0]])
