"""Self-speculation changes no token: greedy or sampled, whatever is rejected, preempted, stopped or cached. In float64.

EAGER agrees with its own first group about half of the time, so that drafts are accepted and rejected at every place of a
block and of a page; PLAIN is random throughout and rejects most. The oracle is `naive.generate` where drafts alone are in
question, and the engine without drafts (held against it in test_properties.py) where much runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.engine.drafts import draft
from shoal.engine.events import MAX_DRAFTS, Completion, Finished, Guide, Token
from shoal.engine.plan import Sampled
from shoal.engine.sampler import Sampler
from shoal.engine.speculative import accept
from shoal.errors import ConfigError, GenerationError, RequestError
from shoal.inputs.tokenizer import END_ID
from shoal.model.cpu import fused
from tests import oracle
from tests.unit.engine.test_sampler import Draw


def build(share: float) -> Model:
    """A random model whose deeper groups add `share` of what they would."""
    model = Model.from_preset("test", seed=3, dtype="float64")
    for group in list(model.net.groups)[1:]:
        for block in group.blocks:  # type: ignore[union-attr]
            block.attention.out.weight.mul_(share)  # type: ignore[union-attr]
            block.mlp.down.weight.mul_(share)  # type: ignore[union-attr]
    return model


PLAIN, EAGER = build(1.0), build(0.5)
GREEDY = Sampling(temperature=0, frequency_penalty=0.5, max_tokens=24, ignore_eos=True)  # or it repeats one token
RICH = Sampling(
    temperature=0.9, top_p=0.95, top_k=80, min_p=0.001, seed=9, max_tokens=30, ignore_eos=True, presence_penalty=0.4,
    frequency_penalty=0.2, repetition_penalty=1.1, logit_bias={70: 1.5, 80: -2.0}, logprobs=3,
)  # fmt: skip


def prompt(seed: int, longest: int = 30) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 260) for _ in range(rng.randint(1, longest))]


def engine(model: Model = EAGER, drafts: int = 4, **more: Any) -> Engine:
    return Engine(model, speculative=drafts, **({"speculative_max_batch": 8} | more))


def run(e: Engine, requests: list[Request]) -> list[Completion]:
    """As `Engine.generate`, with the books checked after every step."""
    answers = {e.submit(request): Completion() for request in requests}
    while not e.idle:
        for event in e.step():
            answer = answers[event.request]
            answer.text += event.text
            if isinstance(event, Token):
                answer.tokens.append(event.token)
                answer.logprobs += [event.logprob] if event.logprob is not None else []
            else:
                answer.finished, answer.finish_reason = event, event.reason
        e.scheduler.check_integrity()
    assert e.dead is None and e.stats()["kv_cache_usage_perc"] == 0
    return list(answers.values())


def undrafted(request: Request, model: Model = EAGER) -> Completion:
    return run(Engine(model), [request])[0]


def same(got: Completion, wanted: Completion) -> None:
    assert (got.tokens, got.text, got.finish_reason) == (wanted.tokens, wanted.text, wanted.finish_reason)
    assert got.finished is not None and got.finished.completion_tokens == len(wanted.tokens)
    assert [entry.token for entry in got.logprobs] == [entry.token for entry in wanted.logprobs]
    for a, b in zip(got.logprobs, wanted.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-9)
        assert [token for token, _ in a.top] == [token for token, _ in b.top]


@pytest.mark.parametrize("drafts", [1, 3, 8, *(pytest.param(n, marks=pytest.mark.drill) for n in (2, 4, 5, 6, 7))])
def test_20_greedy_drafting_changes_no_token(drafts: int) -> None:
    for model in (PLAIN, EAGER):
        e = engine(model, drafts)
        for seed in (drafts, drafts + 50):  # prompts of many lengths: every offset in a block and a page
            request = Request(prompt(seed), GREEDY, depth="full")
            (got,) = run(e, [request])
            same(got, oracle.answer(model, request, got.tokens))
        stats = e.stats()
        drafted, accepted = (stats[f"spec_decode_num_{kind}_tokens_total"] for kind in ("draft", "accepted"))
        assert 0 <= accepted < drafted  # some were rejected
        if model is EAGER:
            assert accepted > 0
            assert stats["steps_total"] < stats["generation_tokens_total"]


@pytest.mark.parametrize("drafts", [MAX_DRAFTS, *(pytest.param(n, marks=pytest.mark.drill) for n in (1, 7))])
def test_in_int8_drafts_change_no_bit(drafts: int) -> None:
    """Tokens and log-probabilities: a row of few of its request is computed alike beside any others. With a draft more than
    those few the other way's last digits moved INT8's roundings, by up to 0.0035 nats."""
    assert fused.SHORT > MAX_DRAFTS
    model = Model.from_preset("test", seed=3).quantized()
    for norm in model.net.exit_norms.values():
        norm.weight.mul_(10)  # type: ignore[operator,union-attr]
    for seed in range(4):
        how = Sampling(temperature=0.8, seed=seed, max_tokens=30, ignore_eos=True, logprobs=0, speculative=drafts)
        request = Request(prompt(seed, 60), how, depth="full")
        (got,), (wanted,) = (run(Engine(model, speculative_max_batch=most), [request]) for most in (1, 0))
        assert (got.tokens, got.logprobs) == (wanted.tokens, wanted.logprobs)


@pytest.mark.parametrize("tolerance", [None, 0.4])
def test_drafts_in_one_stretch_are_those_of_a_step_each(
    tolerance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is laid out once a step gives what is laid out anew for each draft: drafts, states, keys and values, whoever drafts
    how much, whoever ends, and wherever in a page they stand."""
    samplings = [
        dataclasses.replace(RICH, seed=seed, speculative=[1, 4, 7][seed % 3], logprobs=None) for seed in range(6)
    ]
    samplings += [
        dataclasses.replace(GREEDY, speculative=5),
        dataclasses.replace(GREEDY, ignore_eos=False, logit_bias={END_ID: 5}),
    ]
    requests = [
        Request(prompt(seed, 60), sampling, depth=["full", "middle"][seed % 2], quality_tolerance=tolerance)
        for seed, sampling in enumerate(samplings)
    ]
    stretched, found = list[bool](), []
    for way in (draft, lambda *_: False):

        def watched(*given: Any, way: Any = way) -> bool:
            stretched.append(way(*given))
            return stretched[-1]

        monkeypatch.setattr("shoal.engine.drafts.draft", watched)
        e = engine()
        answers = run(e, [dataclasses.replace(request, id=str(i)) for i, request in enumerate(requests)])
        counts = [e.stats()[f"spec_decode_num_{kind}_tokens_total"] for kind in ("draft", "accepted")]
        spent = [answer.finished and answer.finished.spent for answer in answers]
        found.append(([answer.tokens for answer in answers], counts, spent, e.runner.cache.kv.clone()))
    half = len(stretched) // 2
    assert stretched == [True] * half + [False] * half and half > 5
    (tokens, counts, spent, kv), (wanted, others, nats, memory) = found
    assert (tokens, counts) == (wanted, others)
    assert spent == nats if tolerance is None else spent == pytest.approx(nats)
    torch.testing.assert_close(kv[:, 1:], memory[:, 1:], rtol=0, atol=1e-9)


