"""What is captured of each request that is answered by generated tokens, handed over before its answer's last byte leaves.

Numbers of all requests, whichever engine runs them; never a text, nor a key. What costs time is done by the process that writes
them (`loop.outbox`). How they lie on the disk: `loop.capture`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from operator import attrgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

from shoal.api.access import Access
from shoal.api.answers import Answer
from shoal.api.client import EngineClient
from shoal.api.meter import Meter
from shoal.api.requests import EngineCall
from shoal.api.reruns import Reruns
from shoal.api.served import ServedModel
from shoal.engine.events import Finished
from shoal.engine.metrics import Samples, sample
from shoal.errors import ConfigError
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop.capture import JOURNAL, Capture, now_ms, subject, talk
from shoal.loop.facts import Choice, Facts, row, signals
from shoal.loop.outbox import Outbox
from shoal.loop.rows import SHADOW, Row
from shoal.loop.texts import clean, one_line
from shoal.loop.writer import Bounds

log = logging.getLogger("shoal.api")

BEGINS = 4096  # characters of a text, or ids of a prompt, that tell its conversation
SLICE = 64  # characters of a slice's name
SLICES, OTHER = 8, "other"  # names of slices that are kept apart: each costs the detector power
# why rows are lost: each is told from the beginning, since of a number that was not there nobody sees the growth
LOSSES = ("queue", "disk", "bound", "texts", "fault")
MOST_IDS = 100_000  # of prompts, five bytes each in a pipe of 1 MiB: of more no surprisal is known
MOST_DAYS = 36_500  # that rows or texts are kept: a hundred years; what is before the year 1 is no day
SUBJECTS = 4096  # whose hashes are in memory
LOOK_SECONDS = 1.0  # between two looks whether what writes the rows lives


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
            if not 1 <= getattr(self, name) <= MOST_DAYS:
                raise ConfigError(f"capture {name}", got=getattr(self, name), allowed=f"1 to {MOST_DAYS}")

    def open(self) -> Capture:
        """The folder, made where it is not there. Raises DataError."""
        return Capture(self.folder, create=True)


class Recorder:
    """Hands over what requests were, through an outbox, which it owns."""

    def __init__(self, given: CaptureArgs) -> None:
        """Raises DataError for a folder that cannot be used, ConfigError for one that nobody may write to."""
        self.given, self.capture = given, given.open()
        salt = self.capture.salt
        try:
            with tempfile.TemporaryFile(dir=self.capture.folder / JOURNAL):
                pass
        except OSError as error:
            raise ConfigError(
                "capture", got=f"{given.folder}: {error.strerror}", allowed="a folder to write"
            ) from error
        self.outbox = Outbox(given.folder, Bounds(keep_days=given.keep_days, keep_texts=given.texts_days))
        self.reruns = Reruns(given.reruns, self._put)
        # (key's name, user) -> who asks, as `forget` finds them
        self.subject = lru_cache(SUBJECTS)(partial(subject, salt))
        self._salt = salt
        self._slices: set[str] = set()
        self._vocabularies = WeakKeyDictionary[Any, _Vocabulary]()  # by tokenizer, which a model and its adapters share
        self.feedback = Counter[str]()  # votes, by rating

    async def run(self) -> None:
        """Sees to it that rows are written, and asks requests again when nobody waits, until it is cancelled; then what was
        captured is closed."""
        asking = asyncio.create_task(self._ask_again())
        try:
            await self._look()
        finally:
            asking.cancel()
            await asyncio.to_thread(self.outbox.close)

    async def _look(self) -> None:
        while True:
            try:
                self.outbox.look()
            except Exception:  # who writes the rows is looked for again
                log.exception("capture: nobody could see whether rows are written")
            await asyncio.sleep(LOOK_SECONDS)

    async def _ask_again(self) -> None:
        try:
            await self.reruns.run()
        except Exception:  # rows are captured for all that
            log.exception("capture: no request is asked again until a restart")

    def samples(self) -> Samples:
        """What is said of the capture at a scrape."""
        found = {
            sample("capture_rows"): float(self.outbox.rows),
            sample("capture_lag_seconds"): self.outbox.lag,
            sample("capture_bytes"): float(self.outbox.bytes),
            sample("capture_waiting_files"): float(self.outbox.waiting),
            sample("capture_scribes"): float(self.outbox.scribes),
        }
        reasons = {**dict.fromkeys(LOSSES, 0), **self.outbox.dropped}
        votes = {"up": 0, "down": 0, **self.feedback}
        found |= {sample("feedback", rating=rating): float(n) for rating, n in votes.items()}
        found |= {sample("capture_dropped", reason=reason): float(n) for reason, n in reasons.items()}
        return found | self.reruns.samples()

    # --- whose it is --------------------------------------------------------------------------------------------------

    def conversation(self, access: Access, body: Any) -> str | None:
        """Which talk a request belongs to: the same at each turn that has the texts of those before; None where none tells."""
        return self._conversation(self._whose(access), _fields(body))

    def _conversation(self, whose: str | None, fields: Mapping[str, Any]) -> str | None:
        begins = beginning(fields)
        return talk(self._salt, f"{whose}\0{begins}") if begins else None

    def _whose(self, access: Access) -> str | None:
        return self.subject(None if access.key is None else access.key.name, access.facts.get("user"))

    # --- rows ---------------------------------------------------------------------------------------------------------

    def refused(self, access: Access) -> None:
        """Keep the request though it never ran; `answered` takes its place where it does."""
        access.ended = self._guarded(self._keep)

    def bytes_of(self, call: EngineCall, served: ServedModel) -> int:
        """Of its prompts, for `answered`. Of many tokens this takes long."""
        vocabulary = self._vocabulary(served)
        prompts = [cast(Encoded, request.prompt) for request in call.requests[:: call.n]]
        return sum(vocabulary.bytes_of(prompt.ids) for prompt in prompts)

    def answered(
        self, access: Access, body: Any, call: EngineCall, answer: Answer, client: EngineClient, prompt_bytes: int
    ) -> None:
        """Keep the request when it has ended, with what it has then of its `answer` by `client`."""
        access.columns["prompt_bytes"] = prompt_bytes
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
        columns = {
            "id": answer.id,
            "at": now_ms(),
            "request_id": access.id,
            "model": access.served or None,
            "route": access.path[:64],
            "subject": self._whose(access),
            "status": 500 if failed else 200,
            "error": "shadow_failed" if failed else None,
            "first_s": None if meter.times is None else meter.times[0],
            "total_s": max(0.0, meter.last - meter.began),
            "answer_tokens": len(meter.tokens),
            "finish": None if end is None else end.reason,
            **self._of_call(call, answer.served),
            "prompt_bytes": access.columns.get("prompt_bytes"),
            "weights": None,  # the version says which
            "version": version,
            "role": SHADOW,
            "layers": meter.told.depth if meter.told else None,
        }
        told: list[Choice] = [(0, 0, 0.0, signals(end.signals))] if end is not None and end.signals else []
        self.outbox.put((columns, _ids(call), self._vocabulary(answer.served).named, told))

    def _guarded(self, keep: Callable[[Access], None]) -> Callable[[Access], None]:
        def ended(access: Access) -> None:
            try:
                keep(access)
            except Exception:  # a row is worth less than the request
                self.outbox.drop("fault")
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
        columns: dict[str, Any] = {
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
        if call is None or answer is None:
            self.outbox.put((columns | access.columns, [], None, []))
            return
        columns |= self._of_call(call, answer.served)
        columns |= _of_answer(call, answer)
        columns["conversation"] = self._conversation(subject, fields)
        columns |= access.columns
        facts: Facts = columns, _ids(call), self._vocabulary(answer.served).named, _choices(answer)
        self.outbox.put(facts)
        end = answer.choices[0].finished
        if client is not None and end is not None and self.reruns.wants(call, end.signals, answer.id):
            asked = row(facts, _unknown)
            if end.first_depth < end.depth:  # of what its first tokens lost the deeper exit would tell too little
                asked = replace(asked, layers=end.first_depth or asked.layers)
            self.reruns.offer(call, client, end.signals, asked, answer.served.config.exits)

    def _put(self, row: Row) -> None:
        """A row that is made already."""
        self.outbox.put(({name: value for name, value in asdict(row).items() if value is not None}, [], None, []))

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
        }

    def _vocabulary(self, served: ServedModel) -> _Vocabulary:
        known = self._vocabularies.get(served.tokenizer)
        if known is None:
            known = self._vocabularies[served.tokenizer] = _Vocabulary(served.tokenizer)
        return known


class _Vocabulary:
    """What is known of a tokenizer's tokens. Those of a release's versions have one name, though each is another object."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = [tokenizer.token_bytes(token) for token in range(len(tokenizer))]
        self._lengths = [len(token) for token in tokens]  # bytes that each stands for
        self.named = hashlib.blake2b(b"\0".join(tokens), digest_size=8).hexdigest(), len(tokens)

    def bytes_of(self, ids: Sequence[int]) -> int:
        """Of the text that `ids` stand for; of one beyond the vocabulary none."""
        try:
            return sum(map(self._lengths.__getitem__, ids))
        except IndexError:
            return sum(self._lengths[token] for token in ids if token < len(self._lengths))


