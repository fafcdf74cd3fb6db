"""No answer spends more than its tolerance at any place that was verified, in whatever company and whatever happens to it: in
batches, in chunks, preempted, moved to other engines, with images, with adapters, after a second look. In float64.

What was spent is computed again from whole forward passes of prompt and answer, without cache or pages: of the model itself, or
of the one that the answer's adapter would be merged to. Where an answer says that nobody looked, each of its tokens must be
what its own depth says.
"""

from __future__ import annotations

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from shoal import Engine, Model, Request, Sampling
from shoal.engine.events import Finished, Token
from shoal.engine.plan import Outcome, Plan
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import END_ID
from tests.unit.engine.priced import KINDS, Told, check
from tests.unit.engine.test_adapters import KINDS as ADAPTERS
from tests.unit.engine.test_adapters import adapter
from tests.unit.engine.test_oracle import MODEL, picture
from tests.unit.engine.test_second_look import model as looked_at_again

EXITS = MODEL.config.exits
ENDS: list[dict[str, Any]] = [
    {},
    {"stop": ("a", "e"), "min_tokens": 3},
    {"stop_token_ids": tuple(range(30, 200, 7))},
    {"logit_bias": {END_ID: 3.0}, "ignore_eos": False},
]
LOOK = 5  # tokens of an answer after which its router looks again
# either look sends a prompt to a depth that follows from its length: a third of them go deeper by the second
ROUTED = looked_at_again(lambda length: EXITS[length % 3], lambda length: EXITS[(length // 2) % 3], LOOK)


def going_on(request: Request, events: Told) -> Request:
    """`request` as it is sent to another replica after `events`."""
    sent = [one for one in events if isinstance(one, Token)]
    return request.after([one.token for one in sent], sent[-1]) if sent else request


def ended(events: Told) -> bool:
    return any(isinstance(one, Finished) for one in events)


def measured(found: dict[str, Told]) -> int:
    """Tokens of answers that say what they spent."""
    return sum(isinstance(one, Token) and one.spent is not None for events in found.values() for one in events)


def run(e: Engine, found: dict[str, Told], steps: int, rng: random.Random) -> None:
    """At most so many `steps`; before some, one is preempted, or cancelled."""
    for _ in range(steps):
        for one in e.step():
            found[one.request].append(one)
        e.scheduler.check_integrity()
        if e.idle:
            return
        if e.scheduler.running and rng.random() < 0.1:
            e.scheduler._preempt(rng.choice(e.scheduler.running))
        if rng.random() < 0.02:
            e.cancel(rng.choice([*e.scheduler.live]).id)


def prompt(rng: random.Random) -> list[int] | Encoded:
    """Words, some of which begin alike, or a picture among them, some of equal tokens and other pixels."""
    if rng.random() < 0.4:
        return picture(rng.choice((0, 200)))
    shared = [60 + i % 40 for i in range(rng.choice((0, 8, 17)))]
    return shared + [rng.randrange(20, 260) for _ in range(rng.randint(1, 15))]


def asked(rng: random.Random, count: int) -> list[tuple[Request, Model]]:
    """So many requests with a tolerance, each with the model whose full depth judges it."""
    found = []
    for number in range(count):
        with_, judge = adapter(rng.choice([*ADAPTERS])) if rng.random() < 0.4 else (None, MODEL)
        given: dict[str, Any] = {"seed": rng.randrange(9999), "max_tokens": 16, "ignore_eos": True}
        given |= {"speculative": rng.choice((None, 1, 4))}
        given |= {**rng.choice(ENDS), **KINDS[kind]} if (kind := rng.choice([*KINDS])) != "guided" else KINDS[kind]
        request = Request(
            prompt(rng),
            Sampling(**given),
            depth=rng.choice(("full", "middle", "auto", "auto")),
            quality_tolerance=rng.choice((0.05, 0.2, 1.0)),
            id=str(number),
            adapter="" if with_ is None else with_.identity,
        )
        found.append((request, judge))
    return found


def engine(**more: Any) -> Engine:
    """One with all adapters, which audits what it may, and by whose clock a draft costs a tenth of a step."""
    now = 0.0
    made = Engine(ROUTED, **({"units": 400, "clock": lambda: now} | more))
    for number in ADAPTERS:
        made.load_adapter(adapter(number)[0])
    made.scheduler.judge._draws = SimpleNamespace(random=lambda: 0.0)  # type: ignore[assignment]
    step = made.runner.run

    def timed(plan: Plan) -> Outcome:
        nonlocal now
        now += 1.0 + 0.1 * sum(work.drafts for work in plan.works)
        return step(plan)

    made.runner.run = timed  # type: ignore[method-assign]
    return made


def warmed(e: Engine, requests: list[Request], depth: str) -> None:
    """Let `e` know the prompts of `requests`, as they are and as they would be without, or with another, adapter."""
    names = ["", *(adapter(number)[0].identity for number in ADAPTERS)]
    for place, request in enumerate(requests):
        other = names[place % len(names)]
        e.generate(
            [
                dataclasses.replace(request, id=name, quality_tolerance=None, depth=depth, adapter=beside)
                for name, beside in (("as it is", request.adapter), ("beside another", other))
            ]
        )


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 2), st.booleans())
def test_nothing_that_happens_lets_an_answer_spend_more(seed: int, moves: int, warm: bool) -> None:
    """At any depth but the first, "auto" with it; over up to three engines, of which some know the prompts already, some are
    tight, some draft as far as it pays, and some draft nothing, so that the router decides there."""
    rng = random.Random(seed)
    pairs = asked(rng, 6)
    tight: dict[str, Any] = rng.choice(({"units": 60}, {"max_batch_tokens": 24, "max_batch": 3}, {}))
    engines = [engine(**tight, speculative_max_batch=rng.choice((None, 0, 2, 8)))]
    engines += [engine(speculative_max_batch=rng.choice((None, 0, 8))) for _ in range(moves)]
    found: dict[str, Told] = {request.id: [] for request, _ in pairs}
    for place, e in enumerate(engines):
        if warm:
            warmed(e, [request for request, _ in pairs[:3]], rng.choice(("shallow", "full")))
        sent = {
            request.id: going_on(request, found[request.id]) for request, _ in pairs if not ended(found[request.id])
        }
        before = measured(found)
        for request in sent.values():
            e.submit(request)
        run(e, found, rng.randint(1, 30) if place < moves else 10_000, rng)
        assert e.dead is None and (e.idle or place < moves)
        nats = sum(
            (found[name][-1].spent or request.spent) - request.spent for name, request in sent.items() if found[name]
        )
        counted = e.scheduler.metrics.spent, e.scheduler.metrics.measured
        assert counted == (pytest.approx(nats, abs=1e-8), measured(found) - before), "of what was told here, once"
    for request, judge in pairs:
        spent = check(judge, request, found[request.id])
        event("nobody looked" if spent is None else "spent" if spent > 0 else "spent nothing")
        deeper = len({one.depth for one in found[request.id] if isinstance(one, Token)}) > 1
        event(
            f"{'images ' * isinstance(request.prompt, Encoded)}{'adapter ' * bool(request.adapter)}{'deeper ' * deeper}"
        )
