"""Spans of a request and of its parts, where OpenTelemetry is installed and set up, as `opentelemetry-instrument` does.

    POST /v1/chat/completions
      prepare   until its prompt is made and accepted: the body, the turn of who asks, the tokenizer
      queue     until the engine has a place for it           ┐
      prefill   until the first token                          │ of each choice
      decode    until the last                                ┘

An engine tells how long its stages took when an answer ends; so what is cut off before has only the first.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.engine.events import Finished


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


propagate, trace = _installed("opentelemetry.propagate"), _installed("opentelemetry.trace")  # None: no spans
NAMES = {  # OpenTelemetry's, where it has one
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "error": "error.type",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
}


@dataclass(frozen=True)
class Stage:
    """A part of a request, from `began` to `ended`, in seconds of `time.perf_counter`."""

    name: str
    began: float
    ended: float
    choice: int | None = None


def begun(method: str, headers: Mapping[bytes, str]) -> Any:
    """The span of a request that comes, of the trace in its headers; None where nobody would see it."""
    if trace is None:
        return None
    context = propagate.extract({name.decode("latin-1"): value for name, value in headers.items()})
    span = trace.get_tracer("shoal.api").start_span(method, context=context, kind=trace.SpanKind.SERVER)
    return span if span.is_recording() else None


def stages(came: float, accepted: float | None, ends: Sequence[tuple[int, float, Finished]]) -> list[Stage]:
    """The parts of a request that `came` then and was `accepted`; `ends`: of each choice its number, when its end was told, and
    that."""
    if accepted is None:
        return []
    found = [Stage("prepare", came, accepted)]
    for choice, now, end in ends:
        submitted = max(accepted, now - end.total_seconds)
        admitted = min(now, submitted + end.queue_seconds)
        found.append(Stage("queue", submitted, admitted, choice))
        if not end.depth:
            continue  # it never ran
        first = min(now, max(admitted, submitted + end.first_token_seconds)) if end.first_token_seconds else now
        found.append(Stage("prefill", admitted, first, choice))
        if end.first_token_seconds:
            found.append(Stage("decode", first, now, choice))
    return found


def ended(span: Any, name: str, known: Mapping[str, Any], parts: Sequence[Stage], *, failed: bool) -> None:
    """End the span of a request, of which that much is `known`, and tell of its `parts`."""
    tracer, context = trace.get_tracer("shoal.api"), trace.set_span_in_context(span)
    zero = time.time_ns() - round(1e9 * time.perf_counter())
    for part in parts:
        more = {} if part.choice is None else {"shoal.choice": part.choice}
        child = tracer.start_span(
            part.name, context=context, start_time=zero + round(1e9 * part.began), attributes=more
        )
        child.end(zero + round(1e9 * part.ended))
    for key, value in known.items():
        span.set_attribute(NAMES.get(key, f"shoal.{key}"), value)
    if failed:
        span.set_status(trace.StatusCode.ERROR)
    span.update_name(name)
    span.end()
