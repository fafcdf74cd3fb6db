"""The engine and the naive generate agree on every option that a request has, alone and in one batch. In float64.

`deadline` and `priority` are about time; depth "auto" with a router is in test_properties.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shoal import Engine, Model, Request, Sampling
from shoal.engine import naive
from shoal.engine.events import Completion, Guide, TokenLogprob
from shoal.inputs.chat import Encoded
from shoal.inputs.media import to_patches
from shoal.inputs.tokenizer import END_ID
from tests import oracle

MODEL = Model.from_preset("test", seed=3, dtype="float64")
TOKENS = st.integers(20, 200)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    def maybe(values: st.SearchStrategy[Any], none: Any) -> Any:
        return draw(values) if draw(st.booleans()) else none

    guided = maybe(st.sampled_from([Guide("regex", "[a-z]{2,9}"), Guide("choice", ("ja", "nein", "jamais"))]), None)
    tokens = draw(st.integers(1, 12))
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.0, 0.5, 1.0, 1.7])),
        top_p=maybe(st.floats(0.1, 1), 1.0),
        top_k=maybe(st.integers(1, 60), 0),
        min_p=maybe(st.floats(0, 0.3), 0.0),
        seed=draw(st.integers(0, 2**64)),
        max_tokens=tokens,
        min_tokens=0 if guided else maybe(st.integers(0, tokens), 0),
        stop=maybe(st.lists(st.text(st.characters(codec="ascii"), min_size=1, max_size=2), max_size=3), ()),
        stop_token_ids=maybe(st.lists(TOKENS, max_size=20), ()),
        ignore_eos=not guided and draw(st.booleans()),
        presence_penalty=maybe(st.floats(-2, 2), 0.0),
        frequency_penalty=maybe(st.floats(-2, 2), 0.0),
        repetition_penalty=maybe(st.floats(0.5, 2), 1.0),
        logit_bias=maybe(st.dictionaries(TOKENS | st.just(END_ID), st.floats(-5, 5), max_size=5), {}),
        logprobs=maybe(st.integers(0, 5), None),
        prompt_logprobs=maybe(st.integers(0, 3), None),
        guided=guided,
        speculative=maybe(st.integers(0, 5), None),
    )
    prompt: Any = draw(st.lists(TOKENS, min_size=1, max_size=30))
    if draw(st.integers(0, 4)) == 0:
        pixels = np.full((8, 12, 3), draw(st.integers(0, 255)), dtype=np.uint8)
        image = to_patches(Image.fromarray(pixels), MODEL.config)
        prompt = Encoded([*prompt[:3], *image.tokens(), *prompt[3:]], [image])
    return Request(prompt, sampling, depth=draw(st.sampled_from(["shallow", "middle", "full"])))


def close(got: TokenLogprob | None, wanted: TokenLogprob | None) -> bool:
    if got is None or wanted is None:
        return got is wanted
    values = [(got.logprob, wanted.logprob), *((a[1], b[1]) for a, b in zip(got.top, wanted.top, strict=True))]
    return got.token == wanted.token and all(a == b or abs(a - b) < 1e-9 for a, b in values)


def agree(got: Completion, wanted: Completion) -> None:
    assert (got.tokens, got.text, got.finish_reason) == (wanted.tokens, wanted.text, wanted.finish_reason)
    assert got.depth == wanted.depth and got.finished is not None and wanted.finished is not None
    assert got.finished.completion_tokens == wanted.finished.completion_tokens
    for ours, theirs in (
        (got.logprobs, wanted.logprobs),
        (got.finished.prompt_logprobs, wanted.finished.prompt_logprobs),
    ):
        assert len(ours) == len(theirs) and all(map(close, ours, theirs))


def test_log_probabilities_of_the_oracle_are_those_of_what_may_be_said() -> None:
    prompt = [30, 40, 50]
    found = naive.generate(
        MODEL, Request(prompt, Sampling(temperature=0, max_tokens=2, ignore_eos=True, logprobs=1), depth="full")
    )
    assert len(found.logprobs) == len(found.tokens) == 2
    for at, told in enumerate(found.logprobs):
        logits = MODEL.logits([*prompt, *found.tokens[:at]])[-1].clone()
        logits[MODEL.forbidden()] = -torch.inf
        scores = torch.log_softmax(logits, -1)
        assert told.token == found.tokens[at] == int(scores.argmax())
        assert told.logprob == pytest.approx(float(scores.max()), abs=1e-12)


@settings(max_examples=25)
@given(st.lists(requests(), min_size=1, max_size=4))
def test_every_option_means_the_same_in_the_engine_and_in_the_oracle(asked: list[Request]) -> None:
    engine = Engine(MODEL, units=200, max_batch_tokens=40, max_batch=4, speculative=2, speculative_max_batch=4)
    for request, got in zip(asked, engine.generate(asked), strict=True):
        agree(got, naive.generate(MODEL, request))
    engine.step()  # idle: checks the books
    assert engine.dead is None


@pytest.mark.parametrize("cached", [False, True])
def test_every_token_of_a_prompt_is_scored_in_chunks_and_out_of_the_cache(cached: bool) -> None:
    prompt = [20 + 7 * i % 190 for i in range(75)]
    engine = Engine(MODEL, units=200, max_batch_tokens=32, max_batch=4)
    if cached:
        engine.generate([Request(prompt, Sampling(temperature=0, max_tokens=1))])
    request = Request(prompt, Sampling(temperature=0, max_tokens=3, prompt_logprobs=2), depth="full")
    (got,) = engine.generate([request])
    agree(got, naive.generate(MODEL, request))
    assert got.finished is not None
    first, *others = got.finished.prompt_logprobs
    assert first is None and [entry.token for entry in others if entry is not None] == prompt[1:]


@pytest.mark.parametrize("guess", ["right", "other", "short", "long", "none"])
def test_a_guess_changes_nothing_and_saves_looks_where_it_is_right(guess: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests.oracle`, by which other tests ask for what is written out here."""
    pixels = np.full((8, 12, 3), 90, dtype=np.uint8)
    image = to_patches(Image.fromarray(pixels), MODEL.config)
    prompt = Encoded([30, *image.tokens(), 40], [image])
    sampling = Sampling(temperature=1.0, seed=5, max_tokens=9, ignore_eos=True, logprobs=2, prompt_logprobs=1)
    request = Request(prompt, sampling, depth="middle")
    want, plain = naive.generate(MODEL, request), MODEL.generate_naive(prompt, 9, "middle", ignore_eos=True)
    looks, logits = list[int](), Model.logits
    monkeypatch.setattr(Model, "logits", lambda self, ids, *more: looks.append(len(ids)) or logits(self, ids, *more))
    for tokens, asked in (
        (want.tokens, lambda told: agree(oracle.answer(MODEL, request, told), want)),
        (plain, lambda told: oracle.greedy(MODEL, prompt, 9, told, "middle") == plain or pytest.fail("other tokens")),
    ):
        told = {"right": tokens, "other": [*tokens[:4], 299 - tokens[4], *tokens[5:]], "short": tokens[:5],
                "long": [*tokens, 50, 60], "none": []}[guess]  # fmt: skip
        looks.clear()
        asked(told)
        assert len(looks) == {"right": 1, "other": 1 + 4, "short": 1 + 3, "long": 1, "none": 1 + 8}[guess]


def test_the_oracle_says_why_an_answer_ended_as_the_engine_does() -> None:
    request = Request([60], Sampling(max_tokens=9, guided=Guide("lark", 'start: "a" <[5]> "b"')), depth="full")
    (answer,) = Engine(MODEL, units=60).generate([request])
    found = naive.generate(MODEL, request)
    assert answer.finished is not None and answer.finished.error is not None
    assert found.finished is not None and found.finished.error is not None
    assert (found.finish_reason, found.text) == (answer.finish_reason, answer.text) == ("error", "a")
    assert str(found.finished.error) == str(answer.finished.error)
    assert (found.finished.error.param, found.finished.error.status) == ("guided", 400)
