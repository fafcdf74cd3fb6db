"""The small operators of a decoding step, compiled for the CPU with numba; `fused` calls them with tensors.

Plain loops over the formulas of `block`: a step of one token runs a hundred torch operators a layer outside its matrix
products, 3 to 10 us each, and a few calls of these instead, or one, `layer`. They take fp32 and fp64 (the tests compare in
fp64). NaN and infinities keep their meaning in all of them: a model that gives NaN must be seen to give NaN.

Letters: N rows (one new token each) of R requests, D width, F inner width, H query heads, Hk KV heads, G = H/Hk, d head
dim, U units, P page slots, S block, M pages in a table, X = w + (K+1) S tokens that one row may read.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numba.extending import overload

from shoal.model import int8_kernels
from shoal.model.attention_kernels import attend, project_and_store
from shoal.model.compiled import exact, exp, fast, inverse_rms
from shoal.model.float_kernels import product
from shoal.model.int8_kernels import peak


@fast
def rms_norm(x, weight, eps, out):
    """out [N, D] = x / rms(x) * weight."""
    rows, width = x.shape
    for n in range(rows):
        scale = inverse_rms(x[n], eps)
        for i in range(width):
            out[n, i] = x[n, i] * scale * weight[i]


@fast
def swiglu(up, out):
    """out [N, F] = silu(gate) * up for `up` [N, 2F], gate first."""
    rows, inner = out.shape
    one = up.dtype.type(1)
    for n in range(rows):
        for i in range(inner):
            gate = up[n, i]
            out[n, i] = gate / (one + exp(-gate)) * up[n, inner + i]


@exact
def scale_rows(x, top, tiny, out, scale):
    """scale [N, 1] = max |x| / top, at least `tiny` (NaN where x holds one), and out [N, D] = x / scale. Rounded as torch
    rounds it: the levels of INT8 depend on it."""
    rows, width = x.shape
    for n in range(rows):
        most = peak(x[n])
        broken = False
        for i in range(width):
            broken |= x[n, i] != x[n, i]
        s = max(most / x.dtype.type(top), x.dtype.type(tiny))
        if broken:
            s = x.dtype.type(np.nan)
        scale[n, 0] = s
        for i in range(width):
            out[n, i] = x[n, i] / s


@fast
def layer(
    x, attention_norm, qkv, qkv_shift, qkv_scale, q_weight, k_weight, back, back_shift, back_scale, mlp_norm, up, up_shift,
    up_scale, down, down_shift, down_scale, eps, keep, cross, positions, slots, block, kv, summaries, tables, rows, requests,
    window, top_k, sinks, gamma,
):  # fmt: skip
    """x [N, D] after a whole layer, a new array; K/V and summaries as `project_and_store` leaves them. The matrices are fp,
    shifts and scales unused, or int8 with theirs (`times`)."""
    count, width = x.shape
    dim = len(q_weight)
    out, normed, heads = np.empty_like(x), np.empty_like(x), np.empty((count, len(qkv)), x.dtype)
    rms_norm(x, attention_norm, eps, normed)
    times(normed, qkv, qkv_shift, qkv_scale, heads)
    q = np.empty((count, len(qkv) // dim - 2 * kv.shape[1], dim), x.dtype)
    project_and_store(heads, q_weight, k_weight, eps, keep, cross, positions, slots, block, kv, summaries, q)
    mixed = np.empty_like(q)
    attend(q, kv, summaries, tables, rows, requests, positions, block, window, top_k, sinks, gamma, mixed)
    times(mixed.reshape(count, -1), back, back_shift, back_scale, normed)
    for n in range(count):
        for i in range(width):
            out[n, i] = x[n, i] + normed[n, i]
    rms_norm(out, mlp_norm, eps, normed)
    both, inner = np.empty((count, len(up)), x.dtype), np.empty((count, len(up) // 2), x.dtype)
    times(normed, up, up_shift, up_scale, both)
    swiglu(both, inner)
    times(inner, down, down_shift, down_scale, normed)
    for n in range(count):
        for i in range(width):
            out[n, i] += normed[n, i]
    return out


def times(x, weight, shift, scale, out):
    """out [N, O] = x [N, D] @ weight [O, D] transposed: `product`, or `int8_kernels.linear`."""


@overload(times)
def _times(x, weight, shift, scale, out):
    if weight.dtype == nb.int8:
        return lambda x, weight, shift, scale, out: int8_kernels.linear(x, weight, shift, scale, out)
    return lambda x, weight, shift, scale, out: product(x, weight, out)
