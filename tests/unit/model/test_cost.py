"""The arithmetic of cost against what is built, stored, read and multiplied."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from shoal import presets
from shoal.config import GROUPS, ModelConfig
from shoal.model import cost
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.net import Net
from shoal.model.paged import paged_attention, write_kv
from shoal.model.reach import Reach
from shoal.model.router import Router

TEST = presets.get("test").model


@pytest.mark.parametrize("name", presets.NAMES)
@pytest.mark.parametrize("quantization", ["none", "w8a8"])
def test_no_parameter_is_left_out(name, quantization):
    config = dataclasses.replace(presets.get(name).model, quantization=quantization)
    with torch.device("meta"):
        net = Net(config)
    cost.check(net, config)
    assert cost.parameters(config).total == pytest.approx(presets.parameters_said(name), rel=0.1)
    net.groups[0].more = torch.nn.Linear(3, 5, device="meta")
    with pytest.raises(AssertionError, match=r"cost\.py counts"):
        cost.check(net, config)


@pytest.mark.parametrize("kind", ["H", "L"])
@pytest.mark.parametrize("summary", ["mean", "mean_var"])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 100, 1000])
def test_what_decoding_reads_is_what_the_operator_gathers(kind, summary, length):
    """Through all three ways: below the window, under masks, and by what was chosen."""
    config = dataclasses.replace(TEST, window=12, block=4, top_k=2, kv_heads=1, summary=summary)
    counted = count_reads(config, length, kind)
    assert counted == cost.vectors_read(config, length, kind)
    if length == 1000:
        blocks = 250 * (2 if summary == "mean_var" else 1)
        assert counted == (2 * 12 if kind == "L" else blocks + 2 * (12 + 3 * 4)), "n/S + 2 (w + (K+1) S)"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("summary", ["mean", "mean_var"])
def test_kv_memory_is_what_the_pool_allocates_and_proportional_to_depth(dtype, summary):
    c = dataclasses.replace(presets.get("base").model, summary=summary)
    types = (torch.bfloat16, torch.int8) if dtype == torch.int8 else (dtype,)
    unit = GroupCache.zeros(c, 1, types[0], kv_dtype=types[-1])
    each = unit.kv.nbytes + unit.summaries.nbytes
    for depth in c.exits:
        pages, groups = -(-1000 // c.page), depth * GROUPS // c.layers
        assert cost.kv_bytes_stored(c, 1000, depth, *types) == pages * groups * each
    assert cost.kv_bytes_stored(c, 1000) == 4 * cost.kv_bytes_stored(c, 1000, c.exits[0])


def test_kv_bytes_read_follow_from_the_vectors():
    c = presets.get("base").model
    layer = c.kv_heads * c.head_dim * 4 * cost.vectors_read(c, 32_768)
    assert [cost.kv_bytes_read(c, 32_768, e) for e in c.exits] == [layer * e for e in c.exits]
    assert cost.kv_bytes_read(c, 32_768) * 8 < 2 * 32_768 * c.kv_heads * c.head_dim * 4 * c.layers, "against dense"
    mixed = dataclasses.replace(c, attn_pattern="LLLH")
    local = c.kv_heads * c.head_dim * 4 * 2 * c.window
    assert cost.kv_bytes_read(mixed, 32_768) == 9 * local + 3 * layer, "three of four layers read their window alone"
    half = cost.kv_bytes_read(c, 32_768, bytes_each=2)
    assert cost.kv_bytes_read(c, 32_768) / 2 < half, "summaries stay fp32"


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_flops_of_the_products_are_those_that_torch_counts(depth):
    net = Net(TEST).init_(0).requires_grad_(False)
    tokens = torch.randint(9, 300, (1, 40))
    with FlopCounterMode(display=False) as counter:
        net.head(net(tokens, exits=(depth,))[depth], depth)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    short = dataclasses.replace(TEST, window=1, top_k=1, block=1, page=1, sinks=0)
    attention = depth * 2 * TEST.heads * 2 * TEST.head_dim * 3  # a window of one token, a block of one, and the tail's
    scoring = depth * 2 * TEST.heads * TEST.head_dim * 40
    assert cost.flops_per_token(short, 40, depth) - attention - scoring == products // 40


def test_flops_rise_with_depth_and_local_layers_cost_less():
    c = presets.get("base").model
    flops = [cost.flops_per_token(c, 2048, e) for e in c.exits]
    assert flops == sorted(flops) and flops[0] < flops[-1] / 2
    assert cost.flops_per_token(dataclasses.replace(c, attn_pattern="L"), 2048) < flops[-1]
    assert cost.flops_per_token(dataclasses.replace(c, summary="mean_var"), 2048) > flops[-1]


def test_routing_a_prompt_costs_the_head_at_a_few_places_and_the_router():
    c, router = TEST, Router(TEST)
    weights = sum(p.numel() for name, p in router.named_parameters() if name.endswith("weight"))
    stride = 2  # of pages of 8: four places a page
    assert cost.routing_flops(c, 80, nll=True) == 2 * (80 // stride * c.vocab * c.width + weights)
    assert cost.routing_flops(c, 80, nll=False) == 2 * weights
    base = presets.get("base").model
    assert cost.routing_flops(base, 2048, nll=True) < 0.1 * 2048 * cost.flops_per_token(base, 2048), (
        "routing stays cheap"
    )


def test_what_a_query_of_each_kind_of_layer_reads_is_scored_and_summed():
    """2 d for each score and 2 d for each sum, a query head; a block's summary is scored alone."""
    c = dataclasses.replace(TEST, window=12, block=4, top_k=2, dense_length=24)
    d, heads = c.head_dim, 2 * c.heads
    for length, kind, flops in (
        (7, "D", 2 * 7 * d),
        (100, "D", 2 * 100 * d),
        (24, "S", 2 * 24 * d),  # dense up to there
        (25, "S", 2 * (12 + 12) * d + 6 * d),
        (100, "H", 2 * (12 + 12) * d + 25 * d),
        (10, "H", 2 * (10 + 10) * d + 2 * d),
        (11, "L", 2 * 11 * d),
        (100, "L", 2 * 12 * d),
    ):
        assert cost._attention_flops(c, length, kind) == heads * flops, (length, kind)


