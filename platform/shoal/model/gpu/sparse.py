"""The global branch of training by the kernels of `training`, as one differentiable function: what `attention.attend` calls
on a CUDA device where reading what was chosen is well below reading all.

Letters: as in `training`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from shoal.model.gpu import launch


def usable(q: Tensor, keys: int, reads: int) -> bool:
    """Is it for queries like `q` [B, T, H, d], each with its own key among `keys`, that read `reads` of them?"""
    if q.device.type not in launch.ON or q.shape[1] != keys or keys < 2 * reads or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and not is_in_torch_dispatch_mode() and launch.installed()


def attend(
    q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, block_of: Tensor, positions: Tensor, block: int, top_k: int
) -> Tensor:
    """[B, T, H, d]: attention of q [B, T, H, d] to the `chosen` blocks, bool [B, Hk, T, N], of k and v [B, T, Hk, d] and to the
    tail; `block_of` and `positions` [B, T] as in `attention.Layout`. Differentiable in q, k and v."""
    kind = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    blocks, at = chosen.shape[-1], torch.arange(q.shape[1], device=q.device).expand_as(block_of)
    sizes = torch.zeros(len(q), blocks, dtype=torch.long, device=q.device).scatter_add_(
        1, block_of, torch.ones_like(block_of)
    )
    starts = torch.full_like(sizes, q.shape[1]).scatter_reduce_(1, block_of, at, "amin")
    numbers = torch.arange(blocks, device=q.device)
    least = torch.where(chosen, numbers, blocks).topk(min(top_k, blocks), dim=-1, largest=False).values  # [B, Hk, T, K]
    first = torch.cat([starts, torch.full_like(starts[:, :1], -1)], 1)  # the last: of a place without a block
    runs = first[:, None, None].expand(*chosen.shape[:3], -1).gather(-1, least)
    tails = at - positions + (positions + 1) // block * block
    by_block = chosen.transpose(2, 3)
    order = by_block.nonzero()[:, 3]
    offsets = torch.cat([order.new_zeros(1), by_block.sum(-1).flatten().cumsum(0)])
    lists = tuple(each.to(torch.int32).contiguous() for each in (runs, tails, starts, sizes, order, offsets))
    out: Tensor = _Chosen.apply(q.to(kind), k.to(kind), v.to(kind), lists, block)  # type: ignore[no-untyped-call]
    return out


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, ...], block: int) -> Tensor:
        from shoal.model.gpu import training

        q, k, v = (each.contiguous() for each in (q, k, v))
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=launch.fp(q.dtype))
        grid, shape = _shape(q, k, block, lists[0].shape[-1])
        training._forward[grid](q, k, v, *lists[:2], out, lse, q.shape[1], **shape)
        ctx.save_for_backward(q, k, v, out, lse, *lists)
        ctx.block = block
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from shoal.model.gpu import training

        q, k, v, out, lse, runs, tails, starts, sizes, order, offsets = ctx.saved_tensors
        given = gradients[0].contiguous()
        delta = (out.to(lse.dtype) * given.to(lse.dtype)).sum(-1)
        to_q, to_k, to_v = (torch.empty_like(each) for each in (q, k, v))
        grid, shape = _shape(q, k, ctx.block, runs.shape[-1])
        training._to_q[grid](q, k, v, runs, tails, lse, delta, given, to_q, q.shape[1], **shape)
        group = shape["G"]
        del shape["K"], shape["TILE"]
        shape |= {"TALL": launch._power(ctx.block), "ROWS": launch._power(group, 16)}
        training._to_kv[(starts.shape[1], k.shape[2], len(q))](
            q, k, v, lse, delta, given, starts, sizes, order, offsets, to_k, to_v, q.shape[1], starts.shape[1], **shape
        )
        return to_q, to_k, to_v, None, None


def _shape(q: Tensor, k: Tensor, block: int, top_k: int) -> tuple[tuple[int, int], dict[str, Any]]:
    """The grid of a program for each query and KV head, and the constants."""
    rows, length, heads, dim = q.shape
    group = heads // k.shape[2]
    return (rows * length, k.shape[2]), {
        "HEADS": heads, "KV_HEADS": k.shape[2], "G": group, "D": dim, "WIDE": launch._power(dim), "S": block, "K": top_k,
        "ROWS": launch._power(group), "TILE": launch.TILE, "SCALE": 1 / math.sqrt(dim),
        "PRECISION": launch._precision(q), "EXACT": launch._exact(q),
    }  # fmt: skip
