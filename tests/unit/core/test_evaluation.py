"""What `shoal evaluate` says about its own numbers, and what depth costs in them."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from shoal import Model, evaluation, presets
from shoal.evaluation import Sizes
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import cost
from shoal.model.depth import fit_router
from shoal.model.net import Net
from shoal.quickstart import print_tables, write_report
from shoal.train import routing
from shoal.train.evaluate import Answer
from tests.corpus import write_corpus


def exits(*text: float, code: tuple[float, ...] = (3.0, 2.5, 2.0)) -> list[dict[str, Any]]:
    names = ("shallow", "middle", "full")
    rows = [{"exit": e, "bpb text": t, "bpb code": c} for e, t, c in zip(names, text, code, strict=True)]
    return [*rows, {"exit": "auto", "bpb text": None, "bpb code": None}]


def test_19_a_loss_that_rises_with_depth_is_said() -> None:
    assert evaluation.weaknesses([], exits(2.7, 2.6, 2.5)) == []
    (sentence,) = evaluation.weaknesses([], exits(2.7, 2.5, 2.6))
    assert sentence == "bpb text rises with depth: middle reads 2.500, full 2.600."
    (sentence,) = evaluation.weaknesses([], exits(2.7, 2.6, 2.5, code=(2.0, 2.1, 1.9)))
    assert sentence.startswith("bpb code rises with depth: shallow")
    assert any("hardly matters" in said for said in evaluation.weaknesses([], exits(2.51, 2.505, 2.5)))


def test_depth_is_priced_by_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fixed exit by its own FLOPs; the router by those of the exits that it chose, and by what choosing cost."""
    model = Model.from_preset("test")
    answers = [Answer("", 1, depth) for depth in (1, 1, 4)]
    monkeypatch.setattr(evaluation, "quality", lambda *_: {"answers": answers})
    monkeypatch.setattr(evaluation, "decode_speed", lambda *_, **__: 1.0)
    c = model.config
    price = {e: cost.flops_per_token(c, c.train_length, e) for e in c.exits}
    rows = {depth: evaluation._depth_row(model, Path(), depth, Sizes(), None) for depth in ("shallow", "full", "auto")}
    assert rows["shallow"]["flops_share"] == price[1] / price[4] and rows["full"]["flops_share"] == 1.0
    routing = cost.routing_flops(c, c.train_length) / c.train_length
    assert rows["auto"]["flops_share"] == pytest.approx(((2 * price[1] + price[4]) / 3 + routing) / price[4])
    assert (rows["shallow"]["layers"], rows["auto"]["layers"]) == (1, 2.0)


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


def test_the_routers_tables_are_in_the_report() -> None:
    config = Model.from_preset("test").config
    router = fit_router(config, torch.randn(40, 2 * config.width + 3), torch.rand(40, 2), steps=10)
    shown = evaluation._routing(router)
    assert shown["router"] == router.calibration.report
    assert [tuple(row.values()) for row in shown["by_tolerance"]] == router.calibration.by_tolerance
    assert [row["budget"] for row in shown["by_budget"]] == [budget for budget, *_ in router.calibration.by_budget]
    assert evaluation._routing(None) == {"router": {}}
