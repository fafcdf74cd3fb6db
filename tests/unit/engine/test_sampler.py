"""The sampler against plain definitions: filters, penalties, seeds, logprobs; and each row on its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.events import Sampling
from shoal.engine.guided import Grammar, GrammarError, StrayError
from shoal.engine.sampler import Sampler, _mix64, exponential
from shoal.errors import GenerationError
from shoal.inputs.tokenizer import END_ID
from shoal.model.cpu import fused
from tests.pretend_gpu import pretended

VOCAB = 300
CLOSED = 5  # a token that may never be chosen


@dataclass
class Draw:
    sampling: Sampling
    tokens: list[int] = field(default_factory=lambda: [50, 51])
    prompt_len: int = 2
    seed: int = 0
    grammar: Grammar | None = None
    watched: bool = False
    there: Sequence[torch.Tensor] = ()


def sampler() -> Sampler:
    forbidden = torch.zeros(VOCAB, dtype=torch.bool)
    forbidden[CLOSED] = True
    return Sampler(forbidden)


def logits(rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def drawn(row: torch.Tensor, sampling: Sampling, times: int = 4000) -> np.ndarray:
    """How often each token comes, over as many seeds."""
    draws = [Draw(sampling, seed=seed) for seed in range(times)]
    tokens = [s.token for s in sampler().sample(row.repeat(times, 1), draws)]
    return np.bincount(tokens, minlength=VOCAB) / times


def test_greedy_is_the_likeliest_that_is_allowed() -> None:
    row = logits()
    row[0, CLOSED] = 100
    allowed = row[0].clone()
    allowed[CLOSED] = -math.inf
    (sampled,) = sampler().sample(row, [Draw(Sampling(temperature=0))])
    assert sampled.token == int(allowed.argmax())


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=5), Sampling(top_p=0.5), Sampling(min_p=0.2), Sampling(top_k=30, top_p=0.6, min_p=0.05)]
)
def test_filters_keep_what_their_definitions_keep(sampling: Sampling) -> None:
    row = logits(seed=1)
    wanted = row[0].double().clone()
    wanted[CLOSED] = -math.inf
    p = torch.softmax(wanted, -1)
    order = p.argsort(descending=True)
    keep = torch.zeros(VOCAB, dtype=torch.bool)
    keep[order[: sampling.top_k or VOCAB]] = True
    q = torch.where(keep, p, 0) / p[keep].sum()
    before = q[order].cumsum(0) - q[order]
    keep[order[before >= sampling.top_p]] = False
    keep &= p >= sampling.min_p * p.max()
    share = (torch.where(keep, p, 0) / p[keep].sum()).numpy()
    found = drawn(row, sampling)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(keep.numpy()))
    assert np.abs(found - share).max() < 0.04


def test_penalties_bias_and_least_length() -> None:
    row = torch.zeros(1, VOCAB)
    row[0, 60], row[0, 61], row[0, END_ID] = 3.0, 2.5, 9.0

    def best(sampling: Sampling, answer: list[int]) -> int:
        draw = Draw(sampling, tokens=[50, *answer], prompt_len=1)
        return sampler().sample(row.clone(), [draw])[0].token

    assert best(Sampling(temperature=0), []) == END_ID
    assert best(Sampling(temperature=0, min_tokens=1), []) == 60
    assert best(Sampling(temperature=0, min_tokens=1), [60]) == END_ID
    quiet = {END_ID: -100.0}
    assert best(Sampling(temperature=0, logit_bias={**quiet, 61: 1}), []) == 61
    assert best(Sampling(temperature=0, logit_bias=quiet, presence_penalty=0.6), [60]) == 61
    assert best(Sampling(temperature=0, logit_bias=quiet, frequency_penalty=0.3), [60]) == 60
    assert best(Sampling(temperature=0, logit_bias=quiet, frequency_penalty=0.3), [60, 60]) == 61
    assert best(Sampling(temperature=0, logit_bias=quiet, repetition_penalty=1.5), [60]) == 61


def test_a_row_gets_the_same_token_alone_and_in_any_batch() -> None:
    rows = logits(6, seed=2)
    draws = [
        Draw(Sampling(temperature=0.7, top_k=9), seed=1),
        Draw(Sampling(temperature=0)),
        Draw(Sampling(temperature=1.3, top_p=0.8), seed=2),
        Draw(Sampling(presence_penalty=1.0, logprobs=2), tokens=[50, 60, 61], prompt_len=1, seed=3),
        Draw(Sampling(min_p=0.1), seed=4),
        Draw(Sampling(logit_bias={70: 5.0}), seed=5),
    ]
    together = sampler().sample(rows.clone(), draws)
    alone = [sampler().sample(rows[r : r + 1].clone(), [draw])[0] for r, draw in enumerate(draws)]
    assert [s.token for s in together] == [s.token for s in alone]


def test_a_row_that_is_not_finite_is_an_error_of_its_own() -> None:
    rows = logits(3)
    rows[1, 40] = math.nan
    rows[2] = -math.inf
    good, nan, nothing = sampler().sample(rows, [Draw(Sampling(), seed=i) for i in range(3)])
    assert good.error is None
    for bad in (nan, nothing):
        assert isinstance(bad.error, GenerationError) and "not finite" in str(bad.error)


def test_noise_is_what_published_hashes_make_of_seed_position_and_token() -> None:
    """splitmix64, whose first values of seed 0 are known, and lowbias32 in Python's own numbers. Another hash would draw other
    answers for the same seeds."""
    gamma = 0x9E3779B97F4A7C15
    first = _mix64(np.array([0, gamma, 2 * gamma % 2**64], dtype=np.uint64)).tolist()
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    def mix(x: int) -> int:
        return int(_mix64(np.array([x % 2**64], dtype=np.uint64))[0])

    def scramble(x: int, key: int = 0) -> int:
        x = ((x ^ x >> 16) * 0x7FEB352D + key) % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    for seed, position in ((0, 0), (7, 42), (2**63 - 1, 5), (-3, 1), (2**64 + 7, 42)):
        key, noise = mix(mix(seed) + position), sampler().noise([seed], [position])[0].tolist()
        for token in (0, 1, 50, VOCAB - 1):
            bits = scramble(scramble(token) ^ key % 2**32, key >> 32)
            assert noise[token] == pytest.approx(-math.log(((bits >> 9) + 0.5) / 2**23), rel=1e-9)


@pytest.mark.drill
def test_every_value_that_noise_can_have_is_above_zero_and_finite_and_grows_as_its_bits_fall() -> None:
    """All 2^23, and the bits below them, which must not matter: at their ends the largest rounded to -log 1 = 0."""
    values = exponential(torch.arange(2**23, dtype=torch.int32) << 9)
    assert torch.isfinite(values).all() and values.min() > 5e-8 and values.max() < 17
    assert (values[1:] < values[:-1]).all(), "each of them is a value of its own"
    for low in (0, 1, 0x80, 0xFF, 0x100, 0x1FF):
        ends = torch.tensor([0, 1, 2**22 - 1, 2**22, 2**23 - 2, 2**23 - 1], dtype=torch.int32)
        assert torch.equal(exponential((ends << 9) | low), values[ends.long()])
    middles = (np.arange(2**23) + 0.5) / 2**23
    assert np.abs(values.double().numpy() + np.log(middles)).max() < 2e-6


def test_the_noise_of_many_draws_is_always_above_zero() -> None:
    """3 * 10^7 of them, where one in 2^24 was 0."""
    large, least = Sampler(torch.zeros(2**16, dtype=torch.bool)), math.inf
    for start in range(0, 480, 32):
        noise = large.noise([7] * 32, range(start, start + 32))
        least = min(least, noise.min().item())
        assert noise.max() < 17
    assert 0 < least < 1e-6


@pytest.mark.parametrize("extreme", ["least", "most"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=1), Sampling(top_p=0.01), Sampling(min_p=1.0)])
def test_a_closed_token_never_wins_a_race_whatever_its_noise(
    extreme: str, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every closed token, by control, by filter or by weight, has the least noise that there is, and the open one the most."""
    bits = {"least": -1, "most": 0}[extreme]  # all ones, all zeros
    drawn_with = sampler()
    ends = exponential(torch.tensor([bits, ~bits], dtype=torch.int32))
    row = torch.full((1, VOCAB), -80.0)
    row[0, 40:] = -math.inf
    row[0, 70] = 9.0
    row[0, CLOSED] = 99.0
    noise = torch.full((1, VOCAB), ends[0].item())
    noise[0, 70] = ends[1]
    monkeypatch.setattr(drawn_with, "noise", lambda seeds, positions: noise.clone())
    (sampled,) = drawn_with.sample(row, [Draw(sampling)])
    assert sampled.token == 70 and sampled.error is None


