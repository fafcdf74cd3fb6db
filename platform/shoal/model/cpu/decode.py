"""The small operators of a decoding step, compiled for the CPU with numba; `fused` calls them with tensors.

Plain loops over the formulas of `block`. With torch, a step of one token runs a hundred operators a layer beside its matrix
products, of 3 to 10 us each; with these it takes a few calls, or one, `layer`. They take fp32 and fp64 (the tests compare in
fp64). NaN and infinities keep their meaning in all of them: a model that gives NaN must be seen to give NaN.

Letters: N rows (one new token each) of R requests, D width, F inner width, H query heads, Hk KV heads, G = H/Hk, d head
dim, U units, P page slots, S block, M pages in a table, X = w + (K+1) S tokens that one row may read.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numba.extending import overload

from shoal.model.cpu import integers
from shoal.model.cpu.attention import attend, project_and_store
from shoal.model.cpu.compiled import copy, exact, exp, fast, inverse_rms
from shoal.model.cpu.draw import few_log_sums, log_sums, race, thresholds  # noqa: F401, `fused` calls all by this file
from shoal.model.cpu.floats import beside, product
from shoal.model.cpu.integers import peak
from shoal.model.cpu.parts import Form, Layer, Matrix, Rows, Sight


@fast.called
def rms_norm(x, weight, eps, out):
    """out [N, D] = x / rms(x) * weight."""
    rows, width = x.shape
    for n in range(rows):
        scale = inverse_rms(x[n], eps)
        for i in range(width):
            out[n, i] = x[n, i] * scale * weight[i]


@fast.called
def swiglu(up, out):
    """out [N, F] = silu(gate) * up for `up` [N, 2F], gate first."""
    rows, inner = out.shape
    one = up.dtype.type(1)
    for n in range(rows):
        for i in range(inner):
            gate = up[n, i]
            out[n, i] = gate / (one + exp(-gate)) * up[n, inner + i]


@exact.called
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


@fast.called
def layer(x, weights, form, rows, kv, summaries, sight, beside):
    """x [N, D] after a whole layer, a new array; K/V and summaries as `project_and_store` leaves them. `weights`, `form`,
    `rows` and `sight` are what `parts.Layer`, `parts.Form`, `parts.Rows` and `parts.Sight` name, as plain tuples. `beside`:
    what adapters add to qkv, out, up and down, as `floats.beside` takes it without x and out, with the places of each of
    these; `of` is empty where no row has one."""
    w, f, r, look = Layer(*weights), Form(*form), Rows(*rows), Sight(*sight)
    qkv, back, up, down = Matrix(*w.qkv), Matrix(*w.out), Matrix(*w.up), Matrix(*w.down)
    count, width = x.shape
    dim = r.keep.shape[1]
    out, normed, heads = np.empty_like(x), np.empty_like(x), np.empty((count, len(qkv.weight)), x.dtype)
    if f.after:
        copy(x, normed)
    else:
        rms_norm(x, w.attention_norm, f.eps, normed)
    times(normed, qkv, heads)
    plus(normed, beside, 0, heads)
    q = np.empty((count, len(qkv.weight) // dim - 2 * kv.shape[1], dim), x.dtype)
    project_and_store(
        heads, w.bias, w.q_norm, w.k_norm, f.eps, f.half, r.keep, r.cross, r.positions, r.slots, r.block, kv, summaries, q
    )  # fmt: skip
    mixed = np.empty_like(q)
    attend(
        q, kv, summaries, r.tables, r.short, r.requests, r.positions, r.block,
        look.window, look.top_k, look.sinks, look.gamma, look.bias, look.dense, mixed,
    )  # fmt: skip
    times(mixed.reshape(count, -1), back, normed)
    plus(mixed.reshape(count, -1), beside, 1, normed)
    if f.after:
        rms_norm(normed, w.attention_norm, f.eps, normed)
    for n in range(count):
        for i in range(width):
            out[n, i] = x[n, i] + normed[n, i]
    if f.after:
        copy(out, normed)
    else:
        rms_norm(out, w.mlp_norm, f.eps, normed)
    both, inner = np.empty((count, len(up.weight)), x.dtype), np.empty((count, len(up.weight) // 2), x.dtype)
    times(normed, up, both)
    plus(normed, beside, 2, both)
    swiglu(both, inner)
    times(inner, down, normed)
    plus(inner, beside, 3, normed)
    if f.after:
        rms_norm(normed, w.mlp_norm, f.eps, normed)
    for n in range(count):
        for i in range(width):
            out[n, i] += normed[n, i]
    return out


@fast
def plus(x, added, index, out):
    """Adds to out [N, O] what adapters have beside x [N, D]."""
    numbers, places, of = added
    beside(x, numbers, places[index], of, out)


def times(x, matrix, out):
    """out [N, O] = x [N, D] times the transpose of `matrix`: `product`, or `integers.linear`."""


@overload(times)
def _times(x, matrix, out):
    if matrix.types[0].dtype == nb.int8:
        return lambda x, matrix, out: integers.linear(x, matrix.weight, matrix.shift, matrix.scale, out)
    return lambda x, matrix, out: product(x, matrix.weight, out)
