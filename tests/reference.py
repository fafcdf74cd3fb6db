"""The whole network once more, from its equations, in numpy and float64: what every path of `shoal.model` is held against.

Nothing of `shoal` is imported: the paged, parallel, compiled and naive forms share functions, so that a mistake in one of those
(a rate of rope, the scale of the embedding) makes all of them wrong alike, and they would still agree. Here each equation is
written out slowly, one document and one query at a time.

A model is its configuration as a plain mapping and its tensors by their names in the model directory.

Letters: n tokens of one document, D width, V vocabulary, H query heads, Hk KV heads, G = H/Hk, d head dim, S block, P page,
p patch side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# control tokens: an image is IMG, its rows of patches with ROW after each, IMG_END
IMG, IMG_END, ROW, PATCH = 5, 6, 7, 8

Array = np.ndarray
Tensors = Mapping[str, Array]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean x^2 + eps) * weight, over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def int8_product(x: Array, levels: Array, scale: Array) -> Array:
    """x [M, I] by an int8 weight [O, I] with a scale a row [O, 1]. Activations are rounded to 7 bits with one scale a token,
    64 being zero: u = round(x/s + 64), s = max|x|/63. The sums are whole numbers. In the precision of `x`."""
    s = np.maximum(np.abs(x).max(-1, keepdims=True) / x.dtype.type(63), np.finfo(np.float32).tiny)
    u = np.rint(x / s + x.dtype.type(64)).astype(np.int64) - 64
    total = u @ levels.astype(np.int64).T
    return total.astype(x.dtype) * scale.reshape(-1).astype(x.dtype) * s


def product(x: Array, w: Tensors, name: str) -> Array:
    """x times the transpose of the weight `name`, as it is stored."""
    weight = w[f"{name}.weight"]
    if weight.dtype == np.int8:
        return int8_product(x, weight, w[f"{name}.weight_scale"])
    return x @ weight.T.astype(np.float64)


def table(w: Tensors) -> Array:
    """The tied token table [V, D]."""
    weight = w["embed.weight"].astype(np.float64)
    return weight * w["embed.weight_scale"] if w["embed.weight"].dtype == np.int8 else weight


def places(tokens: Sequence[int]) -> list[tuple[int, int]]:
    """Row and column of every patch token, counted from its image's beginning."""
    found, row, column = [], 0, 0
    for token in tokens:
        if token == IMG:
            row = column = 0
        elif token == ROW:
            row, column = row + 1, 0
        elif token == PATCH:
            found.append((row, column))
            column += 1
    return found


def embedded(tokens: Sequence[int], w: Tensors, patches: Array | None) -> Array:
    """[n, D]: sqrt(D) times the token's row; of a patch, its pixels in -1..1 by a matrix, and where it stands in its image."""
    x = table(w)[list(tokens)] * math.sqrt(table(w).shape[1])
    for index, (at, (row, column)) in enumerate(
        zip(np.flatnonzero(np.array(tokens) == PATCH), places(tokens), strict=True)
    ):
        assert patches is not None
        pixels = patches[index].astype(np.float64) / 127.5 - 1
        x[at] = w["patch_in.weight"] @ pixels + w["row_embed"][row] + w["col_embed"][column]
    return x


def turned(x: Array, theta: float) -> Array:
    """x [n, heads, d] by position t: of the first half of d, dimensions i and i + d/4 turn together by t theta^(-4i/d)."""
    quarter = x.shape[-1] // 4
    out, t = x.copy(), np.arange(len(x))[:, None]
    for i in range(quarter):
        angle = t * theta ** (-i / quarter)
        a, b = x[:, :, i], x[:, :, i + quarter]
        out[:, :, i] = a * np.cos(angle) - b * np.sin(angle)
        out[:, :, i + quarter] = b * np.cos(angle) + a * np.sin(angle)
    return out


def chosen(q: Array, keys: Array, visible: int, c: Mapping[str, Any]) -> list[int]:
    """Which of the first `visible` blocks of keys [n, d] a group's queries q [G, d] read: the sinks, then the best, top_k in
    all."""
    size, d = c["block"], q.shape[-1]
    wanted = []
    for block in range(visible):
        some = keys[block * size : (block + 1) * size]
        z = q @ some.mean(0) / math.sqrt(d)
        if c["summary"] == "mean_var":
            z = z + (q * q) @ some.var(0) / (2 * d)
        wanted.append(z)
    if not wanted:
        return []
    z = np.array(wanted).T  # [G, blocks]
    score = z[0] if len(q) == 1 else softmax(z).sum(0)
    sinks = list(range(min(c["sinks"], visible)))
    rest = sorted(range(len(sinks), visible), key=lambda block: (-score[block], block))
    return [*sinks, *rest][: c["top_k"]]


