"""What `shoal evaluate` says about its own numbers, and what depth costs in them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model, evaluation
from shoal.evaluation import Sizes
from shoal.model import cost
from shoal.model.depth import fit_router
from shoal.train.evaluate import Answer


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


def test_the_routers_tables_are_in_the_report() -> None:
    config = Model.from_preset("test").config
    router = fit_router(config, torch.randn(40, 2 * config.width + 3), torch.rand(40, 2), steps=10)
    shown = evaluation._routing(router)
    assert shown["router"] == router.calibration.report
    assert [tuple(row.values()) for row in shown["by_tolerance"]] == router.calibration.by_tolerance
    assert [row["budget"] for row in shown["by_budget"]] == [budget for budget, *_ in router.calibration.by_budget]
    assert evaluation._routing(None) == {"router": {}}
