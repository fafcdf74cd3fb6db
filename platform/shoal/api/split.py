"""Two versions of one model behind one name: the stable one, and while there is one a canary that has a share of the
conversations.

    chosen    by a hash of the conversation: a talk stays where it is, and whom 5 % reach, 25 % reach as well
    shadow    at share 0 copies of requests go to the canary, one at a time; nobody reads the answers
    failed    what fails at the canary and is not the client's fault goes on at the stable version with the tokens that were
              sent (`Request.answer`, decision 0021): a text of two authors, marked so, and counted against the canary
    late      a token that the canary does not give in many times what the stable version takes counts as failed

The evidence is looked at after each request of the canary: one that is condemned gets nothing more from that moment on.
"""

from __future__ import annotations

import asyncio
import secrets
from array import array
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from shoal.api.client import EngineClient
from shoal.api.meter import Meter
from shoal.api.trial import NOWHERE, Part, Trial, Weighed
from shoal.config import FULL
from shoal.engine.events import LATER, Event, Finished, Request
from shoal.engine.metrics import Samples, sample
from shoal.errors import DeadlineError, EngineDeadError, EnginesLostError, QueueFullError, RequestError
from shoal.inputs.chat import Encoded
from shoal.loop.canary import Pace

FIRST_TOKENS = 64  # of a prompt: what tells conversations apart where nothing better does

OnVote = Callable[[str, str | None, str | None], None]  # answer, who, rating


@dataclass
class Note:
    """What is known of one answer, filled while it is given."""

    version: str = ""  # label of the version that it began with
    role: str = ""  # stable or canary
    resumed: str = ""  # "canary->stable" where it went on with other weights
    conversation: bytes = b""  # what tells it from others; empty: by its first tokens
    person: str = ""  # who asks; empty where nobody says so
    api_key: str = ""  # what tells the key that asks from others; empty without keys
    id: str = ""  # of the answer, by which votes name it
    # of an answer during a trial that ended well: is to be told whether the calls of tools in it are valid
    on_calls: Callable[[bool], None] | None = None
    # told of a copy at a canary: the version's label, how it went, its end where it came to one, and whether it failed
    shadowed: Callable[[str, Meter, Finished | None, bool], None] | None = None

    def facts(self) -> dict[str, str]:
        """What is known, for the log and the captured row."""
        told = {"version": self.version, "role": self.role, "resumed": self.resumed}
        return {name: value for name, value in told.items() if value}


