"""What an audit's figure means, held by enumerating all that can be told over three places; and what is promised of the
correction, by simulating routers that are right, and wrong by a known amount.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.engine.audits import BETS, DOUBT, MOST, RATE, Evidence
from shoal.model.router import NEVER, Router, promised, thresholds
from tests.unit.engine.lively import lively

LIVELY = lively()
EXITS = LIVELY.config.exits


# --- what it measures ------------------------------------------------------------------------------------------------------

Law = tuple[float, ...]
END = 2  # of three tokens, the one that ends an answer


def laws(draws: random.Random) -> dict[tuple[int, ...], Law]:
    """A law of the next token after each of the words that can be told."""

    def law() -> Law:
        parts = [draws.expovariate(1) ** 2 + 1e-3 for _ in range(3)]
        return tuple(part / sum(parts) for part in parts)

    return {words: law() for count in range(3) for words in product(range(2), repeat=count)}


def told(q: dict[tuple[int, ...], Law]) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Every answer of at most three tokens, its end among them, with its probability."""
    for words in [tuple(w) for n in range(4) for w in product(range(2), repeat=n)]:
        answer = words if len(words) == 3 else (*words, END)
        yield math.prod(q[answer[:place]][token] for place, token in enumerate(answer)), answer


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_gap_on_what_full_depth_would_have_said_and_own_words_flatter(seed: int) -> None:
    """By enumeration of all answers y of an exit and of all tokens that full depth may draw at each of their places."""
    draws = random.Random(seed)
    p, q = laws(draws), laws(draws)
    measured = gap = flattered = reference = whole = 0.0
    for chance, answer in told(q):
        places = [answer[:place] for place in range(len(answer))]
        kl = [sum(a * math.log(a / b) for a, b in zip(p[words], q[words], strict=True)) for words in places]
        measured += chance * sum(kl) / len(places)
        # the router's gap, loss at the exit less loss at full depth, of references that full depth draws place by place
        drawn = [p[words][x] * (-math.log(q[words][x]) + math.log(p[words][x])) for words in places for x in range(3)]
        gap += chance * sum(drawn) / len(places)
        flattered += chance * sum(math.log(p[w][x] / q[w][x]) for w, x in zip(places, answer, strict=True))
    for chance, answer in told(p):  # where the exit's words are full depth's, it is the whole gap of the calibration
        places = [answer[:place] for place in range(len(answer))]
        reference += chance * sum(math.log(p[w][x] / q[w][x]) for w, x in zip(places, answer, strict=True))
        whole += chance * sum(
            sum(a * math.log(a / b) for a, b in zip(p[words], q[words], strict=True)) for words in places
        )
    assert measured == pytest.approx(gap) and measured > 0
    assert flattered < 0, "the exit's own words say that it is better than full depth"
    assert whole == pytest.approx(reference)


# --- the correction --------------------------------------------------------------------------------------------------------


def losses(draws: random.Random, kind: str, mean: float) -> float:
    """What an answer loses: evenly much, or much of few, or as an exponential law."""
    if kind == "even":
        return draws.uniform(0, 2 * mean)
    if kind == "few":
        return mean / 0.05 if draws.random() < 0.05 else 0.0
    return draws.expovariate(1 / mean)


def test_what_gamblers_have_and_what_is_corrected_are_by_their_definitions() -> None:
    """Those who begin at the k-th answer have 1 / (k (k + 1)), and all who are still to begin 1 / (n + 1). What is proven stays
    so, though afterwards nothing is lost for long."""
    assert (BETS, DOUBT, RATE, MOST) == ((1 / 32, 1 / 8, 1 / 2), 0.05, 0.2, 1.0)
    draws, evidence, proven, shift, corrected = random.Random(0), Evidence(), False, 0.0, list[float]()
    kinds = [[0.0, 0.04, 0.07]] * 9 + [[0.1, 0.3, 3.0]] * 12 + [[0.0]] * 120 + [[0.3]] * 9
    told = [(draws.choice(kind), draws.choice([0.05, 0.1])) for kind in kinds]
    for count in range(1, len(told) + 1):
        evidence.learn(*told[count - 1])
        if not proven:
            bets = [[1 + bet * (min(lost, 1.0) / allowed - 1) for lost, allowed in told[:count]] for bet in BETS]
            begun = [sum(math.prod(each[k - 1 :]) / (k * (k + 1)) for k in range(1, count + 1)) for each in bets]
            assert evidence.wealth == pytest.approx(begun)
            proven = sum(begun) / 3 + 1 / (count + 1) >= 20
        lost, allowed = told[count - 1]
        shift = max(0.0, shift + 0.2 * (min(lost, 1.0) - allowed)) if proven else 0.0
        corrected += [shift] * proven
        assert (evidence.proven, evidence.shift) == (proven, pytest.approx(shift, abs=1e-12))
        assert (evidence.answers, evidence.lost) == (count, pytest.approx(sum(lost for lost, _ in told[:count])))
        assert evidence.allowed == pytest.approx(sum(allowed for _, allowed in told[:count]))
    assert 9 < len(told) - len(corrected) < 20 and 0.0 in corrected and corrected[-1] > 0


