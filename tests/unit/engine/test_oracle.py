"""The engine says what `naive.generate` says, whatever is asked of it and whatever happens to the request. In float64.

The oracle has no cache, no batch and no drafts. `stop` strings, biases and grammars are drawn so that each of them really
changes answers: a random model says nearly every byte.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from PIL import Image

from shoal import Engine, Request, Sampling
from shoal.engine import naive
from shoal.engine.events import Completion, Finished, Guide, Token, TokenLogprob
from shoal.engine.plan import Outcome, Plan
from shoal.inputs.chat import Encoded
from shoal.inputs.media import to_patches
from shoal.inputs.tokenizer import END_ID
from tests import oracle
from tests.unit.engine.lively import lively

MODEL = lively()
LETTERS = MODEL.tokenizer.encode("abcdefgh 0123")


def picture(value: int) -> Encoded:
    image = to_patches(Image.fromarray(np.full((24, 24, 3), value, dtype=np.uint8)), MODEL.config)
    return Encoded([*image.tokens(), *MODEL.tokenizer.encode("what?")], [image])


PROMPTS = st.one_of(
    st.lists(st.integers(20, 259), min_size=1, max_size=30),
    st.text("ab c", min_size=1, max_size=20),  # they meet in the prefix cache
    st.sampled_from([picture(0), picture(200)]),
)
GUIDES = st.sampled_from(
    [Guide("choice", ("yes", "no", "yellow")), Guide("regex", "[a-f]{2,5}"), Guide("json_object")]
)  # fmt: skip


@st.composite
def samplings(draw: st.DrawFn) -> Sampling:
    guided = draw(st.one_of(st.none(), st.none(), st.none(), GUIDES))
    tokens = draw(st.integers(1, 9))
    letters = st.sampled_from(LETTERS)
    return Sampling(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.4, 1.0, 1.7])),
        top_p=draw(st.sampled_from([1.0, 1.0, 0.9, 0.3])),
        top_k=draw(st.sampled_from([0, 0, 1, 5, 50])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.05])),
        seed=draw(st.integers(0, 9)),
        max_tokens=tokens,
        min_tokens=0 if guided else draw(st.integers(0, tokens)),
        stop=draw(st.lists(st.text("abcdefgh 0123", min_size=1, max_size=2), max_size=3)),
        frame=draw(st.sampled_from([None, None, ("a", "b"), ("0", "0"), ("c", "1 ")])),
        stop_token_ids=draw(st.lists(letters, max_size=2)),
        ignore_eos=not guided and draw(st.booleans()),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.7])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
        logit_bias=draw(st.dictionaries(st.one_of(letters, st.just(END_ID)), st.sampled_from([-3.0, 2.0, 4.0]), max_size=9)),
        logprobs=draw(st.sampled_from([None, 0, 4])),
        prompt_logprobs=draw(st.sampled_from([None, None, 0, 2])),
        guided=guided,
        speculative=draw(st.sampled_from([None, 0, 3])),
    )  # fmt: skip


REQUESTS = st.builds(
    Request, PROMPTS, samplings(), depth=st.sampled_from(["shallow", "middle", "full"]), priority=st.integers(0, 1)
)


def same(got: Completion, wanted: Completion) -> None:
    assert (got.tokens, got.text, got.finish_reason) == (wanted.tokens, wanted.text, wanted.finish_reason)
    assert got.finished is not None and wanted.finished is not None
    for field in ("depth", "prompt_tokens", "completion_tokens"):
        assert getattr(got.finished, field) == getattr(wanted.finished, field)
    near(got.logprobs, wanted.logprobs)
    near(got.finished.prompt_logprobs, wanted.finished.prompt_logprobs)


def near(got: Any, wanted: Any) -> None:
    """Lists of logprobs that are equal but for the last digits, best tokens and their order included."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if isinstance(a, TokenLogprob):
            assert (a.token, [token for token, _ in a.top]) == (b.token, [token for token, _ in b.top])
            values = [[x.logprob, *(value for _, value in x.top)] for x in (a, b)]
            assert values[0] == pytest.approx(values[1], abs=1e-9)


