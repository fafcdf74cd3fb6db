"""What the evidence of a canary decides: the test of a share by its definition, and by simulation what it promises."""

from __future__ import annotations

import math
import random

import pytest

from shoal.engine.signals import EVERY
from shoal.loop.canary import ALPHA, CHECKS, LEAST_TIMES, LOOKED_AT, Pace, advanced, checks, judged
from shoal.loop.canary_state import SHARES, Canary
from shoal.loop.evidence import CHANCE, KINDS, MOST_PEOPLE, VOTER, Evidence, dumped, joined, loaded, log_evidence, none
from tests.canaries import add, both

START = Canary(2, 0, "2026-11-27T12:00:00+00:00", shadows=200, people=300)
HALF = advanced(advanced(advanced(START, "later"), "later"), "later")


def test_a_step_ends_by_people_who_had_nothing_bad_and_the_last_one_ends_the_canary() -> None:
    canary, evidence = START, Evidence()
    for step in range(len(SHARES)):
        add(evidence, "stable", 500, step)
        assert judged(canary, evidence)[0] == "wait"
        add(evidence, "canary", canary.enough, step)
        decision, _ = judged(canary, evidence)
        assert decision == ("done" if step + 1 == len(SHARES) else "next")
        canary = advanced(canary, "later") if decision == "next" else canary
    assert canary.share == SHARES[-1]


@pytest.mark.parametrize("what", ["failures", "invalid", "slow"])
@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_one_that_always_fails_is_taken_back_within_twenty_people(what: str, step: int) -> None:
    evidence = add(Evidence(), "stable", 20, step)
    for people in range(1, 21):
        add(evidence, "canary", 1, step, **{what: 1})
        decision, why = judged(START, evidence)
        if decision == "back":
            assert people >= 3 and f"{people} of {people} people" in why
            return
    raise AssertionError("twenty people with bad answers")


def test_calls_that_nobody_can_follow_condemn_within_twenty_and_beside_as_many_they_do_not() -> None:
    def after(canary: int, stable: int) -> str:
        evidence = add(Evidence(), "canary", 20, wrong=canary)
        return judged(HALF, add(evidence, "stable", 40, wrong=stable))[0]

    assert after(20, 2) == after(10, 2) == "back" and after(1, 2) == "wait"
    assert after(10, 20) == "wait", "the tools are at fault"
    assert judged(HALF, both((300, 300)))[0] == "done", "a service without tools"


def test_what_fails_at_the_stable_version_too_is_not_the_canarys_fault() -> None:
    assert judged(HALF, both((20, 20), failures=(10, 10)))[0] == "wait"
    assert judged(HALF, both((20, 20), failures=(10, 0)))[0] == "back"


def test_what_fails_more_often_at_both_from_a_step_on_is_not_the_canarys_fault() -> None:
    """Of all its people a larger part is the canary's in later steps: over all steps 15 % of them had failures, and 8 % of the
    stable version's. In no step is it worse."""
    evidence = add(add(Evidence(), "canary", 300, 1, failures=15), "stable", 5700, 1, failures=285)
    add(add(evidence, "canary", 300, 2, failures=75), "stable", 900, 2, failures=225)
    check = next(check for check in checks(evidence) if check.name == "failures")
    assert check.count / check.of > 1.9 * check.stable and abs(check.more) < 1e-9
    assert judged(advanced(advanced(START, "later"), "later"), evidence)[0] == "next"


def test_votes_condemn_and_clear_nothing() -> None:
    evidence = both((300, 300))
    assert judged(HALF, evidence)[0] == "done", "without a vote"
    add(evidence, "stable", 20, down=2)
    assert judged(HALF, add(evidence, "canary", 2, down=2))[0] == "done", "two people"
    assert judged(HALF, add(evidence, "canary", 7, down=7))[0] == "back"


@pytest.mark.parametrize(("rate", "step"), [(0.02, 1), (0.5, 3)])
def test_an_equal_canary_is_condemned_as_seldom_as_promised_however_often_it_is_looked_at(
    rate: float, step: int
) -> None:
    """By the test alone, without margins and a least number of people, after each person who fails or does not."""
    draws, over = random.Random(1), 0
    for _ in range(50):
        counts = none()[:, :, 0]
        for _ in range(200):
            bad, side = draws.random() < rate, draws.random() < CHANCE[step, 0]
            counts[step, int(side)] += [1, bad, bad]
            if log_evidence(counts) >= math.log(1 / 0.05):
                over += 1
                break
    assert over <= 2.5 + 2 * 1.6  # of 50 trials 5 %, and two standard errors


def test_all_checks_together_keep_what_the_issue_asks() -> None:
    assert len(CHECKS) * ALPHA <= 0.05
    assert {kind for _, kind, *_ in CHECKS} == {*KINDS}


def test_who_comes_to_two_gateways_counts_once_and_where_she_was_first() -> None:
    here, there = Evidence(), Evidence()
    for at, (one, canary) in enumerate(((here, True), (there, False))):
        key = one.part(3, "ann", b"talk", canary=canary, at=float(at))
        assert key is not None
        one.see(key, "failures", True)
    for one, other in ((here, there), (there, here)):
        one.hear(loaded(dumped(other.own)))
        assert one.counts[3, :, 0, 0].tolist() == [0, 1]
    key = there.part(3, "bob", b"talk", canary=False, at=2.0)
    assert key is not None
    there.see(key, "failures", False)
    here.hear(joined(loaded(dumped(there.own)), {}))
    assert here.counts[3, :, 0, 0].tolist() == there.counts[3, :, 0, 0].tolist() == [1, 1]