@pytest.mark.parametrize("depth", ["middle", "full"])
def test_21_sampled_drafting_changes_no_token_whatever_the_options(depth: str) -> None:
    for seed in range(2):
        request = Request(prompt(seed), dataclasses.replace(RICH, seed=seed), depth=depth)
        e = engine()
        (got,) = run(e, [request])
        same(got, oracle.answer(EAGER, request, got.tokens))
        assert e.stats()["spec_decode_num_accepted_tokens_total"] > 0


def test_20_an_answer_ends_where_it_would_without_drafts() -> None:
    """By the end token, a stop token, max_tokens and a stop string, each somewhere inside what was drafted."""
    for seed in range(2):
        base = dataclasses.replace(RICH, seed=seed, max_tokens=24, logprobs=None)
        whole = undrafted(Request(prompt(seed), base, depth="full"))
        for at in (5 + seed, 12):
            cut = [
                dataclasses.replace(base, max_tokens=at),
                dataclasses.replace(base, stop_token_ids=[whole.tokens[at]]),
                dataclasses.replace(base, stop=[whole.text[at : at + 2]]),
                dataclasses.replace(base, stop=[whole.text[at : at + 2]], min_tokens=at + 4),
                dataclasses.replace(base, ignore_eos=False, logit_bias={END_ID: 6.0}),
            ]
            requests = [Request(prompt(seed), sampling, depth="full") for sampling in cut]
            for got, wanted in zip(run(engine(), requests), run(Engine(EAGER), requests), strict=True):
                same(got, wanted)


