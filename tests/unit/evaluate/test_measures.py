"""Evaluation against numbers worked out another way."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from shoal import presets
from shoal.data.batches import heldout_batches
from shoal.data.chats import heldout
from shoal.data.chats.heldout import Question
from shoal.data.shards import token_bytes
from shoal.errors import DataError
from shoal.evaluate import intervals, measures
from shoal.evaluate.measures import Answer
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.net import Net
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.heldout import measure
from shoal.train.loss import LossModel
from shoal.train.parallel import Ranks
from shoal.train.plan import pretrain_plan

CONFIG = presets.get("test").model
TOKENIZER = Tokenizer.bytes_only()


@pytest.fixture(scope="module")
def net() -> Net:
    return Net(CONFIG).init_(0)


def asked(*references: str) -> list[Question]:
    return [Question(prompt=None, row=None, reference=text, task="t", group=0) for text in references]  # type: ignore[arg-type]


def answers(*texts: str) -> list[Answer]:
    return [Answer(text, len(text), depth) for text, depth in zip(texts, (1, 2, 4, 4), strict=False)]


def test_bits_per_byte_is_what_training_measures(net: Net, shards: Path, alone: Ranks) -> None:
    """Two ways to the same number: gathered at once here, in sums over ranks there."""
    plan = pretrain_plan("test", str(shards), "unused", steps=1)
    feed = open_feed(plan, shard_tokenizer(shards), "", alone)
    there = measure(LossModel(net), feed.heldout, alone)
    for modality in ("text", "code"):
        rows = measures.HeldoutRows(shards, modality, batch_rows=3)
        here = measures.bits_per_byte(net, rows, CONFIG.exits, token_bytes(shard_tokenizer(shards)))
        assert [here[e].value for e in CONFIG.exits] == pytest.approx(list(there.bpb[modality].values()), rel=1e-5)
    patches = measures.patch_error(net, measures.HeldoutRows(shards, "image", batch_rows=3))
    assert patches["model"].value == pytest.approx(there.patch, rel=1e-5)


def test_an_untrained_model_knows_nothing(net: Net, shards: Path) -> None:
    """Close to log2(V) bits a token."""
    batches = list(heldout_batches(shards, "text", 4))
    tokens, n_bytes = sum(int((b.targets >= 0).sum()) for b in batches), sum(b.n_bytes for b in batches)
    lengths = token_bytes(shard_tokenizer(shards))
    found = measures.bits_per_byte(net, measures.HeldoutRows(shards, "text"), [CONFIG.layers], lengths)[CONFIG.layers]
    assert found.rows == tokens and found.groups == 12
    assert found.value == pytest.approx(math.log2(CONFIG.vocab) * tokens / n_bytes, rel=0.1)


def test_questions_end_where_the_answer_begins(chats: Path) -> None:
    (task,) = heldout.questions(chats, TOKENIZER, CONFIG, DEFAULT_TEMPLATE, limit=7).items()
    assert task[0] == "customer service" and len(task[1]) == 7
    for question in task[1]:
        start = question.row.answer.index(True)
        assert question.prompt.ids == question.row.ids[:start]
        assert TOKENIZER.decode(question.row.ids[start:]) == question.reference


@pytest.mark.parametrize(
    "line",
    ["{broken", "{}", '{"messages": []}', '{"messages": [{"role": "user", "content": "only a question"}]}'],
)
def test_a_row_that_cannot_be_asked_is_named_by_its_line(tmp_path: Path, line: str) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match="line 2"):
        heldout.questions(path, TOKENIZER, CONFIG, DEFAULT_TEMPLATE)


def test_exact_match_and_its_baseline() -> None:
    references = asked("red", "blue", "red", "green")
    assert measures.exact_match(answers("Red ", "red", "red", "greenish"), references).value == 0.5
    assert measures.majority(q.reference for q in references) == ("red", 0.5)


def test_bleu_is_sacrebleus() -> None:
    sentence = "returns the sum of both numbers given"
    same, signature = measures.bleu([sentence, sentence], asked(sentence, sentence))
    other, _ = measures.bleu(["the sum of two numbers", sentence], asked(sentence, sentence))
    assert same.value == pytest.approx(100.0) and 0 < other.value < 100 and "version:" in signature


def test_bleus_interval_is_by_sacrebleu_without_each_group() -> None:
    """The whole score computed anew each time."""
    words = [
        f"return the {n} of a {m}"
        for n in ("sum", "name", "size", "age")
        for m in ("net", "reef", "shoal", "tide", "sea")
    ]
    questions = [Question(None, None, text, "t", place // 2) for place, text in enumerate(words)]  # type: ignore[arg-type]
    texts = [text if place % 3 else text[:-5] for place, text in enumerate(words)]

    def score(rows: list[int]) -> float:
        return float(sacrebleu.corpus_bleu([texts[i] for i in rows], [[words[i] for i in rows]]).score)

    without = np.array([score([i for i in range(20) if i // 2 != group]) for group in range(10)])
    found, _ = measures.bleu(texts, questions)
    lengths = np.array(
        [sum(len(words[i].split()) for i in (2 * group, 2 * group + 1)) for group in range(10)], dtype=float
    )
    assert found.interval == pytest.approx(intervals.jackknifed(score([*range(20)]), without, lengths))
    assert (found.rows, found.groups) == (20, 10)
    assert measures.bleu(texts[:8], questions[:8])[0].ends is None, "four groups"


def test_anothers_reference_is_of_another_group() -> None:
    questions = [Question(None, None, f"{place}", "t", place // 3) for place in range(9)]  # type: ignore[arg-type]
    given = measures.another(questions)
    assert all(int(text) // 3 != q.group for text, q in zip(given, questions, strict=True))
    assert measures.another(questions[:3]) == ["", "", ""]


def test_code_that_parses() -> None:
    some = answers("def f():\n    return 1\n", "def f(:", "", "x = 1")
    found = measures.parse_rate(some, asked("", "", "", ""))
    assert found.value == 0.5 and found.rows == 4
    assert measures.parse_rate([], []).value == 0.0
    with pytest.raises(SyntaxError):
        ast.parse(some[1].text)


def test_mean_depth_is_of_the_tokens_that_ran() -> None:
    some = [Answer("", 1, 1, prompt=3), Answer("", 5, 4, prompt=2)]
    assert [answer.run for answer in some] == [3, 6], "nothing follows the last token of an answer, so it is not run"
    assert measures.mean_depth(some) == pytest.approx((3 * 1 + 6 * 4) / 9)
