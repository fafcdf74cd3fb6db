"""What a slot of K/V memory holds of one token and KV head, and how torch writes and reads it; `cpu.attention` does the
same in loops.

    float    K [d] | V [d]                  as they are
    int8     K [d] | V [d] | s_K | s_V      levels -127 .. 127, k = s_K K; each scale a bfloat16 in two bytes

The scales lie beside their levels, so whatever shares, moves or clears a unit needs no second memory. A scale is rounded up, so
that no level lies beyond the largest; bfloat16 reaches as far as fp32, so that no value is too large or too small for it.

Letters: d head dim, W numbers in a slot.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from shoal.config import KvCacheDtype
from shoal.errors import ConfigError

TOP = 127  # largest level
_SCALES = 4  # bytes of both scales


def stored_as(kind: str, dtype: torch.dtype) -> torch.dtype:
    """What keys and values of a model that computes in `dtype` are stored as. Raises ConfigError for an unknown `kind`."""
    if kind not in get_args(KvCacheDtype):
        raise ConfigError("kv_cache_dtype", got=kind, allowed=list(get_args(KvCacheDtype)))
    return torch.int8 if kind == "int8" else dtype


def width(head_dim: int, dtype: torch.dtype) -> int:
    """W: numbers of `dtype` in a slot."""
    return 2 * head_dim + (_SCALES if dtype == torch.int8 else 0)


def encode(k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Slots [..., W] in `dtype` of keys and values [..., d]. What holds NaN or infinity is NaN when it is read."""
    if dtype != torch.int8:
        return torch.cat([k, v], dim=-1)
    both = torch.stack([k, v], dim=-2)  # [..., 2, d]
    both = both.to(torch.promote_types(both.dtype, torch.float32))  # in bf16 the largest of a token could get level 128
    scale = (both.abs().amax(-1) / TOP).float().clamp(min=torch.finfo(torch.float32).tiny)
    scale = scale.masked_fill(scale.isnan(), torch.nan)  # a GPU's own NaN would overflow in the next line
    upper = (scale.view(torch.int32) + 0xFFFF) >> 16  # the next bfloat16 that is not smaller
    rounded = (upper << 16).view(torch.float32).to(both.dtype)
    levels = torch.round(both / rounded[..., None]).nan_to_num(0.0).to(torch.int8)
    return torch.cat([levels.flatten(-2), upper.to(torch.int16).view(torch.int8)], dim=-1)


def decode(stored: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [..., d] in `dtype` of slots [..., W]."""
    if stored.dtype != torch.int8:
        k, v = stored.to(dtype).chunk(2, dim=-1)
        return k, v
    levels, scales = stored.split([stored.shape[-1] - _SCALES, _SCALES], dim=-1)
    scale = scales.contiguous().view(torch.bfloat16).to(dtype)  # [..., 2]
    k, v = (levels.unflatten(-1, (2, -1)).to(dtype) * scale[..., None]).unbind(-2)
    return k, v
