"""Encoding and packing: nothing lost, images whole, little padding."""

from __future__ import annotations

import argparse
import ast
import datetime
import inspect
import pathlib
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import presets
from shoal.config import ModelConfig
from shoal.data.documents import Skipped
from shoal.data.encode import encode
from shoal.data.pack import PADDING, Packer, Row, best_fit
from shoal.data.sources import pysource
from shoal.inputs.chat import Encoded
from shoal.inputs.media import Patches
from shoal.inputs.tokenizer import END_ID, IMG_END_ID, IMG_ID, PAD_ID, PATCH_ID, Tokenizer

T = 32


def pack(lengths: list[int], length: int = T) -> tuple[list[Row], Packer]:
    """Rows of documents whose tokens are all different, so that each can be found again."""
    packer, at, rows = Packer(length), 100, []
    for n in lengths:
        rows += packer.add(Encoded(list(range(at, at + n))), "s", at)
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


@given(st.lists(st.integers(1, 3 * T), min_size=1, max_size=60))
@settings(deadline=None, max_examples=30)
def test_a_row_says_which_group_each_of_its_pieces_is_of(lengths: list[int]) -> None:
    """So that two pieces of one long document are known to be of one, whatever rows they came to."""
    rows, _ = pack(lengths)
    starts = np.cumsum([100, *lengths])
    for row in rows:
        assert len(row.groups) == row.docs.max() + 1
        for doc, group in enumerate(row.groups):
            first = row.tokens[row.docs == doc][0]
            assert group == starts[np.searchsorted(starts, first, side="right") - 1]


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
        rows += packer.add(encoded, "s", 0)
    rows += packer.finish()
    for row in rows:
        for doc in range(row.docs.max() + 1):
            ids = row.tokens[row.docs == doc].tolist()
            assert ids.count(IMG_ID) == ids.count(IMG_END_ID) == 1 and ids.count(PATCH_ID) == 9
        assert len(row.patches) == (row.tokens == PATCH_ID).sum()


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(0, 30), st.booleans()), max_size=40))
def test_images_are_whole_in_their_rows_whatever_their_shape(shapes: list[tuple[int, int, int, bool]]) -> None:
    """Rows, columns, tokens of text, and whether the text comes first; spans that alone fill a row are refused by `encode`."""
    packer, made, rows = Packer(64), [], []
    for number, (height, width, text, text_first) in enumerate(shapes):
        image = Patches(np.full((height * width, 3), number, np.uint8), height, width)
        span, words = image.tokens(), list(range(100, 100 + text))
        if len(span) < 64:
            made.append(image)
            ids = [*words, *span, END_ID] if text_first else [*span, *words, END_ID]
            rows += packer.add(Encoded(ids, [image]), "s", 0)
        else:
            rows += packer.add(Encoded([*words, END_ID]), "s", 0)
    rows += packer.finish()
    found = []
    for row in rows:
        patches = iter(row.patches if row.patches is not None else ())
        for doc in range(row.docs.max() + 1):
            ids = row.tokens[row.docs == doc].tolist()
            assert ids.count(IMG_ID) == ids.count(IMG_END_ID) <= 1
            values = [next(patches)[0] for _ in range(ids.count(PATCH_ID))]
            if values:
                assert len(set(values)) == 1 and ids[ids.index(IMG_ID) : ids.index(IMG_END_ID) + 1] in (
                    image.tokens() for image in made if image.values[0, 0] == values[0]
                )
                found.append(values[0])
        assert next(patches, None) is None
    assert sorted(found) == sorted(image.values[0, 0] for image in made)


def test_under_two_percent_of_a_real_corpus_is_cut_or_padded(config: ModelConfig) -> None:
    """Functions and docstrings of the standard library, images with captions; the rows of a small preset."""
    config, draw = presets.get("tiny").model, random.Random(0)
    tokenizer = Tokenizer.train([Path(module.__file__).read_text("utf-8") for module in (argparse, ast)], config.vocab)
    sources = [
        Path(module.__file__).read_text("utf-8") for module in (argparse, ast, random, pathlib, datetime, inspect)
    ]
    code = [tokenizer.encode(function.code) for source in sources for function in pysource.functions(source)]
    pages = [tokenizer.encode(part) for source in sources for part in source.split("\n\n") if part]
    images = [Patches(np.zeros((16, 192), np.uint8), 4, 4) for _ in range(1500)]
    captioned = [[*image.tokens(), *draw.choice(pages)[: draw.randrange(5, 30)], END_ID] for image in images]
    for documents in (code, pages, captioned):
        packer = Packer(config.train_length)
        rows = []
        for number, ids in enumerate(documents):
            rows += packer.add(Encoded(ids, [images[number]] if documents is captioned else []), "s", 0)
        rows += packer.finish()
        places = len(rows) * config.train_length
        assert packer.tokens > 20_000 and (packer.cut + packer.padded) / places < 0.02


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
    (row,) = [*packer.add(encoded, "s", 0), *packer.finish()]
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


def test_a_row_is_filled_to_its_last_place() -> None:
    rows, packer = pack([20, 12, 30, 2])
    assert [row.used for row in rows] == [T, T] and packer.padded == 0


def test_lengths_are_counted_by_their_bits() -> None:
    _, packer = pack([1, 2, 3, 4, 31, 32])
    assert packer.lengths == {1: 1, 2: 2, 3: 1, 5: 1, 6: 1}


def test_what_is_too_long_for_the_rest_of_a_row_takes_no_part_in_the_choice() -> None:
    """Of 99 such lengths and one that fits, only so many are tried."""
    rows, _ = pack([150, *range(51, 150), 50], 200)
    assert rows[0].used == 200 and len(rows[0].groups) == 2
