"""What `shoal evaluate` says about its own numbers, and what depth costs in them."""

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shoal import Model, presets
from shoal.config import ModelConfig
from shoal.data.chats.rows import HELDOUT
from shoal.evaluate import evaluation, intervals, routing, tolerance
from shoal.evaluate.evaluation import Sizes
from shoal.evaluate.intervals import of_share
from shoal.evaluate.measures import Answer, row_of
from shoal.evaluate.prompts import Prompts
from shoal.evaluate.report import write_report
from shoal.evaluate.tables import print_tables
from shoal.evaluate.weak import weaknesses
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import cost
from shoal.model.net import Net
from shoal.model.router import Router, fit_router
from tests import corpus
from tests.corpus import write_corpus


def exits(*text: float, code: tuple[float, ...] = (3.0, 2.5, 2.0)) -> list[dict[str, Any]]:
    names = ("shallow", "middle", "full")
    rows = [{"exit": e, "bpb text": t, "bpb code": c} for e, t, c in zip(names, text, code, strict=True)]
    return [*rows, {"exit": "auto", "bpb text": None, "bpb code": None}]


def test_19_a_loss_that_rises_with_depth_is_said() -> None:
    assert weaknesses([], exits(2.7, 2.6, 2.5)) == []
    (sentence,) = weaknesses([], exits(2.7, 2.5, 2.6))
    assert sentence == "bpb text rises with depth: middle reads 2.500, full 2.600."
    (sentence,) = weaknesses([], exits(2.7, 2.6, 2.5, code=(2.0, 2.1, 1.9)))
    assert sentence.startswith("bpb code rises with depth: shallow")
    assert any("hardly matters" in said for said in weaknesses([], exits(2.51, 2.505, 2.5)))


def test_depth_is_priced_by_what_ran() -> None:
    """A fixed exit by its own FLOPs; the router by those of the exits that it chose, for each token that ran, and by what
    choosing cost each prompt. Two short answers at the first exit beside a long one at full depth are not two thirds."""
    model = Model.from_preset("test")
    asked = ((2, 1, 9), (2, 1, 9), (41, 4, 40))

    def row(depth: str, layers: int | None = None) -> dict[str, Any]:
        answers = [Answer("", tokens, layers or took, prompt=prompt) for tokens, took, prompt in asked]
        return evaluation._depth_row(c, depth, evaluation.Quality(answers=answers), {}, speeds, router)

    c = model.config
    speeds = {"by_exit": dict.fromkeys(c.exits, 1.0)}
    head = 2 * c.vocab * c.width
    price = {e: cost.flops_per_token(c, c.train_length, e) - head for e in c.exits}
    router = Router(c)
    rows = {"shallow": row("shallow", 1), "full": row("full", 4), "auto": row("auto")}
    whole = 100 * price[4] + 45 * head
    assert rows["shallow"]["flops_share"] == pytest.approx((100 * price[1] + 45 * head) / whole)
    assert rows["full"]["flops_share"] == 1.0
    routing = 2 * cost.routing_flops(c, 9, nll=True) + cost.routing_flops(c, 40, nll=True)
    ran = 10 * price[1] + 10 * price[1] + 80 * price[4] + 45 * head + routing
    assert rows["auto"]["flops_share"] == pytest.approx(ran / whole)
    assert (rows["shallow"]["layers"], rows["auto"]["layers"]) == (1, 3.4)
    nothing = evaluation._depth_row(c, "shallow", evaluation.Quality(), {}, speeds, router)
    assert nothing["flops_share"] == (price[1] + head) / (price[4] + head), "as much as a token takes"


def asks(task: str, count: int, question: str = "what {}?") -> list[dict[str, Any]]:
    def turns(number: int) -> list[dict[str, str]]:
        return [
            {"role": "user", "content": question.format(number)},
            {"role": "assistant", "content": "a shoal"},
        ]

    return [{"task": task, "group": f"{task}{n}{len(question)}", "messages": turns(n)} for n in range(count)]


