"""Tolerant drafts: what an answer spends is what full depth makes of it, and never more than it may. In float64.

What was spent is computed again from whole forward passes of the words that were told: whatever batch, preemption or engine
they came from, the sum must be the engine's. What that bounds is held by enumerating all that can happen over three tokens.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.engine import naive
from shoal.engine.events import Finished, Token
from shoal.engine.sampler import Sampler
from shoal.engine.tolerance import Allowance, Chain, apart, greedy_price, sampled_price, settle
from shoal.errors import RequestError
from tests.unit.engine.lively import lively, with_router
from tests.unit.engine.priced import KINDS, Told, check
from tests.unit.engine.test_speculative import EAGER, PLAIN, prompt

LIVELY = lively()
MODELS = {"eager": EAGER, "plain": PLAIN, "lively": LIVELY}


def ask(seed: int, tolerance: float, *, kind: str = "greedy", **more: Any) -> Request:
    sampling = {"seed": seed, "max_tokens": 20, "ignore_eos": True, "speculative": 3, **KINDS[kind], **more}
    return Request(prompt(seed), Sampling(**sampling), depth="full", quality_tolerance=tolerance, id=f"{kind}{seed}")


def engine(model: Model, **more: Any) -> Engine:
    return Engine(model, **({"units": 400, "speculative_max_batch": 8} | more))


def told(e: Engine, requests: list[Request]) -> dict[str, Told]:
    """The events of each of `requests`, run together."""
    found: dict[str, Told] = {e.submit(request): [] for request in requests}
    while not e.idle:
        for event in e.step():
            found[event.request].append(event)
        e.scheduler.check_integrity()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_an_answer_spends_what_full_depth_makes_of_it_and_no_more(name: str, kind: str) -> None:
    model, spent = MODELS[name], dict[float, float]()
    for tolerance in (0.02, 0.3, 5.0):
        requests = [ask(seed, tolerance, kind=kind) for seed in range(3)]
        found = told(engine(model), requests)
        spent[tolerance] = sum(check(model, request, found[request.id]) or 0.0 for request in requests)
    assert spent[5.0] > 0 or kind in ("filtered", "guided")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_tolerance_no_token_is_another(kind: str) -> None:
    for seed in range(3):
        request = ask(seed, 0.0, kind=kind)
        (answer,) = engine(LIVELY).generate([request])
        plain = naive.generate(LIVELY, request)
        assert (answer.tokens, answer.text, answer.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
        assert answer.finished is not None and answer.finished.spent == 0.0
        assert [entry.token for entry in answer.logprobs] == answer.tokens[: len(answer.logprobs)]


def test_a_tie_is_decided_as_without_drafts() -> None:
    """It would cost nothing that the draft stands; without a tolerance it falls all the same."""
    chain = Chain(0, [5], [torch.zeros(9)], 0.0, 0.0, 0)
    drawn = [3, 7]
    assert settle(chain, drawn, lambda row, place: 0.0) == {} and drawn == [3, 7]
    assert settle(dataclasses.replace(chain, tolerance=1e-9), drawn, lambda row, place: 0.0) == {0: 0.0} and drawn == [
        5,
        7,
    ]


def test_a_price_that_is_no_number_or_of_no_token_is_not_paid() -> None:
    chain = Chain(0, [5], [torch.zeros(9)], 9.0, 0.0, 0)
    for price in (math.nan, math.inf):
        drawn = [3]
        assert settle(chain, drawn, lambda row, place, price=price: price) == {} and drawn == [3]  # type: ignore[misc]
    drawn = [-1]
    assert settle(chain, drawn, lambda row, place: 0.0) == {} and drawn == [-1]


def test_no_tolerance_is_so_large_that_what_is_spent_is_no_number() -> None:
    """Times two tokens it is infinite. Where top-k leaves full depth and the first exit no token in common a draft is beyond
    price; else it costs what it costs."""
    most = sys.float_info.max
    chain = Chain(0, [5], [torch.zeros(9)], most, 0.0, 2)
    drawn = [3]
    assert settle(chain, drawn, lambda row, place: math.inf) == {} and drawn == [3]
    assert settle(chain, drawn, lambda row, place: 7.0) == {0: 7.0} and drawn == [5]
    e = engine(LIVELY)
    for seed in range(3):
        request = dataclasses.replace(ask(seed, 1.0, kind="drawn", top_k=2), quality_tolerance=most)
        spent = check(LIVELY, request, told(e, [request])[request.id])
        assert spent is not None and math.isfinite(spent)
    assert e.scheduler.metrics.drafts > e.scheduler.metrics.drafts_accepted and math.isfinite(e.scheduler.metrics.spent)


def test_a_chain_is_settled_draft_by_draft_until_one_falls() -> None:
    """In its own rows; one that full depth drew costs nothing, and none is asked after one that cannot be paid. Token 0 is a
    token as any."""
    chain = Chain(2, [11, 12, 13, 14, 15, 16], [torch.zeros(20)] * 6, tolerance=0.5, spent=0.25, answered=3)
    drawn, prices = [9, 9, 11, 0, 8, 14, 7, 6], {(3, 1): 0.5, (4, 2): 1.25, (6, 4): 1.75}
    assert settle(chain, drawn, lambda row, place: prices[row, place]) == {3: 0.5, 4: 1.25}
    assert drawn == [9, 9, 11, 12, 13, 14, 7, 6], "2.0 nats were spent, and 1.75 more than 7 tokens may"


def test_a_sampled_price_is_the_divergence_by_the_distance_of_two_laws() -> None:
    """Of what is not normalised; equal laws cost nothing, and what the exit never says is beyond price."""
    p, q = torch.tensor([0.5, 0.25, 0.25, 0.0]).log(), torch.tensor([0.25, 0.5, 0.125, 0.125]).log()
    nothing = torch.full((4,), -math.inf)
    laws = torch.stack([p + 3, p, q, p, p]), torch.stack([q - 1, p, p, nothing, q * math.nan])
    found = [sampled_price(*map(float, each)) for each in zip(*apart(*laws), strict=True)]
    assert found[:4] == [pytest.approx(0.5 * math.log(2) / 0.375, rel=1e-6), 0.0, math.inf, math.inf]
    assert found[4] == math.inf, "of no numbers"
    assert sampled_price(0.5, 1.0) == 0.5, "so far apart that no more than rounding is shared"
    assert greedy_price(torch.tensor([0.5, 2.0, -1.0]), 1, 2) == 3.0


def test_an_answer_that_an_end_closes_spent_at_most_its_tolerance_a_token() -> None:
    ends, most = tuple(range(20, 260, 2)), 0.0
    for seed in (5, 19, 21, 33, 39):
        request = ask(seed, 1.0, stop_token_ids=ends, min_tokens=seed % 4 + 1)
        (answer,) = engine(LIVELY).generate([request])
        assert answer.finished is not None and answer.finished.spent is not None
        most = max(most, answer.finished.spent / len(answer.tokens))
    assert 0 < most <= 1.0


@pytest.mark.parametrize(("name", "stand"), [("lively", False), pytest.param("eager", True, marks=pytest.mark.drill)])
def test_layers_that_ran_elsewhere_for_an_answer_are_counted_on(name: str, stand: bool) -> None:
    """Two engines that draft, then one that does not; where a step is cut in two, all that it ran is told with its first."""
    model, request, moved = MODELS[name], ask(1, 0.0, max_tokens=24), 0
    *sent, end = told(engine(model), [request])[request.id]
    for one in range(1, 24, 5):
        for two in range(one, 25, 4):
            tokens = [each for each in sent[:one] if isinstance(each, Token)]
            rest = request.after([each.token for each in tokens], tokens[-1])
            tokens = [each for each in told(engine(model), [rest])[request.id] if isinstance(each, Token)][: two - one]
            if tokens:
                rest = rest.after([each.token for each in tokens], tokens[-1])
            before = rest.ran
            (*_, last) = told(engine(model, speculative_max_batch=0), [rest])[request.id]
            assert isinstance(last, Finished) and last.completion_tokens == 24
            assert last.mean_depth == pytest.approx((before + 4 * (24 - two)) / 24)
            moved += before != 4 * two
    assert moved and isinstance(end, Finished) and (end.mean_depth < 4) == stand, "a draft that falls takes layers, too"


def test_a_token_that_another_engine_gave_took_no_layers_here() -> None:
    """Nobody counted what ran for it there."""
    request = ask(1, 0.0, max_tokens=6)
    (whole,) = engine(LIVELY).generate([request])
    for known in range(1, 7):
        rest = dataclasses.replace(request, answer=tuple(whole.tokens[:known]))
        (answer,) = engine(LIVELY, speculative_max_batch=0).generate([rest])
        assert answer.finished is not None and answer.finished.mean_depth == (4 if known < 6 else 0)


def test_a_logprob_is_that_of_the_token_that_stands() -> None:
    request = ask(1, 5.0, logprobs=3)
    (answer,) = engine(PLAIN).generate([request])
    assert answer.finished is not None and answer.finished.spent
    assert [entry.token for entry in answer.logprobs] == answer.tokens
    logits = PLAIN.logits([*request.prompt, *answer.tokens], "full").masked_fill(PLAIN.forbidden(), -math.inf)  # type: ignore[list-item]
    whole = torch.log_softmax(logits.double(), -1)
    for place, entry in enumerate(answer.logprobs, len(request.prompt) - 1):
        assert entry.logprob == pytest.approx(float(whole[place, entry.token]), abs=1e-9)


# --- what is bounded --------------------------------------------------------------------------------------------------

VOCAB, LONG = 3, 3


def laws(seed: int, before: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Full depth's law and the first exit's after the tokens `before`."""
    rng = np.random.default_rng([seed, *before, len(before)])
    logits = rng.normal(size=VOCAB)
    both = np.exp([2 * logits, 2 * logits + rng.choice([0.1, 1.0]) * rng.normal(size=VOCAB)])
    p, q = both / both.sum(-1, keepdims=True)
    return p, q


