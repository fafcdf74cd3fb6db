"""What /metrics says of each model, and what follows from two readings of it: speed, and changes in the number of replicas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

from ui import talk
from ui.site import Site

PREFIX = "shoal:"
MODEL = "model_name"  # the label that says whose sample it is
MOST_CHANGES = 20

Metrics = dict[str, float]  # of one model: sample name, with its label if it has one, without the prefix -> value
Readings = dict[str, Metrics]  # by the model's name


@dataclass
class Seen:
    """What one reading leaves for the next; `tokens` and `replicas` are those of each model that told."""

    at: float = 0.0  # monotonic seconds
    tokens: Metrics = field(default_factory=dict)
    replicas: Metrics = field(default_factory=dict)  # at work or on their way
    changes: list[str] = field(default_factory=list)  # of the number of replicas, newest first


async def read_metrics(at: Site) -> tuple[Readings, str]:
    """What /metrics says, and why it says nothing (empty if it does)."""
    try:
        answer: httpx.Response = await at.api.get(at.url.removesuffix("/v1") + "/metrics", cast_to=httpx.Response)
    except openai.OpenAIError as error:
        return {}, talk.reason(error)
    return parse(answer.text), ""


def parse(text: str) -> Readings:
    """Prometheus' text by model, then by sample name: ``name{label="value"}`` where there is a label besides the model's."""
    found: Readings = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if MODEL in sample.labels:
                inside = ",".join(f'{name}="{value}"' for name, value in sample.labels.items() if name != MODEL)
                name = sample.name.removeprefix(PREFIX) + (f"{{{inside}}}" if inside else "")
                found.setdefault(sample.labels[MODEL], {})[name] = sample.value
    return found


def total(readings: Readings, name: str) -> float | None:
    """Of all models that tell it; None where none does. Of a share (``_perc``) the highest: its requests wait first."""
    values = [metrics[name] for metrics in readings.values() if name in metrics]
    if not values:
        return None
    return max(values) if name.endswith("_perc") else sum(values)


def observe(last: Seen, readings: Readings, now: float, clock: str) -> Seen:
    """What is known after a reading at `now`; a change in the number of replicas is a decision of the autoscaler."""
    replicas = {model: _wanted(metrics) for model, metrics in readings.items() if "num_replicas" in metrics}
    changed = [
        _change(clock, model, last.replicas[model], number, readings[model])
        for model, number in replicas.items()
        if last.replicas.get(model, number) != number
    ]
    tokens = {model: m["generation_tokens_total"] for model, m in readings.items() if "generation_tokens_total" in m}
    return Seen(now, tokens, {**last.replicas, **replicas}, [*changed, *last.changes][:MOST_CHANGES])


def speed(last: Seen, now: Seen, model: str) -> float | None:
    """Tokens a second of `model` between two readings; None without two, or when its engine began anew."""
    if model not in last.tokens or model not in now.tokens or now.at <= last.at:
        return None
    made = now.tokens[model] - last.tokens[model]
    return made / (now.at - last.at) if made >= 0 else None


def _wanted(metrics: Mapping[str, float]) -> float:
    return metrics["num_replicas"] + metrics.get("num_replicas_starting", 0.0)


def _change(clock: str, model: str, before: float, after: float, metrics: Mapping[str, float]) -> str:
    """``10:00:05  fish: 1 to 3 replicas, with 8 running, 5 waiting``."""
    names = {"num_requests_running": "running", "num_requests_waiting": "waiting"}
    load = ", ".join(f"{metrics[name]:.0f} {word}" for name, word in names.items() if name in metrics)
    return f"{clock}  {model}: {before:.0f} → {after:.0f} replicas, with {load or 'an unknown load'}"
