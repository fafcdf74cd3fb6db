"""Documents to token ids and patches: what a packed row is made of.

A text or code document is its ids and ``<|end|>``. An image document is its image span and its text, then ``<|end|>``; of
documents whose text is a caption, half have the caption first, so that a model learns to read and to draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash

from shoal.config import ModelConfig
from shoal.data.documents import Document, Skipped
from shoal.errors import RequestError
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import END_ID, Tokenizer


def encode(documents: Sequence[Document], tokenizer: Tokenizer, config: ModelConfig) -> list[Encoded | Skipped]:
    """One result a document, in order. An image that cannot be decoded, or that alone fills a row, is skipped."""
    texts = tokenizer.encode_batch([document.text for document in documents])
    return [_encode(document, ids, config) for document, ids in zip(documents, texts, strict=True)]


def _encode(document: Document, ids: list[int], config: ModelConfig) -> Encoded | Skipped:
    if document.image is None:
        return Encoded([*ids, END_ID])
    try:
        image = media.patches_of(document.image, config)
    except RequestError as error:
        reason = error.message.split(":")[0]  # without the particulars, so that equal faults are counted together
        return Skipped(document.origin, document.source, reason, operator="image")
    span = image.tokens()
    if len(span) >= config.train_length:
        return Skipped(document.origin, document.source, "image does not fit a row", operator="image")
    text_first = document.caption and xxhash.xxh3_64_intdigest(document.id.encode()) % 2 == 0
    return Encoded([*ids, *span, END_ID] if text_first else [*span, *ids, END_ID], [image])
