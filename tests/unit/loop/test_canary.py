"""What the evidence of a canary decides: the test of a share by its definition, and by simulation what it promises."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from shoal.engine.signals import EVERY
from shoal.loop.canary import (
    ALPHA,
    CLEARED,
    CONDEMNED,
    LEAST_TIMES,
    LOOKED_AT,
    SHARES,
    Canary,
    Evidence,
    Pace,
    Tally,
    advanced,
    checks,
    judged,
    sprt,
)

START = Canary(2, 0, "2026-11-27T12:00:00+00:00", shadows=200, requests=300)


def good(requests: int) -> Tally:
    return Tally(requests=requests, timed=requests)


def test_the_evidence_is_the_likelihood_ratio_of_each_request() -> None:
    outcomes = [True, False, False, True, False]
    by_hand = sum(math.log(0.03 / 0.005) if bad else math.log(0.97 / 0.995) for bad in outcomes)
    assert sprt(2, 5, 0.005, 0.025) == pytest.approx(by_hand, rel=1e-12)


def test_a_step_ends_by_requests_that_went_well_and_the_last_one_ends_the_canary() -> None:
    canary, evidence = START, Evidence(good(0), good(500))
    for step in range(len(SHARES)):
        assert judged(canary, evidence)[0] == "wait"
        evidence.canary.requests += canary.enough
        evidence.canary.timed += canary.enough
        evidence.step = canary.enough
        decision, _ = judged(canary, evidence)
        assert decision == ("done" if step + 1 == len(SHARES) else "next")
        if decision == "next":
            canary, evidence.step = advanced(canary, "later"), 0
    assert canary.share == SHARES[-1]


@pytest.mark.parametrize("what", ["failures", "invalid", "slow"])
def test_one_that_always_fails_is_taken_back_within_twenty_requests(what: str) -> None:
    for requests in range(1, 21):
        tally = good(requests)
        setattr(tally, what, requests)
        decision, why = judged(START, Evidence(tally, good(100), requests))
        if decision == "back":
            assert str(requests) in why
            return
    raise AssertionError("twenty bad answers")


def test_calls_that_nobody_can_follow_condemn_within_twenty_and_beside_as_many_they_do_not() -> None:
    def after(wrong: int, stable: Tally) -> str:
        tally = replace(good(20), called=20, wrong=wrong)
        return judged(START, Evidence(tally, stable, 20))[0]

    known = replace(good(100), called=40, wrong=2)
    assert after(20, known) == after(10, known) == "back" and after(1, known) == "wait"
    assert after(10, replace(good(100), called=40, wrong=20)) == "wait", "the tools are at fault"
    assert judged(START, Evidence(good(300), good(300), 300))[0] == "next", "a service without tools"


def test_what_fails_at_the_stable_version_too_is_not_the_canarys_fault() -> None:
    half = Tally(requests=400, failures=200, timed=0)
    assert judged(START, Evidence(Tally(requests=20, failures=10), half, 20))[0] == "wait"
    assert judged(START, Evidence(Tally(requests=20, failures=10), good(400), 20))[0] == "back"


def test_votes_condemn_and_clear_nothing() -> None:
    evidence = Evidence(good(300), good(300), 300)
    assert judged(START, evidence)[0] == "next", "without a vote"
    evidence.canary.votes = evidence.canary.down = 8
    assert judged(START, evidence)[0] == "back"


def test_a_good_canary_is_condemned_as_seldom_as_promised_and_a_bad_one_soon() -> None:
    """1,000 canaries each of 2,000 requests. Of Wald's test the promise is that of each error, within what it oversteps."""
    draws = random.Random(1)

    def ends(rate: float) -> tuple[str, int]:
        count = 0
        for of in range(1, 2001):
            count += draws.random() < rate
            evidence = sprt(count, of, 0.005, 0.025)
            if evidence >= CONDEMNED or evidence <= CLEARED:
                return ("back" if evidence >= CONDEMNED else "clear"), of
        return "wait", 2000

    found = [ends(0.005) for _ in range(1000)]
    assert sum(end == "back" for end, _ in found) <= 1000 * ALPHA * 2
    bad = sorted(of for end, of in (ends(0.5) for _ in range(1000)) if end == "back")
    assert len(bad) >= 990 and bad[len(bad) // 2] <= 8


def test_slow_is_measured_against_the_stable_versions_latest_answers() -> None:
    pace = Pace(keep=40)
    assert pace.is_slow(9.0, 9.0) is None and pace.patience(1.0, 10.0) == math.inf
    for _ in range(LEAST_TIMES):
        pace.observe(0.1, 0.01)
    assert [pace.is_slow(*times) for times in ((0.1, 0.01), (0.2, 0.01), (0.1, 0.02), (0.12, None))] == [
        False, True, True, False,
    ]  # fmt: skip
    assert pace.patience(0.5, 10.0) == pytest.approx(1.0) and pace.patience(5.0, 10.0) == 5.0
    for _ in range(40):
        pace.observe(1.0, 0.1)
    assert pace.is_slow(1.1, 0.1) is False, "the machine is slow now"


def goes_back(draws: random.Random, shift: float, requests: int = 200) -> int | None:
    """After how many answers a canary is taken back that is less sure by so many standard deviations; as many answers of the
    stable version beside, and all become harder meanwhile."""
    pace, evidence = Pace(), Evidence()
    for number in range(requests):
        for tally, more in ((evidence.stable, 0.0), (evidence.canary, shift)):
            nll = draws.gauss(number / requests + more, 1.0)
            unsure = pace.is_unsure(nll)
            if unsure is not None:
                tally.heard += 1
                tally.unsure += unsure
            if tally is evidence.stable:
                pace.observe(0.1, 0.01, nll)
        if number % 4 == 3 and judged(START, evidence)[0] == "back":
            return number + 1
    return None


def test_one_that_is_as_sure_stays_and_one_that_is_not_goes_within_the_copies() -> None:
    """Of 100 trials the promise of 1 % lets chance make 4. One standard deviation is found by 50 answers in the median."""
    draws = random.Random(2)
    assert sum(goes_back(draws, 0.0) is not None for _ in range(100)) <= 4
    found = sorted(goes_back(draws, 1.0) or 999 for _ in range(30))
    assert found[15] <= 72 and found[28] <= 200


def goes_back_of(draws: random.Random, stable: tuple[int, float], canary: tuple[int, float]) -> bool:
    """Whether one is taken back within 300 answers, of (tokens that are looked at, nats of one in seven; of all others a
    fiftieth of that)."""
    pace, evidence = Pace(), Evidence()
    for _ in range(300):
        for tally, (looked, nats) in ((evidence.stable, stable), (evidence.canary, canary)):
            some = [draws.expovariate(1 / (nats if draws.random() < 0.15 else nats / 50)) for _ in range(looked)]
            nll, tokens = sum(some) / looked, looked * LOOKED_AT
            unsure = pace.is_unsure(nll, tokens)
            if unsure is not None:
                tally.heard += 1
                tally.unsure += unsure
            if tally is evidence.stable:
                pace.observe(0.1, 0.01, nll, tokens)
        if judged(START, evidence)[0] == "back":
            return True
    return False


@pytest.mark.parametrize(
    ("stable", "canary", "back"),
    [
        # longer answers, each token as sure: of these more than twice as many had been unsure
        ((1, 1.5), (3, 1.5), False),
        ((3, 1.5), (1, 1.5), False),
        ((3, 0.005), (3, 0.02), False),  # four times nothing
        ((3, 1.0), (3, 20.0), True),
    ],
)
def test_neither_other_lengths_nor_thousandths_of_a_nat_are_less_sure(
    stable: tuple[int, float], canary: tuple[int, float], back: bool
) -> None:
    draws = random.Random(3)
    found = sum(goes_back_of(draws, stable, canary) for _ in range(15))
    assert found >= 14 if back else found <= 1


def test_lengths_are_alike_as_engines_look_at_tokens() -> None:
    assert LOOKED_AT == EVERY
    pace = Pace()
    for _ in range(LEAST_TIMES):
        pace.observe(0.1, 0.01, 1.0, 17)
    found = [pace.is_unsure(2.0, tokens) for tokens in (1, 16, 17, 48, 49)]
    assert found == [None, None, True, True, None], "one token, two or three, four and more"
    assert [pace.is_unsure(nll, 17) for nll in (1.01, 1.03, None)] == [False, True, None]


def test_every_check_has_a_name_of_its_own() -> None:
    names = [check.name for check in checks(Evidence())]
    assert len({*names}) == len(names) == 7


def test_what_slows_both_condemns_nobody() -> None:
    """A canary that has just been loaded, on a machine that has not the cores for two."""
    three = Tally(requests=3, timed=3, slow=3)
    for stable in (Tally(), Tally(requests=4, timed=4, slow=3), Tally(requests=3, timed=3)):
        assert judged(START, Evidence(three, stable, 3))[0] == "wait"
    eight = Tally(requests=8, timed=8, slow=8)
    assert judged(START, Evidence(eight, Tally(requests=8, timed=8), 8))[0] == "back"
