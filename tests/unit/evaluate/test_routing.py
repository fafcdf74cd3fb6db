"""Held-out prompts, of chats and of documents, and the router that is fitted to them after a stage."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shoal import Engine, Model, Request, Sampling, presets
from shoal.config import ModelConfig
from shoal.data import shards
from shoal.data.chats.heldout import questions
from shoal.data.chats.rows import group_of
from shoal.data.pack import Packer
from shoal.data.shards import Rows, open_index
from shoal.errors import CheckpointError, DataError
from shoal.evaluate import halves, prompts, routing, second_look
from shoal.inputs.chat import DEFAULT_TEMPLATE, Encoded
from shoal.inputs.tokenizer import IMG_END_ID, PATCH_ID, Tokenizer
from shoal.model import checkpoint
from shoal.model.model import IMAGE_IDS
from shoal.model.net import Net
from shoal.model.router import Router, dealt, fit_router
from shoal.train.feed import shard_tokenizer
from shoal.train.loop import fit
from shoal.train.plan import finetune_plan, pretrain_plan
from tests.corpus import COLOURS, write_corpus

CONFIG = presets.get("test").model
TOKENIZER = Tokenizer.bytes_only()
FEW = 3  # held-out documents of each modality


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With enough held out to fit a router to."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", presets.get("test"), documents=40, heldout=60)


def untrained(data: Path) -> Model:
    return Model(CONFIG, Net(CONFIG).init_(0), shard_tokenizer(data))


def test_gaps_are_losses_on_the_answer_alone(chats: Path) -> None:
    net = Net(CONFIG).init_(0)
    found = questions(chats, TOKENIZER, CONFIG, DEFAULT_TEMPLATE, limit=4)
    rows = [q.row for q in found["customer service"]]
    features, gaps = prompts.gaps(net, rows)
    assert features.shape == (4, 2 * CONFIG.width + 3) and gaps.shape == (4, 2)
    for row, measured in zip(rows, gaps, strict=True):
        loss = []
        for depth in CONFIG.exits:
            logits = Model(CONFIG, net, TOKENIZER).logits(row.ids, depth=depth)
            places = [at for at in range(len(row.ids) - 1) if row.answer[at + 1]]
            assert len(places) < len(row.ids) / 2
            loss.append(
                sum(float(F.cross_entropy(logits[at], torch.tensor(row.ids[at + 1]))) for at in places) / len(places)
            )
        assert measured.tolist() == pytest.approx([loss[0] - loss[2], loss[1] - loss[2]], abs=1e-5)


def test_documents_are_prompts_of_all_lengths_with_what_follows_as_answer(corpus: Path) -> None:
    """Each is a stretch of a held-out document from its beginning; an image is whole, and in the prompt."""
    model = untrained(corpus)
    sides = [prompts.heldout_rows(model, corpus, 50, asked=asked) for asked in (False, True)]
    found = {task: [held.row for side in sides for held in side[task]] for task in sides[0]}
    index, longest = open_index(corpus), Counter[str]()
    assert set(found) == {"text", "image", "code"}
    for modality, rows in found.items():
        packed = [row[:2] for row in Rows(corpus, index, "heldout", modality)]
        beginnings = [
            tokens[start:end].tolist()
            for tokens, docs in packed
            for start, end in pairwise([0, *(np.flatnonzero(np.diff(docs)) + 1), len(docs)])
        ]
        assert 10 < len(rows) <= 100
        for row in rows:
            start = row.answer.index(True)
            longest[modality] = max(longest[modality], start)
            assert any(row.ids == document[: len(row.ids)] for document in beginnings)
            assert row.answer == [False] * start + [True] * (len(row.ids) - start)
            assert start >= prompts.SHORTEST and prompts.SHORTEST <= len(row.ids) - start <= prompts.LONGEST_ANSWER
            assert not IMAGE_IDS & set(row.ids[start:])
            assert sum(len(image.values) for image in row.images) == row.ids.count(PATCH_ID)
            if modality == "image":  # the patches are those of the colour that its text names, not of a neighbour
                colour = model.tokenizer.decode(row.ids[row.ids.index(IMG_END_ID) + 1 : -1])
                assert tuple(row.images[0].values[0, :3]) == COLOURS[colour] and row.images[0].rows == 3
        assert modality == "image" or len({row.answer.index(True) for row in rows}) > 5
    assert longest["text"] > CONFIG.train_length / 2
    assert prompts.heldout_rows(model, corpus, 50, asked=True).keys() == sides[1].keys()
    again = prompts.heldout_rows(model, corpus, 50, asked=True)["text"]
    assert [held.row.ids for held in again] == [held.row.ids for held in sides[1]["text"]]


def long_documents(directory: Path, count: int = 12) -> tuple[Path, list[list[int]]]:
    """A corpus that holds out `count` texts of several rows each; and their ids."""
    tokenizer = Tokenizer.bytes_only()
    directory.mkdir(parents=True)
    tokenizer.save(directory / shards.TOKENIZER)
    ids = [[20 + document] * (CONFIG.train_length * 3 + 17 + document) for document in range(count)]
    found = []
    for split in ("train", "heldout"):
        writer = shards.ShardWriter(directory, split, "text", shards.token_bytes(tokenizer), {"s": "MIT"})
        packer = Packer(CONFIG.train_length)
        for number, document in enumerate(ids):
            for row in packer.add(Encoded(document), "s", shards.group_number(f"document {number}")):
                writer.add(row)
        for row in packer.finish():
            writer.add(row)
        writer.close()
        found += writer.shards
    shards.write_index(directory, shards.Index.made_for(CONFIG, tokenizer, {"text": 1.0}, found))
    return directory, ids


def test_no_document_is_on_both_sides_however_many_pieces_it_came_in(tmp_path: Path) -> None:
    """Of documents whose ids tell which one it is: the router's fit, its calibration, its test and what is asked share none."""
    data, ids = long_documents(tmp_path / "data")
    model = Model(CONFIG, Net(CONFIG).init_(0), Tokenizer.bytes_only())
    sides = [prompts.heldout_rows(model, data, 100, asked=asked)["text"] for asked in (False, True)]
    which = [{held.row.ids[0] for held in side} for side in sides]
    assert not which[0] & which[1] and len(which[0] | which[1]) == len(ids)
    assert all(len(side) > 3 * len(some) for side, some in zip(sides, which, strict=True)), "several pieces of each"
    assert abs(len(which[0]) - len(which[1])) <= 1, "as many documents on one side as on the other"
    half = halves.asked_groups(data)
    for side in sides:
        assert all((held.group in half) == (side is sides[1]) for held in side)
    found = prompts.measured(model.net, {"text": sides[0]})
    order, half, three = dealt(found.groups, seed=0)
    of = found.groups[order]
    parts = [set(part.tolist()) for part in (of[:half], of[half:three], of[three:])]
    assert all(parts) and sum(map(len, parts)) == len(which[0]) == len(set.union(*parts))


