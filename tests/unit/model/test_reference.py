"""The oracle by eye, and the fast forms against the oracle.

Every mask of a small case stands here as a literal matrix, a query a row: 1 where it may look. In float64, so equality
means equality."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import presets
from shoal.model import reference
from shoal.model.attention import Layout, attend, block_summaries, hybrid_attention, select
from shoal.model.block import rope_tables
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.net import Net
from shoal.model.paged import paged_attention, write_kv
from shoal.model.reach import Reach
from shoal.model.reference import reference_attention, reference_sparse

F64 = torch.float64
SUMMARIES = ["mean", "mean_var"]


def drawn(kind, seed, *shape):
    """Random numbers with ties now and then: rounded to halves for odd seeds."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + 1000 * kind), dtype=F64)
    return (2 * x).round() / 2 if seed % 2 else x


def matrix(mask):
    return ["".join(str(int(x)) for x in row) for row in mask]


# What may be read, by eye ----------------------------------------------------------------------------------------------


def test_the_window_by_eye():
    assert matrix(reference.local_mask(7, window=3)) == [
        "1000000",
        "1100000",
        "1110000",
        "0111000",
        "0011100",
        "0001110",
        "0000111",
    ]


def test_documents_of_a_row_by_eye():
    assert list(reference.documents([7, 3, 3, 7])) == [(0, 1), (1, 3), (3, 4)]
    assert list(reference.documents([5, 5, 5])) == [(0, 3)]


def test_the_tail_by_eye():
    """Three tokens a block: the last token of a block completes it, so that its tail is empty."""
    assert matrix(reference.tail_mask(8, block=3)) == [
        "10000000",
        "11000000",
        "00000000",
        "00010000",
        "00011000",
        "00000000",
        "00000010",
        "00000011",
    ]


def test_single_tokens_have_no_tail():
    assert not reference.tail_mask(5, block=1).any(), "the article's case: every token is a complete block"


SCORES = [  # what each query gives each of the four blocks of two tokens
    [9, 9, 9, 9],
    [1, 9, 9, 9],
    [1, 9, 9, 9],
    [1, 3, 9, 9],
    [1, 3, 9, 9],
    [1, 3, 2, 9],
    [1, 3, 2, 9],
    [1, 3, 2, 2],
]


@pytest.mark.parametrize(
    ("top_k", "sinks", "blocks"),
    [
        # a block exists for a query once its last token does: none for query 0, block 0 from query 1 on
        # query 7: 2 and 3 tie, the lower wins
        (2, 0, ["0000", "1000", "1000", "1100", "1100", "0110", "0110", "0110"]),
        (2, 1, ["0000", "1000", "1000", "1100", "1100", "1100", "1100", "1100"]),  # the sink and the best of the rest
        (1, 1, ["0000", "1000", "1000", "1000", "1000", "1000", "1000", "1000"]),  # sinks alone
        (9, 1, ["0000", "1000", "1000", "1100", "1100", "1110", "1110", "1111"]),  # fewer blocks than K: all of them
    ],
)
def test_the_choice_by_eye(top_k, sinks, blocks):
    scores = torch.tensor([SCORES], dtype=F64)
    assert matrix(reference.chosen_blocks(scores, 2, top_k, sinks)[0]) == blocks
    layout = Layout.packed(torch.zeros(1, 8, dtype=torch.long), window=1, block=2, sinks=sinks)
    assert matrix(select(scores[None], layout.eligible, layout.sink, top_k)[0, 0]) == blocks


def test_the_global_branch_by_eye():
    """Block 1 chosen whenever it is there, block 0 only at first; the tail beside them."""
    chosen = reference.chosen_blocks(torch.tensor([SCORES], dtype=F64), 2, 1, 0)
    assert matrix(reference.global_mask(chosen, 2, 8)[0]) == [
        "10000000",  # the tail alone
        "11000000",  # block 0, which this query completes
        "11100000",  # and its tail
        "00110000",
        "00111000",
        "00110000",
        "00110010",
        "00110000",
    ]


# The fast forms ------------------------------------------------------------------------------------------------------------


def rows_of_documents(data, length):
    """Document ids [1, T]: runs of 1 to 20 tokens, or None for a row of one document."""
    if data.draw(st.booleans()):
        return None
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=length, max_size=length))
    ids = [number for number, count in enumerate(lengths) for _ in range(count)]
    return torch.tensor([ids[:length]])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_training_rows_equal_the_reference(data):
    """Packed documents, the banded window, strips of queries, grouped heads, ties."""
    heads, kv_heads = data.draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    length = data.draw(st.sampled_from([1, 7, 24, 36, 72]))
    seed = data.draw(st.integers(0, 10**6))
    q, k, v = (drawn(i, seed, 1, length, n, 8) for i, n in enumerate((heads, kv_heads, kv_heads)))
    top_k = data.draw(st.integers(1, 5))
    how = {
        "window": data.draw(st.sampled_from([1, 5, 12])),
        "block": data.draw(st.sampled_from([1, 2, 4, 8])),
        "top_k": top_k,
        "sinks": data.draw(st.integers(0, top_k)),
        "local_weight": torch.linspace(0.0, 1.0, heads, dtype=F64),
        "docs": rows_of_documents(data, length),
        "summary": data.draw(st.sampled_from(SUMMARIES)),
    }
    assert (hybrid_attention(q, k, v, **how) - reference_attention(q, k, v, **how)).abs().max() < 1e-9


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_sparse_rows_equal_the_reference(data):
    """As above, for one softmax over window and chosen blocks, and rows of which a part is dense."""
    heads, kv_heads = data.draw(st.sampled_from([(2, 2), (4, 2), (3, 1)]))
    length, seed = data.draw(st.sampled_from([1, 7, 24, 36, 72])), data.draw(st.integers(0, 10**6))
    q, k, v = (drawn(i, seed, 1, length, n, 8) for i, n in enumerate((heads, kv_heads, kv_heads)))
    top_k, block = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 2, 4, 8]))
    how = {"window": block + data.draw(st.integers(0, 9)), "block": block, "sinks": data.draw(st.integers(0, top_k))}
    docs, summary = rows_of_documents(data, length), data.draw(st.sampled_from(SUMMARIES))
    dense, bias = data.draw(st.sampled_from([0, 8, 24, 96])), torch.linspace(-1.0, 2.0, heads, dtype=F64)
    layout = Layout.packed(torch.zeros(1, length, dtype=torch.long) if docs is None else docs, **how)
    reach = Reach(how["window"], top_k, how["sinks"], None, bias, dense)
    ours = attend(q, k, v, block_summaries(k, layout, summary), layout, reach)
    more = {"top_k": top_k, "bias": bias, "dense_length": dense, "docs": docs, "summary": summary}
    assert (ours - reference_sparse(q, k, v, **how, **more)).abs().max() < 1e-9