def test_a_temperature_that_no_float32_holds_is_greedy() -> None:
    for temperature in (1e-30, 1e-46, 5e-324):
        for sampling in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_p=0.5, top_k=9)):
            assert drawn(logits(), sampling, 20)[int(logits()[0].argmax())] == 1


def test_a_row_without_a_token_has_no_logprobs_whether_others_have() -> None:
    """Not even where no row has a token."""
    asked = [Draw(Sampling(temperature=0, logprobs=2)) for _ in "ab"]
    for broken in ((0, 1), (1,)):
        rows = logits(2)
        rows[list(broken)] = math.nan
        found = sampler().sample(rows, asked)
        for row, each in enumerate(found):
            assert isinstance(each.error, GenerationError) == (row in broken)
            assert (each.logprob is None) == (row in broken)


def test_ids_that_end_the_vocabulary_without_a_token_are_never_drawn() -> None:
    forbidden = torch.zeros(VOCAB, dtype=torch.bool)
    forbidden[[CLOSED, *range(290, VOCAB)]] = True
    rows = logits(2)
    rows[0, 290], rows[1, VOCAB - 1] = 100.0, 100.0
    wanted = [int(row[:290].index_fill(0, torch.tensor([CLOSED]), -math.inf).argmax()) for row in rows]
    found = Sampler(forbidden).sample(rows, [Draw(Sampling(temperature=0)) for _ in "ab"])
    assert [each.token for each in found] == wanted