def outcomes(seed: int, tolerance: float) -> Iterator[tuple[float, float, float, np.ndarray]]:
    """All that can happen: probability, nats spent, the sum of KL(full depth || what the token was drawn from), and at which
    places a draft was let stand whatever was drawn. By the race's closed form: both laws draw v with probability
    1 / sum_u max(p_u / p_v, q_u / q_v)."""
    for tokens in product(range(VOCAB), repeat=LONG):
        for differs in product((False, True), repeat=LONG):
            chance, divergence, allowance, free = 1.0, 0.0, Allowance(tolerance), np.zeros(LONG, dtype=bool)
            for place, (token, differ) in enumerate(zip(tokens, differs, strict=True)):
                p, q = laws(seed, tokens[:place])
                price = sampled_price(*map(float, apart(*(torch.from_numpy(np.log(law))[None] for law in (p, q)))))
                both = 1 / np.maximum(p / p[token], q / q[token]).sum()
                if allowance.affords(price, place):
                    free[place] = True
                    divergence += float((p * np.log(p / q)).sum())
                    chance *= q[token] - both if differ else both
                    allowance.spent += price if differ else 0.0
                else:
                    chance *= p[token] - both if differ else both
            yield chance, allowance.spent, divergence, free


@pytest.mark.parametrize(
    "tolerance", [0.1, *(pytest.param(each, marks=pytest.mark.drill) for each in (0.02, 0.5, 3.0))]
)
def test_the_mean_divergence_of_what_is_told_is_at_most_what_is_spent(tolerance: float) -> None:
    let = 0.0
    for seed in range(12):
        all_ = list(outcomes(seed, tolerance))
        assert sum(chance for chance, *_ in all_) == pytest.approx(1.0, abs=1e-9)
        spent = sum(chance * spent for chance, spent, *_ in all_)
        divergence = sum(chance * divergence for chance, _, divergence, _ in all_)
        assert divergence <= spent + 1e-12
        assert max(spent for chance, spent, *_ in all_ if chance > 0) <= tolerance * (LONG - 1)
        let += sum(chance * free.mean() for chance, _, _, free in all_)
    assert let > 0, "nothing was ever let stand"