def test_scoring_is_of_the_layers_that_choose_and_of_sparse_ones_past_what_they_read_whole():
    c = dataclasses.replace(TEST, attn_pattern="LHSD", window=12, block=4, dense_length=24)
    one = 2 * c.heads * c.head_dim
    assert c.layers == 4
    assert [cost.scoring_flops(c, length) for length in (24, 25, 103)] == [6 * one, 2 * 6 * one, 2 * 25 * one]


def test_an_exit_of_its_own_width_costs_its_three_products():
    c = dataclasses.replace(TEST, exit_ffn=16)
    for depth, more in ((1, 3 * c.width * 16), (2, 3 * c.width * 16), (4, 0), (None, 0)):
        assert cost.flops_per_token(c, 40, depth) - cost.flops_per_token(TEST, 40, depth) == 2 * more


@torch.inference_mode()
def count_reads(config: ModelConfig, length: int, kind: str = "H") -> int:
    """Vectors of d numbers a KV head that the paged operator reads to decode the last of `length` tokens."""
    c, pages = config, -(-length // config.page)
    at, table = torch.arange(length), torch.arange(1, pages + 1)[None]
    cache = GroupCache.zeros(dataclasses.replace(c, layers=4), pages + 1)
    kv, summaries = cache.kv[0], cache.summaries[0]
    k, v = (torch.randn(length, c.kv_heads, c.head_dim) for _ in range(2))
    write_kv(k, v, kv, summaries, PagedStep(at, at + c.page, table, [0, length], c.page, c.block))
    q, last = torch.randn(1, c.heads, c.head_dim), at[-1:]
    step = PagedStep(last, last + c.page, table, [0, 1], c.page, c.block)
    reach = Reach(c.window, c.top_k, c.sinks, torch.full((c.heads,), 0.7) if kind == "H" else None)
    with Reads(kv, summaries) as seen:
        paged_attention(q, kv, summaries, step, reach)
    return seen.numbers // (c.kv_heads * c.head_dim)


class Reads(TorchDispatchMode):
    """Counts the numbers that operators take out of `memories`: of each that is given a view of one and returns memory of its
    own, what it returns. Only gathers are known; anything else that touches the memories is an error, not a miscount."""

    GATHERS = ("aten::index.Tensor", "aten::index_select")

    def __init__(self, *memories: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numbers = 0
        self._memories = {memory.untyped_storage().data_ptr() for memory in memories}

    def _inside(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._memories

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(map(self._inside, args)) and not self._inside(out):
            if func.name() not in self.GATHERS:
                raise TypeError(f"{func.name()} reads the pages, and is no gather that this knows how to count")
            self.numbers += out.numel()
        return out
