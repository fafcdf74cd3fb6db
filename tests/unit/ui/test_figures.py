"""Numbers on the pages: what is not known is not shown as zero, and names cannot write markup."""

from __future__ import annotations

from typing import Any

from shoal.api.metrics import Metrics as Exposition
from shoal.engine.metrics import Metrics as Engine
from ui import look, service, training
from ui.service import Seen
from ui.talk import Card

CARD = Card("fish", 384, {"shallow": 1, "middle": 2, "full": 4}, "w8a8")


def scrape(**gauges: float) -> service.Metrics:
    engine = Engine(generation_tokens=50, depths={1: 3, 4: 1})
    engine.ended("stop", 4, 0.01, 0.1, 0.5, 9)
    return service.parse(Exposition().text({"fish": {**gauges, **engine.samples((1, 2, 4))}}).decode())


def test_what_the_engine_counts_arrives_under_its_own_name() -> None:
    metrics = scrape(num_requests_running=2, kv_cache_usage_perc=0.25)
    assert metrics["num_requests_running"] == 2 and metrics["requests_depth_1_total"] == 3
    assert metrics['request_success_total{finished_reason="stop"}'] == 1
    page = service.show([CARD], metrics, "", "ready", Seen(10.0, 30), service.observe(Seen(), metrics, 12.0, ""))
    assert "<dd>25%</dd>" in page and "<dd>10</dd>" in page  # K/V memory; 20 tokens in 2 s
    assert "width:75.0%" in page and "500.0 ms" in page


def test_models_are_summed_and_their_shares_averaged() -> None:
    stats = {name: {"kv_cache_usage_perc": use, "kv_units": 4.0} for name, use in (("a", 0.2), ("b", 0.4))}
    metrics = service.parse(Exposition().text(stats).decode())
    assert metrics["kv_units"] == 8 and abs(metrics["kv_cache_usage_perc"] - 0.3) < 1e-12


def test_what_is_not_known_is_not_shown_as_zero() -> None:
    page = service.show([CARD], {}, "metrics are switched off", "ready", Seen(), Seen())
    assert "No metrics: metrics are switched off" in page and ">0<" not in page
    assert page.count(look.UNKNOWN) > 10 and '<p class="note">Not known.</p>' in page and "process" not in page


def test_what_has_not_happened_yet_is_told_from_what_is_not_known() -> None:
    fresh = service.parse(
        Exposition().text({"fish": {"num_requests_running": 0, **Engine().samples((1, 2, 4))}}).decode()
    )
    page = service.show([CARD], fresh, "", "ready", Seen(), service.observe(Seen(), fresh, 1.0, ""))
    assert page.count(f"<td>{look.NONE_YET}</td>") == 4  # latencies
    assert "<dd>1 process</dd>" in page and "runs in one process" in page
    on_ray = fresh | {"num_replicas": 2}
    page = service.show([CARD], on_ray, "", "ready", Seen(), service.observe(Seen(), on_ray, 1.0, ""))
    assert "<dd>2</dd>" in page and "None since this page was opened; 2 at work." in page


def test_a_change_of_replicas_is_a_decision_and_its_load_is_told() -> None:
    seen = service.observe(Seen(), scrape(num_replicas=1), 1.0, "10:00:00")
    assert seen.decisions == []  # nothing to compare with
    seen = service.observe(
        seen, scrape(num_replicas=3, num_requests_running=8, num_requests_waiting=5), 2.0, "10:00:05"
    )
    assert seen.decisions == ["10:00:05  1 → 3 replicas, with 8 running, 5 waiting"]
    assert service.observe(seen, {}, 3.0, "").decisions == seen.decisions  # unknown is no change


def run(**more: Any) -> training.Run:
    curves = {name: [1.0, 2.0] for name in ("loss", "rate", "tokens_per_second", "tokens")}
    evals = [{"step": 2, "bpb": {"text": {"shallow": 3.0, "full": None}, "code": {"shallow": 2.0, "full": 1.5}}}]
    return {
        "name": "a/<b>",
        "state": "running",
        "step": 2,
        "progress": 0.5,
        "eta": 75.0,
        "spoke": 0.0,
        "start": {"parameters": 1_080_000, "mix": {"text": 0.6, "image": 0.4}},
        "curves": {"step": [1, 2], "patches": [0.5, None], **curves},
        "evals": evals,
        "end": None,
        **more,
    }


def test_a_run_shows_where_it_is_and_no_number_that_it_does_not_have() -> None:
    page = training.show(run(), CARD, {})
    assert "a/&lt;b&gt;" in page and "1 min 15 s" in page and "1.08 M" in page
    assert "Bits a byte, code" in page and "Bits a byte, text" not in page
    assert "width:60.0%" in page and "16.7% image patches" in page
    assert training._label(run()) == "a/<b> · running, 50%, 1 min 15 s left"


def test_a_run_that_has_just_begun_says_so() -> None:
    empty: dict[str, list[float]] = {name: [] for name in run()["curves"]}
    page = training.show(run(start=None, curves=empty, evals=[], step=None, eta=None), CARD, {})
    assert "No update yet" in page and "does not say" in page


def test_names_cannot_write_markup() -> None:
    bad = "<script>"
    for made in (
        look.tiles([(bad, bad)]),
        look.table(bad, (bad,), [(bad, bad)]),
        look.bars(bad, {bad: 1.0}, {bad: bad}, bad),
        look.curves(bad, bad, {bad: [(0, 1), (1, 2)]}),
        look.fault(bad),
        look.remark(bad, bad),
    ):
        assert bad not in made and "&lt;script&gt;" in made
