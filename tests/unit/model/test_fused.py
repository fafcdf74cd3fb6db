"""The fused operators of a decoding step against the torch operators that they stand in for."""

import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import presets
from shoal.model import int8, linears
from shoal.model.adapters import Stack
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.cpu import fused
from shoal.model.net import Net
from shoal.model.paged import paged_attention
from shoal.model.quant import TOP, int8_linear_reference, quantize_rows, token_scale
from shoal.model.reach import Reach

pytest.importorskip("numba")
DTYPES = {torch.float32: 1e-6, torch.float64: 1e-13}  # relative differences allowed


def normal(seed, *shape, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def same(got, want, dtype):
    assert ((got - want).abs() <= DTYPES[dtype] * want.abs().clamp(min=1)).all()


def test_only_where_it_can_be():
    x = torch.ones(2, 4)
    assert not fused.usable(x)  # gradients are on
    with torch.no_grad():
        assert not fused.usable(x)  # training measures itself so, on memory that FSDP frees
    with torch.inference_mode():
        assert fused.usable(x)
        assert not fused.usable(x.bfloat16())
        assert not fused.usable(x.to("meta"))


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(1, 70),
    st.sampled_from([*DTYPES]),
    st.sampled_from([1.0, 1e-3, 30]),
)
def test_norm_and_swiglu(seed, rows, width, dtype, scale):
    x, weight = normal(seed, rows, width, dtype=dtype, scale=scale), normal(seed + 1, width, dtype=dtype)
    same(fused.rms_norm(x, weight, 1e-6), F.rms_norm(x, (width,), weight, 1e-6), dtype)
    up = normal(seed, rows, 2 * width, dtype=dtype, scale=scale)
    same(fused.swiglu(up), F.silu(up[:, :width]) * up[:, width:], dtype)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 13),
    st.one_of(st.integers(1, 70), st.integers(1, 12).map(lambda n: 16 * n)),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_few_rows_times_a_weight(seed, rows, width, outputs, dtype):
    """Widths of whole vectors, which go by tiles, and others."""
    x, weight = normal(seed, rows, width, dtype=dtype), normal(seed + 1, outputs, width, dtype=dtype)
    with torch.inference_mode():
        got, want = fused.product(x, weight), F.linear(x.double(), weight.double())
    off = 1e-6 if dtype == torch.float32 else 1e-15
    assert ((got - want).abs() <= off * (x.abs() @ weight.abs().T)).all()  # of the sum of all sizes


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.one_of(st.integers(1, 40), st.integers(1, 4).map(lambda n: 16 * n)),
    st.one_of(st.integers(1, 40), st.integers(1, 4).map(lambda n: 32 * n)),
    st.sampled_from([(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.bfloat16)]),
)
def test_what_adapters_have_beside_rows_is_added_to_each_of_them(seed, rows, width, outputs, kinds):
    """Of three adapters, the second of rank 0; rows of one follow each other, and some have none. bfloat16 is read by its
    bits."""
    rng, (kind, held) = np.random.default_rng(seed), kinds
    ranks = np.array([rng.integers(1, 6), 0, rng.integers(1, 6)])
    last = ranks.cumsum()
    first, of = last - ranks, np.repeat(rng.integers(-1, 3, rows), rng.integers(1, 4, rows))[:rows]
    x, out = normal(seed, rows, width, dtype=kind), normal(seed + 1, rows, outputs, dtype=kind)
    a, b = (normal(seed + size, int(last[-1]), size, dtype=held) for size in (width, outputs))
    is_added(x, a, b, first, last, of, out)


@torch.no_grad()
@pytest.mark.parametrize("rows", [8, 16])
def test_as_many_rows_as_are_whole_vectors_have_numbers_that_are_none(rows):
    x, out = normal(0, rows, 5, dtype=torch.float32), normal(1, rows, 7, dtype=torch.float32)
    a, b = (normal(size, 3, size, dtype=torch.bfloat16) for size in (5, 7))
    is_added(x, a, b, np.array([0]), np.array([3]), np.zeros(rows, np.int64), out)


def is_added(x, a, b, first, last, of, out):
    want, sizes = out.double(), out.double().abs()
    for n, k in enumerate(of):
        if k >= 0:
            one, other = (matrix[first[k] : last[k]].double() for matrix in (a, b))
            want[n] += x[n].double() @ one.T @ other
            sizes[n] += x[n].double().abs() @ one.abs().T @ other.abs()
    with torch.inference_mode():
        fused.beside(x, *Stack(a, b, first, last).arrays, of, out)
    assert ((out - want).abs() <= (1e-6 if x.dtype == torch.float32 else 1e-15) * sizes).all()


