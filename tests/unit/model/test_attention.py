"""Hybrid attention against its definition. Everything in float64, so equality means equality."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import presets
from shoal.model.attention import Layout, attend, block_scores, block_summaries, hybrid_attention, select
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.net import Net
from shoal.model.reach import Reach
from tests.pretend_gpu import pretended

F64 = torch.float64


def qkv(seed, t, heads, kv_heads, d, rows=1):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, t, h, d, generator=g, dtype=F64) for h in (heads, kv_heads, kv_heads)]


def article_formula(q, k, v, window, top_k, local):
    """out = 0.7 * local(sliding window) + 0.3 * global(sparse top-k), causal, written out for one token and head at a
    time."""
    out = torch.zeros_like(q)
    for t in range(q.shape[1]):
        for h in range(q.shape[2]):
            scores = k[0, : t + 1, h] @ q[0, t, h] / math.sqrt(q.shape[-1])
            near = scores[-window:].softmax(0) @ v[0, : t + 1, h][-window:]
            best = scores.sort(descending=True, stable=True).indices[:top_k]
            far = scores[best].softmax(0) @ v[0, best, h]
            out[0, t, h] = local * near + (1 - local) * far
    return out


@pytest.mark.parametrize("seed", range(3))
def test_article_preset_is_the_articles_formula(seed):
    c = presets.get("article").model
    q, k, v = qkv(seed, 90, c.heads, c.kv_heads, c.head_dim)
    got = hybrid_attention(
        q, k, v, window=c.window, block=c.block, top_k=c.top_k, sinks=c.sinks, local_weight=c.local_weight
    )
    assert (got - article_formula(q, k, v, c.window, c.top_k, 0.7)).abs().max() < 1e-9
    single = hybrid_attention(
        *(x.float() for x in (q, k, v)),
        window=c.window, block=c.block, top_k=c.top_k, sinks=c.sinks, local_weight=c.local_weight,
    )  # fmt: skip
    assert (single - got).abs().max() < 1e-5


def masks(layout):
    """local and tail as rows of 0 and 1, for reading."""
    return (["".join(str(int(x)) for x in row) for row in m[0]] for m in (layout.local, layout.tail))


def test_layout_of_one_document_by_eye():
    local, tail = masks(Layout.packed(torch.zeros(1, 6, dtype=torch.long), window=3, block=2, sinks=0))
    assert list(local) == ["100000", "110000", "111000", "011100", "001110", "000111"]
    # the tail is the incomplete last block: one token after an even position, none after an odd one
    assert list(tail) == ["100000", "000000", "001000", "000000", "000010", "000000"]


def test_layout_of_two_documents_by_eye():
    layout = Layout.packed(torch.tensor([[7, 7, 7, 3, 3, 3]]), window=2, block=2, sinks=1)
    local, tail = masks(layout)
    assert list(local) == ["100000", "110000", "011000", "000100", "000110", "000011"]
    assert list(tail) == ["100000", "000000", "001000", "000100", "000000", "000001"]
    assert layout.positions.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert layout.block_of.tolist() == [[0, 0, 1, 2, 2, 3]]  # blocks restart with the document
    eligible = ["".join(str(int(x)) for x in row) for row in layout.eligible[0]]
    assert eligible == ["0000", "1000", "1000", "0000", "0010", "0010"]
    assert layout.sink[0, 0].tolist() == [True, False, True, False]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_packed_and_causal_layouts_agree(data):
    block = data.draw(st.sampled_from([1, 2, 4]))
    t = data.draw(st.integers(1, 6)) * block
    window, sinks = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2))
    a = Layout.packed(torch.zeros(1, t, dtype=torch.long), window=window, block=block, sinks=sinks)
    b = Layout.causal(torch.arange(t)[None], t, window=window, block=block, sinks=sinks)
    for name in ("local", "tail", "past", "eligible", "beyond", "block_of", "positions"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert torch.equal(a.sink[0, 0], b.sink[0, 0])


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_select_is_a_stable_sort(data):
    """Sinks first, then by score, ties to the lower block: what a stable descending sort of the eligible ones gives."""
    n, k = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 6))
    sinks = data.draw(st.integers(0, k))
    scores = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n))
    visible = data.draw(st.integers(0, n))
    eligible = (torch.arange(n) < visible)[None, None]
    got = select(torch.tensor(scores)[None, None, None], eligible, (torch.arange(n) < sinks)[None, None], k)
    order = sorted(range(visible), key=lambda b: (b >= sinks, -scores[b] if b >= sinks else 0, b))
    assert sorted(order[:k]) == got[0, 0, 0].nonzero().flatten().tolist()


@torch.no_grad()
def test_all_of_it_lies_where_the_rows_do():
    """On a GPU that is pretended: nothing mixes devices, and the gate may come from anywhere."""
    rows, docs = qkv(4, 24, 4, 2, 8), torch.tensor([[0] * 9 + [1] * 15])
    args = {"window": 4, "block": 2, "top_k": 2, "sinks": 1, "summary": "mean_var"}
    gate = torch.tensor([0.1, 0.3, 0.6, 0.9])
    at = torch.arange(20, 24)[None]

    def causal(q, k, v):
        layout = Layout.causal(at.to(q.device), 24, window=4, block=2, sinks=1)
        reach = Reach(4, 2, 1, gate.to(q))
        return attend(q[:, 20:], k, v, block_summaries(k, layout, "mean_var"), layout, reach)

    here = hybrid_attention(*rows, local_weight=gate, docs=docs, **args), causal(*rows)
    with pretended() as gpu:
        moved = [each.to(gpu) for each in rows]
        there = hybrid_attention(*moved, local_weight=gate, docs=docs.to(gpu), **args), causal(*moved)
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one.held, other, rtol=0, atol=1e-12)


def test_a_group_of_heads_chooses_together_and_within_bounds():
    q, k, _ = qkv(3, 40, 4, 2, 8)
    layout = Layout.packed(torch.zeros(1, 40, dtype=torch.long), window=4, block=4, sinks=1)
    scores = block_scores(q, block_summaries(k, layout, "mean"), layout.eligible)
    chosen = select(scores, layout.eligible, layout.sink, 3)
    assert chosen.shape == (1, 2, 40, 10)  # one choice a KV head, not a query head
    complete = (torch.arange(40) + 1) // 4
    assert torch.equal(chosen.sum(-1)[0, 0], complete.clamp(max=3))
    assert not (chosen & ~layout.eligible[:, None]).any()
    assert chosen[..., 0][:, :, 3:].all()  # the sink is always among them


def test_gradients_with_the_choice_held():
    q, k, v = (x.requires_grad_() for x in qkv(1, 10, 2, 1, 4))
    gamma = torch.tensor([0.7, 0.4], dtype=F64, requires_grad=True)

    def run(q, k, v, gamma):
        return hybrid_attention(q, k, v, window=3, block=2, top_k=2, sinks=1, local_weight=gamma)

    assert torch.autograd.gradcheck(run, (q, k, v, gamma), eps=1e-7, atol=1e-5)


def test_blocks_are_chosen_in_full_precision_under_autocast_too():
    """Training in bf16 must choose what decoding chooses: here two blocks whose scores bf16 cannot tell apart."""
    q, k, v = torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4), torch.zeros(1, 4, 1, 4)
    q[..., 0], k[0, :2, 0, 0], k[0, 2:, 0, 0], v[0, 2:] = 1.0, 1.0, 1.001, 1.0
    how = {"window": 1, "block": 2, "top_k": 1, "sinks": 0, "local_weight": 0.0}
    with torch.autocast("cpu", torch.bfloat16):
        assert hybrid_attention(q, k, v, **how)[0, 3, 0].tolist() == [1.0] * 4, "the second block, and no tail"


def test_rollback_is_moving_a_length():
    """Rejected tokens are overwritten; the means of their blocks come out as if they had never been."""
    c = presets.get("test").model
    net = Net(c).init_(0).double()
    tokens = torch.randint(9, 300, (40,), generator=torch.Generator().manual_seed(0))
    cache = GroupCache.zeros(c, 8, F64)
    table = torch.arange(1, 6)[None]

    def run(ids, start):
        at = torch.arange(start, start + len(ids))
        step = PagedStep(at, table[0, at // 8] * 8 + at % 8, table, [0, len(ids)], 8, c.block)
        return net.groups[0].paged(net.embed_inputs(ids), step, cache)

    run(tokens[:20], 0)
    want = run(tokens[20:], 20)
    run(tokens.flip(0)[:13], 20)
    assert (run(tokens[20:], 20) - want).abs().max() == 0


@pytest.mark.parametrize(("window", "size"), [(4, 2), (3, 3)])
def test_of_a_long_row_a_few_queries_together_read_the_window_before_them(window, size):
    """So that the local branch costs as much as its window, and not as the row: half a window of them, or where that is odd a
    whole one. A row that does not divide so has none, nor one of two windows, where nothing would be saved."""
    for length in range(1, 8 * window):
        docs = (torch.arange(length) >= length // 3)[None].long()
        layout = Layout.packed(docs, window=window, block=2, sinks=0)
        if length % size or length <= 2 * window:
            assert layout.band is None
            continue
        assert layout.band.shape == (1, length // size, size, window + size)
        for t in range(length):
            first = t // size * size - window
            read = {first + at for at in layout.band[0, t // size, t % size].nonzero().flatten().tolist()}
            assert read == set(layout.local[0, t].nonzero().flatten().tolist())
