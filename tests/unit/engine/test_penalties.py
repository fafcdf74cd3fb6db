"""Penalties by their definitions, those of vLLM and OpenAI, on whole rows of logits (`sample` adjusts them in place)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal import Engine
from shoal.engine import naive
from shoal.engine.events import Request, Sampling
from shoal.engine.penalties import adjust
from shoal.engine.sampler import Sampler
from tests.unit.engine.lively import lively
from tests.unit.engine.test_sampler import Draw

INF = float("inf")
VOCAB = 12
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=9)


@given(
    prompt=TOKENS.filter(bool),
    answer=TOKENS,
    repetition=st.sampled_from([1.0, 0.5, 1.7]),
    presence=st.sampled_from([0.0, 0.8, -1.5]),
    frequency=st.sampled_from([0.0, 0.3, -0.4]),
    bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=3),
    seed=st.integers(0, 99),
)
def test_every_token_is_changed_by_what_its_definition_says(
    prompt: list[int], answer: list[int], repetition: float, presence: float, frequency: float,
    bias: dict[int, float], seed: int,
) -> None:  # fmt: skip
    """Presence once however often a token came, frequency as often as it came, both in the answer alone; repetition for what
    stands in prompt or answer, towards smaller where it is above 1, whatever the sign."""
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    sampling = Sampling(
        temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency,
        logit_bias=bias,
    )  # fmt: skip
    expected = []
    for token, logit in enumerate(row.tolist()):
        value = logit + bias.get(token, 0.0)
        if token in prompt or token in answer:
            value = value / repetition if value > 0 else value * repetition
        count = Counter(answer)[token]
        expected.append(value - (presence if count else 0.0) - frequency * count)
    logits = row[None].clone()
    (sampled,) = Sampler(torch.zeros(VOCAB, dtype=torch.bool)).sample(
        logits, [Draw(sampling, [*prompt, *answer], len(prompt))]
    )
    np.testing.assert_allclose(logits[0].numpy(), expected, rtol=0, atol=1e-12)
    assert expected[sampled.token] == max(expected)


@given(
    prompt=TOKENS.filter(bool),
    answer=TOKENS,
    runs=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=3), min_size=1, max_size=4),
    seed=st.integers(0, 9),
)
def test_a_banned_run_of_tokens_is_never_completed_by_the_answer(
    prompt: list[int], answer: list[int], runs: list[list[int]], seed: int
) -> None:
    """Neither one whose beginning the prompt holds is closed, nor anything else."""
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    closed = {token for token in range(VOCAB) if any(ends([*answer, token], run) for run in runs)}
    logits = row[None].clone()
    sampling = Sampling(temperature=0, banned=runs)
    Sampler(torch.zeros(VOCAB, dtype=torch.bool)).sample(logits, [Draw(sampling, [*prompt, *answer], len(prompt))])
    for token, logit in enumerate(logits[0].tolist()):
        assert logit == (-INF if token in closed else row[token])


RUNS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=5)
ROWS = st.tuples(
    TOKENS.filter(bool), st.lists(st.integers(0, 2), min_size=1, max_size=6), st.integers(0, 6),
    st.sampled_from([1.0, 0.5, 1.7]), st.sampled_from([0.0, 0.8, -1.5]), st.sampled_from([0.0, 0.3, -0.4]), RUNS,
)  # fmt: skip


@given(rows=st.lists(ROWS, min_size=1, max_size=4), seed=st.integers(0, 9), double=st.booleans())
def test_what_the_host_has_not_read_changes_logits_as_what_it_has(rows: list[Any], seed: int, double: bool) -> None:
    """To the bit, whichever of the answer's last tokens lie elsewhere; of these `tokens` holds others."""
    kind = torch.float64 if double else torch.float32
    logits = torch.randn(len(rows), VOCAB, generator=torch.Generator().manual_seed(seed)).to(kind) * 3
    known, unread = list[Draw](), list[Draw]()
    for prompt, answer, count, repetition, presence, frequency, runs in rows:
        sampling = Sampling(
            repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, banned=runs
        )
        known.append(Draw(sampling, [*prompt, *answer], len(prompt)))
        there = [torch.tensor(token) for token in answer[max(0, len(answer) - count) :]] if count else []
        tokens = [*prompt, *answer[: len(answer) - len(there)], *[11] * len(there)]
        unread.append(replace(known[-1], tokens=tokens, there=there))
    want, got = logits.clone(), logits.clone()
    adjust(want, known, [])
    adjust(got, unread, [])
    assert torch.equal(got, want)


def test_where_all_tokens_are_banned_the_request_is_at_fault_and_not_the_model() -> None:
    sampling = Sampling(temperature=0, banned=[[token] for token in range(VOCAB)])
    logits = torch.zeros(1, VOCAB, dtype=torch.float64)
    for draw in (Draw(sampling, [1], 1), Draw(sampling, [1, 0], 1, there=[torch.tensor(5)])):
        (sampled,) = Sampler(torch.zeros(VOCAB, dtype=torch.bool)).sample(logits.clone(), [draw])
        assert sampled.error is not None and (sampled.error.status, sampled.error.param) == (400, "banned")


def test_banned_runs_and_kept_stops_are_the_oracle_s_with_drafts_too() -> None:
    model = lively()
    engine, prompt = Engine(model, speculative=3), [60] * 8
    for seed in range(6):
        free = Sampling(max_tokens=12, seed=seed, ignore_eos=True)
        tokens = naive.generate(model, Request(prompt, free, depth="full")).tokens
        runs = [tokens[2:3], tokens[4:6], tokens[6:9]]
        sampling = replace(free, banned=runs, speculative=3, stop=("a", "e"), include_stop=True)
        wanted = naive.generate(model, Request(prompt, sampling, depth="full"))
        (got,) = engine.generate([Request(prompt, sampling, depth="full")])
        assert (got.tokens, got.text) == (wanted.tokens, wanted.text)
        assert not any(got.tokens[at : at + len(run)] == run for run in runs for at in range(len(got.tokens)))


def ends(tokens: list[int], run: list[int]) -> bool:
    return len(tokens) >= len(run) and tokens[len(tokens) - len(run) :] == run
