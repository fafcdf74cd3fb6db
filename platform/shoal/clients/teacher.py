"""A teacher: a served model that answers the questions of fine-tuning rows, with its provenance in every row.

    {"messages": [..., {"role": "user", ...}]}  ─>  the same, answered, and "teacher": {model, server, what was asked, ...}

Any server of the OpenAI protocol can be asked: ours in front of our engine or of vLLM, or another.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import httpx

from shoal import __version__
from shoal.errors import DataError, ResourceError, UsageError

TEACHER = "teacher"  # field of a row: who answered it, and how
BUSY = (429, 503)
CUT_OFF = ("length", "content_filter")  # values of `finish_reason`
TRIES = 8
CONNECT_SECONDS, ANSWER_SECONDS, MOST_PAUSE = 5.0, 600.0, 30.0


@dataclass(frozen=True)
class Ask:
    """What a teacher is asked beside the messages. Two answers of equal `digest` were asked alike."""

    url: str  # ends in /v1
    model: str
    temperature: float = 0.0  # 0 is greedy
    max_tokens: int = 512
    seed: int = 0
    depth: str | None = None  # exit name, where the teacher is a Shoal model; None: its own choice

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError("--temperature", got=self.temperature, allowed="0 to 100")
        if self.max_tokens < 1:
            raise UsageError("--max-tokens", got=self.max_tokens, allowed="1 or more")

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def questions(line: bytes | str) -> list[dict[str, Any]]:
    """The messages of a row up to the last of the user. Raises DataError for a row without one, and for one that HTTP cannot
    carry: half a surrogate pair, a number that is none."""
    try:
        row = json.loads(line)
        messages = row["messages"]
        last = max(index for index, message in enumerate(messages) if message["role"] == "user")
        json.dumps(messages, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError("row without a question", got=str(line)[:80], allowed='{"messages": [...]}') from error
    return list(messages[: last + 1])


def identity(messages: list[dict[str, Any]], ask: Ask) -> str:
    """What tells one question, asked so, from all others."""
    return hashlib.sha256((json.dumps(messages, sort_keys=True) + ask.digest).encode()).hexdigest()


class NoTarget(DataError):
    """An answer that nothing should be taught by; `kind`: how it is counted, "cut_off" or "empty"."""

    def __init__(self, kind: str, what: str, **more: Any) -> None:
        super().__init__(what, **more)
        self.kind = kind


def answered(http: httpx.Client, messages: list[dict[str, Any]], ask: Ask) -> dict[str, Any]:
    """The row with the teacher's answer. Waits while the server is full. Raises ResourceError for one that does not answer,
    DataError for a question that it refuses, NoTarget for an answer that was cut off, since it would teach to end there, or is
    empty."""
    body = {"model": ask.model, "messages": messages, "temperature": ask.temperature, "max_tokens": ask.max_tokens}
    body |= {"seed": ask.seed} | ({"depth": ask.depth} if ask.depth else {})
    answer = _post(http, f"{ask.url.rstrip('/')}/chat/completions", body)
    try:
        choice, used = answer["choices"][0], dict(answer.get("usage") or {})
        text, ended = choice["message"]["content"] or "", choice["finish_reason"]
        text.encode()
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise DataError("the teacher's answer is none of the protocol", got=str(answer)[:200]) from error
    if ended in CUT_OFF:
        raise NoTarget("cut_off", "the teacher's answer was cut off", got=ended, do="give it more --max-tokens")
    if not text.strip():
        raise NoTarget("empty", "the teacher's answer is empty", got=ended)
    teacher = {
        **{name: value for name, value in asdict(ask).items() if value is not None},
        "answered_by": answer.get("model"),
        "id": answer.get("id"),
        "finish_reason": ended,
        "depth_used": used.get("depth"),
        "tokens": used.get("completion_tokens"),
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "question": identity(messages, ask),
        "shoal": __version__,
    }
    reply = {"role": "assistant", "content": text}
    return {"messages": [*messages, reply], TEACHER: teacher}


def _post(http: httpx.Client, url: str, body: dict[str, Any]) -> dict[str, Any]:
    for attempt in range(TRIES):
        try:
            answer = http.post(url, json=body, timeout=httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS))
        except httpx.HTTPError as error:
            raise ResourceError(
                f"no answer from {url}", got=str(error), do="start the teacher, or check --url"
            ) from error
        if answer.status_code == 200:
            try:
                return dict(answer.json())
            except (ValueError, TypeError, RecursionError) as error:
                raise DataError("the teacher's answer is none of the protocol", got=answer.text[:200]) from error
        if answer.status_code not in BUSY:
            raise DataError("the teacher refused a question", got=f"{answer.status_code}: {answer.text[:200]}")
        told = answer.headers.get("Retry-After", "")
        time.sleep(min(MOST_PAUSE, float(told) if told.isdecimal() else 2.0**attempt))
    raise ResourceError(f"{url} stayed full", got=f"{TRIES} answers of {BUSY}", do="ask with less --concurrency")