def test_grammar_and_drafts_together() -> None:
    for kind, spec in (("regex", "(ab?c)+[0-9]{2,9}"), ("choice", ("yes", "no", "yesterday"))):
        for seed in range(2):
            sampling = Sampling(guided=Guide(kind, spec), seed=seed, max_tokens=20)  # type: ignore[arg-type]
            request = Request(prompt(seed), sampling, depth="full")
            e = engine()
            same(run(e, [request])[0], undrafted(request))
    assert e.stats()["spec_decode_num_draft_tokens_total"] > 0


@pytest.mark.parametrize("limits", [{"units": 1 + 4 * 16}, {"max_batch_tokens": 28, "max_batch": 3}, {"max_batch": 8}])
def test_a_batch_with_preemption_chunks_and_depths_changes_no_token(limits: dict[str, int]) -> None:
    requests = [
        Request(
            prompt(seed, 60),
            dataclasses.replace(RICH, seed=seed, speculative=[None, 0, 2, 7][seed % 4], logprobs=None),
            depth=["full", "middle", "shallow"][seed % 3],
        )
        for seed in range(7)
    ]
    e = engine(**limits)
    none = [dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, speculative=0)) for r in requests]
    for got, wanted in zip(run(e, requests), run(Engine(EAGER), none), strict=True):
        same(got, wanted)
    if "units" in limits:
        assert e.stats()["num_preemptions_total"] > 0
    assert e.stats()["spec_decode_num_accepted_tokens_total"] > 0


def test_what_is_cancelled_or_paused_while_drafting_leaves_nothing_behind() -> None:
    rng = random.Random(1)
    wanted = [undrafted(Request(prompt(seed), dataclasses.replace(RICH, seed=seed))).tokens for seed in range(4)]
    for round_ in range(2):
        e = engine(units=1 + 4 * 24)
        requests = [Request(prompt(seed), dataclasses.replace(RICH, seed=seed, logprobs=None)) for seed in range(4)]
        ids = [e.submit(request) for request in requests]
        said: dict[str, list[int]] = {request: [] for request in ids}
        ends: dict[str, str] = {}
        for step in itertools.count():
            for event in e.step():
                if isinstance(event, Token):
                    said[event.request].append(event.token)
                else:
                    ends[event.request] = event.reason
            e.scheduler.check_integrity()
            e.pause(rng.choice(ids), paused=step < 12 and rng.random() < 0.5)
            if step == 3 + round_:
                e.cancel(ids[round_])
            if step >= 12:
                for request in ids:
                    e.pause(request, paused=False)
            if e.idle:
                break
        assert e.stats()["kv_cache_usage_perc"] == 0 and ends[ids[round_]] == "cancelled"
        for tokens, ident in zip(wanted, ids, strict=True):
            assert said[ident] == (tokens if ends[ident] == "length" else tokens[: len(said[ident])])


def test_21_the_prefix_cache_holds_no_draft() -> None:
    """Every page that can be found afterwards spells a piece of a finished request; and what is found gives the same tokens."""
    e = engine(PLAIN, 7)
    request = Request(prompt(2), dataclasses.replace(GREEDY, max_tokens=40), depth="full")
    (answer,) = run(e, [request])
    tokens = [*request.prompt, *answer.tokens]  # type: ignore[misc]
    page = PLAIN.config.page
    pages = [tuple(tokens[at : at + page]) for at in range(0, len(tokens), page)]
    keys = [key for _, key in e.scheduler.pages._key.values()]
    assert keys and all(key.tokens in pages for key in keys)
    follow = Request(tokens, Sampling(temperature=0, max_tokens=10, ignore_eos=True), depth="full")
    (got,) = run(e, [follow])
    same(got, undrafted(follow, PLAIN))
    assert got.finished is not None and got.finished.cached_tokens >= page


