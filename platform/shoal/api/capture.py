"""A captured row of each request that is answered by generated tokens, made where its access line is written.

Numbers of all requests, whichever engine runs them; never a text, nor a key. How they lie on the disk: `loop.capture`.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from shoal.api.access import Access
from shoal.api.answers import Answer
from shoal.api.client import EngineClient
from shoal.api.meter import Meter
from shoal.api.requests import EngineCall
from shoal.api.reruns import Reruns
from shoal.api.served import ServedModel
from shoal.engine.events import Finished, Signals
from shoal.engine.metrics import Samples, sample
from shoal.errors import ConfigError
from shoal.inputs.chat import Encoded
from shoal.loop.capture import Capture, now_ms, subject, talk
from shoal.loop.rows import SHADOW, Row
from shoal.loop.surprisal import Learned
from shoal.loop.texts import clean, one_line
from shoal.loop.writer import Bounds, Writer

log = logging.getLogger("shoal.api")

BEGINS = 4096  # characters of a text, or ids of a prompt, that tell its conversation
SLICE = 64  # characters of a slice's name
SLICES, OTHER = 8, "other"  # names of slices that are kept apart: each costs the detector power


@dataclass(frozen=True)
class CaptureArgs:
    """What a service captures, and where."""

    folder: str  # of the capture
    texts: bool = False  # also the text of requests that ask for it, with keys that may
    keep_days: int = 90  # of numbers
    texts_days: int = 30
    # share of the requests whose depth the router chose that are asked again at full depth when idle
    reruns: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.reruns <= 1:
            raise ConfigError("capture reruns", got=self.reruns, allowed="a share, 0 to 1")
        for name in ("keep_days", "texts_days"):
            if getattr(self, name) < 1:
                raise ConfigError(f"capture {name}", got=getattr(self, name), allowed="1 or more")

    def open(self) -> Capture:
        """The folder, made where it is not there. Raises DataError."""
        return Capture(self.folder, create=True)


class Recorder:
    """Makes rows and gives them to a writer, which it owns."""

    def __init__(self, given: CaptureArgs) -> None:
        """Raises DataError for a folder that cannot be used."""
        self.given, self.capture = given, given.open()
        self._salt = self.capture.salt
        bounds = Bounds(keep_days=given.keep_days, keep_texts=given.texts_days)
        try:
            self.writer = Writer(self.capture, bounds)
        except OSError as error:
            raise ConfigError(
                "capture", got=f"{given.folder}: {error.strerror}", allowed="a folder to write"
            ) from error
        self.reruns = Reruns(given.reruns, self.writer.put)
        self._slices: set[str] = set()
        self._models: dict[str, _Model] = {}
        self.feedback = Counter[str]()  # votes, by rating

    async def run(self) -> None:
        """Asks requests again when nobody waits, until it is cancelled; then what was captured is closed."""
        try:
            await self.reruns.run()
        finally:
            await asyncio.to_thread(self.writer.close)

    def samples(self) -> Samples:
        """What is said of the capture at a scrape."""
        found = {
            sample("capture_rows"): float(self.writer.rows),
            sample("capture_lag_seconds"): self.writer.lag,
            sample("capture_bytes"): float(self.writer.bytes),
            sample("capture_waiting_files"): float(self.writer.waiting),
        }
        reasons = {"queue": 0, "disk": 0, "bound": 0, **self.writer.dropped}
        votes = {"up": 0, "down": 0, **self.feedback}
        found |= {sample("feedback", rating=rating): float(n) for rating, n in votes.items()}
        found |= {sample("capture_dropped", reason=reason): float(n) for reason, n in reasons.items()}
        return found | self.reruns.samples()

    # --- whose it is --------------------------------------------------------------------------------------------------

    def subject(self, key: str | None, user: str | None) -> str | None:
        """Who asks, as `loop.forget` finds them again; None for nobody in particular."""
        return subject(self._salt, key, user)

    def conversation(self, access: Access, body: Any) -> str | None:
        """Which talk a request belongs to: the same at each turn that has the texts of those before; None where none tells."""
        return self._conversation(self._whose(access), _fields(body))

    def _conversation(self, whose: str | None, fields: Mapping[str, Any]) -> str | None:
        begins = _beginning(fields)
        return talk(self._salt, f"{whose}\0{begins}") if begins else None

    def _whose(self, access: Access) -> str | None:
        return self.subject(None if access.key is None else access.key.name, access.facts.get("user"))

    # --- rows ---------------------------------------------------------------------------------------------------------

    def refused(self, access: Access) -> None:
        """Keep the request though it never ran; `answered` takes its place where it does."""
        access.ended = self._guarded(self._keep)

    def answered(self, access: Access, body: Any, call: EngineCall, answer: Answer, client: EngineClient) -> None:
        """Keep the request when it has ended, with what it has then of its `answer` by `client`."""
        access.ended = self._guarded(partial(self._keep, body=body, call=call, answer=answer, client=client))

    def shadowed(
        self,
        access: Access,
        call: EngineCall,
        answer: Answer,
        version: str,
        meter: Meter,
        end: Finished | None,
        failed: bool,
    ) -> None:
        """Keep the copy of a request that went to a canary: a row beside that of its request, with the same id."""
        key = None if access.key is None else access.key.name
        row = Row(
            id=answer.id, at=now_ms(), request_id=access.id, model=access.served or None, version=version, role=SHADOW,
            route=access.path[:64], subject=self.subject(key, access.facts.get("user")), layers=meter.depth or None,
            answer_tokens=len(meter.tokens), first_s=None if meter.times is None else meter.times[0],
            total_s=max(0.0, meter.last - meter.began), finish=None if end is None else end.reason,
            status=500 if failed else 200, error="shadow_failed" if failed else None,
        )  # fmt: skip
        told = self._of_call(call, answer.served) | _signals([end.signals] if end is not None and end.signals else [])
        for name, value in told.items():
            setattr(row, name, value)
        row.weights = None  # the version says which
        self.writer.put(row)

    def _guarded(self, keep: Callable[[Access], None]) -> Callable[[Access], None]:
        def ended(access: Access) -> None:
            try:
                keep(access)
            except Exception:  # a row is worth less than the request
                self.writer.dropped["fault"] += 1
                log.exception("no row was captured of request %s", access.id)

        return ended

    def _keep(
        self,
        access: Access,
        body: Any = None,
        call: EngineCall | None = None,
        answer: Answer | None = None,
        client: EngineClient | None = None,
    ) -> None:
        fields, subject = _fields(body), self._whose(access)
        known: dict[str, Any] = {
            "id": access.id if answer is None else answer.id,
            "at": now_ms(),
            "request_id": access.id,
            "model": access.served or None,
            "route": access.path[:64],
            "subject": subject,
            "slice": self._slice(access, fields),
            "status": access.status,
            "error": access.error,
            "stream": fields.get("stream"),
            "total_s": access.seconds,
            "first_s": None if access.first_token is None else access.first_token - access.began,
        }
        if call is not None and answer is not None:
            known |= self._of_call(call, answer.served) | _of_answer(call, answer)
            known["conversation"] = self._conversation(subject, fields)
        row = Row(**(known | access.columns))
        self.writer.put(row)
        end = None if answer is None else answer.choices[0].finished
        if call is not None and answer is not None and client is not None and end is not None:
            self.reruns.offer(call, client, end.signals, row, answer.served.config.exits)

    def _slice(self, access: Access, fields: Mapping[str, Any]) -> str | None:
        """What `metadata.workload` says, else the key's name; past `SLICES` of them, "other"."""
        given = fields.get("metadata")
        # what a client says may be anything, and a row holds nobody's words
        said = given.get("workload") if isinstance(given, dict) else None
        name = one_line(clean(said))[:SLICE] if said else None
        name = name or (None if access.key is None else access.key.name)
        if name is None or name in self._slices:
            return name
        if len(self._slices) >= SLICES:
            return OTHER
        self._slices.add(name)
        return name

    def _of_call(self, call: EngineCall, served: ServedModel) -> dict[str, Any]:
        """What was asked."""
        first = call.requests[0]
        prompts = [cast(Encoded, request.prompt) for request in call.requests[:: call.n]]
        known = self._models.get(served.name)
        if known is None or known.served is not served:
            known = self._models[served.name] = _Model(served, self.capture.folder)
        return {
            "weights": served.weights or None,
            "depth_asked": served.fixed_depth(first.depth) or "auto",
            "tolerance": first.quality_tolerance,
            "temperature": first.sampling.temperature,
            "max_tokens": first.sampling.max_tokens,
            "guided": first.sampling.guided is not None,
            "tools": len(call.offered),
            "images": sum(len(prompt.images) for prompt in prompts),
            "prompt_tokens": call.prompt_tokens,
            "prompt_bytes": sum(known.bytes_of(prompt.ids) for prompt in prompts),
            "prompt_surprisal": _mean([known.surprisal.of(prompt.ids) for prompt in prompts]),
        }


