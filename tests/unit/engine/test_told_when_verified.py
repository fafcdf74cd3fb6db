"""What is not yet verified is not streamed: of an answer with a tolerance no token is told before full depth, or the depth that
was asked for, has looked at its place, whatever else runs and whoever loses units meanwhile. In float64.

What was looked at is not asked of the engine: of all logits that come to the sampler, those count that a forward pass of the
whole text gives at the request's depth. The drafts' own logits are others.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch

from shoal import Engine, Model, Request
from shoal.engine.events import Event, Finished, Token
from shoal.engine.plan import Sampled
from shoal.engine.tolerance import Chain
from tests.unit.engine.lively import lively, with_router
from tests.unit.engine.priced import KINDS
from tests.unit.engine.test_tolerance import ask

TOLERANCES = (0.0, 0.05, 0.3, 2.0)


@cache
def routed() -> Model:
    """One whose router says this or that."""
    return with_router(lively())


class Watch:
    """Of some requests, which differ in their prompts: the places that were verified, with the token that came of each, and
    whether every token was told after that."""

    def __init__(self, model: Model, requests: Sequence[Request]) -> None:
        self.model, self.requests = model, {request.id: request for request in requests}
        self.verified: dict[tuple[int, ...], int] = {}  # by the text before: the token that was settled on
        self.told: dict[str, list[int]] = {request.id: list(request.prompt) for request in requests}  # type: ignore[arg-type]
        self.right = self.unlooked = 0
        self.wrong: list[str] = []  # raised in a step, it would end a request and no test
        self._laws: dict[tuple[int, ...], torch.Tensor] = {}

    def sees(self, monkeypatch: pytest.MonkeyPatch, engine: Engine) -> None:
        """From now on: what comes to the engine's sampler, and each token's event at the moment that it is made."""
        sample, make = engine.runner.sampler.sample, Token.__init__

        def sampled(
            logits: torch.Tensor, draws: Sequence[Any], chains: Sequence[Chain] = (), unread: Any = None
        ) -> list[Sampled]:
            texts = [tuple(draw.tokens) for draw in draws]
            looked = [self._is_verified(text, law) for text, law in zip(texts, logits, strict=True)]
            found = sample(logits, draws, chains, unread)
            self.verified |= {text: one.token for text, one, is_ in zip(texts, found, looked, strict=True) if is_}
            return found

        def made(event: Token, *given: Any, **named: Any) -> None:
            make(event, *given, **named)
            self._tells(event)

        monkeypatch.setattr(engine.runner.sampler, "sample", sampled)
        monkeypatch.setattr(Token, "__init__", made)

    def _is_verified(self, text: tuple[int, ...], law: torch.Tensor) -> bool:
        if text not in self._laws:
            (depth,) = {request.depth for request in self.requests.values() if _begins(text, request)}
            self._laws[text] = self.model.logits(list(text), "full" if depth == "auto" else depth)[-1]
        return torch.allclose(law, self._laws[text], rtol=0, atol=1e-6)

    def _tells(self, event: Token) -> None:
        text = tuple(self.told[event.request])
        self.told[event.request].append(event.token)
        if event.spent is None and self.requests[event.request].depth == "auto":
            self.unlooked += 1  # of the router's own depth: nobody looks, and the answer says so
        elif (stands := self.verified.get(text)) == event.token:
            self.right += 1
        else:
            self.wrong.append(f"{event.request} told {event.token} at {len(text)}, and {stands} stands there")


def _begins(text: tuple[int, ...], request: Request) -> bool:
    return list(text[: len(request.prompt)]) == list(request.prompt)  # type: ignore[arg-type]


def drawn(rng: random.Random, count: int) -> list[Request]:
    """So many requests with a tolerance, of all kinds and all depths that may have one."""
    found = []
    for number in rng.sample(range(10_000), count):
        more: dict[str, Any] = {"max_tokens": 12, "speculative": rng.choice((None, 1, 4))}
        request = ask(number, rng.choice(TOLERANCES), kind=rng.choice([*KINDS]), **more)
        found.append(dataclasses.replace(request, depth=rng.choice(("full", "middle", "auto"))))
    return found


@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.drill) for seed in (0, 3, 4, 5))])
def test_what_is_not_yet_verified_is_not_streamed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to four requests that come one after the other, in a step's time or later, into pools of all sizes."""
    rng = random.Random(seed)
    waiting = drawn(rng, 4)
    tight: dict[str, Any] = rng.choice(({"units": 60}, {"max_batch_tokens": 24, "max_batch": 3}, {}))
    model = routed()
    e = Engine(model, **({"units": 400, "speculative_max_batch": rng.choice((2, 8))} | tight))
    watch, sent = Watch(model, waiting), list[Event]()
    watch.sees(monkeypatch, e)
    while waiting or not e.idle:
        if waiting and (e.idle or rng.random() < 0.3):
            e.submit(waiting.pop())
        sent += e.step()
        if e.scheduler.running and rng.random() < 0.1:
            e.scheduler._preempt(rng.choice(e.scheduler.running))
    assert watch.wrong == [] and watch.right > 0
    ends = [event.reason for event in sent if isinstance(event, Finished)]
    assert len(ends) == 4 and {*ends} <= {"length", "stop"}, ends
    said = {name: list(watch.requests[name].prompt) for name in watch.told}  # type: ignore[arg-type]
    for event in sent:
        if isinstance(event, Token):
            said[event.request].append(event.token)
    assert said == watch.told, "each token that was made was sent, and in that order"
    assert e.stats()["spec_decode_num_draft_tokens_total"] > 0
