"""Numbers on the pages: what is not known is not shown as zero, and names cannot write markup."""

from __future__ import annotations

from typing import Any

from shoal.api.metrics import text
from shoal.engine.metrics import Metrics as Engine
from shoal.engine.metrics import Samples, sample
from ui import bubbles, look, readings, service, training
from ui.readings import Readings, Seen
from ui.talk import Card

CARD = Card("fish", 384, {"shallow": 1, "middle": 2, "full": 4}, "w8a8")
OTHER = Card("whale", 384, {"shallow": 2, "full": 4}, "none")


def engine(**gauges: float) -> Samples:
    counted = Engine(generation_tokens=50, depths={1: 3, 4: 1})
    counted.ended("stop", 4, 0.01, 0.1, 0.5, 9)
    return {**{sample(name): value for name, value in gauges.items()}, **counted.samples((1, 2, 4))}


def scrape(**models: Samples) -> Readings:
    return readings.parse(text(models, {}).decode())


def show(cards: list[Card], metrics: Readings, why: str = "") -> str:
    return service.show(cards, metrics, why, "ready", Seen(), readings.observe(Seen(), metrics, 1.0, ""))


def test_what_the_engine_counts_arrives_under_its_own_name() -> None:
    metrics = scrape(fish=engine(num_requests_running=2, kv_cache_usage_perc=0.25))
    fish = metrics["fish"]
    assert fish["num_requests_running"] == 2 and fish["requests_depth_1_total"] == 3
    assert fish['request_success_total{finished_reason="stop"}'] == 1
    now = readings.observe(Seen(10.0, {"fish": 30}), metrics, 12.0, "")
    page = service.show([CARD], metrics, "", "ready", Seen(10.0, {"fish": 30}), now)
    assert "<dd>25%</dd>" in page and "<dd>10</dd>" in page  # K/V memory; 20 tokens in 2 s
    assert "width:75.0%" in page and "500.0 ms" in page
    assert "Models at present" not in page, "one model is what the tiles show"


def test_each_of_several_models_has_its_own_numbers_and_the_tiles_all() -> None:
    metrics = scrape(
        fish=engine(num_replicas=1, num_requests_running=2, kv_cache_usage_perc=0.25),
        whale=engine(num_replicas=3, num_requests_running=5, kv_cache_usage_perc=0.5),
    )
    page = show([CARD, OTHER], metrics)
    assert "<dt>Running</dt><dd>7</dd>" in page and "<dt>Replicas</dt><dd>4</dd>" in page
    assert "<dt>K/V memory used</dt><dd>50%</dd>" in page, "the fuller pool is the one that requests wait for"
    assert "<td>1</td><td>2</td><td>not known</td><td>25%</td>" in page
    assert "<td>3</td><td>5</td><td>not known</td><td>50%</td>" in page
    assert "Depth of the requests to fish" in page and "Depth of the requests to whale" in page
    assert '<th scope="col">fish</th><th scope="col">whale</th>' in page


def test_a_model_that_says_nothing_is_not_known_beside_one_that_does() -> None:
    page = show([CARD, OTHER], scrape(fish=engine(num_replicas=2)))
    assert "<td>2</td>" in page and "<dt>Replicas</dt><dd>2</dd>" in page
    assert f"<td>{look.UNKNOWN}</td>" in page


def test_what_is_not_known_is_not_shown_as_zero() -> None:
    page = show([CARD], {}, "metrics are switched off")
    assert "No metrics: metrics are switched off" in page and ">0<" not in page
    assert page.count(look.UNKNOWN) > 10 and page.count('<p class="note">Not known.</p>') == 2


def test_a_change_of_replicas_is_a_decision_of_its_model_and_its_load_is_told() -> None:
    few = scrape(fish=engine(num_replicas=1), whale=engine(num_replicas=1))
    seen = readings.observe(Seen(), few, 1.0, "10:00:00")
    assert seen.changes == []  # nothing to compare with
    load = {"num_requests_running": 8.0, "num_requests_waiting": 5.0}
    many = scrape(fish=engine(num_replicas=1, num_replicas_starting=2, **load), whale=engine(num_replicas=1))
    assert "<dt>Replicas</dt><dd>2 + 2</dd>" in show([CARD, OTHER], many)
    refused = scrape(fish=engine(num_replicas=2, weights_update_refused=1))
    assert "<dt>Replicas</dt><dd>2, 1 refused new weights</dd>" in show([CARD], refused)
    seen = readings.observe(seen, many, 2.0, "10:00:05")
    assert seen.changes == ["10:00:05  fish: 1 → 3 replicas, with 8 running, 5 waiting"]
    started = scrape(fish=engine(num_replicas=3, num_replicas_starting=0), whale=engine(num_replicas=1))
    assert readings.observe(seen, started, 3.0, "").changes == seen.changes, "it was decided before"
    assert readings.observe(seen, {}, 3.0, "").changes == seen.changes, "unknown is no change"
    back = readings.observe(readings.observe(seen, {}, 3.0, ""), few, 4.0, "10:00:20").changes
    assert back[0] == "10:00:20  fish: 3 → 1 replicas, stopped or lost, with an unknown load", (
        "also after a reading that failed"
    )


def test_what_replicas_tell_under_their_names_is_one_number_of_their_model() -> None:
    scraped = """
# TYPE shoal:steps counter
shoal:steps_total{model_name="fish",replica="a"} 3
shoal:steps_total{model_name="fish",replica="b"} 4
# TYPE shoal:kv_cache_usage_perc gauge
shoal:kv_cache_usage_perc{model_name="fish",replica="a"} 0.25
shoal:kv_cache_usage_perc{model_name="fish",replica="b"} 0.75
# TYPE shoal:request_errors counter
shoal:request_errors_total{code="429",gateway="x",model_name="fish"} 2
shoal:request_errors_total{code="429",gateway="y",model_name="fish"} 3
"""
    told = {"steps_total": 7.0, "kv_cache_usage_perc": 0.5, 'request_errors_total{code="429"}': 5.0}
    assert readings.parse(scraped) == {"fish": told}


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
    page = training.show(run(), [CARD], {})
    assert "a/&lt;b&gt;" in page and "1 min 15 s" in page and "running · 1.08 M parameters" in page
    assert "Bits a byte, code" in page and "Bits a byte, text" not in page
    assert "<td>3.000</td><td>2.000</td></tr>" in page and f"<td>{look.UNKNOWN}</td><td>1.500</td></tr>" in page
    assert "width:60.0%" in page and "16.7% image patches" in page
    assert training._label(run()) == "a/<b> · running, 50%, 1 min 15 s left"


def test_names_cannot_write_markup() -> None:
    bad = "<script>"
    for made in (
        look.tiles([(bad, bad)]),
        look.table(bad, (bad,) * 9, [(bad, bad)], {bad: bad}),
        look.bars(bad, {bad: 1.0}, {bad: bad}, bad),
        look.curves(bad, bad, {bad: [(0, 1), (1, 2)]}),
        bubbles.fault(bad),
        look.remark(bad, bad),
    ):
        assert bad not in made and "&lt;script&gt;" in made
