"""The service at a glance: what runs, what waits, memory, speed and depth, read from /metrics, /ready and /v1/models.

Notable: a number that the API does not give is shown as "not known", never as zero. Rates, and replicas that came or went, are
differences between two readings, so they begin when the page opens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import gradio as gr
import httpx
import openai

from ui import bubbles, look, readings, site, talk
from ui.look import NONE_YET, SOON, UNKNOWN, Place
from ui.readings import Metrics, Readings, Seen
from ui.site import QUIET, Site
from ui.talk import Card

PLACE = Place("Service", "service", "tools")
EVERY = 2.0  # seconds between two readings


def build(at: Site) -> None:
    """The page, inside the Blocks that are open."""
    head = at.head(PLACE)
    body = gr.HTML(look.empty("Reading the service…", "One moment."), elem_id="service")
    seen = gr.Textbox(visible="hidden")  # the page remembers, and not the server, which may be another one next time

    async def refresh(request: gr.Request, before: str) -> tuple[Any, ...]:
        last = readings.remembered(before)
        try:
            cards = await at.cards(request)
        except openai.OpenAIError as error:
            said = at.header(PLACE, request, talk.reason(error), fault=True)
            return said, look.nothing(EVERY), gr.skip()
        metrics, why = await readings.read_metrics(at)
        now = readings.observe(last, metrics, time.time(), time.strftime("%H:%M:%S"))
        page = show(cards, metrics, why, await _ready(at), last, now)
        return at.header(PLACE, request, site.all_of(cards)), page, json.dumps(asdict(now))

    at.page.load(refresh, seen, [head, body, seen], **QUIET)
    gr.Timer(EVERY).tick(refresh, seen, [head, body, seen], **QUIET)


def show(cards: list[Card], metrics: Readings, why: str, ready: str, last: Seen, now: Seen) -> str:
    """The whole page as HTML."""
    named = {card.name: metrics.get(card.name, {}) for card in cards}
    sections = [look.tiles([("State", ready), *_load(named, last, now)], {"ready": "good", "not ready": "bad"})]
    if why:
        sections.append(bubbles.fault(f"No metrics: {why}"))
    if len(cards) > 1:
        sections.append(_models(cards, named, last, now))
    sections.append('<div class="figures">')
    sections.append(_by_model("Requests since the start", named, _requests))
    sections.append(_by_model("Mean latency since the start", named, _latencies))
    sections.append(_scaling(now, readings.total(metrics, "num_replicas_starting") or 0.0))
    sections += [depth_bars(named[card.name], card, len(cards) > 1) for card in cards]
    sections.append("</div>")
    return "".join(sections)


def depth_bars(metrics: Metrics, card: Card, name_it: bool = False) -> str:
    """How many requests of a model ran to each depth."""
    counts = {
        f"{name}, {layers} layer{'s' * (layers != 1)}": metrics[f"requests_depth_{layers}_total"]
        for name, layers in card.depths.items()
        if f"requests_depth_{layers}_total" in metrics
    }
    caption = f"Depth of the requests to {card.name}" if name_it else "Depth of the requests served"
    if not counts:
        return look.bars(caption, {}, {}, f"{UNKNOWN.capitalize()}.")
    values = {name: f"{count:,.0f}" for name, count in counts.items()}
    return look.bars(caption, look.shares(counts), values, "" if any(counts.values()) else "No request has ended yet.")


def _load(metrics: Readings, last: Seen, now: Seen) -> list[tuple[str, str]]:
    speeds = [made for model in metrics if (made := readings.speed(last, now, model)) is not None]
    told = readings.total(metrics, "generation_tokens_total") is not None
    found, asked = (readings.total(metrics, f"prefix_cache_{name}_total") for name in ("hits", "queries"))
    return [
        ("Replicas", _replicas(metrics)),
        ("Running", _count(readings.total(metrics, "num_requests_running"))),
        ("Waiting", _count(readings.total(metrics, "num_requests_waiting"))),
        ("K/V memory used", _share(readings.total(metrics, "kv_cache_usage_perc"))),
        ("Tokens/s now", _count(sum(speeds)) if speeds else SOON if told else UNKNOWN),
        ("Prompt from cache", _mean(found, asked, "{:.0%}")),
    ]


def _replicas(metrics: Readings) -> str:
    """Those at work, those on their way, and those that could not load the weights that a deployed file names."""
    starting, refused = (readings.total(metrics, name) for name in ("num_replicas_starting", "weights_update_refused"))
    more = (f" + {starting:.0f}" if starting else "") + (f", {refused:.0f} refused new weights" if refused else "")
    return _count(readings.total(metrics, "num_replicas")) + more


def _models(cards: list[Card], metrics: Readings, last: Seen, now: Seen) -> str:
    """What each of several models does at present."""
    rows = []
    for card in cards:
        of, made = metrics[card.name], readings.speed(last, now, card.name)
        counts = [_count(of.get(f"num_{name}")) for name in ("replicas", "requests_running", "requests_waiting")]
        tokens = _count(made) if made is not None else SOON if "generation_tokens_total" in of else UNKNOWN
        rows.append((card.name, *counts, _share(of.get("kv_cache_usage_perc")), tokens))
    below = {card.name: site.kind(card) for card in cards}
    head = ("model", "replicas", "running", "waiting", "K/V memory", "tokens/s")
    return look.table("Models at present", head, rows, below)


def _by_model(caption: str, metrics: Readings, rows: Callable[[Metrics], dict[str, str]]) -> str:
    """A table of the `rows` that each model has, a column for each."""
    columns = {model: rows(of) for model, of in metrics.items()}
    names = next(iter(columns.values()))
    head = ("", *columns) if len(columns) > 1 else ()
    return look.table(caption, head, [(name, *(column[name] for column in columns.values())) for name in names])


def _requests(metrics: Metrics) -> dict[str, str]:
    names = {
        "ended by the model": 'request_success_total{finished_reason="stop"}',
        "ended by length": 'request_success_total{finished_reason="length"}',
        "cancelled": "requests_cancelled_total",
        "out of time": "requests_deadline_total",
        "failed": "requests_error_total",
        "refused, queue full": "requests_refused_total",
        "preempted": "num_preemptions_total",
    }
    return {word: _count(metrics.get(name)) for word, name in names.items()}


def _latencies(metrics: Metrics) -> dict[str, str]:
    names = {
        "in the queue": "request_queue_time_seconds",
        "to the first token": "time_to_first_token_seconds",
        "from token to token": "inter_token_latency_seconds",
        "whole request": "e2e_request_latency_seconds",
    }
    return {
        word: _mean(metrics.get(f"{name}_sum"), metrics.get(f"{name}_count"), "{:,.1f} ms", 1000)
        for word, name in names.items()
    }


def _scaling(now: Seen, starting: float) -> str:
    """What became of the replicas, by the readings of this page."""
    caption = "Replicas since this page was opened"
    if now.changes:
        return look.table(caption, (), [(line,) for line in now.changes])
    if not now.replicas:
        return look.remark(caption, f"{UNKNOWN.capitalize()}.")
    more = f" {starting:.0f} of them {'is' if starting == 1 else 'are'} still starting." if starting else ""
    return look.remark(caption, f"None was added, stopped or lost.{more}")


def _count(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.0%}"


def _mean(part: float | None, whole: float | None, form: str, times: float = 1.0) -> str:
    """`part` over `whole`, or which of the two reasons there is for having no such number."""
    if part is None or whole is None:
        return UNKNOWN
    return form.format(times * part / whole) if whole else NONE_YET


async def _ready(at: Site) -> str:
    try:
        await at.api.get(at.url.removesuffix("/v1") + "/ready", cast_to=httpx.Response)
    except openai.APIStatusError:
        return "not ready"
    except openai.OpenAIError:
        return UNKNOWN
    return "ready"