def test_one_gateway_keeps_no_more_people_of_a_step_than_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.loop.evidence.MOST_PEOPLE", 10)
    assert MOST_PEOPLE * SHARES[1] > START.people
    evidence = Evidence()
    kept = [evidence.part(1, str(number), b"", canary=False, at=0.0) for number in range(20)]
    assert sum(key is not None for key in kept) == 10
    assert evidence.part(1, "3", b"", canary=False, at=1.0) is not None, "one who is known"
    assert evidence.part(2, "30", b"", canary=False, at=1.0) is not None, "another step"


@pytest.mark.parametrize("ours", [1.0, 5.0, 9.0])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_seen_of_who_is_known_elsewhere_costs_no_look_at_all_people(
    ours: float, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a restart each request of one took 0.2 s a kind, with sixty thousand people. Counts are those of a whole look,
    whoever was `first`, and whatever the clocks say."""
    there, here = Evidence(), Evidence()
    there.see(str(there.part(1, "a", b"", canary=True, at=5.0)), "failures", True)
    if first:
        here.see(str(here.part(1, "a", b"", canary=True, at=ours)), "failures", False)
    here.hear(loaded(dumped(there.own)))
    with monkeypatch.context() as patch:
        patch.setattr(Evidence, "hear", lambda *_: pytest.fail("looked at everybody"))
        key = str(here.part(1, "a", b"", canary=True, at=ours))
        for bad in (True, False):
            here.see(key, "down", bad)
        here.unsee(key, "failures")
    counts = here.counts.copy()
    here.hear(here.others)
    assert (here.counts == counts).all()


def test_who_votes_takes_no_place_of_who_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.loop.evidence.MOST_PEOPLE", 10)
    evidence = Evidence()
    for number in range(20):
        evidence.part(1, f"{VOTER}{number}", b"", canary=True, at=0.0)
    assert evidence.part(1, "a", b"", canary=True, at=0.0) is not None and len(evidence.own) == 11


@pytest.mark.parametrize(
    "told", [{"9a": [0, 1, 1, 0, 0]}, {"1a": [0, 1, 1]}, {"x": [0, 1, 1, 0, 0]}, {"1": [0, 1, -1, 0, 0]}]
)
def test_what_no_gateway_wrote_is_refused(told: dict[str, list[int]]) -> None:
    with pytest.raises((ValueError, TypeError, KeyError)):
        loaded(told)


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
        for side, more in (("stable", 0.0), ("canary", shift)):
            nll = draws.gauss(number / requests + more, 1.0)
            unsure = pace.is_unsure(nll)
            if unsure is not None:
                add(evidence, side, 1, unsure=int(unsure))
            if side == "stable":
                pace.observe(0.1, 0.01, nll)
        if number % 4 == 3 and judged(HALF, evidence)[0] == "back":
            return number + 1
    return None


def test_one_that_is_as_sure_stays_and_one_that_is_not_goes_within_the_copies() -> None:
    """Of 100 trials the promise of 0.5 % lets chance make 2. One standard deviation is found by 60 answers in the median."""
    draws = random.Random(2)
    assert sum(goes_back(draws, 0.0) is not None for _ in range(100)) <= 2
    assert sum(goes_back(draws, 0.2) is not None for _ in range(50)) <= 5
    found = sorted(goes_back(draws, 1.0) or 999 for _ in range(30))
    assert found[15] <= 72 and found[28] <= 200


def goes_back_of(draws: random.Random, stable: tuple[int, float], canary: tuple[int, float]) -> bool:
    """Whether one is taken back within 300 answers, of (tokens that are looked at, nats of one in seven; of all others a
    fiftieth of that)."""
    pace, evidence = Pace(), Evidence()
    for _ in range(300):
        for side, (looked, nats) in (("stable", stable), ("canary", canary)):
            some = [draws.expovariate(1 / (nats if draws.random() < 0.15 else nats / 50)) for _ in range(looked)]
            nll, tokens = sum(some) / looked, looked * LOOKED_AT
            unsure = pace.is_unsure(nll, tokens)
            if unsure is not None:
                add(evidence, side, 1, unsure=int(unsure))
            if side == "stable":
                pace.observe(0.1, 0.01, nll, tokens)
        if judged(HALF, evidence)[0] == "back":
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
    for stable, slow in ((0, 0), (12, 12)):
        assert judged(HALF, both((12, stable), slow=(12, slow)))[0] == "wait"
    assert judged(HALF, both((12, 12), slow=(12, 0)))[0] == "back"


def test_sixty_invented_users_of_one_key_condemn_no_canary_by_their_votes() -> None:
    """Of two keys, with the others' votes good; at the gateway that took them and at one that only read of them. Where there
    are no other keys they are the users of the service."""

    def voted(keys: tuple[str, ...]) -> Evidence:
        found = Evidence()
        for place in range(300):
            side, api_key = place % 4 == 0, keys[place % len(keys)]
            asked = found.part(3, f"asks {place}", b"", canary=side, at=0.0, api_key=api_key)
            assert asked is not None
            found.see(asked, "failures", False)
        for place in range(60):
            key = found.part(3, f"v{place}", b"", canary=True, at=0.0, api_key=keys[0])
            assert key is not None
            found.see(key, "down", True)
        return found

    canary = Canary(2, 3, "")
    assert judged(canary, voted(("a",)))[0] == "back"
    found, other = voted(("a", "b", "c")), Evidence()
    other.hear(loaded(dumped(found.own)))
    for each in (found, other):
        assert judged(canary, each)[0] != "back"
        assert each.table()["canary"]["down"] == {"of": 60, "bad": 60}, "what was said is told as it is"
    for place in range(6):  # of two other keys, who say the same
        key = found.part(3, f"v-{place}", b"", canary=True, at=0.0, api_key="bc"[place % 2])
        assert key is not None
        found.see(key, "down", True)
    assert judged(canary, found)[0] == "back"