@pytest.mark.drill
def test_images_without_words_and_questions_without_room_cost_no_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits over no bytes were shown as 1e302; one long question, or a task of one document, ended the command."""
    plain = corpus.document
    monkeypatch.setattr(
        corpus,
        "document",
        lambda kind, n: dataclasses.replace(plain(kind, n), **{"text": ""} if kind == "image" else {}),
    )
    data = write_corpus(tmp_path / "data", presets.get("test"), documents=20, heldout=24)
    rows = [*asks("a", 120), *asks("a", 4, "long {0} " * 900), *asks("b", 1), *asks("c", 1)]
    (data / HELDOUT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = presets.get("test").model
    Model(config, Net(config).init_(0), Tokenizer.load(data / "tokenizer.json")).save(tmp_path / "model")
    routing.refit(tmp_path / "model", data / HELDOUT)
    report = evaluation.compare({"fish": tmp_path / "model"}, data, sizes=Sizes(heldout_rows=4, decode_tokens=2))
    json.dumps(report, allow_nan=False)
    assert all(value < 1e9 for row in report["quality"]["rows"] for value in row["values"].values())
    assert not any(row["metric"] == "bpb image text" for row in report["quality"]["rows"])
    (said,) = [sentence for sentence in report["weak"] if "were not asked" in sentence]
    assert said[0] in "1234" and " of a " in said, "as many as are of the asked half"
    assert report["frontier"]["prompts"] >= 50


@pytest.mark.drill
def test_a_corpus_of_text_alone_is_measured_on_what_it_has(tmp_path: Path) -> None:
    """No chats, no code, no images: nothing is shown of them, and routing is compared on the beginnings of documents."""
    data = write_corpus(tmp_path / "data", presets.get("test"), documents=20, heldout=90, kinds=("text",))
    config = presets.get("test").model
    Model(config, Net(config).init_(0), Tokenizer.load(data / "tokenizer.json")).save(tmp_path / "model")
    sizes = Sizes(heldout_rows=4, decode_tokens=2)
    report = evaluation.compare({"fish": tmp_path / "model"}, data, sizes=sizes)
    assert next(row["metric"] for row in report["quality"]["rows"]) == "bpb text"
    assert not any(
        word in row["metric"] for row in report["quality"]["rows"] for word in ("bpb code", "bpb image", "patch")
    )
    assert [row["exit"] for row in report["depth"]["rows"]] == ["shallow", "middle", "full"]
    assert report["frontier"] == {}
    routing.refit(tmp_path / "model", data)
    report = evaluation.compare({"fish": tmp_path / "model"}, data, sizes=sizes)
    assert report["frontier"]["prompts"] >= 20 and report["depth"]["router"]["prompts"] >= 10
    write_report(tmp_path / "report.json", {"title": "fish", "corpus": {}, "stages": [], **report})
    print_tables(report, Console(file=io.StringIO()))
    assert "What routing is worth" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_what_is_weak_follows_from_what_stands_beside() -> None:
    """A rival that is better is named; a share is said to be above its rival only where its interval is."""
    bits = row_of("bpb text", "bits/byte", {"m": 2.5}, beside={"gzip": 2.9, "xz": 2.4, "5-gram": 2.49})
    (sentence,) = weaknesses([bits], exits(2.7, 2.6, 2.5))
    assert sentence == "bpb text: m reads 2.50, worse than xz and 5-gram."
    for hits, said in ((60, 0), (42, 1), (30, 1)):
        share = of_share([place < hits for place in range(100)], range(100))
        row = row_of("customer service exact", "share", {"m": share}, of="questions", beside={"majority answer": 0.4})
        found = weaknesses([row], exits(2.7, 2.6, 2.5))
        assert len(found) == said and all("not surely above majority answer, 40.0%" in one for one in found)
        assert (row["rows"], row["groups"]) == (100, 100) and row["intervals"]["m"] == list(share.interval)


def prompts(draws: torch.Generator, count: int, config: ModelConfig) -> Prompts:
    """Prompts whose features are noise; those of "hard" lose 0.3 and 0.1, the others nothing; two a group."""
    gaps = torch.tensor([[0.0, 0.0], [0.3, 0.1]]).repeat(count // 2, 1)
    features = torch.randn(count, 2 * config.width + 3, generator=draws)
    return Prompts(
        features,
        gaps,
        torch.full((count,), 20),
        torch.full((count,), 5),
        ("easy", "hard") * (count // 2),
        torch.arange(count) // 2,
    )


def test_the_tolerance_is_shown_by_task_since_no_task_is_bounded() -> None:
    """The router cannot tell the tasks apart: the mean is within the tolerance, and the hard task's is twice that."""
    config = Model.from_preset("test").config
    draws = torch.Generator().manual_seed(0)
    router = fit_router(config, (fit := prompts(draws, 400, config)).features, fit.gaps, steps=10)
    router.calibration.default_tolerance = 0.2
    router.calibration.thresholds = [(t, math.inf) for t, _ in router.calibration.thresholds]  # all take the first exit
    found = tolerance.lost(config, router, prompts(draws, 40, config))
    every, easy, hard = found["by_task"]
    assert [row["task"] for row in (every, easy, hard)] == [tolerance.EVERY, "easy", "hard"]
    assert [row["loss"] for row in (every, easy, hard)] == pytest.approx([0.15, 0.0, 0.3])
    assert [row["above"] for row in (every, easy, hard)] == pytest.approx([0.5, 0.0, 1.0])
    assert (every["prompts"], every["groups"], hard["groups"]) == (40, 20, 20) and every["depth_share"] == 0.25
    assert hard["above_interval"] == pytest.approx(list(intervals.exact(20, 20)))
    (sentence,) = tolerance.too_much(found)
    assert "hard loses 0.300 in the mean of its 20 prompts" in sentence
    at = {row["tolerance"]: row for row in found["by_tolerance"]}
    assert at[0.5]["above"] == 0.0 and at[0.1]["above"] == pytest.approx(0.5)