def test_two_draws_share_as_much_as_the_closed_form_says() -> None:
    p, q = laws(1, ())
    sampler = Sampler(torch.zeros(VOCAB, dtype=torch.bool), [])
    noise = sampler.noise([7] * 40_000, list(range(40_000))).numpy()
    a, b = (p / noise).argmax(-1), (q / noise).argmax(-1)
    for token in range(VOCAB):
        both = 1 / np.maximum(p / p[token], q / q[token]).sum()
        assert ((a == token) & (b == token)).mean() == pytest.approx(both, abs=0.01)


# --- who is audited ---------------------------------------------------------------------------------------------------


def test_where_the_router_would_decide_a_tolerance_is_measured_if_drafts_pay() -> None:
    model = with_router(LIVELY)
    request = dataclasses.replace(ask(0, 5.0, speculative=None), depth="auto")
    alone = dataclasses.replace(request.sampling, speculative=0)
    cases: list[tuple[Request, dict[str, Any], bool]] = [
        (request, {}, True),
        (request, {"speculative_max_batch": 0}, False),
        (request, {"compute_budget": 0.5}, False),
        (dataclasses.replace(request, sampling=alone), {}, False),
        (dataclasses.replace(request, quality_tolerance=None), {}, False),
    ]
    for asked, more, measured in cases:
        e = engine(model, **more)
        (answer,) = e.generate([asked])
        assert answer.finished is not None
        assert (answer.finished.spent is not None) == measured
        if measured:
            check(model, asked, told(engine(model, **more), [asked])[asked.id])
            assert answer.depth == model.config.layers and e.stats()["spec_decode_num_draft_tokens_total"] > 0
            assert 0 < answer.finished.mean_depth < answer.depth
        elif asked.quality_tolerance is not None:
            assert answer.depth == answer.finished.mean_depth == 1, (
                "the router says that the first exit is within 5 nats"
            )


def test_the_first_exit_cannot_have_a_tolerance() -> None:
    for depth in ("shallow", 1):
        with pytest.raises(
            RequestError, match=r"^quality_tolerance at the first exit: leave it out, or ask for a deeper one$"
        ):
            engine(EAGER).submit(dataclasses.replace(ask(0, 0.5), depth=depth))
