"""Attention over whole rows (training, and whatever else runs them at once) by the kernels of `window`, `choice` and
`training`: what `net` and `attention.hybrid_attention` take on a CUDA device in place of masks. Nothing of T times T numbers is
made, and nothing waits for the device.

Each kernel is an operator of torch's, so that `torch.compile`, fake tensors and recomputation take it as one.

Letters: as in `training`; t queries of a strip, m values of a summary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.model.gpu import launch
from shoal.model.reach import Reach

SCORED = 2**25  # scores that exist at once (fp32: 128 MB)
PIECE = 512  # queries of a block whose gradients one program adds up
MOST = 64  # queries or keys of a tile; of fp64, which no tensor core multiplies, 16
# bytes of a tile that a program holds, and of one that its loop reads, some steps ahead: several of either lie in shared
# memory, of which the smallest device has 99 KB
HELD, READ = 2**14, 2**13


@dataclass
class Spans:
    """Where each query's document, and each complete block, lies in a row; the same for every layer of one forward.

    starts [B, T]: place of the first token of each token's document; tails [B, T]: of the first token after its last complete
    block; first [B, N]: of each complete block, in the order of the row. A query may choose the `many` [B, T] blocks before
    number `ends` [B, T]; block_of [B, T]: the complete block of a token, or -1. With one softmax over both branches it reads
    all from `low` [B, T] on, and chooses of the `few` [B, T] blocks before number `few_ends` [B, T], which begin before that.
    All int32, but for positions [B, T], in the document (for rope), int64.
    """

    starts: Tensor
    tails: Tensor
    first: Tensor
    ends: Tensor
    many: Tensor
    block_of: Tensor
    positions: Tensor
    low: Tensor
    few: Tensor
    few_ends: Tensor
    block: int

    @classmethod
    def packed(cls, docs: Tensor, block: int, window: int = 1, dense: int = 0) -> Spans:
        """For rows that hold several documents, as `attention.Layout.packed`. `window` and `dense` are those of layers with one
        softmax over both branches, where there are any: a query before position `dense` reads all."""
        rows, length = docs.shape
        new = torch.ones_like(docs, dtype=torch.bool)
        new[:, 1:] = docs[:, 1:] != docs[:, :-1]
        at = torch.arange(length, device=docs.device).expand_as(docs)
        starts = torch.where(new, at, 0).cummax(1).values
        position = at - starts
        completes = position % block == block - 1
        ends = completes.cumsum(1)
        count = max(1, length // block)
        first = torch.zeros(rows, count + 1, dtype=torch.long, device=docs.device)
        first.scatter_(1, torch.where(completes, ends - 1, count), at - block + 1)
        last = at - position % block + block - 1  # of the token's block
        inside = last.clamp(max=length - 1)
        whole = (last < length) & (starts.gather(1, inside) == starts)
        block_of = torch.where(whole, ends.gather(1, inside) - 1, -1)
        many = (position + 1) // block
        early = position < dense
        low = torch.where(early, starts, (at - window + 1).maximum(starts))
        few = torch.where(early, 0, ((position - window + block).clamp(min=0) // block).minimum(many))
        tails, first = starts + many * block, first[:, :count]
        spans = cls(starts, tails, first, ends, many, block_of, position, low, few, ends - many + few, block)
        for name in ("starts", "tails", "first", "ends", "many", "block_of", "low", "few", "few_ends"):
            setattr(spans, name, getattr(spans, name).to(torch.int32).contiguous())
        return spans


def usable(x: Tensor, block: int) -> bool:
    """Is `attend` for rows like `x` [B, T, ...]? Not for gradients in fp16: each that a kernel rounds on its way, and is below
    2^-25, would be 0. Nothing here trains in it."""
    if x.device.type not in launch.ON or x.dtype not in launch.TYPES:
        return False
    if x.dtype == torch.float16 and torch.is_grad_enabled():
        return False
    return x.shape[1] // block <= launch.MOST_BLOCKS and launch.able(x.device)


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, reach: Reach, variance: bool = False) -> Tensor:
    """[B, T, H, d]: what a layer of this `reach` reads, of q [B, T, H, d], k and v [B, T, Hk, d]; `variance`: are blocks scored
    by it, too? Differentiable in q, k, v, gamma and bias, but for the choice."""
    length, device = q.shape[1], q.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    own, keys, values = (each.to(kind).contiguous() for each in (q, k, v))
    window = min(max(reach.window, reach.dense), length)
    if reach.bias is not None and window < length:
        local, near = torch.ops.shoal.near(own, keys, values, spans.low, window)
        numbers = choose(q.detach(), k.detach(), spans, reach, variance)
        lists = (numbers, spans.first, spans.tails, spans.block_of)
        far, other = torch.ops.shoal.chosen(own, keys, values, *lists, spans.block, reach.window)
        # two softmaxes are one by the sums of exp that they were divided by
        share = torch.sigmoid(near + reach.bias - other)[..., None]
        return (far + share * (local - far)).to(kind)
    local = torch.ops.shoal.near(own, keys, values, spans.starts, window)[0]
    if reach.gamma is None:
        return local
    if length <= reach.top_k * spans.block:  # then all complete blocks are read
        far = local if window == length else torch.ops.shoal.near(own, keys, values, spans.starts, length)[0]
    else:
        numbers = choose(q.detach(), k.detach(), spans, reach, variance)
        lists = (numbers, spans.first, spans.tails, spans.block_of)
        far = torch.ops.shoal.chosen(own, keys, values, *lists, spans.block, 0)[0]
    return torch.addcmul(far, reach.gamma[:, None], local - far)


@torch.no_grad()
def choose(q: Tensor, k: Tensor, spans: Spans, reach: Reach, variance: bool = False) -> Tensor:
    """int32 [B, Hk, T, K]: the blocks that each query reads, in ascending order, -1 where there are fewer; scored in fp32 or
    better, as decoding will."""
    with torch.autocast(q.device.type, enabled=False):
        exact = k.to(launch.fp(k.dtype))
        places = spans.first[..., None] + torch.arange(spans.block, device=k.device)  # [B, N, S]
        rows = torch.arange(len(k), device=k.device)[:, None, None]
        held = exact[rows, places]
        summaries = held.mean(2)
        if variance:
            summaries = torch.cat([summaries, held.var(2, correction=0)], dim=-1)
        among = (spans.ends, spans.many) if reach.bias is None else (spans.few_ends, spans.few)
        found: Tensor = torch.ops.shoal.choose(q.contiguous(), summaries.contiguous(), *among, reach.top_k, reach.sinks)
        return found


# ---- the operators


@torch.library.custom_op("shoal::near", mutates_args=())
def _near(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention to the last `window` tokens of the document, and the log of the sum of exp of the scores [B, T, H]."""
    from shoal.model.gpu.window import _near as near

    out, lse = _like_near(q, k, v, starts, window)
    rows, length, heads, _ = q.shape
    shape = _shape(q, k)
    near[(-(-length // shape["TALL"]), heads, rows)](q, k, v, starts, out, lse, length, window, **shape)
    return out, lse


@_near.register_fake
def _like_near(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=launch.fp(q.dtype))


@torch.library.custom_op("shoal::near_back", mutates_args=())
def _near_back(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    out: Tensor,
    lse: Tensor,
    gradient: Tensor,
    to_lse: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, of those of `out` and of `lse`."""
    from shoal.model.gpu.window import _near_to_kv, _near_to_q

    rows, length, heads, _ = q.shape
    given, delta, shape = gradient.contiguous(), _delta(out, gradient, to_lse), _shape(q, k)
    to_q, to_k, to_v = (torch.empty_like(each) for each in (q, k, v))
    more = (q, k, v, starts, lse, delta, given)
    _near_to_q[(-(-length // shape["TALL"]), heads, rows)](*more, to_q, length, window, **shape)
    shape = _shape(q, k, of_keys=True)
    _near_to_kv[(-(-length // shape["TILE"]), k.shape[2], rows)](*more, to_k, to_v, length, window, **shape)
    return to_q, to_k, to_v


@_near_back.register_fake
def _like_near_back(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each) for each in (q, k, v))


@torch.library.custom_op("shoal::choose", mutates_args=())
def _choose(q: Tensor, summaries: Tensor, ends: Tensor, many: Tensor, top_k: int, sinks: int) -> Tensor:
    """As `choose`, of summaries [B, N, Hk, m]. Scores of a strip of queries at a time, so that they are no more than SCORED."""
    from shoal.model.gpu import choice

    rows, length, heads, dim = q.shape
    blocks, kv_heads = summaries.shape[1:3]
    chosen = _like_choose(q, summaries, ends, many, top_k, sinks)
    group, exact = heads // kv_heads, launch._exact(q)
    padded = launch._fit(group)
    # summaries are fp32 where q is bf16
    tile, (each, strip) = _tiles(summaries.shape[-1], summaries)[1], _strip(q, summaries)
    scores = q.new_empty(rows, kv_heads, strip, blocks, dtype=summaries.dtype)
    for first in range(0, length, strip):
        count = min(strip, length - first)
        choice._rate[(-(-count // each), kv_heads, rows)](
            q, summaries, ends, many, scores, length, blocks, first, count,
            HEADS=heads, KV_HEADS=kv_heads, G=group, D=dim, WIDE=launch._power(dim), VARIANCE=summaries.shape[-1] > dim,
            EACH=each, GROUP=padded, TILE=tile, SCALE=1 / math.sqrt(dim), PRECISION=_nearly_fp32(q), EXACT=exact,
        )  # fmt: skip
        choice._pick[(count, kv_heads, rows)](
            scores, ends, many, chosen, length, blocks, first, count,
            KV_HEADS=kv_heads, K=top_k, SINKS=sinks, TILE=launch._power(blocks), WIDE=launch._fit(top_k), EXACT=exact,
            num_warps=launch._warps(blocks),
        )  # fmt: skip
    return chosen


@_choose.register_fake
def _like_choose(q: Tensor, summaries: Tensor, ends: Tensor, many: Tensor, top_k: int, sinks: int) -> Tensor:
    return torch.empty(len(q), summaries.shape[2], q.shape[1], top_k, dtype=torch.int32, device=q.device)


@torch.library.custom_op("shoal::chosen", mutates_args=())
def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    numbers: Tensor,
    first: Tensor,
    tails: Tensor,
    block_of: Tensor,
    block: int,
    before: int,
) -> tuple[Tensor, Tensor]:
    """Attention to the blocks `numbers` [B, Hk, T, K] and to the tail; and the log of the sum of exp of scores [B, T, H]. Where
    `before` is a window, to what of the blocks lies before it, and to no tail: 0, and some -1e30, where that is nothing."""
    from shoal.model.gpu import training

    out, lse = _like_chosen(q, k, v, numbers, first, tails, block_of, block)
    rows, length = q.shape[:2]
    shape = _reads(q, k, numbers, block)
    training._forward[(rows * length, k.shape[2])](
        q, k, v, _runs(numbers, first), tails, out, lse, length, before, **shape
    )
    return out, lse


@_chosen.register_fake
def _like_chosen(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=launch.fp(q.dtype))


@torch.library.custom_op("shoal::chosen_back", mutates_args=())
def _chosen_back(
    q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, first: Tensor, tails: Tensor, block_of: Tensor, out: Tensor,
    lse: Tensor, gradient: Tensor, to_lse: Tensor, block: int, before: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of q, k and v, of those of `out` and of `lse`."""
    from shoal.model.gpu import training

    rows, length, _, dim = q.shape
    kv_heads, blocks = k.shape[2], first.shape[1]
    given, delta = gradient.contiguous(), _delta(out, gradient, to_lse)
    to_q, to_k, to_v = (torch.empty_like(each) for each in (q, k, v))
    training._to_q[(rows * length, kv_heads)](
        q, k, v, _runs(numbers, first), tails, lse, delta, given, to_q, length, before, **_reads(q, k, numbers, block)
    )
    order, offsets, of, begins = lists(numbers, blocks)
    pieces_k, pieces_v = (q.new_empty(len(of), block, dim, dtype=lse.dtype) for _ in range(2))
    shape = _shape(q, k, of_keys=True) | {"S": block}
    group, tile, queries = shape["G"], shape.pop("TILE"), shape["TALL"]
    training._to_pieces[(len(of),)](
        q, k, v, lse, delta, given, first, order, offsets, of, begins, pieces_k, pieces_v, length, blocks, before,
        **shape | {"TALL": launch._power(block)}, ROWS=max(queries, launch._power(group)), PIECE=PIECE,
    )  # fmt: skip
    training._to_kv[(-(-length // tile), kv_heads, rows)](
        q, k, v, tails, lse, delta, given, block_of, first, begins, pieces_k, pieces_v, to_k, to_v, length, blocks, before,
        **shape, TILE=tile,
    )  # fmt: skip
    return to_q, to_k, to_v


@_chosen_back.register_fake
def _like_chosen_back(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(each) for each in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [each for each in inputs if isinstance(each, Tensor)]
    ctx.last = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors, *output)


def _near_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.shoal.near_back(*ctx.saved_tensors, *gradients, *ctx.last)
    return (*found, None, None)


def _chosen_gradients(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    found = torch.ops.shoal.chosen_back(*ctx.saved_tensors, *gradients, *ctx.last)
    return (*found, *(None,) * 6)


torch.library.register_autograd("shoal::near", _near_gradients, setup_context=_keep)
torch.library.register_autograd("shoal::chosen", _chosen_gradients, setup_context=_keep)


# ---- what they share


def lists(numbers: Tensor, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who chose each block, by the `numbers` [B, Hk, T, K] of `blocks` in a row: the queries, block after block, ascending in
    each (`order`); where each of the B Hk N blocks begins in that (`offsets`, and its end); the block of each piece of PIECE
    queries, -1 where there is none (`of`: as many as there can be); where the pieces of each block begin (`begins`, and its
    end)."""
    rows, kv_heads, length, top_k = numbers.shape
    count = rows * kv_heads * blocks
    base = torch.arange(rows * kv_heads, dtype=torch.int32, device=numbers.device).view(rows, kv_heads, 1, 1) * blocks
    keys, places = torch.where(numbers < 0, count, numbers + base).flatten().sort(stable=True)
    edges = torch.arange(count + 1, dtype=torch.int32, device=numbers.device)
    offsets = torch.searchsorted(keys, edges)
    begins = torch.nn.functional.pad(((offsets.diff() + PIECE - 1) // PIECE).cumsum(0), (1, 0))
    pieces = torch.arange(count + numbers.numel() // PIECE, device=numbers.device)
    of = torch.searchsorted(begins, pieces, right=True) - 1
    of = torch.where(pieces < begins[-1], of, -1)
    order = places // top_k % length
    return order.to(torch.int32), offsets.to(torch.int32), of.to(torch.int32), begins.to(torch.int32)


def _runs(numbers: Tensor, first: Tensor) -> Tensor:
    """[B, Hk, T, K]: the place of the first token of each block of `numbers`; -1 where there is none."""
    rows = torch.arange(len(first), device=first.device)[:, None, None, None]
    return torch.where(numbers < 0, -1, first[rows, numbers.clamp(min=0)])


def _delta(out: Tensor, gradient: Tensor, to_lse: Tensor) -> Tensor:
    """[B, T, H]: the sum of output times its gradient, less the gradient of the log of the sum of exp: what is taken from the
    gradient of each score's weight."""
    return (out.to(to_lse.dtype) * gradient.to(to_lse.dtype)).sum(-1) - to_lse


def _nearly_fp32(q: Tensor) -> str:
    """What scores of blocks are multiplied in: sums of three products in TF32, so that they are those of decoding."""
    return "tf32x3" if q.is_cuda else "wide"


def _tiles(size: int, x: Tensor) -> tuple[int, int]:
    """How many rows of `size` numbers of the type of `x` a program holds, and how many its loop reads at a time."""
    each, most = launch._power(size) * x.element_size(), 16 if launch._exact(x) else MOST
    held, read = (max(16, min(most, size // each)) for size in (HELD, READ))
    return held, read


def _strip(q: Tensor, summaries: Tensor) -> tuple[int, int]:
    """How many queries of q [B, T, H, d] one program scores by summaries [B, N, Hk, m], and how many one launch: no more than
    SCORED scores, of all rows."""
    (rows, length, heads, _), (blocks, kv_heads) = q.shape, summaries.shape[1:3]
    tall, _ = _tiles(summaries.shape[-1], summaries)
    each = max(1, tall // launch._fit(heads // kv_heads))
    return each, min(length, max(each, SCORED // (rows * kv_heads * blocks) // each * each))


def _shape(q: Tensor, k: Tensor, *, of_keys: bool = False) -> dict[str, Any]:
    """The constants of all kernels of attention: TALL queries and TILE keys, of which a program holds the queries, or the keys
    (`of_keys`)."""
    heads, dim = q.shape[2:]
    held, read = _tiles(dim, q)
    tall, tile = (read, held) if of_keys else (held, read)
    return {
        "HEADS": heads, "KV_HEADS": k.shape[2], "G": heads // k.shape[2], "D": dim, "WIDE": launch._power(dim),
        "TALL": tall, "TILE": tile, "SCALE": 1 / math.sqrt(dim), "PRECISION": launch._precision(q),
        "EXACT": launch._exact(q),
    }  # fmt: skip


def _reads(q: Tensor, k: Tensor, numbers: Tensor, block: int) -> dict[str, Any]:
    """Those of a program that reads what one query chose."""
    shape = _shape(q, k) | {"S": block, "K": numbers.shape[-1]}
    del shape["TALL"]
    return shape | {"ROWS": launch._power(shape["G"])}
