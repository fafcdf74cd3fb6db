"""Evaluation against numbers worked out another way."""

import ast
import json
import math
from pathlib import Path

import pytest

from shoal import presets
from shoal.data.batches import heldout_batches
from shoal.errors import DataError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.net import Net
from shoal.train import evaluate
from shoal.train.evaluate import Answer, Question
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
    return [Question(prompt=None, row=None, reference=text, task="t") for text in references]  # type: ignore[arg-type]


def answers(*texts: str) -> list[Answer]:
    return [Answer(text, len(text), depth) for text, depth in zip(texts, (1, 2, 4, 4), strict=False)]


def test_bits_per_byte_is_what_training_measures(net: Net, shards: Path, alone: Ranks) -> None:
    """Two ways to the same number: gathered at once here, in sums over ranks there."""
    plan = pretrain_plan("test", str(shards), "unused", steps=1)
    feed = open_feed(plan, shard_tokenizer(shards), "", alone)
    there = measure(LossModel(net), feed.heldout, alone)
    for modality in ("text", "code"):
        here = evaluate.bits_per_byte(net, heldout_batches(shards, modality, 3), CONFIG.exits)
        assert [here[e] for e in CONFIG.exits] == pytest.approx(list(there.bpb[modality].values()), rel=1e-5)
    patches = evaluate.patch_error(net, heldout_batches(shards, "image", 3))
    assert patches["model"] == pytest.approx(there.patch, rel=1e-5)


def test_an_untrained_model_knows_nothing(net: Net, shards: Path) -> None:
    """Close to log2(V) bits a token."""
    batches = list(heldout_batches(shards, "text", 4))
    tokens, n_bytes = sum(int((b.targets >= 0).sum()) for b in batches), sum(b.n_bytes for b in batches)
    found = evaluate.bits_per_byte(net, batches, [CONFIG.layers])[CONFIG.layers]
    assert found == pytest.approx(math.log2(CONFIG.vocab) * tokens / n_bytes, rel=0.1)


def test_questions_end_where_the_answer_begins(chats: Path) -> None:
    (task,) = evaluate.questions(chats, TOKENIZER, CONFIG, DEFAULT_TEMPLATE, limit=7).items()
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
        evaluate.questions(path, TOKENIZER, CONFIG, DEFAULT_TEMPLATE)


def test_exact_match_and_its_baseline() -> None:
    references = asked("red", "blue", "red", "green")
    assert evaluate.exact_match(answers("Red ", "red", "red", "greenish"), references) == 0.5
    assert evaluate.majority(q.reference for q in references) == ("red", 0.5)


def test_bleu_is_sacrebleus() -> None:
    sentence = "returns the sum of both numbers given"
    same, signature = evaluate.bleu(answers(sentence, sentence), asked(sentence, sentence))
    other, _ = evaluate.bleu(answers("the sum of two numbers", sentence), asked(sentence, sentence))
    assert same == pytest.approx(100.0) and 0 < other < 100 and "version:" in signature


def test_code_that_parses() -> None:
    some = answers("def f():\n    return 1\n", "def f(:", "", "x = 1")
    assert evaluate.parse_rate(some) == 0.5
    assert evaluate.parse_rate([]) == 0.0
    with pytest.raises(SyntaxError):
        ast.parse(some[1].text)


def test_mean_depth_is_a_share_of_the_layers() -> None:
    assert evaluate.mean_depth(answers("a", "b", "c"), CONFIG) == pytest.approx((1 + 2 + 4) / 3 / 4)