def test_compiled_loops_draw_the_tokens_of_the_race() -> None:
    """Of any rows of a batch, greedy ones among them, filtered or not; also where many tokens are equal, closed or broken."""
    pytest.importorskip("numba")

    @settings(max_examples=150)
    @given(
        st.integers(0, 2**31),
        st.sampled_from([torch.float32, torch.float64]),
        st.sampled_from([0.0, 0.05, 1.0, 8.0, 60.0]),
        st.lists(
            st.builds(
                Sampling,
                temperature=st.sampled_from([0.0, 1e-44, 0.3, 1.0, 2.0]),
                top_k=st.sampled_from([0, 1, 7, 250, 299, 5000]),
                top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 1e-6]),
                min_p=st.sampled_from([0.0, 0.02, 1.0]),
            ),
            min_size=1,
            max_size=6,
        ),
        st.sampled_from(["plain", "few values", "closed", "broken", "one"]),
    )
    def same(seed: int, dtype: torch.dtype, spread: float, samplings: list[Sampling], what: str) -> None:
        vocab = 300 + seed % 400
        rows = torch.randn(len(samplings), vocab, generator=torch.Generator().manual_seed(seed), dtype=dtype) * spread
        if what == "few values":
            rows = rows.round()
        if what == "closed":
            rows[rows < rows.quantile(0.9)] = -math.inf
        if what == "broken":
            rows[seed % len(rows), seed % vocab] = math.nan
            rows[-1, (seed + 1) % vocab] = math.inf
        if what == "one":
            rows[:, : vocab - 1] = -math.inf
        forbidden = torch.zeros(vocab, dtype=torch.bool)
        forbidden[CLOSED] = True
        draws = [Draw(each, seed=seed + r) for r, each in enumerate(samplings)]
        plain = Sampler(forbidden).sample(rows.clone(), draws)
        with torch.inference_mode():
            compiled = Sampler(forbidden).sample(rows.clone(), draws)
        assert [s.token for s in compiled] == [s.token for s in plain]
        assert [type(s.error) for s in compiled] == [type(s.error) for s in plain]

    same()