def attention(x: Array, w: Tensors, name: str, kind: str, c: Mapping[str, Any]) -> Array:
    """o = gamma softmax(window) V + (1 - gamma) softmax(tail and chosen blocks) V for each head; x [n, D], normed. In sparse
    layers, S, one softmax over the window, with the gate added to its scores, and the blocks chosen before it; in dense ones,
    D, and in sparse ones before a position, over all."""
    heads, kv_heads, d, n = c["heads"], c["kv_heads"], c["head_dim"], len(x)
    qkv = product(x, w, f"{name}.qkv").reshape(n, heads + 2 * kv_heads, d)
    q, k, v = np.split(qkv, [heads, heads + kv_heads], axis=1)
    q = turned(rms(q, w[f"{name}.q_norm.weight"], c["norm_eps"]), c["rope_theta"])
    k = turned(rms(k, w[f"{name}.k_norm.weight"], c["norm_eps"]), c["rope_theta"])
    learned = c["mix_mode"] == "per_head"
    gate = w.get(f"{name}.gate", np.zeros(heads))
    gamma = 1 / (1 + np.exp(-gate)) if learned else np.full(heads, c["local_weight"])
    out, share, size = np.zeros((n, heads, d)), heads // kv_heads, c["block"]
    for t in range(n):
        near = list(range(max(0, t - c["window"] + 1), t + 1))
        for g in range(kv_heads):
            mine = range(g * share, (g + 1) * share)
            if kind in "SD":
                all_ = kind == "D" or t < c["dense_length"]
                far = [] if all_ else chosen(q[t, list(mine)], k[:, g], -(-near[0] // size), c)
                to = [j for b in far for j in range(b * size, (b + 1) * size) if j < near[0]] + near
                to = list(range(t + 1)) if all_ else to
                for h in mine:
                    more = np.array([0 if all_ or j < near[0] else gate[h] for j in to])
                    out[t, h] = softmax(k[to, g] @ q[t, h] / math.sqrt(d) + more) @ v[to, g]
                continue
            blocks = chosen(q[t, list(mine)], k[:, g], (t + 1) // size, c) if kind == "H" else []
            read = [j for b in blocks for j in range(b * size, (b + 1) * size)] + list(
                range((t + 1) // size * size, t + 1)
            )
            for h in mine:

                def attend(to: list[int], h: int = h, g: int = g, t: int = t) -> Array:
                    return softmax(k[to, g] @ q[t, h] / math.sqrt(d)) @ v[to, g] if to else np.zeros(d)

                out[t, h] = attend(near) if kind == "L" else gamma[h] * attend(near) + (1 - gamma[h]) * attend(read)
    return product(out.reshape(n, -1), w, f"{name}.out")


def layer(x: Array, w: Tensors, name: str, kind: str, c: Mapping[str, Any]) -> Array:
    x = x + attention(rms(x, w[f"{name}.attention_norm.weight"], c["norm_eps"]), w, f"{name}.attention", kind, c)
    both = product(rms(x, w[f"{name}.mlp_norm.weight"], c["norm_eps"]), w, f"{name}.mlp.up")
    gate, up = np.split(both, 2, axis=-1)
    return x + product(gate / (1 + np.exp(-gate)) * up, w, f"{name}.mlp.down")


def hidden(tokens: Sequence[int], w: Tensors, c: Mapping[str, Any], depth: int, patches: Array | None = None) -> Array:
    """[n, D] after `depth` layers of one document, before the exit's norm."""
    x, quarter, pattern = embedded(tokens, w, patches), c["layers"] // 4, c["attn_pattern"]
    for index in range(depth):
        name = f"groups.{index // quarter}.blocks.{index % quarter}"
        x = layer(x, w, name, pattern[index % len(pattern)], c)
    return x


def head(h: Array, w: Tensors, c: Mapping[str, Any], depth: int) -> Array:
    """Logits [n, V] of hidden states [n, D] at the exit after `depth` layers."""
    return product(rms(h, w[f"exit_norms.{depth}.weight"], c["norm_eps"]), w, "embed")


def logits(tokens: Sequence[int], w: Tensors, c: Mapping[str, Any], depth: int, patches: Array | None = None) -> Array:
    return head(hidden(tokens, w, c, depth, patches), w, c, depth)


def router_features(tokens: Sequence[int], w: Tensors, c: Mapping[str, Any], patches: Array | None = None) -> Array:
    """[2D + 3] of a prompt after its first group: the mean state and the last one; the mean loss of the first exit at four
    places a page, of tokens in the same page that are no patches; the log of the length; the share of patches."""
    first, page, n = c["layers"] // 4, c["page"], len(tokens)
    h = hidden(tokens, w, c, first, patches)
    p = softmax(head(h, w, c, first))
    stride = max(2, page // 4)
    asked = [t for t in range(n - 1) if t % stride == stride - 2 and tokens[t + 1] != PATCH]
    losses = [-math.log(p[t, tokens[t + 1]]) for t in asked]
    nll = sum(losses) / max(1, len(losses))
    return np.concatenate([h.mean(0), h[-1], [nll, math.log(n), list(tokens).count(PATCH) / n]])


def router_choice(
    x: Array, w: Tensors, exits: Sequence[int], thresholds: Sequence[tuple[float, float]], tolerance: float
) -> int:
    """The smallest of `exits` whose predicted 0.8-quantile of the gap is within the bound for `tolerance`; else the last."""
    z = np.tanh(w["router.hidden.weight"] @ ((x - w["router.center"]) / w["router.spread"]) + w["router.hidden.bias"])
    quantile = w["router.quantile.weight"] @ z + w["router.quantile.bias"]
    bounds = [bound for at, bound in thresholds if at <= tolerance]
    for exit_, gap in zip(exits, quantile, strict=False):
        if tolerance > 0 and bounds and gap <= bounds[-1]:
            return exit_
    return exits[-1]


def losses(
    tokens: Sequence[int], w: Tensors, c: Mapping[str, Any], depth: int, patches: Array | None = None
) -> list[float]:
    """-log p of each token but the first after those before it, in nats."""
    p = softmax(logits(tokens, w, c, depth, patches))
    return [-math.log(p[t, token]) for t, token in enumerate(tokens[1:])]
