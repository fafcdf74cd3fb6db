"""What /metrics says of each model, and what follows from two readings of it: speed, and changes in the number of replicas."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from ui import talk
from ui.site import Site

PREFIX = "shoal:"
MODEL = "model_name"  # the label that says whose sample it is
NOT_OURS = (MODEL, "replica", "gateway")  # labels of who tells
MOST_CHANGES = 20

Metrics = dict[str, float]  # of one model: sample name, with its label if it has one, without the prefix -> value
Readings = dict[str, Metrics]  # by the model's name


@dataclass
class Seen:
    """What one reading leaves for the next; `tokens` and `replicas` are those of each model that told."""

    at: float = 0.0  # seconds, of a clock that the next reading has too, whichever server makes it
    tokens: Metrics = field(default_factory=dict)
    replicas: Metrics = field(default_factory=dict)  # at work or on their way
    working: Metrics = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)  # of the number of replicas, newest first


async def read_metrics(at: Site) -> tuple[Readings, str]:
    """What /metrics says, and why it says nothing (empty if it does)."""
    try:
        answer: httpx.Response = await at.api.get(at.url.removesuffix("/v1") + "/metrics", cast_to=httpx.Response)
    except openai.OpenAIError as error:
        return {}, talk.reason(error)
    return parse(answer.text), ""


def remembered(text: str) -> Seen:
    """What a page brings of the last reading, as `json.dumps` of its fields; nothing where it brings anything else."""
    try:
        return Seen(**json.loads(text))
    except (TypeError, ValueError):
        return Seen()


def parse(text: str) -> Readings:
    """Prometheus' text by model, then by sample name: ``name{label="value"}`` where there is a label besides the model's. What
    several replicas or gateways tell is added up, and of shares the mean is taken."""
    found: Readings = {}
    tellers = Counter[tuple[str, str]]()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if MODEL in sample.labels:
                inside = ",".join(f'{name}="{value}"' for name, value in sample.labels.items() if name not in NOT_OURS)
                name = sample.name.removeprefix(PREFIX) + (f"{{{inside}}}" if inside else "")
                metrics = found.setdefault(sample.labels[MODEL], {})
                metrics[name] = metrics.get(name, 0.0) + sample.value
                tellers[sample.labels[MODEL], name] += 1
    for (model, name), number in tellers.items():
        if name.endswith("_perc"):
            found[model][name] /= number
    return found


def total(readings: Readings, name: str) -> float | None:
    """Of all models that tell it; None where none does. Of a share (``_perc``) the highest: its requests wait first."""
    values = [metrics[name] for metrics in readings.values() if name in metrics]
    if not values:
        return None
    return max(values) if name.endswith("_perc") else sum(values)


def observe(last: Seen, readings: Readings, now: float, clock: str) -> Seen:
    """What is known after a reading at `now`: also which replicas were added or lost since the `last` one."""
    told = {model: metrics for model, metrics in readings.items() if "num_replicas" in metrics}
    changed = [
        f"{clock}  {model}: {what}, with {_load(metrics)}"
        for model, metrics in told.items()
        if (what := _change(last, model, metrics))
    ]
    tokens = {model: m["generation_tokens_total"] for model, m in readings.items() if "generation_tokens_total" in m}
    replicas = {**last.replicas, **{model: _wanted(metrics) for model, metrics in told.items()}}
    working = {**last.working, **{model: metrics["num_replicas"] for model, metrics in told.items()}}
    return Seen(now, tokens, replicas, working, [*changed, *last.changes][:MOST_CHANGES])


def speed(last: Seen, now: Seen, model: str) -> float | None:
    """Tokens a second of `model` between two readings; None without two, or when its engine began anew."""
    if model not in last.tokens or model not in now.tokens or now.at <= last.at:
        return None
    made = now.tokens[model] - last.tokens[model]
    return made / (now.at - last.at) if made >= 0 else None


def _wanted(metrics: Mapping[str, float]) -> float:
    return metrics["num_replicas"] + metrics.get("num_replicas_starting", 0.0)


def _change(last: Seen, model: str, metrics: Metrics) -> str:
    """``1 → 3 replicas``, ``1 of 2 replicas lost, another starts``; empty where a model has as many as before."""
    now, working = _wanted(metrics), metrics["num_replicas"]
    before = last.replicas.get(model, now)
    if now != before:  # one that is gone was stopped, or lost and not missed yet: the API tells no more
        return f"{before:.0f} → {now:.0f} replicas{', stopped or lost' if now < before else ''}"
    lost = last.working.get(model, working) - working
    return (
        f"{lost:.0f} of {before:.0f} replicas lost, {'another starts' if lost == 1 else 'others start'}"
        if lost > 0
        else ""
    )


def _load(metrics: Metrics) -> str:
    """``8 running, 5 waiting``."""
    names = {"num_requests_running": "running", "num_requests_waiting": "waiting"}
    return (
        ", ".join(f"{metrics[name]:.0f} {word}" for name, word in names.items() if name in metrics) or "an unknown load"
    )
