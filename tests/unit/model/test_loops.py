"""The small loops that the compiled ones of a CPU are made of, each by its definition in float64. They run as Python here: what
numba makes of them is compared as a whole in `test_fused`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")


from shoal.model import slots
from shoal.model.cpu import attention, compiled, decode, draw, integers

RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (attention, compiled, decode, draw, integers):
        for name, found in list(vars(module).items()):
            if hasattr(found, "py_func"):
                monkeypatch.setattr(module, name, found.py_func)


def test_an_exponential_in_fp32_is_within_2e_7_and_held_where_fp32_ends() -> None:
    for x in (*np.linspace(-87, 88, 701), *np.linspace(-1, 1, 201), 0.0):
        x = np.float32(x)
        assert float(compiled._exp32(x)) == pytest.approx(math.exp(float(x)), rel=2e-7)
    low, high = (float(compiled._exp32(np.float32(x))) for x in (-87, 88))
    assert [float(compiled._exp32(np.float32(x))) for x in (-87.5, 88.5)] == [low, high]
    assert float(compiled._exp32(np.float32(-1e4))) == low > 0 and math.isfinite(high)
    assert float(compiled._exp32(np.float32(np.inf))) == float(compiled._exp32(np.float32(100))) == high
    assert float(compiled._exp32(np.float32(0))) == 1.0
    with np.errstate(invalid="ignore"):
        assert math.isnan(float(compiled._exp32(np.float32(np.nan))))


# ---- what tokens race with


@pytest.mark.parametrize("rows", [1, 3])
def test_a_threshold_is_the_largest_of_the_three_by_sorting(rows: int) -> None:
    """Of the k likeliest, of the fewest of these with so much of their mass, and of what is given."""
    logits = RNG(2).normal(size=(rows, 600)) * 2
    logits[0, 5:9] = logits[0, 5]  # equal ones
    likeliest = logits.argmax(-1)
    for heat, top_k, top_p, floor in (
        (1.0, 600, 0.5, -np.inf), (0.7, 40, 1.0, -np.inf), (1.3, 40, 0.9, -np.inf), (1.0, 1, 0.9, -np.inf),
        (1.0, 600, 0.999, -2.0), (1.0, 40, 0.9, -1.0), (1.0, 600, 1.0, -3.0), (2.0, 599, 0.01, -np.inf),
    ):  # fmt: skip
        lowest = np.zeros(rows)
        many = (np.full(rows, each) for each in (heat, top_k, top_p, floor))
        draw.thresholds(logits, np.arange(rows), likeliest, *many, lowest)
        for row in range(rows):
            z = np.sort((logits[row] - logits[row].max()) / heat)[::-1]
            kept = z[: min(top_k, len(z))]
            mass = np.exp(kept).cumsum() / np.exp(kept).sum()
            wanted = [floor, kept[-1] if top_k < 600 else -np.inf]
            wanted += [kept[int((mass >= top_p).argmax())]] if top_p < 1 else []
            assert lowest[row] == pytest.approx(max(wanted), abs=1e-12)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_bound_is_never_less_than_what_a_token_races_with_and_a_race_is_won_by_the_largest(kind: Any) -> None:
    """What is filtered out has a bound of 0. Of two tokens with the same noise and logit rounding decides, and that is told."""
    logits, rows = RNG(3).normal(size=(2, 300)).astype(kind) * 2, np.arange(40) % 2
    logits[0, 7], logits[1, 290] = -np.inf, logits[1].max()  # forbidden; equal to the likeliest
    ids, keys = np.arange(300, dtype=np.uint32) * np.uint32(65537), RNG(4).integers(0, 2**32, (40, 2)).astype(np.uint32)
    ids[271], logits[0, 271] = ids[30], logits[0, 30] = ids[30], logits[0].max() + 1
    heat, lowest = np.array([0.9, 1.5] * 20), np.array([-3.0, -np.inf] * 20)
    found, ties = np.zeros(40, np.int64), np.zeros(40, bool)
    with np.errstate(over="ignore"):
        draw.race(logits, rows, logits.argmax(-1)[rows], heat, lowest, ids, keys, found, ties)
        for d, row in enumerate(rows):
            scores, likeliest = np.zeros(300), int(logits[row].argmax())
            for token in range(300):
                z = (float(logits[row, token]) - float(logits[row].max())) / heat[d]
                uniform = (int(draw._uniform(ids[token], *keys[d])) + 0.5) / 2**23
                scores[token] = math.exp(z) / -math.log(uniform) if z >= lowest[d] else 0.0
            assert found[d] == scores.argmax() and ties[d] == (found[d] == 30 and row == 0)
            for start in (0, 256):
                out = np.full(draw.BLOCK, -1, np.int32)
                given = logits[row, likeliest], heat[d], lowest[d], ids, *keys[d], out
                most, own = draw.bounds(logits[row], start, *given), out[: min(draw.BLOCK, 300 - start)]
                assert most == own.max() and (own >= 0).all()
                bounds = np.array([draw._value(bits) for bits in own])
                some = scores[start : start + draw.BLOCK]
                assert (bounds * (1 + draw.SLACK) >= some).all() and ((bounds == 0) == (some == 0)).all()
    assert (ties.sum() > 3 and (found != logits.argmax(-1)[rows]).sum() > 20) and (found > 256).any()


def test_the_log_of_a_part_is_of_its_middle() -> None:
    assert draw._log(0) == math.log(0.5 / 2**23) and draw._log(2**23 - 1) == math.log(1 - 0.5 / 2**23)
    assert draw._value(np.float32(0.75).view(np.int32)) == 0.75 * 2**23


def test_log_sums_are_of_the_rows_that_are_asked_for() -> None:
    logits = RNG(4).normal(size=(3, 40)) * 5
    kept, totals = np.zeros((2, 40)), np.zeros(2)
    draw.log_sums(logits, np.array([2, 0]), kept, totals)
    assert (kept == logits[[2, 0]]).all()
    assert totals == pytest.approx([math.log(np.exp(logits[row]).sum()) for row in (2, 0)], rel=1e-14)


# ---- attention


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("variance", [False, True])
def test_blocks_are_chosen_by_their_scores_beside_the_sinks(group: int, variance: bool) -> None:
    """Equal scores go to the earlier block; up to top_k all are read."""
    dim, per_page, top_k = 4, 3, 3
    q, table = RNG(5).normal(size=(group, dim)), np.array([4, 1, 3])
    summaries = RNG(6).normal(size=(5, 2, per_page, 2 * dim if variance else dim))
    summaries[..., dim:] **= 2
    summaries[3, 1, 1] = summaries[1, 1, 0]  # blocks 7 and 3 are alike
    for complete in range(10):
        of = [summaries[table[b // per_page], 1, b % per_page] for b in range(complete)]
        z = np.array([[(q[h] @ s[:dim]) * 0.5 + (q[h] ** 2 @ s[dim:]) / (2 * dim) if variance else (q[h] @ s) * 0.5
                       for s in of] for h in range(group)])  # fmt: skip
        score = z[0] if group == 1 else (np.exp(z) / np.exp(z).sum(-1, keepdims=True)).sum(0) if complete else z[0]
        for sinks in range(top_k + 1):
            others = sorted(range(sinks, complete), key=lambda b: (-score[b], b))[: top_k - sinks]
            wanted = sorted([*range(min(sinks, complete)), *others])
            got = attention._choose(q, summaries, table, 1, complete, per_page, top_k, sinks, 0.5)
            assert got.tolist() == (list(range(complete)) if complete <= top_k else wanted)


def test_equal_scores_go_to_the_earlier_block() -> None:
    q, table, summaries = np.ones((1, 2)), np.arange(4), np.zeros((4, 1, 2, 2))
    summaries[2, 0, 1] = 1.0  # block 5
    found = attention._choose(q, summaries, table, 0, 8, 2, 3, 1, 1.0)
    assert found.tolist() == [0, 1, 5]


@pytest.mark.parametrize("apart", [0.0, 59.0, 61.0, 800.0, -59.0, -61.0, -800.0])
def test_two_softmaxes_are_mixed_by_their_share_however_far_apart_they_are(apart: float) -> None:
    """A token in both is in both sums; one in neither weighs nothing."""
    z = RNG(7).normal(size=6)
    near, far = np.array([1.0, 1, 1, 0, 0, 0]), np.array([0.0, 0, 1, 1, 1, 0])
    z[:2] += apart

    def softmax(mask: np.ndarray) -> np.ndarray:
        top = max(x for x, there in zip(z, mask, strict=True) if there)
        e = np.array([math.exp(x - top) if there else 0.0 for x, there in zip(z, mask, strict=True)])
        whole: np.ndarray = e / e.sum()
        return whole

    wanted = 0.3 * softmax(near) + 0.7 * softmax(far)
    attention._mix(weight := z.copy(), near, far, 0.3)
    assert weight == pytest.approx(wanted, rel=1e-12, abs=1e-300)
    attention._mix_apart(weight := z.copy(), near, far, 0.3, max(z[:3]), max(z[2:5]))
    assert weight == pytest.approx(wanted, rel=1e-12, abs=1e-300)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_a_slot_of_int8_is_written_and_read_as_slots_say(kind: Any) -> None:
    """As torch does it; the key and the value of a slot leave each other's numbers alone."""
    rows = (RNG(15).normal(size=(6, 2, 5)) * [[[1e-30]], [[3.0]], [[1e20]], [[0.0]], [[1.0]], [[1.0]]]).astype(kind)
    rows[4, 0, 2], rows[5, 1, 3] = np.nan, np.inf
    wanted = slots.encode(*torch.from_numpy(rows).unbind(1), torch.int8)
    kv, room = np.full((1, 1, 7, slots.width(5, torch.int8)), 77, np.int8), np.full((7, 10), 9.0, kind)
    with np.errstate(invalid="ignore", over="ignore"):
        for n, (key, value) in enumerate(rows):
            attention._store_levels(value, kv[0, 0, n + 1], attention.VALUE)
            assert (kv[0, 0, n + 1, :5] == 77).all() and (kv[0, 0, n + 1, 10:12] == 77).all()
            attention._store_levels(key, kv[0, 0, n + 1], attention.KEY)
    assert (kv[0, 0, 1:] == wanted.numpy()).all() and (kv[0, 0, 0] == 77).all()
    for which, numbers in enumerate(slots.decode(wanted, torch.from_numpy(rows).dtype)):
        with np.errstate(invalid="ignore"):
            read = attention._levels(kv, 0, 0, 1, 6, which, room)[:, which * 5 : (which + 1) * 5]
        assert read.shape == (6, 5)
        np.testing.assert_array_equal(read, numbers.numpy())
