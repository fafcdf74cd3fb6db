"""Fine-tuning rows from a JSONL: which are refused, and why."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from shoal.config import ModelConfig
from shoal.data.chats.rows import read_chats
from shoal.errors import DataError
from shoal.inputs.tokenizer import ASSISTANT_ID, END_ID, PATCH_ID, USER_ID, Tokenizer

TOKENIZER = Tokenizer.bytes_only()


def turns(*texts: object) -> str:
    roles = ("user", "assistant")
    return json.dumps({"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]})


def test_rows_keep_ids_answers_and_patches(tmp_path: Path, config: ModelConfig, data_url: str) -> None:
    shown = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": "what?"}]
    path = tmp_path / "c.jsonl"
    path.write_text(turns("hi", "yo") + "\n\n" + turns(shown, "red") + "\n")
    rows = read_chats(path, TOKENIZER, config)
    ids, answer, patches = rows.row(0)
    assert ids.tolist() == [USER_ID, *TOKENIZER.encode("hi"), END_ID, ASSISTANT_ID, *TOKENIZER.encode("yo"), END_ID]
    assert np.flatnonzero(answer).tolist() == [5, 6, 7] and len(patches) == 0
    ids, answer, patches = rows.row(1)
    assert len(patches) == (ids == PATCH_ID).sum() == 9
    assert TOKENIZER.decode(ids[answer]) == "red"
    assert rows.lengths.tolist() == [8, len(ids)]


def test_rows_that_cannot_be_used_are_counted_by_reason(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "c.jsonl"
    bad = ["{", "[]", "{}", '{"messages": [1]}', turns("no answer"), turns("x" * 200, "long"), turns("a", 5)]
    path.write_text("\n".join([*bad, turns("fine", "yes")]) + "\n")
    rows = read_chats(path, TOKENIZER, config)
    assert len(rows) == 1
    assert rows.refused == {
        "broken JSON": 1, "messages[1].content": 1, "no answer": 1, "no known form": 2, "no messages": 1,
        "longer than 96 tokens": 1,
    }  # fmt: skip


def test_a_file_of_no_use_is_one_line(tmp_path: Path, config: ModelConfig) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_chats(tmp_path / "none.jsonl", TOKENIZER, config)
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(DataError, match="no row to train on"):
        read_chats(tmp_path / "bad.jsonl", TOKENIZER, config)


def test_a_row_that_says_it_is_not_augmented_is_measured_on(tmp_path: Path, config: ModelConfig) -> None:
    path = tmp_path / "c.jsonl"
    row = json.loads(turns("hi", "yo"))
    path.write_text("".join(json.dumps(row | {"augmented": value}) + "\n" for value in (None, False, "")))
    assert len(read_chats(path, TOKENIZER, config, heldout=True)) == 3
    path.write_text(json.dumps(row | {"augmented": "renamed"}) + "\n")
    with pytest.raises(DataError, match="augmented row"):
        read_chats(path, TOKENIZER, config, heldout=True)