class _Model:
    """What is known of a model's tokens. Models of one tokenizer, such as the versions of a release, share a table."""

    def __init__(self, served: ServedModel, folder: Path) -> None:
        self.served = served
        tokens = [served.tokenizer.token_bytes(token) for token in range(len(served.tokenizer))]
        # bytes that each token stands for; of any other, none
        self._lengths = np.array([*map(len, tokens), 0], np.int64)
        name = hashlib.blake2b(b"\0".join(tokens), digest_size=8).hexdigest()
        self.surprisal = Learned(folder / f"tokens-{name}.npz", len(tokens))

    def bytes_of(self, ids: Sequence[int]) -> int:
        """Of the text that `ids` stand for."""
        return int(self._lengths[np.minimum(np.asarray(ids, np.int64), len(self._lengths) - 1)].sum())


def _fields(body: Any) -> Mapping[str, Any]:
    """A body's fields by name, none of no body. Asking pydantic for one that a body does not have costs twenty that it has."""
    return {} if body is None else vars(body)


def _beginning(fields: Mapping[str, Any]) -> str:
    """What stays the same of a conversation as it goes on: its texts up to the user's first; of a prompt its first."""
    turns: Any = fields.get("messages") or fields.get("input") or fields.get("prompt", "")
    if isinstance(turns, str):
        return turns[:BEGINS]
    if turns and not hasattr(turns[0], "role"):
        return str(turns[:BEGINS] if isinstance(turns[0], int) else turns[0])[:BEGINS]
    found: list[str] = []
    for turn in turns:
        content = getattr(turn, "content", None)
        parts = [content] if isinstance(content, str) else [getattr(part, "text", "") for part in content or ()]
        found += [part[:BEGINS] for part in parts if isinstance(part, str)]
        if getattr(turn, "role", None) == "user":
            break
    return "\0".join(found)