def test_requests_that_run_through_one_group_have_nothing_to_draft_with() -> None:
    e = engine()
    run(e, [Request(prompt(1), Sampling(temperature=0, max_tokens=10), depth="shallow")])
    assert e.stats()["spec_decode_num_draft_tokens_total"] == 0


def test_logits_that_are_not_finite_end_the_request_alone() -> None:
    model = build(0.3)
    e = engine(model)
    bad = e.submit(Request(prompt(1), Sampling(temperature=0, max_tokens=20, ignore_eos=True)))
    e.step()
    model.net.exit_norms[str(model.config.layers)].weight.fill_(math.nan)  # type: ignore[union-attr]
    events: list[Any] = []
    while not e.idle:
        events += e.step()
        e.scheduler.check_integrity()
    (end,) = [event for event in events if isinstance(event, Finished)]
    assert (end.request, end.reason) == (bad, "error") and e.stats()["kv_cache_usage_perc"] == 0


# --- the draw itself -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [
    Sampling(temperature=0.7, top_p=0.9),
    *(pytest.param(each, marks=pytest.mark.drill) for each in (Sampling(), Sampling(top_k=5))),
])  # fmt: skip
def test_21_verified_tokens_follow_the_full_models_distribution(sampling: Sampling) -> None:
    """10^5 draws of a draft from q and of the token that verifies it from p: the verified ones follow p exactly (chi-square),
    and drafts are right at least (1 - TV) / (1 + TV) of the time, the bound of this coupling."""
    vocab, times = 8, 100_000
    generator = torch.Generator().manual_seed(0)
    p_logits = torch.randn(vocab, generator=generator, dtype=torch.float64)
    q_logits = p_logits + 0.7 * torch.randn(vocab, generator=generator, dtype=torch.float64)
    sampler = Sampler(torch.zeros(vocab, dtype=torch.bool))
    draws = [Draw(sampling, seed=seed) for seed in range(times)]
    drawn = [
        np.array([s.token for s in sampler.sample(row.repeat(times, 1), draws)]) for row in (q_logits, p_logits)
    ]  # fmt: skip

    def shares(logits: torch.Tensor) -> np.ndarray:
        p = torch.softmax(logits / sampling.temperature, -1).numpy()
        order = np.argsort(-p)
        keep = np.zeros(vocab, dtype=bool)
        keep[order[: sampling.top_k or vocab]] = True
        before = np.cumsum(p[order]) - p[order]
        keep[order[before >= sampling.top_p]] = False
        return np.where(keep, p, 0) / p[keep].sum()

    for tokens, share in zip(drawn, (shares(q_logits), shares(p_logits)), strict=True):
        counts, kept = np.bincount(tokens, minlength=vocab), share > 0
        assert counts[~kept].sum() == 0
        chi = ((counts[kept] - times * share[kept]) ** 2 / (times * share[kept])).sum()
        freedom = int(kept.sum()) - 1
        assert chi < freedom + 4 * math.sqrt(2 * freedom) + 6
    distance = 0.5 * np.abs(shares(p_logits) - shares(q_logits)).sum()
    right = (drawn[0] == drawn[1]).mean()
    assert (1 - distance) / (1 + distance) - 0.01 < right <= 1 - distance + 0.01


def test_accept_keeps_what_was_right_and_the_first_token_after_it() -> None:
    rows = [Sampled(token) for token in (5, 6, 9, 8)]
    got = accept([5, 6, 7], rows)
    assert (got.token, [s.token for s in got.after], got.drafted) == (5, [6, 9], 3)
    assert [s.token for s in accept([5, 6, 9], rows).after] == [6, 9, 8]
    assert accept([4, 6, 9], rows).after == ()
    assert accept([], rows[:1]) == Sampled(5)
    error = GenerationError("boom")
    broken = [Sampled(5), Sampled(0, error=error), Sampled(9)]
    assert [s.error for s in accept([5, 0], broken).after] == [error]


def test_bad_values_are_named() -> None:
    with pytest.raises(ConfigError, match="speculative"):
        Engine(EAGER, speculative=17)
    for value in (-1, 17, True, 1.5):
        with pytest.raises(RequestError) as caught:
            Sampling(speculative=value)  # type: ignore[arg-type]
        assert caught.value.param == "speculative"