class Split:
    """The stable version and its canary, as one `EngineClient`."""

    def __init__(self, stable: Weighed, vote_elsewhere: OnVote | None = None) -> None:
        """`vote_elsewhere`: where there are other gateways, is told of votes on answers that this one did not give; each is
        asked what it has `counted` then."""
        self.stable, self._vote_elsewhere = stable, vote_elsewhere
        self.trial: Trial | None = None
        self.pace = Pace()
        self.rollbacks = 0  # of canaries, by themselves
        self._counts: Counter[tuple[str, str]] = Counter()  # (label of a version, outcome)
        self.beside: Callable[[], Samples] = dict  # what a release's files say
        self.labels: Mapping[str, str] = {}  # beginning of what engines call their weights -> label of the version

    def asked(self, note: Note) -> EngineClient:
        """It for one answer, of which `note` is told."""
        return _Noted(self, note)

    def voted(self, answer: str, who: str | None, rating: str | None) -> None:
        """`who` rates an answer: evidence, where one of the two versions gave it during the trial, here or at another gateway,
        which counts it then."""
        if not self.counts_vote(answer, who, rating) and self.trial is not None and self._vote_elsewhere is not None:
            self._vote_elsewhere(answer, who, rating)

    def counts_vote(self, answer: str, who: str | None, rating: str | None) -> bool:
        """As `voted`, of answers that were given here; whether this is one."""
        if self.trial is None or answer not in self.trial.answered:
            return False
        self.trial.vote(answer, who, rating)
        return True

    def condemned(self) -> Trial | None:
        """The trial, if its evidence says that it is to end; then it gets nothing more."""
        trial = self.trial
        return trial if trial is not None and trial.decided[0] == "back" else None

    def batches(self, request: Request, note: Note | None = None) -> AsyncIterator[list[Event]]:
        note = note or Note()
        trial = None if self.condemned() else self.trial
        if trial is None:
            return self._on_stable(trial, request, note)
        request, talk = replace(request, signals=True), note.conversation or _beginning(request)
        if not trial.canary.step:
            return self._on_stable(trial, request, note, self._shadow(trial, request, note, talk))
        takes = trial.takes(talk)
        answered = self._on_trial if takes else self._on_stable
        return answered(trial, request, note, trial.part(talk, note.person, canary=takes, api_key=note.api_key))

    async def _on_stable(
        self, trial: Trial | None, request: Request, note: Note, part: Part = NOWHERE
    ) -> AsyncGenerator[list[Event], None]:
        note.role = "stable"
        meter = Meter()
        try:
            async with aclosing(self._of_stable(request, note)) as lists:
                async for events in lists:
                    meter.take(events)
                    if isinstance(events[-1], Finished):
                        self._ended(trial, meter, note, part, failed=_fault(events[-1]) is not None)
                    yield events
        except Exception as error:
            if not _clients_fault(error):
                self._ended(trial, meter, note, part, failed=True)
            raise

    def _ended(self, trial: Trial | None, meter: Meter, note: Note, part: Part, *, failed: bool) -> None:
        """An answer of the stable version has ended."""
        self._counts[note.version, "failed" if failed else "ok"] += 1
        if trial is not None:
            trial.count(meter, part, stable=True, failed=failed)
            _remember(note, trial, part)
            note.on_calls = None if failed else partial(trial.called, part=part)
        if not failed and meter.times is not None:
            self.pace.observe(*meter.times, meter.nll if part.first else None, len(meter.tokens))

    async def _of_stable(self, request: Request, note: Note) -> AsyncGenerator[list[Event], None]:
        lists = self.stable.batches(request, partial(self._begun, note))
        try:
            async for events in lists:
                yield events
        finally:
            if isinstance(lists, AsyncGenerator):
                await lists.aclose()

    def _begun(self, note: Note, weights: str) -> None:
        note.version = note.version or self.labels.get(weights.partition("-")[0], "")

    async def _on_trial(
        self, trial: Trial, request: Request, note: Note, part: Part
    ) -> AsyncGenerator[list[Event], None]:
        if request.sampling.seed is None:  # with which another engine can go on
            request = replace(request, sampling=replace(request.sampling, seed=secrets.randbits(63)))
        note.role = "canary"
        meter = Meter()
        try:
            async with aclosing(trial.patient(request)) as lists:
                async for events in lists:
                    error = _fault(events[-1])
                    good = events if error is None else events[:-1]
                    meter.take(good)
                    if error is None and isinstance(events[-1], Finished):
                        trial.count(meter, part, stable=False)
                        note.on_calls = partial(trial.called, part=part)
                        self._counts[trial.label, "ok"] += 1
                    if good:
                        note.version = trial.label
                        if isinstance(good[-1], Finished):
                            _remember(note, trial, part)
                        yield good
                    if error is not None:
                        raise error
                    if isinstance(events[-1], Finished):
                        return
            raise EngineDeadError("the canary ended the request without finishing it")
        except Exception as error:
            if _clients_fault(error):
                raise
            if not isinstance(error, QueueFullError):  # that it has fewer replicas is no fault of its weights
                trial.count(meter, part, stable=False, failed=True)
            losses = int(isinstance(error, EngineDeadError) and error.taken)
            if isinstance(error, EnginesLostError):
                self._counts[trial.label, "failed"] += 1
                raise
        self._counts[trial.label, "failed"] += 1
        note.resumed = "canary->stable"
        async with aclosing(self._of_stable(replace(meter.rest(request), losses=losses), note)) as rest:
            async for events in rest:
                yield [meter.ours(event, request) for event in events]

    def _shadow(self, trial: Trial, request: Request, note: Note, talk: bytes) -> Part:
        """Sends a copy to the canary, where none is there; it waits for whatever else there is. Where the original counts."""
        if trial.shadowing is not None and not trial.shadowing.done():
            return Part(None, trial.begins(talk))
        part, other = (trial.part(talk, note.person, canary=each, api_key=note.api_key) for each in (False, True))
        copied = replace(part, key=other.key)
        copy = replace(request, id=f"{request.id}.shadow", priority=LATER, payer="shadow", client="", beside="")
        trial.shadowing = asyncio.create_task(self._copied(trial, copy, note, copied))
        return part

    async def _copied(self, trial: Trial, request: Request, note: Note, part: Part) -> None:
        meter, failed, end = Meter(), False, None
        try:
            async with aclosing(trial.patient(request)) as lists:
                async for events in lists:
                    meter.take(events)
                    failed = _fault(events[-1]) is not None
                    end = events[-1] if isinstance(events[-1], Finished) else None
        except Exception as error:
            if _clients_fault(error) or isinstance(error, QueueFullError):
                return
            failed = True
        trial.count(meter, part, stable=False, failed=failed)
        if note.shadowed is not None:
            note.shadowed(trial.label, meter, end, failed)

    async def embed(
        self,
        prompts: list[list[int]],
        depth: str | int = FULL,
        *,
        payer: str = "",
        client: str = "",
        priority: int = 0,
        adapter: str = "",
        note: Note | None = None,
    ) -> list[list[float]]:
        """By the stable version: vectors of two cannot be compared."""
        begun = partial(self._begun, note or Note())
        return await self.stable.embed(
            prompts, depth, payer=payer, client=client, priority=priority, adapter=adapter, on_begun=begun
        )

    async def load_adapter(self, directory: str) -> str:
        return await self.stable.load_adapter(directory)

    async def keep_adapters(self, known: Mapping[str, str], held: Mapping[str, str], at: int) -> None:
        await self.stable.keep_adapters(known, held, at)

    def counted(self) -> Samples:
        """What this gateway counts: rollbacks, and requests of each version."""
        told = {sample("release_rollbacks"): float(self.rollbacks)}
        for (version, outcome), count in self._counts.items():
            told[sample("version_requests", version=version, outcome=outcome)] = float(count)
        return told

    async def stats(self) -> Samples:
        told = self.counted() if self._vote_elsewhere is None else {}
        if self.trial is not None:
            told[sample("release_share", version=self.trial.label)] = self.trial.canary.share
        return {**await self.stable.stats(), **told, **await asyncio.to_thread(self.beside)}

    async def info(self) -> list[dict[str, str]]:
        return await self.stable.info()

    async def check_health(self) -> None:
        await self.stable.check_health()