def _ids(call: EngineCall) -> list[list[int]]:
    """Of each prompt; none of so many that no pipe takes them."""
    found = [cast(Encoded, request.prompt).ids for request in call.requests[:: call.n]]
    return found if call.prompt_tokens <= MOST_IDS else []


_of_end = attrgetter("cached_tokens", "queue_seconds", "signals")


def _choices(answer: Answer) -> list[Choice]:
    """What is known of each choice, as `facts` takes it."""
    found: list[Choice] = []
    for choice in answer.choices:
        if choice.finished is None:
            found.append((choice.depth, None, None, None))
        else:
            cached, queued, told = _of_end(choice.finished)
            found.append((choice.depth, cached, queued, None if told is None else signals(told)))
    return found


def _unknown(vocabulary: tuple[str, int], prompt: Sequence[int]) -> None:
    """The surprisal of a prompt whose row is only to be compared with."""


def _fields(body: Any) -> Mapping[str, Any]:
    """A body's fields by name, none of no body. Asking pydantic for one that a body does not have costs twenty that it has."""
    return {} if body is None else vars(body)


def beginning(fields: Mapping[str, Any]) -> str:
    """What stays the same of a conversation as it goes on: its texts up to the user's first; of a prompt its first."""
    turns: Any = fields.get("messages") or fields.get("input") or fields.get("prompt", "")
    if isinstance(turns, str):
        return turns[:BEGINS]
    if turns and isinstance(turns[0], (int, str, list)):
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
    """What became of it, as far as it came."""
    found: dict[str, Any] = {
        "answer_tokens": 0 if call.silent else sum(choice.count for choice in answer.choices),
        "finish": answer.choices[0].reason,
    }
    if call.offered:
        calls = [each for choice in answer.choices for each in choice.calls]
        found["tool_calls"], found["tool_valid"] = len(calls), answer.calls_valid()
    return found
