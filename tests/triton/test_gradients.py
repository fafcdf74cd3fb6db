"""The kernels of backward against the gradients of the definition in float64, number by number, of layers of each kind. Bounds
are what forward and backward, written down once more, may lose (`rounded`).

A layer is one softmax over its keys, or two that are joined. Of one with weights p and output o, for the gradients g of o and
h of the log of the sum of exp:

    pull = p (g v - sum of o g + h) / sqrt d        to q: pull k        to k: pull^T q        to v: p^T g

To bf16 are rounded o, p and pull before they are multiplied, and what comes of it: by a kernel, which in the interpreter cuts,
or by torch, which goes to the nearest.

Letters: n tokens of a document, H query heads, Hk KV heads, G = H/Hk, d head dim. The G n rows of a KV head are those of its
first query head, of its second, and so on.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.model import reference
from shoal.model.gpu import sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.reach import Reach
from tests.triton.rounded import Array, Rounded
from tests.triton.test_reference import CUT, WHOLE, defined, exact, near, normal

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

BLOCK, DIM = 4, 16
DOCS = torch.tensor([[0] * 24, [0] * 7 + [1] * 17])
SCALE = Rounded.exact(np.full(1, 1 / math.sqrt(DIM)))
SEEN = {torch.float32: 2e-4, torch.bfloat16: 0.15}  # by how much a factor must be wrong, to be seen


class Softmax(NamedTuple):
    p: Rounded  # [Hk, G n, n]
    lse: Rounded  # [Hk, G n, 1]; any where no key is read
    out: Rounded  # [Hk, G n, d]
    some: Array  # bool [Hk, G n, 1]


def softmax(q: Rounded, k: Rounded, v: Rounded, there: Array, cut: float) -> Softmax:
    """Over the keys that are `there`, bool [Hk, G n, n]."""
    some = there.any(-1, keepdims=True)
    s = (q @ k.turned()) * SCALE
    lse = s.log_of_sums(there | ~some)
    p = (s - lse).exp().where(there, 0.0)
    return Softmax(p, lse, (p.cut(cut) @ v).cut(cut), some)


def back(given: list[Rounded], one: Softmax, gradient: Rounded, to_lse: Rounded, cut: float) -> list[Rounded]:
    """To q, k and v."""
    q, k, v = given
    pull = (one.p * (gradient @ v.turned() - ((one.out * gradient).sum(-1) - to_lse)) * SCALE).cut(cut)
    found = pull @ k, pull.turned() @ q, one.p.cut(cut).turned() @ gradient
    return [each.cut(cut) for each in found]


def read(q: Array, k: Array, reach: Reach) -> list[Array]:
    """What each softmax of a layer reads of a document, bool [n, n] or [Hk, n, n]: its window, or all; and what it chose."""
    n, first = len(q), [torch.as_tensor(x).transpose(0, 1) for x in (q, k)]
    every, local = reference.local_mask(n, n), reference.local_mask(n, reach.window)
    if not reach.top_k:
        return [(every if reach.dense else local).numpy()]
    counts, besides = None, torch.zeros(n, n, dtype=torch.bool)
    if reach.bias is not None:
        early = torch.arange(n) < reach.dense
        local |= every & early[:, None]
        besides = reference.tail_mask(n, BLOCK) | local
        counts = [0 if early[t] else max(0, math.ceil((t - reach.window + 1) / BLOCK)) for t in range(n)]
    scores = reference.block_scores(first[0], first[1], BLOCK, "mean_var", counts)
    chosen = reference.chosen_blocks(scores, BLOCK, reach.top_k, reach.sinks, counts)
    return [local.numpy(), (reference.global_mask(chosen, BLOCK, n) & ~besides).numpy()]


def by_head(x: Array, kv_heads: int) -> Array:
    """[Hk, G n, d] of x [n, H, d]."""
    found: Array = x.swapaxes(0, 1).reshape(kv_heads, -1, x.shape[-1])
    return found


def expected(
    q: Array, k: Array, v: Array, gradient: Array, reach: Reach, cut: float
) -> tuple[list[Rounded], Rounded | None]:
    """Of a document, to q [Hk, G n, d], k and v [Hk, n, d], and what is added up to the gradient of each head's gate [H, m], if
    there is one. Of two softmaxes torch makes the gradients of both outputs, in the type that these have, and adds what both
    give."""
    heads, kv_heads, n, nearest = q.shape[1], k.shape[1], len(q), cut / 2
    masks = [np.tile(np.broadcast_to(mask, (kv_heads, n, n)), (1, heads // kv_heads, 1)) for mask in read(q, k, reach)]
    q_, k_, v_, g = (Rounded.exact(by_head(x, kv_heads)) for x in (q, k, v, gradient))
    local, *others = (softmax(q_, k_, v_, mask, cut) for mask in masks)
    none = Rounded.exact(np.zeros_like(local.lse.of))
    if not others:
        return back([q_, k_, v_], local, g, none, cut), None
    (far,), gates = others, reach.gamma if reach.bias is None else reach.bias
    assert gates is not None
    share = Rounded.exact(exact(gates).repeat(n).reshape(none.of.shape))
    to_gate, to_lse = g * (local.out - far.out).cut(nearest), none
    if reach.bias is not None:
        share = (local.lse + share - far.lse).sigmoid().where(far.some, 1.0)
        to_gate = to_lse = to_gate.sum(-1) * share * (Rounded.exact(np.ones(1)) - share)
    to_local = (g * share).cut(nearest)
    ways = (local, to_local, to_lse), (far, (g - to_local).cut(nearest), none - to_lse)
    both = zip(*(back([q_, k_, v_], *way, cut) for way in ways), strict=True)
    return [(a + b).cut(nearest) for a, b in both], to_gate.shaped(heads, -1)


def held(got: Array, want: Array, bound: Rounded) -> float:
    """Each number is within the bound of its own, which is of these numbers. Returns by how much a factor that is wrong for all
    of them would have to be, to be seen."""
    assert np.abs(bound.of - want).max() <= 1e-12 * np.abs(want).max()
    near(got, want, bound.off)
    return float(2 / (np.abs(want) / np.maximum(bound.off, 1e-300)).max())


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", SEEN)  # of fp16 there are none (`sparse.usable`)
@pytest.mark.parametrize("kind", WHOLE)
def test_gradients_of_whole_rows_are_those_of_the_definition(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To q, k, v and the gate, in several tiles, and blocks that more queries chose than one program adds up. A wrong factor
    would be seen of q, k and v; a gate's gradient is a sum over all tokens, in which roundings may come to more."""
    monkeypatch.setattr(sparse, "MOST", 16)
    monkeypatch.setattr(sparse, "PIECE", 5)
    drawn, reach = [normal(i, 2, 24, heads, DIM, dtype=dtype) for i, heads in enumerate((4, 2, 2, 4))], WHOLE[kind]
    names = [name for name in ("gamma", "bias") if getattr(reach, name) is not None]
    gates, weight = [getattr(reach, name) for name in names], drawn.pop()

    def leaves(kind: torch.dtype, of_gates: torch.dtype) -> tuple[list[Tensor], Reach]:
        made = [x.to(kind, copy=True) for x in drawn] + [x.to(of_gates, copy=True) for x in gates]
        gated: Any = dict(zip(names, made[3:], strict=True))
        return [x.requires_grad_() for x in made], dataclasses.replace(reach, **gated)

    ours, mine = leaves(dtype, torch.float32)
    spans = Spans.packed(DOCS, BLOCK, reach.window, reach.dense if reach.bias is not None else 0)
    out = sparse.attend(*ours[:3], spans, mine, True)
    got = [exact(x) for x in torch.autograd.grad((out * weight.to(out.dtype)).sum(), ours)]
    theirs, same = leaves(torch.float64, torch.float64)
    places = [(row, slice(*ends)) for row in range(2) for ends in reference.documents(DOCS[row].tolist())]
    whole = [defined(*(x[row : row + 1, span] for x in theirs[:3]), same, BLOCK, "mean_var") for row, span in places]
    total = sum((one * weight[at]).sum() for one, at in zip(whole, places, strict=True))
    want = [exact(x) for x in torch.autograd.grad(total, theirs)]
    of_gate, least = list[Rounded](), [math.inf] * 3
    for at in places:
        found, to_gate = expected(*(exact(x[at]) for x in (*drawn, weight)), reach, CUT[dtype])
        of_gate += [] if to_gate is None else [to_gate]
        for i, bound in enumerate(found):
            least[i] = min(least[i], held(by_head(got[i][at], 2), by_head(want[i][at], 2), bound))
    assert max(least) < SEEN[dtype]
    for a, b in zip(got[3:], want[3:], strict=True):
        both = (np.concatenate([getattr(each, name) for each in of_gate], axis=1) for name in ("of", "off"))
        held(a[:, None], b[:, None], Rounded(*both).sum(1))