class _Noted(Split):
    """A `Split` for one answer."""

    def __init__(self, whole: Split, note: Note) -> None:
        self._whole, self._note = whole, note
        self.stable = whole.stable

    def batches(self, request: Request, note: Note | None = None) -> AsyncIterator[list[Event]]:
        return self._whole.batches(request, note or self._note)

    async def embed(self, *given: Any, note: Note | None = None, **more: Any) -> list[list[float]]:
        return await self._whole.embed(*given, note=note or self._note, **more)


def _remember(note: Note, trial: Trial, part: Part) -> None:
    if note.id and note.version:
        trial.remember(note.id, note.version, note.api_key, part.who)


def _beginning(request: Request) -> bytes:
    """Of a prompt, with who sent it."""
    whose = f"{request.payer}\0{request.client}\0".encode()
    if isinstance(request.prompt, str):
        return whose + request.prompt[:FIRST_TOKENS].encode("utf-8", "surrogatepass")
    ids = request.prompt.ids if isinstance(request.prompt, Encoded) else request.prompt
    return whose + array("q", ids[:FIRST_TOKENS]).tobytes()


def _clients_fault(error: Exception) -> bool:
    """Whether any version would have said so."""
    kinds = (QueueFullError, DeadlineError)
    return isinstance(error, RequestError) and error.status < 500 and not isinstance(error, kinds)


def _fault(event: Event) -> Exception | None:
    """What was wrong with an answer that ended so, where it did not end well; never where the client left."""
    if not isinstance(event, Finished) or event.reason in ("stop", "length"):
        return None
    if event.reason == "deadline":
        return DeadlineError("the request ran out of its time", do="ask for fewer tokens or try again")
    return event.error or EngineDeadError(f"the request was {event.reason} by the server", do="try again")