def test_what_is_asked_of_a_conversation_is_on_the_side_of_its_document(tmp_path: Path) -> None:
    """Two tasks of one file, two questions on one image, and one question twice: each on one side."""
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    rows = [
        {"group": 0, "messages": [{"role": "user", "content": "Write f"}]},
        {"group": 0, "messages": [{"role": "user", "content": "Summarise f"}]},
        {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "what?"}]}]},
        {"messages": [{"role": "user", "content": [image, {"type": "text", "text": "where?"}]}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]},
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "b"}]},
    ]
    found = [group_of(row) for row in rows]
    assert found[0] == found[1] == shards.group_number("0") and found[2] == found[3] and found[4] == found[5]
    assert len(set(found)) == 3


@pytest.mark.drill
def test_a_pretrained_model_chooses_its_depth(corpus: Path, tmp_path: Path) -> None:
    plan = pretrain_plan("test", str(corpus), str(tmp_path / "run"), steps=2, eval_every=0, eval_rows=2)
    fit(plan)
    said: list[str] = []
    report = routing.finish(plan.model_dir, plan.router_data, said.append)
    assert report is not None and len(said) == 1 and said[0].startswith("router: within 0.05 nats a token")
    assert (plan.model_dir / "router.json").is_file()
    model = Model.load(plan.model_dir)
    (answer,) = Engine(model).generate([Request("The tide", Sampling(max_tokens=2), depth="auto")])
    assert answer.depth in CONFIG.exits
    fitted, test = routing.heldout_prompts(model, corpus) or pytest.fail("too few")
    assert set(fitted.tasks) == set(test.tasks) == {"text", "image", "code"}


