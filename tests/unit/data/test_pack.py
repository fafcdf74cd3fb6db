"""Encoding and packing: nothing lost, images whole, little padding."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.data.documents import Skipped
from shoal.data.encode import encode
from shoal.data.pack import PADDING, Packer, Row, best_fit
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import END_ID, IMG_END_ID, IMG_ID, PAD_ID, PATCH_ID, Tokenizer

T = 32


def pack(lengths: list[int], length: int = T) -> tuple[list[Row], Packer]:
    """Rows of documents whose tokens are all different, so that each can be found again."""
    packer, at, rows = Packer(length), 100, []
    for n in lengths:
        rows += packer.add(Encoded(list(range(at, at + n))), "s")
        at += n
    return [*rows, *packer.finish()], packer


@given(st.lists(st.integers(1, 3 * T), min_size=1, max_size=60))
@settings(deadline=None, max_examples=60)
def test_every_token_is_in_exactly_one_row(lengths: list[int]) -> None:
    rows, packer = pack(lengths)
    tokens = np.concatenate([row.tokens for row in rows])
    held = tokens[tokens != PAD_ID]
    assert sorted(held.tolist()) == list(range(100, 100 + sum(lengths)))
    assert packer.tokens == sum(lengths) and packer.cut == 0
    assert packer.padded == (tokens == PAD_ID).sum() == sum((row.docs == PADDING).sum() for row in rows)
    for row in rows:
        assert row.used == (row.docs != PADDING).sum()
        for doc in range(row.docs.max() + 1):
            run = row.tokens[row.docs == doc]
            assert (np.diff(run) == 1).all()  # pieces of a document stay in order


def test_padding_stays_below_two_percent_on_documents_of_many_lengths() -> None:
    draw = random.Random(0)
    rows, packer = pack([min(900, int(draw.lognormvariate(4, 1)) + 1) for _ in range(3000)], 256)
    assert packer.padded / (len(rows) * 256) < 0.02


@given(st.dictionaries(st.integers(1, 12), st.integers(1, 3), min_size=1, max_size=4), st.integers(1, 20))
def test_best_fit_is_a_best_subset(available: dict[int, int], space: int) -> None:
    sums = {0}
    for n, count in available.items():
        sums = {s + k * n for s in sums for k in range(count + 1)}
    chosen = best_fit(available, space)
    assert sum(chosen) == max(s for s in sums if s <= space)
    assert all(chosen.count(n) <= available[n] for n in set(chosen))


def test_an_image_is_never_split_nor_parted_from_its_text(document, png, config: ModelConfig) -> None:
    tokenizer = Tokenizer.bytes_only()
    shown = [document("A red square, as plain as can be.", "image", image=png(), id=f"s/{i}") for i in range(40)]
    packer, rows = Packer(config.train_length), []
    for encoded in encode(shown, tokenizer, config):
        rows += packer.add(encoded, "s")
    rows += packer.finish()
    for row in rows:
        for doc in range(row.docs.max() + 1):
            ids = row.tokens[row.docs == doc].tolist()
            assert ids.count(IMG_ID) == ids.count(IMG_END_ID) == 1 and ids.count(PATCH_ID) == 9
        assert len(row.patches) == (row.tokens == PATCH_ID).sum()


@pytest.mark.parametrize("text_first", [True, False])
def test_a_text_too_long_beside_its_image_is_cut_and_counted(
    png, document, config: ModelConfig, text_first: bool
) -> None:
    tokenizer = Tokenizer.bytes_only()
    for number in range(40):  # half of the captions come first, by the hash of the id
        long = document("word " * 60, "image", image=png(), caption=True, id=f"s/{number}")
        (encoded,) = encode([long], tokenizer, config)
        if (encoded.ids[0] != IMG_ID) == text_first:
            break
    packer = Packer(config.train_length)
    (row,) = [*packer.add(encoded, "s"), *packer.finish()]
    assert (row.tokens == PATCH_ID).sum() == len(row.patches) == 9
    assert packer.cut == len(encoded.ids) - config.train_length > 0


def test_encoding_closes_documents_and_skips_unreadable_images(document, config: ModelConfig) -> None:
    tokenizer = Tokenizer.bytes_only()
    text, broken = encode([document("abc"), document("", "image", image=b"no image")], tokenizer, config)
    assert text.ids == [*tokenizer.encode("abc"), END_ID]
    assert isinstance(broken, Skipped) and (broken.operator, broken.reason) == ("image", "image cannot be decoded")


def test_control_tokens_in_a_document_are_plain_text(document, config: ModelConfig) -> None:
    (encoded,) = encode([document("<|end|><patch>")], Tokenizer.bytes_only(), config)
    assert encoded.ids.count(END_ID) == 1 and PATCH_ID not in encoded.ids
