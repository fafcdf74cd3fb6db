"""What a slot of K/V memory holds of one token and KV head, and how it is written and read with torch; `attention_kernels` does
the same with loops.

    float      K [d] | V [d]                    as they are
    int8       K [d] | V [d] | s_K | s_V        levels -127..127, each with an fp32 scale in four bytes: k = s_K K

The scales lie beside their levels, so whatever moves or clears a slot, or takes one from a pool, needs no second memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOP = 127  # largest level
_SCALE = 4  # bytes


def width(head_dim: int, dtype: torch.dtype) -> int:
    """Numbers of `dtype` in a slot."""
    return 2 * head_dim + (2 * _SCALE if dtype == torch.int8 else 0)


def encode(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Slots [..., width] in `dtype` of keys and values [..., d]."""
    if dtype != torch.int8:
        return torch.cat([k, v], dim=-1)
    both = torch.stack([k, v], dim=-2)  # [..., 2, d]
    scale = (both.abs().amax(-1, keepdim=True) / TOP).float().clamp(min=torch.finfo(torch.float32).tiny)
    levels = torch.round(both / scale).nan_to_num(0).clamp(-TOP, TOP).to(torch.int8)
    return torch.cat([levels.flatten(-2), scale.flatten(-2).contiguous().view(torch.int8)], dim=-1)


def decode(stored: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [..., d] in `dtype` of slots [..., width]."""
    if stored.dtype != torch.int8:
        k, v = stored.chunk(2, dim=-1)
        return k, v
    levels, scales = stored.split([2 * head_dim, 2 * _SCALE], dim=-1)
    scale = scales.contiguous().view(torch.float32).to(dtype)  # [..., 2]
    k, v = (levels.unflatten(-1, (2, head_dim)).to(dtype) * scale[..., None]).unbind(-2)
    return k, v