def reference_group(group, x):
    """A layer group over x [T, D] with its attention by the oracle."""
    rope = rope_tables(torch.arange(len(x)), group.config, x.dtype)
    c = group.config
    for block in group.blocks:
        attention, gamma = block.attention, block.attention.gamma()
        q, k, v = attention.project(block.attention_norm(x), rope)
        how = {"window": c.window, "block": c.block, "top_k": c.top_k, "sinks": c.sinks, "summary": c.summary}
        if attention.kind == "S":
            more = {"bias": attention.gate, "dense_length": c.dense_length}
            y = reference_sparse(q[None], k[None], v[None], **how, **more)
        else:
            y = reference_attention(q[None], k[None], v[None], **how, local_weight=1.0 if gamma is None else gamma)
        x = x + attention.out(y[0].flatten(-2))
        x = x + block.mlp(block.mlp_norm(x))
    return x


def test_a_short_and_a_long_request_decode_in_one_step_of_a_sparse_layer():
    """The one reads all, the other its window and what it chose among the blocks before that, though the block it wants most
    lies in it; both tables are of one length, and NaN stands wherever nothing was written."""
    lengths, how = (14, 61), {"window": 8, "block": 2, "sinks": 1}
    bias, rows = torch.linspace(-1.0, 2.0, 6, dtype=F64), sum(lengths)
    q, k, v = (drawn(kind, 2, rows, heads, 8) for kind, heads in enumerate((6, 3, 3)))
    k[-5:-3] = 3 * q[-1].unflatten(0, (3, 2)).mean(1)
    tables = torch.tensor([[3, 10, 0, 0, 0, 0, 0, 0], [9, 1, 2, 4, 8, 5, 7, 6]])
    at = torch.cat([torch.arange(length) for length in lengths])
    slots = tables.repeat_interleave(torch.tensor(lengths), 0)[torch.arange(rows), at // 8] * 8 + at % 8
    memory, summaries = torch.full((11, 3, 8, 16), math.nan, dtype=F64), torch.full((11, 3, 4, 8), math.nan, dtype=F64)
    write_kv(k, v, memory, summaries, PagedStep(at, slots, tables, [0, 14, rows], 8, 2))
    last = torch.tensor([13, rows - 1])
    step = PagedStep(at[last], slots[last], tables, [0, 1, 2], 8, 2)
    got = paged_attention(q[last], memory, summaries, step, Reach(8, 6, 1, None, bias, 16))
    for row, one in enumerate((slice(0, 14), slice(14, rows))):
        want = reference_sparse(q[None, one], k[None, one], v[None, one], **how, top_k=6, bias=bias, dense_length=16)
        assert (got[row] - want[0, -1]).abs().max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_pages_equal_the_reference(data):
    """Any chunks, single tokens that read only what they chose, pages in any order, NaN wherever nothing was written."""
    base = presets.get("test").model
    block, page = data.draw(st.sampled_from([(1, 8), (2, 8), (4, 8), (8, 8), (1, 1)]))
    c = dataclasses.replace(
        base, block=block, page=page, window=8, top_k=3, kv_heads=data.draw(st.sampled_from([1, 3])),
        attn_pattern=data.draw(st.sampled_from(["H", "L", "S"])), summary=data.draw(st.sampled_from(SUMMARIES)),
        dense_length=data.draw(st.sampled_from([0, 16, 64])),
    )  # fmt: skip
    seed, t = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 90))
    group = Net(c).init_(seed).double().requires_grad_(False).groups[0]
    for layer in group.blocks:
        layer.attention.gate += torch.linspace(-1.0, 2.0, c.heads)
    x = drawn(0, 2 * seed, t, c.width)
    pages = -(-t // page)
    units = torch.randperm(pages + 3, generator=torch.Generator().manual_seed(seed))[:pages] + 1
    cache = GroupCache.zeros(c, pages + 4, F64)
    cache.kv.fill_(math.nan)
    cache.summaries.fill_(math.nan)
    outputs, start = [], 0
    while start < t:
        stop = min(t, start + data.draw(st.sampled_from([1, 1, block, page + 1, t])))
        at = torch.arange(start, stop)
        table = units[None, : -(-stop // page)]
        step = PagedStep(at, units[at // page] * page + at % page, table, [0, stop - start], page, block)
        outputs.append(group.paged(x[start:stop], step, cache))
        start = stop
    assert (torch.cat(outputs) - reference_group(group, x)).abs().max() < 1e-9
