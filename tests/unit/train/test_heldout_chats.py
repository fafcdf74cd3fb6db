"""One reader of chats: what training accepts as held out is asked after training too, and what it refuses it names at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal import Model
from shoal.data.chats.heldout import questions
from shoal.data.chats.rows import read_chats
from shoal.errors import DataError
from shoal.evaluate import prompts
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, finetune_plan, quantize_plan

USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}
IN_PARTS = {"role": "assistant", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "."}]}


def row(*messages: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"messages": messages, **more}).encode() + b"\n"


GOOD = row(USER, ANSWER)
ODD = {
    "a blank line at the end": GOOD + b"\n",
    "blank lines": b"\n" + GOOD + b"  \r\n" + GOOD,
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "a row that ends with the user": row(USER, ANSWER, USER),
    "an answer in parts": row(USER, IN_PARTS),
    "a task that is no text": row(USER, ANSWER, task=[1]) + row(USER, ANSWER, task=None) + row(USER, ANSWER, task=0),
    "an empty answer": row(USER, {"role": "assistant", "content": ""}),
    "an answer alone": row(ANSWER),
}
REFUSED = {
    "broken JSON": b'{"messages": [\n',
    "JSON without an end": b"[" * 100_000 + b"\n",
    "no UTF-8": b'{"messages": "\xff"}\n',
    "a tool's turn": row(USER, ANSWER, {"role": "tool", "content": "4"}, ANSWER),
    "no answer": row(USER),
    "no known form": b'{"words": "a"}\n',
    "half a surrogate": row(USER, {"role": "assistant", "content": "\ud800"}),
    "a group of half a surrogate": row(USER, ANSWER, group="\ud800"),
    "a task of half a surrogate": row(USER, ANSWER, task="\ud800"),
    "an augmented row": row(USER, ANSWER, augmented="typo"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    Model.from_preset("test").save(folder)
    return folder


def plan(base: Path, chats: Path, run: Path, heldout: Path, **more: Any) -> FitPlan:
    values = {"steps": 1, "batch_tokens": 768, "eval_every": 0, **more}
    return finetune_plan(str(base), str(chats), str(run), heldout=str(heldout), **values)


@pytest.mark.parametrize("name", ODD)
def test_what_is_measured_on_can_be_asked(tmp_path: Path, name: str) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_bytes(ODD[name])
    model = Model.from_preset("test")
    rows = read_chats(path, model.tokenizer, model.config, heldout=True)
    asked = [q for some in questions(path, model.tokenizer, model.config, DEFAULT_TEMPLATE).values() for q in some]
    assert len(rows) == len(asked) > 0 and not rows.refused
    for question in asked:
        start = max(
            place for place, mine in enumerate(question.row.answer) if mine and not question.row.answer[place - 1]
        )
        assert question.prompt.ids == question.row.ids[:start]
        assert model.tokenizer.decode(question.row.ids[start:]) == question.reference
    halves = [prompts.heldout_rows(model, path, 50, asked=half) for half in (True, False)]
    assert sum(len(some) for found in halves for some in found.values()) == len(asked)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_named_before_the_first_update(
    base: Path, chats: Path, tmp_path: Path, name: str
) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_bytes(GOOD + REFUSED[name])
    with pytest.raises(DataError, match=r"heldout\.jsonl line 2") as caught:
        fit(plan(base, chats, tmp_path / "run", path))
    assert "\n" not in str(caught.value) and not log.metrics_file(tmp_path / "run").exists()


def test_what_training_passes_over_is_named_by_its_first_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n" + REFUSED["no answer"] + GOOD + REFUSED["no answer"] + REFUSED["broken JSON"])
    model = Model.from_preset("test")
    rows = read_chats(path, model.tokenizer, model.config)
    assert rows.refused == {"broken JSON": 1, "no answer": 2} and rows.refused_at == {"no answer": 2, "broken JSON": 5}
    shares = {"padding": 0.0, "naive_padding": 0.0, "rows": 1, "tokens": 9}
    said = log.line({"kind": "chats", **shares, "refused": rows.refused, "refused_at": rows.refused_at})
    assert "2 refused: no answer (the first in line 2)" in said and "broken JSON (the first in line 5)" in said


def test_held_out_chats_are_measured_on_beside_shards_too(base: Path, shards: Path, tmp_path: Path) -> None:
    """They were read after training alone, for the router: a broken one cost the run."""
    path = tmp_path / "heldout.jsonl"
    path.write_bytes(GOOD + b"{\n")
    model = Model.from_preset("test")
    model.tokenizer = type(model.tokenizer).load(shards / "tokenizer.json")
    model.save(tmp_path / "of-shards")
    values = {"steps": 1, "batch_tokens": 768, "eval_every": 0, "heldout": str(path)}
    todo = quantize_plan(str(tmp_path / "of-shards"), str(shards), str(tmp_path / "int8"), **values)
    with pytest.raises(DataError, match=r"heldout\.jsonl line 2"):
        fit(todo)
    path.write_bytes(GOOD * 3)
    assert set(fit(todo).bpb) == {"chat", "text", "code", "image"}