def test_a_row_does_not_depend_on_its_batch_mates_from_three_on():
    x, weight = normal(0, 128, 64, dtype=torch.float32), normal(1, 70, 64, dtype=torch.float32)
    with torch.inference_mode():
        whole = fused.product(x, weight)
        for rows in (3, 4, 5, 8, 31, 127):
            assert torch.equal(fused.product(x[:rows], weight), whole[:rows])


def test_rows_that_do_not_lie_side_by_side_are_read_as_they_are_meant():
    wide, tall = normal(0, 5, 96, dtype=torch.float32), normal(1, 64, 9, dtype=torch.float32)
    with torch.inference_mode():
        torch.testing.assert_close(fused.product(wide[:, 16:80], tall.T), wide[:, 16:80] @ tall)


def test_what_is_not_finite_stays_in_its_row():
    x, weight = normal(0, 5, 64, dtype=torch.float32), normal(1, 8, 64, dtype=torch.float32)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    with torch.inference_mode():
        got = fused.product(x, weight)
    assert got[1].isnan().all() and not got[2].isfinite().any() and got[[0, 3, 4]].isfinite().all()


def test_one_thread_takes_many_rows_and_several_threads_leave_them_to_onednn(monkeypatch):
    for threads, most in {1: 128, 2: 8, 3: 0}.items():
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert max([0, *(rows for rows in range(200) if fused.few(rows))]) == most


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([0.0, 1e-20, 1e-3, 1, 1e4]),
)
def test_few_rows_in_int8_are_the_references_to_the_bit(seed, rows, width, outputs, size):
    x, w = normal(seed, rows, width, dtype=torch.float32, scale=size), normal(seed + 1, outputs, width)
    x[0, 0] = w[0, 0] = 3.0 * size  # a saturating pair
    weight, scale = quantize_rows(w)
    with torch.inference_mode():
        assert torch.equal(int8.Numba(weight, scale)(x), int8_linear_reference(x, weight, scale))


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 70), st.sampled_from([0.0, 1e-20, 1e-3, 1, 1e4]))
def test_scales_are_torchs_to_the_bit(seed, rows, width, scale):
    x = normal(seed, rows, width, dtype=torch.float32, scale=scale)
    unit, s = fused.scale_rows(x, TOP)
    assert torch.equal(s, token_scale(x)) and torch.equal(unit, x / token_scale(x))


def test_one_at_a_time_compiles_and_nobody_waits_for_ever(monkeypatch, tmp_path):
    from shoal.model.cpu import compiled

    monkeypatch.setattr(compiled, "_KEPT", str(tmp_path / "code"))
    order, entered = [], threading.Event()

    def other():
        with compiled.alone():
            order.append("other")
        entered.set()

    with compiled.alone():
        waiting = threading.Thread(target=other)
        waiting.start()
        assert not entered.wait(0.3)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "other"]
    monkeypatch.setattr(compiled, "PATIENCE", 0.1)
    with compiled.alone(), compiled.alone():
        order.append("impatient")
    (tmp_path / "file").touch()
    monkeypatch.setattr(compiled, "_KEPT", str(tmp_path / "file" / "code"))
    with compiled.alone():
        order.append("nowhere")
    assert order[2:] == ["impatient", "nowhere"]


@torch.no_grad()
def test_what_is_not_a_number_stays_so():
    x = torch.tensor([[1.0, math.nan], [1.0, 2.0], [math.inf, 1.0]])
    for row in (fused.rms_norm(x, torch.ones(2), 1e-6), fused.scale_rows(x, TOP)[0]):
        assert not row[0].isfinite().any() and row[1].isfinite().all() and not row[2].isfinite().all()
    assert fused.swiglu(x).isfinite().tolist() == [[False], [True], [False]]


FORMS = [  # of layers: ours, and those of open models
    {},
    {"qk_norm": "none", "rope_dims": 4},
    {"qk_norm": "none", "rope_dims": 4, "qkv_bias": True, "rope_rates": (1.0, 0.3), "rope_scale": 1.4},
    {"qk_norm": "head", "rope_dims": 4, "rope_theta": 100.0},
    {"qk_norm": "all", "rope_dims": 4, "norm_place": "after"},
    {"qk_norm": "none", "rope_dims": 2, "rope_pattern": "RN"},
    {"qk_norm": "all", "qkv_bias": True, "rope_pattern": "NR"},
]


