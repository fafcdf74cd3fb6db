"""The service at a glance: what runs, what waits, memory, speed and depth, read from /metrics, /ready and /v1/models.

Notable: a number that the API does not give is shown as "not known", never as zero. Rates and autoscaling decisions are
differences between two readings, so they begin when the page opens.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import gradio as gr
import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from ui import look, site, talk
from ui.look import NONE_YET, UNKNOWN, Place
from ui.site import QUIET, Key, Site
from ui.talk import Card

PLACE = Place("Service", "service", "tools")
EVERY = 2.0  # seconds between two readings
PREFIX = "shoal:"
MOST_DECISIONS = 20

Metrics = dict[str, float]  # sample name, with its label if it has one, without the prefix -> value


@dataclass
class Seen:
    """What one reading leaves for the next."""

    at: float = 0.0  # monotonic seconds
    tokens: float | None = None
    replicas: float | None = None
    decisions: list[str] = field(default_factory=list)  # newest first


def build(at: Site) -> None:
    """The page, inside the Blocks that are open."""
    head = at.head(PLACE)
    key = Key.ask()
    body = gr.HTML(look.empty("Reading the service…", "One moment."), elem_id="service")
    seen = gr.State(None)

    async def refresh(given: str, before: Any) -> tuple[Any, ...]:
        last = Seen(**before) if before else Seen()
        try:
            cards = await at.cards(given)
        except openai.OpenAIError as error:
            why = look.empty("The models are not known", "") + look.fault(talk.reason(error))
            return at.header(PLACE), why, asdict(last), Key.shown(given, error)
        metrics, why = await read_metrics(at)
        now = observe(last, metrics, time.monotonic(), time.strftime("%H:%M:%S"))
        page = show(cards, metrics, why, await _ready(at), last, now)
        return at.header(PLACE, site.about(cards[0])), page, asdict(now), gr.skip()

    key.then(at, refresh, [seen], [head, body, seen, key.box])
    gr.Timer(EVERY).tick(refresh, [key.box, seen], [head, body, seen, key.box], **QUIET)


async def read_metrics(at: Site) -> tuple[Metrics, str]:
    """What /metrics says, and why it says nothing (empty if it does). Values of several models are summed, shares averaged."""
    try:
        answer: httpx.Response = await at.api.get(at.url.removesuffix("/v1") + "/metrics", cast_to=httpx.Response)
    except openai.OpenAIError as error:
        return {}, talk.reason(error)
    return parse(answer.text), ""


def parse(text: str) -> Metrics:
    """Prometheus' text as values by sample name; ``name{label="value"}`` where there is a label besides the model's."""
    found: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            inside = ",".join(f'{name}="{value}"' for name, value in labels.items())
            name = sample.name.removeprefix(PREFIX) + (f"{{{inside}}}" if inside else "")
            found.setdefault(name, []).append(sample.value)
    return {
        name: sum(values) / len(values) if name.endswith("_perc") else sum(values) for name, values in found.items()
    }


def observe(last: Seen, metrics: Metrics, now: float, clock: str) -> Seen:
    """What is known after a reading at `now`; a change in the number of replicas is a decision of the autoscaler."""
    replicas = metrics.get("num_replicas")
    decisions = list(last.decisions)
    if None not in (last.replicas, replicas) and replicas != last.replicas:
        load = ", ".join(
            f"{metrics[name]:.0f} {word}"
            for name, word in (("num_requests_running", "running"), ("num_requests_waiting", "waiting"))
            if name in metrics
        )
        decisions.insert(0, f"{clock}  {last.replicas:.0f} → {replicas:.0f} replicas, with {load or 'an unknown load'}")
    return Seen(now, metrics.get("generation_tokens_total"), replicas, decisions[:MOST_DECISIONS])


def show(cards: list[Card], metrics: Metrics, why: str, ready: str, last: Seen, now: Seen) -> str:
    """The whole page as HTML."""
    sections = [look.tiles([("State", ready), *_load(metrics, last, now)])]
    if why:
        sections.append(look.fault(f"No metrics: {why}"))
    sections.append('<div class="figures">')
    sections.append(depth_bars(metrics, cards[0]))
    sections.append(look.table("Requests since the start", ("requests", "count"), _requests(metrics)))
    sections.append(look.table("Latency since the start", ("time", "mean"), _latencies(metrics)))
    sections.append("</div>")
    sections.append(_scaling(metrics, now))
    rows = [
        (card.name, "INT8" if card.quantization != "none" else "fp", f"{card.layers}", f"{card.context}")
        for card in cards
    ]
    sections.append(look.table("Models", ("name", "weights", "layers", "context, tokens"), rows))
    return "".join(sections)


def depth_bars(metrics: Metrics, card: Card) -> str:
    """How many requests ran to each depth."""
    counts = {
        f"{name}, {layers} layer{'s' * (layers != 1)}": metrics[f"requests_depth_{layers}_total"]
        for name, layers in card.depths.items()
        if f"requests_depth_{layers}_total" in metrics
    }
    caption = "Depth of the requests served"
    if not counts:
        return look.bars(caption, {}, {}, f"{UNKNOWN.capitalize()}.")
    values = {name: f"{count:,.0f}" for name, count in counts.items()}
    return look.bars(caption, look.shares(counts), values, "" if any(counts.values()) else "No request has ended yet.")


def _load(metrics: Metrics, last: Seen, now: Seen) -> list[tuple[str, str]]:
    speed = (now.tokens - last.tokens) / (now.at - last.at) if None not in (now.tokens, last.tokens) else None  # type: ignore[operator]
    return [
        ("Replicas", "1 process" if _is_one_process(metrics) else _count(metrics, "num_replicas")),
        ("Running", _count(metrics, "num_requests_running")),
        ("Waiting", _count(metrics, "num_requests_waiting")),
        ("K/V memory used", f"{metrics['kv_cache_usage_perc']:.0%}" if "kv_cache_usage_perc" in metrics else UNKNOWN),
        ("Tokens/s now", UNKNOWN if speed is None or speed < 0 else f"{speed:,.0f}"),
        ("Prompt found in cache", _mean(metrics, "prefix_cache_hits_total", "prefix_cache_queries_total", "{:.0%}")),
    ]


def _requests(metrics: Metrics) -> list[tuple[str, str]]:
    names = {
        "ended by the model": 'request_success_total{finished_reason="stop"}',
        "ended by length": 'request_success_total{finished_reason="length"}',
        "cancelled": "requests_cancelled_total",
        "out of time": "requests_deadline_total",
        "failed": "requests_error_total",
        "refused, queue full": "requests_refused_total",
        "preempted": "num_preemptions_total",
    }
    return [(word, _count(metrics, name)) for word, name in names.items()]


def _latencies(metrics: Metrics) -> list[tuple[str, str]]:
    names = {
        "in the queue": "request_queue_time_seconds",
        "to the first token": "time_to_first_token_seconds",
        "from token to token": "inter_token_latency_seconds",
        "whole request": "e2e_request_latency_seconds",
    }
    return [(word, _mean(metrics, f"{name}_sum", f"{name}_count", "{:,.1f} ms", 1000)) for word, name in names.items()]


def _is_one_process(metrics: Metrics) -> bool:
    """Without Ray there is one engine, and nobody counts replicas."""
    return "num_requests_running" in metrics and "num_replicas" not in metrics


def _scaling(metrics: Metrics, now: Seen) -> str:
    if _is_one_process(metrics):
        text = "None: this service runs in one process, without Ray."
    elif now.replicas is None:
        text = f"{UNKNOWN.capitalize()}."
    elif not now.decisions:
        text = f"None since this page was opened; {now.replicas:.0f} at work."
    else:
        return look.table("Autoscaling since this page was opened", ("decision",), [(line,) for line in now.decisions])
    return look.remark("Autoscaling", text)


def _count(metrics: Metrics, name: str) -> str:
    return f"{metrics[name]:,.0f}" if name in metrics else UNKNOWN


def _mean(metrics: Metrics, part: str, whole: str, form: str, times: float = 1.0) -> str:
    """`part` over `whole`, or which of the two reasons there is for having no such number."""
    if part not in metrics or whole not in metrics:
        return UNKNOWN
    return form.format(times * metrics[part] / metrics[whole]) if metrics[whole] else NONE_YET


async def _ready(at: Site) -> str:
    try:
        await at.api.get(at.url.removesuffix("/v1") + "/ready", cast_to=httpx.Response)
    except openai.APIStatusError:
        return "not ready"
    except openai.OpenAIError:
        return UNKNOWN
    return "ready"