@settings(max_examples=20)
@given(
    st.lists(REQUESTS, min_size=1, max_size=4),
    st.sampled_from([{}, {"units": 60, "max_batch": 6}, {"max_batch": 2, "max_batch_tokens": 10}]),
    st.sampled_from([0, 2]),
)
def test_any_options_in_any_company(requests: list[Request], limits: dict[str, int], drafts: int) -> None:
    engine = Engine(MODEL, **({"units": 400} | limits), speculative=drafts, speculative_max_batch=8)  # type: ignore[arg-type]
    requests = [dataclasses.replace(request, id=str(i)) for i, request in enumerate(requests)]
    for request, answer in zip(requests, engine.generate(requests), strict=True):
        same(answer, oracle.answer(MODEL, request, answer.tokens))
        event(f"ends by {answer.finish_reason}")
    assert engine.dead is None and engine.stats()["kv_cache_usage_perc"] == 0
    engine.scheduler.check_integrity()


@cache
def template(index: int) -> tuple[Request, Completion]:
    """One of a few requests that share beginnings, with what the oracle says to it."""
    rng = random.Random(index)
    prompt = [60] * rng.choice([0, 8, 16]) + [rng.randrange(20, 260) for _ in range(rng.randint(1, 12))]
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.5]), seed=index, max_tokens=rng.randint(1, 14), ignore_eos=rng.random() < 0.5,
        logit_bias={END_ID: 3.0}, repetition_penalty=rng.choice([1.0, 1.2]), prompt_logprobs=rng.choice([None, 0]),
        speculative=rng.choice([0, 0, 3]),
    )  # fmt: skip
    request = Request(prompt, sampling, depth=rng.choice(["shallow", "middle", "full"]), priority=rng.randint(0, 1))
    return request, naive.generate(MODEL, request)


def sequence(rng: random.Random, seen: Counter[str]) -> None:
    """Forty things in a row that may happen to an engine, over a small pool; its books are checked after each."""
    limits = {"units": rng.randint(40, 70), "max_batch": rng.randint(1, 5), "max_batch_tokens": rng.randint(13, 30)}
    engine = Engine(MODEL, **limits, speculative_max_batch=8)  # type: ignore[arg-type]
    run, wanted = engine.runner.run, dict[str, Completion]()
    got: dict[str, Completion] = {}

    def step() -> None:
        for happened in engine.step():
            answer = got[happened.request]
            assert answer.finished is None, "an event after the end"
            answer.text += happened.text
            if isinstance(happened, Token):
                answer.tokens.append(happened.token)
            else:
                answer.finished, answer.finish_reason = happened, happened.reason

    def fail(plan: Plan) -> Outcome:
        if rng.random() < 0.5:
            run(plan)  # what it wrote stays written
        raise FloatingPointError("injected")

    for _ in range(40):
        live = sorted(engine.scheduler._live)
        match rng.choices(["submit", "step", "cancel", "preempt", "pause", "fail"], [8, 14, 1, 2, 3, 1])[0]:
            case "submit":
                request, answer = template(rng.randrange(24))
                request = dataclasses.replace(request, id=str(len(wanted)))
                wanted[request.id], got[request.id] = answer, Completion()
                engine.submit(request)
            case "cancel" if live:
                engine.cancel(rng.choice(live))
            case "preempt" if engine.scheduler.running:
                engine.scheduler._preempt(rng.choice(engine.scheduler.running))
            case "pause" if live:
                engine.pause(rng.choice(live), rng.random() < 0.4)
            case "fail":
                engine.runner.run = fail  # type: ignore[method-assign]
                step()
                engine.runner.run = run  # type: ignore[method-assign]
            case _:
                step()
        engine.scheduler.check_integrity()
    for request_id in engine.scheduler._live:
        engine.pause(request_id, False)
    while not engine.idle:
        step()
    step()
    for request_id, answer in got.items():
        seen[answer.finish_reason] += 1
        assert isinstance(answer.finished, Finished)
        if answer.finish_reason in ("stop", "length"):
            same(answer, wanted[request_id])
        else:
            assert answer.tokens == wanted[request_id].tokens[: len(answer.tokens)]
    assert engine.dead is None and engine.stats()["kv_cache_usage_perc"] == 0
    seen["preempted"] += engine.scheduler.metrics.preemptions
    seen["accepted"] += engine.scheduler.metrics.drafts_accepted
    seen["rejected"] += engine.scheduler.metrics.drafts - engine.scheduler.metrics.drafts_accepted


def test_whatever_happens_to_a_request_its_answer_is_the_same() -> None:
    seen: Counter[str] = Counter()
    for seed in range(30):
        sequence(random.Random(seed), seen)
    for what in ("stop", "length", "cancelled", "error", "preempted", "accepted", "rejected"):
        assert seen[what] >= 20, (what, seen)
