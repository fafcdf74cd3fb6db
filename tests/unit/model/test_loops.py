"""The small loops that the compiled ones of a CPU are made of, each by its definition in float64. They run as Python here: what
numba makes of them is compared as a whole in `test_fused`."""

from __future__ import annotations

import hashlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

import numba as nb

from shoal.model import int8, slots
from shoal.model.cpu import attention, compiled, decode, draw, integers
from shoal.model.cpu.parts import Form, Layer, Matrix, Rows, Sight

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


def test_the_exponential_of_fp32_is_for_fp32_alone() -> None:
    assert compiled._exp_of(nb.float32) is compiled._exp32 and compiled._exp_of(nb.float64) is compiled.exp


def test_an_inverse_rms_and_a_largest() -> None:
    x = np.array([3.0, -4.0])
    assert compiled.inverse_rms(x, 0.5) == pytest.approx(1 / math.sqrt(12.5 + 0.5), rel=1e-15)
    assert compiled.largest(np.array([-3.0, -1.0, -2.0])) == -1.0 and compiled.largest(np.array([-3.0])) == -3.0


def test_loops_are_compiled_with_rounding_as_they_say_and_kept_in_a_folder_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only what searches for a largest takes numbers to be finite, and what is brief holds the lock of the interpreter."""
    asked, before = list[tuple[str, dict[str, Any]]](), compiled.config.CACHE_DIR

    def numbas(**options: Any) -> Any:
        asked.append((compiled.config.CACHE_DIR, options))
        return lambda function: ("compiled", function)

    monkeypatch.setattr(compiled.nb, "njit", numbas)
    monkeypatch.setattr(compiled, "register_jitable", numbas)
    monkeypatch.setattr(compiled.config, "DISABLE_JIT", True)
    assert compiled.fast(math.exp) is math.exp and not asked
    for way in (compiled.fast, compiled.finite, compiled.exact):
        assert way.called(math.exp) == ("compiled", math.exp)
        assert before == compiled.config.CACHE_DIR, "other compiled code lies where numba has it"
    assert compiled.exact.called(nogil=False)(math.exp) == ("compiled", math.exp)
    same, quick = {"error_model": "numpy", "no_cfunc_wrapper": True}, {"reassoc", "contract", "nsz"}
    assert [options for _, options in asked] == [
        {**same, "cache": True, "nogil": True, "fastmath": quick},
        {**same, "cache": True, "nogil": True, "fastmath": True},
        {**same, "cache": True, "nogil": True},
        {**same, "cache": True, "nogil": False},
    ]
    assert {kept for kept, _ in asked} == {compiled._KEPT}
    asked.clear()
    monkeypatch.setattr(compiled.config, "DISABLE_JIT", False)
    assert compiled.fast(math.exp) == compiled.exact(math.exp) == ("compiled", math.exp)
    assert asked == [(before, {**same, "fastmath": quick}), (before, same)]
    sources = b"".join((compiled._HERE / name).read_bytes() for name in compiled._SOURCES)
    assert compiled._KEPT.endswith(f"numba-{compiled._digest()}") and len(compiled._digest()) == 16
    assert hashlib.sha256(sources).hexdigest().startswith(compiled._digest())


# ---- what tokens race with


def test_the_weights_of_a_histogram_are_exponentials_in_buckets_of_a_64th_of_a_nat() -> None:
    """Where fp64 underflows, and a token that is forbidden, weigh nothing; what is no number stays so. The last bucket has all
    that lies 32 nats and more below."""
    heat = 0.5
    z = np.array([0.0, -1e-9, -0.015624, -0.015626, -1.0, -31.97, -31.99, -40.0, -700.0, -708.5, -np.inf, np.nan, 3.0])
    logits = np.concatenate([np.full(5, 9.0), 7.0 + z * heat])
    weights, buckets = np.full(draw.BLOCK, -1.0), np.full(draw.BLOCK, -1, np.int32)
    draw._weigh(logits, 5, 7.0, heat, weights, buckets)
    for got, x in zip(weights, z, strict=False):
        if x < -708:
            assert got == 0.0
        elif math.isnan(x):
            assert math.isnan(got)
        else:
            assert got == pytest.approx(math.exp(x), rel=1e-12)
    assert buckets[: len(z) - 1].tolist() == [0, 0, 0, 1, 64, 2046, 2047, 2047, 2047, 2047, 2047, 2047]
    assert (weights[len(z) :] == -1).all() and (buckets[len(z) :] == -1).all()


def test_a_bucket_is_sorted_and_holds_its_tokens_alone() -> None:
    logits = RNG(1).normal(size=700) * 3
    logits[0] = logits.max() + 0.001  # the first token, and the likeliest
    top, heat = float(logits.max()), 0.8
    z = (logits - top) / heat
    of = (z * -64).astype(int)
    fullest = int(np.bincount(of).argmax())
    assert (of == fullest).sum() > 2, "else nothing is sorted"
    for bucket in (0, 1, fullest):
        own = np.sort(z[of == bucket])[::-1]
        got = draw._falling(logits, top, heat, bucket, len(own), np.empty(draw.BLOCK, np.int32))
        assert got.tolist() == own.tolist()


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


def test_two_whose_noise_is_nearly_the_least_there_is_are_compared_though_their_bounds_are_what_they_race_with() -> (
    None
):
    """-log u is 1 - u there, to a millionth: the bound of the second is no more than the best, and rounding decides."""
    low, high = np.uint32(7), np.uint32(9)
    with np.errstate(over="ignore"):
        some = np.arange(2**18, dtype=np.uint32)
        x = some ^ low
        x ^= x >> np.uint32(16)
        x = x * np.uint32(0x7FEB352D) + high
        x ^= x >> np.uint32(15)
        x = x * np.uint32(0x846CA68B)
        x = (x ^ (x >> np.uint32(16))) >> np.uint32(9)
        least, most = some[x.argmin()], some[x.argmax()]
        assert draw._uniform(most, low, high) > 2**23 - 2**6, "so that the bound is within 4e-6"
        for apart in (31, 290):  # in the same block, and in another
            ids, logits = np.full(300, least), np.zeros((1, 300))
            ids[[30, apart]] = most
            found, ties = np.zeros(1, np.int64), np.zeros(1, bool)
            given = np.zeros(1, np.int64), np.ones(1), np.full(1, -np.inf), ids, np.array([[low, high]])
            draw.race(logits, np.zeros(1, np.int64), *given, found, ties)
            assert found[0] == 30 and ties[0]


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


def test_what_lies_in_int8_is_read_as_levels_and_other_numbers_where_they_lie() -> None:
    low, high = SimpleNamespace(dtype=nb.int8), SimpleNamespace(dtype=nb.float32)
    assert attention._store_as(None, low, 0) is attention._store_levels
    assert attention._store_as(None, high, 0) is attention._store_numbers
    assert attention._stored_as(low, 0, 0, 0, 0, 0, None) is attention._levels
    kv = RNG(16).normal(size=(3, 2, 8, 6))
    read = attention._stored_as(high, 0, 0, 0, 0, 0, None)(kv, 2, 1, 3, 4, attention.KEY, None)
    assert np.shares_memory(read, kv) and (read == kv[2, 1, 3:7]).all()
    for which in (attention.KEY, attention.VALUE):
        attention._store_numbers(np.array([1.0, 2, 3]), kv[0, 0, 0], which)
        assert kv[0, 0, 0, which * 3 : (which + 1) * 3].tolist() == [1.0, 2, 3]


def stored_in_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """What numba chooses by the type of a slot, and what only fetches ahead."""
    read = attention._stored_as(SimpleNamespace(dtype=nb.float64), 0, 0, 0, 0, 0, None)
    monkeypatch.setattr(attention, "_store", attention._store_numbers)
    monkeypatch.setattr(attention, "_stored", read)
    monkeypatch.setattr(attention, "fetch", lambda _: None)


@pytest.mark.parametrize("whole", [False, True])
def test_scores_and_sums_of_values_are_those_of_runs_in_their_order(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`whole`: by the products that are made of registers, for which `fits` has the say; else by plain loops."""
    stored_in_floats(monkeypatch)
    dim, kv = 4, RNG(17).normal(size=(5, 2, 8, 8))
    q, runs = RNG(18).normal(size=(3, dim)), np.array([[4, 2, 3], [0, 0, 8], [2, 7, 1]])
    rows = np.concatenate([kv[unit, 1, slot : slot + size] for unit, slot, size in runs])

    def dots(q: np.ndarray, keys: np.ndarray, weight: np.ndarray, at: int, first: int) -> None:
        assert whole and first == 0
        weight[:, at : at + len(keys)] = q @ keys[:, :dim].T

    def weigh(weight: np.ndarray, values: np.ndarray, start: int, result: np.ndarray) -> None:
        assert whole
        result += weight @ values[:, start : start + dim]

    asked = list[tuple[int, int]]()
    monkeypatch.setattr(attention, "fits", lambda *given: asked.append(given) or whole)
    monkeypatch.setattr(attention, "dots", dots)
    monkeypatch.setattr(attention, "weigh", weigh)
    weight = np.full((3, 14), 9.0)
    attention._score(q, kv, 1, runs, 0.5, weight, None)
    assert weight[:, :12] == pytest.approx(q @ rows[:, :dim].T * 0.5, rel=1e-13) and (weight[:, 12:] == 9).all()
    result = np.full((3, dim), 9.0)
    attention._gather(weight, kv, 1, runs, result, None)
    assert result == pytest.approx(weight[:, :12] @ rows[:, dim:], rel=1e-13)
    assert asked == [(dim, 8), (dim // 2, 8)], "a value is weighed two registers at a time"


def test_queries_are_turned_and_keys_and_values_stored_with_the_summary_of_a_block_that_is_complete(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Row 1 is stored already, and only its query is made; row 2 ends a block of two tokens, row 0 begins one."""
    stored_in_floats(monkeypatch)
    heads, dim, eps, half = 4, 6, 0.1, 2
    given, bias = RNG(19).normal(size=(3, 8 * dim)), RNG(20).normal(size=8 * dim)
    q_weight, k_weight = RNG(21).normal(size=(2, dim))
    keep, cross = RNG(22).normal(size=(2, 3, dim))
    kv, summaries = np.full((3, 2, 4, 2 * dim), 7.0), np.full((3, 2, 2, 2 * dim), 7.0)
    positions, places = np.array([2, 9, 3]), np.array([2 * 4 + 2, -1, 2 * 4 + 3])
    qkv, q = given.copy(), np.zeros((3, heads, dim))
    attention.project_and_store(
        qkv, bias, q_weight, k_weight, eps, half, keep, cross, positions, places, 2, kv, summaries, q
    )
    assert qkv == pytest.approx(given + bias, rel=1e-14)

    def turned(n: int, number: int, weight: np.ndarray) -> np.ndarray:
        out = np.zeros(dim)
        attention._norm_and_turn(given[n] + bias, number, weight, eps, half, keep[n], cross[n], out)
        return out

    for n in range(3):
        assert q[n] == pytest.approx(np.stack([turned(n, h, q_weight) for h in range(heads)]), rel=1e-13)
    changed = kv != 7
    for g in range(2):
        keys = np.stack([turned(n, heads + g, k_weight) for n in (0, 2)])
        values = np.stack([(given[n] + bias)[(6 + g) * dim : (7 + g) * dim] for n in (0, 2)])
        assert kv[2, g, 2:] == pytest.approx(np.concatenate([keys, values], axis=1), rel=1e-13)
        assert summaries[2, g, 1] == pytest.approx(np.concatenate([keys.mean(0), keys.var(0)]), rel=1e-12)
    assert changed.sum() == 2 * 2 * 2 * dim and (summaries != 7).sum() == 2 * 2 * dim
    positions[2], summaries[:] = 4, 7.0
    attention.project_and_store(
        given.copy(), bias, q_weight, k_weight, eps, half, keep, cross, positions, places, 2, kv, summaries, q
    )
    assert (summaries == 7).all(), "no block ends with a token at position 4"


def test_scores_of_one_head_are_compared_as_they_are() -> None:
    """Two that lie 800 nats below the best are no equals, as they would be among probabilities; of several heads they are."""
    summaries = np.array([[[[-801.0], [0.0], [-800.0], [-802.0]]]])
    for group, wanted in ((1, [1, 2]), (2, [0, 1])):
        q = np.ones((group, 1))
        assert attention._choose(q, summaries, np.zeros(1, int), 0, 4, 4, 2, 0, 1.0).tolist() == wanted


def test_tokens_are_placed_page_by_page() -> None:
    table, runs = np.array([7, 2, 9]), np.zeros((6, 3), np.int64)
    runs[0] = 1, 1, 1
    assert attention._place(3, 17, table, 8, runs, 1) == 4
    assert runs[:4].tolist() == [[1, 1, 1], [7, 3, 5], [2, 0, 8], [9, 0, 1]]
    assert attention._place(5, 5, table, 8, runs, 4) == 4 and attention._place(8, 9, table, 8, runs, 4) == 5
    assert runs[4].tolist() == [2, 0, 1]


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


def test_a_softmax_and_a_summary() -> None:
    z = np.array([1000.0, 1001.0, 999.0])
    attention._softmax(z)
    assert z == pytest.approx(np.exp([-1.0, 0, -2]) / np.exp([-1.0, 0, -2]).sum(), rel=1e-14)
    keys = RNG(8).normal(size=(4, 6))
    for room in (3, 6):
        summary = np.full(room, 9.0)
        attention._summarise(keys, summary, 3)
        assert summary[:3] == pytest.approx(keys[:, :3].mean(0), rel=1e-14)
        assert room == 3 or summary[3:] == pytest.approx(keys[:, :3].var(0), rel=1e-13)


@pytest.mark.parametrize("half", [0, 1, 2, 3])
@pytest.mark.parametrize("norm", ["none", "a head", "all heads"])
def test_a_head_is_normed_and_its_first_dims_are_turned(half: int, norm: str) -> None:
    dim, heads, eps = 6, RNG(9).normal(size=18), 0.1
    keep, cross = RNG(10).normal(size=(2, dim))
    weight = {"none": np.zeros(0), "a head": RNG(11).normal(size=dim), "all heads": RNG(11).normal(size=18)}[norm]
    for h in range(3):
        x = heads[h * dim : (h + 1) * dim]
        if norm == "a head":
            x = x / np.sqrt((x**2).mean() + eps) * weight
        elif norm == "all heads":
            x = x / np.sqrt((heads**2).mean() + eps) * weight[h * dim : (h + 1) * dim]
        wanted = x.copy()
        for i in range(half):
            wanted[i] = x[i] * keep[i] + x[half + i] * cross[i]
            wanted[half + i] = x[half + i] * keep[half + i] + x[i] * cross[half + i]
        out = np.full(dim, 9.0)
        attention._norm_and_turn(heads, h, weight, eps, half, keep, cross, out)
        assert out == pytest.approx(wanted, rel=1e-13)


# ---- rows and their scales


def test_norm_gate_and_scales_of_rows() -> None:
    x, weight = RNG(12).normal(size=(2, 5)), RNG(13).normal(size=5)
    out = np.zeros((2, 5))
    decode.rms_norm(x, weight, 0.2, out)
    assert out == pytest.approx(x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.2) * weight, rel=1e-14)
    up, out = RNG(14).normal(size=(2, 6)), np.zeros((2, 3))
    decode.swiglu(up, out)
    assert out == pytest.approx(up[:, :3] / (1 + np.exp(-up[:, :3])) * up[:, 3:], rel=1e-14)
    rows = np.array([[1.0, -6.3, 2.0], [0.0, 0.0, 0.0], [1.0, np.nan, 9.0]])
    out, scale = np.zeros((3, 3)), np.zeros((3, 1))
    decode.scale_rows(rows, 63.0, 1e-6, out, scale)
    assert scale[:2, 0].tolist() == [6.3 / 63, 1e-6] and math.isnan(scale[2, 0]) and np.isnan(out[2]).all()
    assert out[:2].tolist() == [[1.0 / (6.3 / 63), -6.3 / (6.3 / 63), 2.0 / (6.3 / 63)], [0.0] * 3]


def test_levels_are_rounded_to_even_between_1_and_127_and_nothing_is_written_beyond() -> None:
    """Half a level goes to the even one; a row that is not a number has levels, and a scale that is none. Beyond a row's
    numbers the weight has zeros."""
    x = np.array([[63.0, -63.0, 0.5, 1.5, -0.5, 0.49], [0, 0, 0, 0, 0, 0], [np.nan, 1, 1, 1, 1, 1]], np.float32)
    levels, scale = np.full((3, 8), 9, np.uint8), np.zeros(3, np.float32)
    with np.errstate(invalid="ignore"):
        integers._round(x, levels, scale)
    assert levels[0].tolist() == [127, 1, 64, 66, 64, 64, 9, 9] and scale[0] == 1.0
    assert levels[1].tolist() == [64] * 6 + [9, 9] and scale[1] == integers._TINY
    assert math.isnan(scale[2]) and (levels[2, 6:] == 9).all()
    assert integers.peak(x[0]) == 63.0 and integers.peak(-x[0]) == 63.0
    padded = int8.Numba(torch.full((2, 6), -5, dtype=torch.int8), torch.ones(2, 1)).matrix.weight
    assert padded.shape == (2, integers.STEP) and not padded[:, 6:].any()


# ---- a whole layer


def test_a_product_is_of_whole_numbers_where_the_weight_is_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    did = list[tuple[Any, ...]]()
    monkeypatch.setattr(decode, "product", lambda *given: did.append(("fp", *given)))
    monkeypatch.setattr(integers, "linear", lambda *given: did.append(("int8", *given)))
    matrix = Matrix("weight", "shift", "scale")
    for kind in (nb.int8, nb.float32):
        decode._times("x", SimpleNamespace(types=[SimpleNamespace(dtype=kind)]), "out")("x", matrix, "out")
    assert did == [("int8", "x", "weight", "shift", "scale", "out"), ("fp", "x", "weight", "out")]


def test_what_adapters_add_to_a_matrix_is_that_of_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    did = list[tuple[Any, ...]]()
    monkeypatch.setattr(decode, "beside", lambda *given: did.append(given))
    for number in range(4):
        decode.plus("x", ("numbers", [f"places {each}" for each in range(4)], "of"), number, "out")
    assert did == [("x", "numbers", f"places {each}", "of", "out") for each in range(4)]


@pytest.mark.parametrize("after", [False, True])
def test_a_layer_adds_attention_and_mlp_with_a_norm_before_or_behind_each(
    after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the definition, in float64; attention itself is twice the query and one here."""
    eps, heads, dim, inner = 0.3, 2, 3, 5
    x, kv = RNG(1).normal(size=(2, 7)), np.zeros((4, 1, 9, 2 * dim))
    qkv, back, up, down = (RNG(n).normal(size=size) for n, size in enumerate(((12, 7), (7, 6), (10, 7), (7, 5))))
    more = [RNG(9 + n).normal(size=each.T.shape) for n, each in enumerate((qkv, back, up, down))]
    norms, got = RNG(8).normal(size=(2, 7)), dict[str, tuple[Any, ...]]()

    def project(rows: Any, *given: Any) -> None:
        got["project"] = given[:-1]
        given[-1][:] = rows[:, : heads * dim].reshape(2, heads, dim)

    def attend(q: Any, *given: Any) -> None:
        got["attend"] = given[:-1]
        given[-1][:] = 2 * q + 1

    monkeypatch.setattr(decode, "times", lambda x, matrix, out: np.matmul(x, matrix.weight.T, out=out))
    monkeypatch.setattr(decode, "plus", lambda x, added, index, out: np.add(out, x @ added[index], out=out))
    monkeypatch.setattr(decode, "project_and_store", project)
    monkeypatch.setattr(decode, "attend", attend)
    matrices = [Matrix(each, None, None) for each in (qkv, back, up, down)]
    weights = Layer(norms[0], matrices[0], "bias", "q norm", "k norm", matrices[1], norms[1], *matrices[2:])
    keep = np.zeros((2, dim))
    rows = Rows(keep, "cross", "positions", "slots", "tables", "short", "requests", 4)
    sight = Sight(11, 12, 13, "gamma", "gate's bias", 14)
    out = decode.layer(x, tuple(weights), tuple(Form(eps, 1, after)), tuple(rows), kv, "summaries", tuple(sight), more)

    def normed(y: np.ndarray, weight: np.ndarray) -> np.ndarray:
        whole: np.ndarray = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * weight
        return whole

    def linear(y: np.ndarray, number: int) -> np.ndarray:
        whole: np.ndarray = y @ matrices[number].weight.T + y @ more[number]
        return whole

    def mlp(y: np.ndarray) -> np.ndarray:
        both = linear(y, 2)
        return linear(both[:, :inner] / (1 + np.exp(-both[:, :inner])) * both[:, inner:], 3)

    def attention(y: np.ndarray) -> np.ndarray:
        return linear(2 * linear(y, 0)[:, : heads * dim] + 1, 1)

    y = x + (normed(attention(x), norms[0]) if after else attention(normed(x, norms[0])))
    assert out == pytest.approx(y + (normed(mlp(y), norms[1]) if after else mlp(normed(y, norms[1]))), rel=1e-12)
    assert got["project"][:5] == ("bias", "q norm", "k norm", eps, 1) and got["project"][5] is keep
    assert got["project"][6:10] == ("cross", "positions", "slots", 4) and got["project"][10] is kv
    assert got["attend"][0] is kv and got["attend"][1:] == (
        "summaries", "tables", "short", "requests", "positions", 4, 11, 12, 13, "gamma", "gate's bias", 14,
    )  # fmt: skip