def test_a_race_that_rounding_decides_is_run_as_it_is_defined(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slack that makes every race such a one."""
    draw = pytest.importorskip("shoal.model.cpu.draw")
    rows, draws = logits(40, seed=3), [Draw(Sampling(), seed=seed) for seed in range(40)]
    plain = [s.token for s in sampler().sample(rows.clone(), draws)]
    run, close = fused.race, list[int]()

    def all_close(*args: Any) -> tuple[torch.Tensor, list[int]]:
        found, ties = run(*args)
        close.extend(ties)
        return torch.zeros_like(found), list(range(len(found)))

    assert draw.SLACK < 1e-3
    monkeypatch.setattr(fused, "race", all_close)
    with torch.inference_mode():
        assert [s.token for s in sampler().sample(rows.clone(), draws)] == plain
    assert not close  # chance does not make one in 40


# chi-square that chance passes once in a thousand, by degrees of freedom
CHANCE = (0.0, 10.83, 13.82, 16.27, 18.47, 20.52, 22.46, 24.32)
EIGHT = torch.tensor([1.9, 1.2, 0.7, 0.1, -0.4, -1.1, -1.6, -2.4], dtype=torch.float64)
TIMES = 10_000


def raced(row: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """The token of each of `TIMES` seeds, drawn from `row` [V]."""
    draws = [Draw(sampling, seed=seed) for seed in range(TIMES)]
    found = Sampler(torch.zeros(len(row), dtype=torch.bool)).sample(row.repeat(TIMES, 1), draws)
    return np.array([each.token for each in found])


def law(row: torch.Tensor, s: Sampling) -> np.ndarray:
    """What `s` draws from, as its filters are defined: top-k, of these top-p, and min-p beside the likeliest."""
    p = np.exp(row.numpy() / s.temperature)
    p /= p.sum()
    order = np.argsort(-p)
    p[order[s.top_k or len(p) :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= s.top_p]] = 0
    p[p < s.min_p * p.max()] = 0
    whole: np.ndarray = p / p.sum()
    return whole


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(), Sampling(temperature=0.6), Sampling(temperature=1.7), Sampling(top_k=3), Sampling(top_p=0.8),
        Sampling(min_p=0.2), Sampling(temperature=1.4, top_k=6, top_p=0.85, min_p=0.1),
    ],
    ids=["all", "cold", "hot", "top_k", "top_p", "min_p", "together"],
)  # fmt: skip
def test_tokens_come_as_often_as_their_definition_says_within_chance(sampling: Sampling) -> None:
    """Of 10,000 seeds by a chi-square of one in a thousand; what the filters leave out never comes."""
    share, found = law(EIGHT, sampling), np.bincount(raced(EIGHT, sampling), minlength=8)
    kept = share > 0
    assert not found[~kept].any()
    wanted = TIMES * share[kept]
    assert ((found[kept] - wanted) ** 2 / wanted).sum() < CHANCE[kept.sum() - 1]


def test_two_distributions_draw_the_same_token_as_often_as_a_race_of_the_same_noise_does() -> None:
    """Token v wins both with the probability 1 / sum over u of max(p_u / p_v, q_u / q_v), since the minimum of exponentials is
    one: 0.77 to 0.95 here, where tokens that are drawn apart would agree in 0.25 to 0.35. Within four standard errors."""
    full = raced(EIGHT, Sampling())
    for change, temperature in ((0.1, 1.0), (0.5, 1.0), (0.0, 0.7)):
        other = EIGHT + change * torch.tensor([-1.0, 1.0, 0.5, -0.5, 1.0, 0.0, -1.0, 2.0])
        s = Sampling(temperature=temperature)
        p, q = law(EIGHT, Sampling()), law(other, s)
        ratios = np.maximum(p[None] / p[:, None], q[None] / q[:, None])
        wanted, same = (1 / ratios.sum(1)).sum(), full == raced(other, s)
        assert abs(same.mean() - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / TIMES)
        assert wanted > 2 * (p * q).sum()


def test_a_request_that_closes_all_there_is_is_told_where_and_how_though_ids_without_a_token_are_left() -> None:
    """Two ids at the end have no token, and a control token stands in the middle: none of them was open to it."""
    forbidden = torch.zeros(12, dtype=torch.bool)
    forbidden[[3, 4, 10, 11]] = True
    known = [token for token in range(12) if not forbidden[token]]
    few = Sampling(temperature=0, min_tokens=3, stop_token_ids=known)
    for answer in (0, 2):
        draw = Draw(few, tokens=[7] * (2 + answer))
        (found,) = Sampler(forbidden, [0]).sample(torch.zeros(1, 12), [draw])
        assert found.error is not None and (found.error.status, found.error.param) == (400, "min_tokens")
        assert f"none, after {answer} of the answer" in str(found.error) and "ask for fewer" in str(found.error)
    (found,) = Sampler(forbidden, [0]).sample(torch.zeros(1, 12), [Draw(few, tokens=[7] * 5)])
    assert found.error is None and found.token == 0, "long enough"
    some = Sampling(temperature=0, min_tokens=3, stop_token_ids=known[:-1])
    (found,) = Sampler(forbidden, [0]).sample(torch.zeros(1, 12), [Draw(some)])
    assert found.error is None and found.token == known[-1]


def test_scores_are_the_models_own_over_what_it_may_choose_with_as_many_alternatives_as_are_asked() -> None:
    rows = logits(3, seed=5).double()
    allowed = rows.index_fill(1, torch.tensor([CLOSED]), -math.inf)
    whole = allowed - allowed.exp().sum(-1, keepdim=True).log()
    for count in (0, 1, 4):
        entries = sampler().score(rows.clone(), [70, CLOSED, 0], count)
        assert [entry.token for entry in entries] == [70, CLOSED, 0]
        assert [entry.logprob for entry in entries] == pytest.approx(
            [float(whole[0, 70]), -math.inf, float(whole[2, 0])], abs=1e-12
        )
        best = whole.topk(4)
        for row, entry in enumerate(entries):
            assert [token for token, _ in entry.top] == best.indices[row, :count].tolist()
            assert [value for _, value in entry.top] == pytest.approx(best.values[row, :count].tolist(), abs=1e-12)


class Says:
    """A grammar that allows what it was made with, or fails."""

    def __init__(self, *allowed: int, error: Exception | None = None) -> None:
        self.mask, self.error = np.zeros(VOCAB, dtype=bool), error
        self.mask[list(allowed)] = True
        self.asked: list[list[int]] = []

    def allowed(self, answer: list[int]) -> np.ndarray:
        self.asked.append(answer)
        if self.error is not None:
            raise self.error
        return self.mask


@pytest.mark.parametrize("there", [False, True], ids=["CPU", "device"])
def test_what_a_grammar_does_not_allow_is_closed_in_its_row_alone(there: bool) -> None:
    """Of the answer, not of the prompt. One that fails, or that asks for a control token, is told of as what it is."""
    grammars = [
        Says(60, 61),
        None,
        Says(error=StrayError("x")),
        Says(error=GrammarError("deep")),
        Says(CLOSED),
        Says(70),
    ]
    rows = logits(len(grammars), seed=4)
    kept, best = rows.clone(), rows.index_fill(1, torch.tensor([CLOSED]), -math.inf).argmax(-1)
    draws = [Draw(Sampling(temperature=0), [50, 51, 8, 9], grammar=each) for each in grammars]  # type: ignore[arg-type]
    forbidden = torch.zeros(VOCAB, dtype=torch.bool)
    forbidden[CLOSED] = True
    with pretended() if there else nullcontext("cpu") as device:
        adjusted = rows.to(device)
        found = Sampler(forbidden.to(device)).sample(adjusted, draws)
        adjusted = adjusted.cpu() if there else adjusted
    guided, free, stray, deep, control, one = found
    assert guided.token == (60 if kept[0, 60] >= kept[0, 61] else 61) and one.token == 70
    assert free.token == best[1] and all((each.error, each.spent) == (None, 0.0) for each in (guided, free, one))
    assert all(each.asked == [[8, 9]] for each in grammars if each is not None)
    for each, status, param, said in (
        (stray, 500, None, "left its grammar"), (deep, 400, "guided", "simpler"), (control, 400, "guided", "goes on with text"),
    ):  # fmt: skip
        assert each.error is not None and (each.error.status, each.error.param) == (status, param)
        assert said in str(each.error)
    assert adjusted[0].isfinite().nonzero().flatten().tolist() == [60, 61]
    assert adjusted[1].isfinite().sum() == VOCAB - 1