@pytest.mark.parametrize(("together", "proven"), [(19.95, False), (20.05, True)])
def test_who_is_still_to_begin_counts_with_what_it_has(together: float, proven: bool) -> None:
    """After one answer half of all is left to those who begin later; the others bet 7/32 of theirs in the mean."""
    evidence, ratio = Evidence(), (2 * (together - 0.5) - 1) * 32 / 7
    evidence.learn(1.0, 1 / (1 + ratio))
    assert sum(evidence.wealth) / 3 + 0.5 == pytest.approx(together) and evidence.proven is proven


@pytest.mark.parametrize("kind", ["even", "few", "exponential"])
@pytest.mark.parametrize("share", [1.0, 0.8])
def test_a_router_that_is_right_is_hardly_ever_corrected(kind: str, share: float) -> None:
    """In 5 % of runs at most, though it loses just what it may, and is looked at after each of 500 answers."""
    runs, moved = 200, 0
    for seed in range(runs):
        draws, evidence = random.Random(seed), Evidence()
        for _ in range(500):
            evidence.learn(losses(draws, kind, share * 0.05), 0.05)
            if evidence.proven:
                break
        moved += evidence.proven
        assert evidence.proven or evidence.shift == 0
    assert moved <= 0.05 * runs


def simulated(seed: int, answers: int, error: float, quiet: int = 0) -> tuple[list[float], list[int], Evidence]:
    """What each of so many answers loses and its depth, of a router that is right for `quiet` answers and then takes each gap
    for less than it is, by `error` times its size."""
    draws = torch.Generator().manual_seed(seed)
    count = 400 + answers
    hard = torch.empty(count).exponential_(8, generator=draws)
    gaps = torch.stack([2 * hard, hard], 1) * (0.5 + torch.rand(count, 2, generator=draws))  # [.., A]
    seen = gaps * (0.5 + torch.rand(count, 2, generator=draws))
    router = Router(LIVELY.config)
    full = torch.cat([gaps, torch.zeros(count, 1)], 1)

    def regrets(bounds: Tensor) -> Tensor:
        within = torch.cat([seen[:400] <= bounds[:, None, None], torch.ones(len(bounds), 400, 1, dtype=torch.bool)], 2)
        return promised(full[torch.arange(400), within.float().argmax(2)], float(full.max()), torch.arange(400))

    router.calibration.thresholds = thresholds(seen[:400].flatten().tolist(), regrets)
    assert router.bound(0.05) > NEVER
    evidence, x = Evidence(), torch.zeros(2 * LIVELY.config.width + 3)
    spent: list[float] = []
    depths: list[int] = []
    for place in range(400, count):
        predicted = (seen[place] / (1 + error if place >= 400 + quiet else 1)).tolist()
        depth = router.choose(x, 0.05, None, (predicted, predicted), None, evidence.shift)
        depths.append(depth)
        spent.append(float(full[place, EXITS.index(depth)]))
        evidence.learn(spent[-1], 0.05)
    return spent, depths, evidence


@pytest.mark.parametrize("error", [1.0, 3.0])
def test_what_a_router_loses_that_is_wrong_by_a_known_amount_comes_back_within_what_it_may(error: float) -> None:
    late: list[float] = []
    early: list[float] = []
    found = 0
    for seed in range(6):
        spent, depths, evidence = simulated(seed, 1200, error)
        found += evidence.proven
        early.append(sum(spent[:30]) / 30)
        late.append(sum(spent[400:]) / 800)
        assert len(set(depths[400:])) > 1, "not all at full depth"
    assert found == 6 and sum(early) / 6 > 1.5 * 0.05
    assert sum(late) / 6 <= 1.03 * 0.05 and max(late) <= 1.2 * 0.05


def test_one_that_turns_wrong_late_is_found_and_one_that_is_right_again_comes_back() -> None:
    spent, _, evidence = simulated(1, 3000, 3.0, quiet=1000)
    assert evidence.proven and sum(spent[1600:]) / 1400 <= 1.1 * 0.05
    for _ in range(math.ceil(evidence.shift / (RATE * 0.05)) + 1):
        evidence.learn(0.0, 0.05)
    assert evidence.shift == 0
    spent, _, evidence = simulated(2, 600, 0.0)
    assert not evidence.proven and sum(spent) / 600 <= 1.1 * 0.05


@settings(max_examples=200)
@given(st.lists(st.floats(0, 5), max_size=120), st.floats(0.01, 1), st.floats(0.01, 2))
def test_whatever_comes_the_mean_is_bounded_once_it_is_corrected(
    worst: list[float], allowed: float, high: float
) -> None:
    """Nothing is lost where the shift is `high`, since all are at full depth then; else whatever somebody picks."""
    evidence = Evidence(proven=True)
    excess = 0.0
    for each in worst:
        of = 0.0 if evidence.shift >= high else each
        excess += min(of, MOST) - allowed
        evidence.learn(of, allowed)
        assert RATE * excess <= evidence.shift + 1e-9 <= high + RATE * MOST + 1e-8


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 9)), max_size=50))
def test_what_is_known_is_always_numbers(answers: list[tuple[float, float]]) -> None:
    evidence = Evidence()
    for each, allowed in answers:
        evidence.learn(each, allowed)
    assert all(math.isfinite(each) and each >= 0 for each in (evidence.shift, *evidence.wealth))