def _of_answer(call: EngineCall, answer: Answer) -> dict[str, Any]:
    """What became of it, as far as it came: over several choices sums of what is counted, means of what is measured."""
    ends = [choice.finished for choice in answer.choices if choice.finished is not None]
    depths = [choice.depth for choice in answer.choices if choice.depth]
    found: dict[str, Any] = {
        "answer_tokens": 0 if call.silent else sum(choice.count for choice in answer.choices),
        "layers": round(sum(depths) / len(depths)) if depths else None,
        "finish": answer.choices[0].reason,
    }
    if ends:
        found["cached_tokens"] = sum(end.cached_tokens for end in ends)
        found["queue_s"] = max(end.queue_seconds for end in ends)
        found |= _signals([end.signals for end in ends if end.signals is not None])
    calls = [each for choice in answer.choices for each in choice.calls]
    if call.offered:
        found["tool_calls"] = len(calls)
        found["tool_valid"] = all(_is_valid(each, call.offered) for each in calls) if calls else None
    return found


def _signals(told: Sequence[Signals]) -> dict[str, Any]:
    """What the engines said of several choices, as one."""
    if not told:
        return {}
    gaps = [each.predicted_gaps for each in told if each.predicted_gaps]
    means = ("prompt_nll", "router_bound", "router_distance", "answer_nll")
    found: dict[str, Any] = {name: _mean([getattr(each, name) for each in told]) for name in means}
    return found | {
        "answer_nll_max": max((e.answer_nll_max for e in told if e.answer_nll_max is not None), default=None),
        "predicted_gaps": [sum(column) / len(gaps) for column in zip(*gaps, strict=True)] or None,
        "drafts_accepted": sum(each.drafts_accepted for each in told),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _is_valid(call: Mapping[str, Any], offered: Sequence[str]) -> bool:
    function = call["function"]
    try:
        return function["name"] in offered and isinstance(json.loads(function["arguments"]), dict)
    except ValueError:
        return False