def test_too_little_to_fit_a_router_to_is_said_and_the_model_is_kept(tmp_path: Path) -> None:
    data = write_corpus(tmp_path / "data", presets.get("test"), documents=10, heldout=FEW)
    untrained(data).save(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    said: list[str] = []
    assert routing.finish(tmp_path / "model", data, said.append) is None
    assert len(said) == 1 and 'no router, so depth "auto" is full depth' in said[0] and "at least 40" in said[0]
    assert {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before


def test_what_a_stage_holds_out_is_what_its_router_is_fitted_on(corpus: Path, chats: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    untrained(corpus).save(model)
    tuned = {
        name: finetune_plan(str(model), str(chats), "run", heldout=name).router_data for name in ("", "held.jsonl")
    }
    assert tuned == {"": "", "held.jsonl": "held.jsonl"}
    for data in (str(corpus), "s3://bucket/data"):
        assert pretrain_plan("test", data, "run", steps=1).router_data == data
    assert routing.finish(model, "", pytest.fail) is None


def test_shards_of_another_tokenizer_are_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match="another tokenizer"):
        prompts.heldout_rows(Model.from_preset("test"), corpus, 8, asked=True)


def test_refit_writes_a_router_and_leaves_the_weights(tmp_path: Path, chats: Path) -> None:
    model = Model.from_preset("test", seed=3)
    model.save(tmp_path / "model", card="# the card\n")
    report = routing.refit(tmp_path / "model", chats)
    after = Model.load(tmp_path / "model")
    assert after.router is not None and after.router.calibration.report == pytest.approx(report)
    assert report["prompts"] == report["groups"] == 15, "a quarter of the 60 that are not asked"
    assert 0.25 <= report["depth_share"] <= 1.0
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(after.net.state_dict()[name], tensor)
    assert (tmp_path / "model" / "README.md").read_text() == "# the card\n"


@pytest.mark.drill
def test_a_router_learns_nothing_of_what_is_asked(tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither do the baselines of the frontier, and what all are measured on is asked."""
    model = Model.from_preset("test", seed=3)
    model.save(tmp_path / "model")
    learned: list[int] = []

    def seen(config: ModelConfig, x: torch.Tensor, gaps: torch.Tensor, groups: torch.Tensor, **how: Any) -> Router:
        learned.extend(groups.tolist())
        return fit_router(config, x, gaps, groups, **how)

    monkeypatch.setattr(routing, "fit_router", seen)
    routing.refit(tmp_path / "model", chats)
    fitted, tested = routing.heldout_prompts(model, chats) or pytest.fail("too few")
    asked = halves.asked_groups(chats)
    assert len(set(learned)) == 60 and not asked & set(learned)
    assert not asked & set(fitted.groups.tolist())
    assert len(set(tested.groups.tolist())) == 60 and set(tested.groups.tolist()) <= asked


def test_a_folder_with_other_things_in_it_is_refused_before_anything_is_measured(
    tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model.from_preset("test").save(tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    monkeypatch.setattr(routing, "measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(CheckpointError, match=r"notes\.txt"):
        routing.refit(tmp_path / "model", chats)


def test_refit_needs_enough_rows(tmp_path: Path, chats: Path) -> None:
    Model.from_preset("test").save(tmp_path / "model")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:60]))
    with pytest.raises(DataError, match="rows to fit the router: got '30 of 30 documents"):
        routing.refit(tmp_path / "model", few)
    assert Model.load(tmp_path / "model").router is None


def rows(count: int, groups: int) -> prompts.ByTask:
    return {"chat": [prompts.Heldout(Encoded([50 + i % 9, 60, 61]), i % groups) for i in range(count)]}


def test_a_model_that_a_killed_command_took_away_is_put_back_before_it_gets_its_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model.from_preset("test").save(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / f".model.1.0123abcd{checkpoint.OLD}")
    x, gaps = torch.randn(64, 2 * CONFIG.width + 3), torch.rand(64, 2)
    made = fit_router(CONFIG, x, gaps, steps=1)
    monkeypatch.setattr(routing, "fit_router", lambda *_, **__: made)
    monkeypatch.setattr(second_look, "fit", lambda *_, **__: (None, None))
    given = prompts.Prompts(x, gaps, torch.zeros(64), torch.ones(64), ("a",) * 64, torch.arange(64))
    routing._fitted(lambda *_: (), str(tmp_path / "model"), given, 5)  # type: ignore[arg-type]
    assert Model.load(tmp_path / "model").router is not None


def test_a_router_is_taken_over_with_all_else_as_it_was(tmp_path: Path) -> None:
    said, model, old = list[str](), Model.from_preset("test", seed=3), Model.from_preset("test", seed=4)
    model.save(tmp_path / "model", card="# mine\n")
    old.save(tmp_path / "old", card="# old\n")
    routing.take_over(tmp_path / "model", tmp_path / "old", said.append)
    assert not said and Model.load(tmp_path / "model").router is None, "there was none"
    x = torch.randn(64, 2 * CONFIG.width + 3)
    old.router = fit_router(CONFIG, x, torch.rand(64, 2), steps=1)
    old.save(tmp_path / "old", card="# old\n")
    routing.take_over(tmp_path / "model", tmp_path / "old", said.append)
    after = Model.load(tmp_path / "model")
    assert after.router is not None and torch.equal(after.router(x[0])[0], old.router(x[0])[0])
    assert len(said) == 1 and (tmp_path / "model" / "README.md").read_text() == "# mine\n"
    for name, tensor in model.net.state_dict().items():
        assert torch.equal(after.net.state_dict()[name], tensor)