def configs(data):
    base = presets.get("test").model
    block, page = data.draw(st.sampled_from([(1, 8), (2, 8), (4, 8), (8, 8), (1, 1)]))
    pattern = data.draw(st.sampled_from(["H", "HL", "D", "DH", "SD", "HS"]))
    window = data.draw(st.sampled_from([1, 3, 16, 40]))
    return dataclasses.replace(
        base, head_dim=data.draw(st.sampled_from([4, 16])), block=block, page=page,
        kv_heads=data.draw(st.sampled_from([1, 3])), top_k=data.draw(st.integers(1, 5)),
        sinks=data.draw(st.integers(0, 1)), window=max(window, block if "S" in pattern else 1),
        summary=data.draw(st.sampled_from(["mean", "mean_var"])), attn_pattern=pattern,
        dense_length=data.draw(st.sampled_from([0, 16, 32])),
        **data.draw(st.sampled_from(FORMS)),
    )  # fmt: skip


def run(group, config, chunks, units, x, kv_dtype=None):
    """States of one request after `group`, and its memory: rows in `chunks`, on pages `units`, beside a second request that
    decodes on the same memory."""
    cache = GroupCache.zeros(config, 2 * len(units) + 2, x.dtype, kv_dtype=kv_dtype)
    cache.kv.fill_(math.nan if kv_dtype is None else -1)  # two bytes of -1 are a scale that is not a number
    cache.summaries.fill_(math.nan)
    other, outputs, start = units + len(units), [], 0
    for number, size in enumerate(chunks):
        at = torch.cat([torch.arange(start, start + size), torch.tensor([number])])
        owner = torch.stack([units, other])[[0] * size + [1], at // config.page]
        step = PagedStep(
            at,
            owner * config.page + at % config.page,
            torch.stack([units, other]),
            [0, size, size + 1],
            config.page,
            config.block,
        )
        rows = torch.cat([x[start : start + size], x[number][None]])
        outputs.append(group.paged(rows, step, cache))
        start += size
    return torch.cat([o[:-1] for o in outputs]), torch.stack([o[-1] for o in outputs]), cache


def drawn(config, seed):
    """A state for `config`, whose norms are no ones and whose biases no zeros."""
    whole = Net(dataclasses.replace(config, quantization="none")).init_(seed)
    for name, weight in whole.named_parameters():
        if "norm" in name or "bias" in name:
            weight.data = 1 + 0.5 * normal(seed + len(name), *weight.shape, dtype=torch.float32)
    return whole.state_dict() if config.quantization == "none" else linears.export_int8(whole)


@torch.inference_mode()
def two_rows(net):
    """States after the second group of two requests' first rows, which layers in one call compute where they can."""
    x, step = beginning(net.config)
    assert bool(net.groups[1]._in_one_call(x, step)) == fused.usable(x)
    cache = GroupCache.zeros(net.config, 3)
    cache.kv.normal_(generator=torch.Generator().manual_seed(0))  # keys of nothing would hide how far a query is turned
    return net.groups[1].paged(x, step, cache)


def beginning(config):
    """Two rows of two requests, and their step."""
    at = torch.tensor([0, 2])
    slots = torch.tensor([1, 2]) * config.page + at
    step = PagedStep(at, slots, torch.tensor([[1], [2]]), [0, 1, 2], config.page, config.block)
    return normal(1, 2, config.width, dtype=torch.float32), step


@pytest.mark.parametrize("quantization", ["none", "w8a8"])
@pytest.mark.parametrize("form", FORMS[1:])
def test_layers_of_open_models_run_in_one_call(form, quantization, monkeypatch):
    """And give what torch gives; in INT8 a level or two may be rounded the other way."""
    config = dataclasses.replace(presets.get("test").model, attn_pattern="D", quantization=quantization, **form)
    net = Net(config).requires_grad_(False)
    net.load_state_dict(drawn(config, 1), assign=True)
    got = two_rows(net)
    monkeypatch.setattr(fused, "usable", lambda x: False)
    off = (got - two_rows(net)).abs()
    assert off.max() < 1e-4 if quantization == "none" else off.mean() < 1e-2


@pytest.mark.parametrize("quantization", ["none", "w8a8"])
def test_layers_in_one_call_read_their_tensors_where_they_lie_now(quantization, monkeypatch):
    """They are kept as arrays: what is changed in place is seen, and so is what takes another's place."""
    config = dataclasses.replace(presets.get("test").model, quantization=quantization)
    net, found = Net(config).requires_grad_(False), []
    for seed, assign in ((1, True), (2, True), (3, quantization == "w8a8")):
        net.load_state_dict(drawn(config, seed), assign=assign)
        found.append(two_rows(net))
        with monkeypatch.context() as patch:
            patch.setattr(fused, "usable", lambda x: False)
            want = two_rows(net)
        assert torch.allclose(found[-1], want, rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.1 < (found[1] - found[2]).abs().max()


@torch.inference_mode()
def test_one_short_request_reads_its_window_over_all_its_pages():
    """By the definition: of 24 tokens on three pages, the last 20."""
    q, k, v = (normal(seed, 24, 2, 8) for seed in (1, 2, 3))
    memory, summaries = normal(4, 5, 2, 8, 16), torch.zeros(5, 2, 2, 8, dtype=torch.float64)
    at, pages = torch.arange(24), torch.tensor([[3, 1, 4]])
    memory[pages[0, at // 8], :, at % 8] = torch.cat([k, v], dim=-1)
    step = PagedStep(at[-1:], pages[0, 2:] * 8 + 7, pages, [0, 1], 8, 4)
    got = paged_attention(q[-1:], memory, summaries, step, Reach(20, 0, 0, None))
    want = torch.einsum("hd,thd->ht", q[-1], k[-20:]).div(math.sqrt(8)).softmax(-1)
    same(got[0], torch.einsum("ht,thd->hd", want, v[-20:]), torch.float64)


@pytest.mark.parametrize("kv_dtype", [None, pytest.param(torch.int8, marks=pytest.mark.drill)], ids=["float", "int8"])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_layer_group_equals_its_torch_form(kv_dtype, data):
    """Any chunks, any pages, poison everywhere: outputs, stored keys and values, and summaries. In int8 these are compiled for
    this test and one drill alone; that the loops round as they should is held uncompiled (`test_loops`)."""
    config = configs(data)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        group = Net(config).init_(data.draw(st.integers(0, 9))).double().groups[1]
        for block in group.blocks:
            for number, weight in enumerate(each for each in block.parameters() if each.dim() < 2):
                weight.copy_(1 + 0.5 * normal(number, *weight.shape))
            if block.attention.kind != "D":
                block.attention.gate.copy_(normal(3, config.heads))
            if config.qk_norm != "none":
                block.attention.k_norm.weight.mul_(data.draw(st.sampled_from([1.0, 30.0])))  # scores far apart, too
        length = data.draw(st.integers(1, 90))
        chunks = []
        while sum(chunks) < length:
            chunks.append(min(length - sum(chunks), data.draw(st.sampled_from([1, 2, config.page + 1, 30]))))
        pages = -(-length // config.page)
        units = torch.randperm(pages, generator=torch.Generator().manual_seed(length)) + 1
        x = normal(length, length, config.width)
        got = run(group, config, chunks, units, x, kv_dtype)
        patch.setattr(fused, "usable", lambda x: False)
        want = run(group, config, chunks, units, x, kv_dtype)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (a - b).abs().max() < 1e-10
    for name in ("kv", "summaries"):
        a, b = getattr(got[2], name)[:, 1:], getattr(want[2], name)[:, 1:]  # unit 0 is for padding
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True)


@torch.no_grad()
@pytest.mark.parametrize("near", [0.0, 200.0])
def test_both_branches_keep_their_own_largest_score(near: float) -> None:
    """Scores 200 apart, whichever branch has the larger: with one maximum for both, all weights of the other would be what fp32
    has in place of nothing, and alike. Here they are as 1 to e in either."""
    q = torch.full((1, 3, 16), 12.5)
    kv = torch.zeros(2, 3, 8, 32)
    kv[1, :, 0:2, :16] = (200.0 - near) / 50  # a key of x everywhere scores 50 x
    kv[1, :, 6:, :16] = near / 50
    kv[1, :, [1, 7], :16] += 1 / 50
    kv[1, :, :, 16:] = torch.tensor([1.0, 3.0, 0, 0, 0, 0, 6.0, 7.0])[:, None]
    means = kv[:, :, :, :16].unflatten(2, (4, 2)).mean(3)
    means[1, :, 3] = -9.0  # else the window's own block would be the best one
    step = PagedStep(torch.tensor([7]), torch.tensor([15]), torch.tensor([[1]]), [0, 1], 8, 2)
    out = torch.empty_like(q)
    fused.attend(q, kv, means, step, Reach(2, 1, 0, torch.full((3,), 0.7)), out)
    window, block = (6 + 7 * math.e) / (1 + math.e), (1 + 3 * math.e) / (1 + math.e)
    assert torch.allclose(out, torch.full_like(out, 0.7 * window + 0.3 * block), atol=1e-4), out
