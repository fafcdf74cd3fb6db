"""What queries give to the keys and values of blocks that they chose, and of their tail, by two kernels alone (`_to_pieces`,
`_to_kv`) against sums over one query and one key at a time, in float64.

Letters: B rows, T tokens, H query heads, Hk KV heads, G = H/Hk, d head dim, S block, K blocks read, P pieces.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.model.gpu import launch, sparse

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

ROWS, BLOCK, TOP, DIM, PIECE = 2, 3, 2, 8, 7  # of three heads a program takes five queries at a time
ENDS = [[7, 20], [20, 21]]  # of the documents of each row: one ends on a block, others do not, and one holds none
LENGTH = 21
PAST = 64 * 1024  # numbers after each tensor, all NaN: who reads there is seen


def beside_nan(x: Tensor) -> Tensor:
    """`x` with NaN before and behind it; of whole numbers such as lead far away."""
    fill = torch.nan if x.is_floating_point() else 1 << 20
    whole = torch.full((x.numel() + 2 * PAST,), fill, dtype=x.dtype)
    found = whole[PAST : PAST + x.numel()].view(x.shape)
    return found.copy_(x)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(spans: sparse.Spans, kv_heads: int, seed: int) -> Tensor:
    """[B, Hk, T, K]: some of the complete blocks before each query, in ascending order; the first of a document by most."""
    draw, found = np.random.default_rng(seed), torch.full((ROWS, kv_heads, LENGTH, TOP), -1, dtype=torch.int32)
    for row, head, t in np.ndindex(ROWS, kv_heads, LENGTH):
        end, many = int(spans.ends[row, t]), int(spans.many[row, t])
        others = draw.permutation(np.arange(end - many, end))[: draw.integers(0, TOP + 1)]
        taken = sorted({end - many, *others.tolist()})[:TOP] if many and draw.random() < 0.9 else []
        found[row, head, t, : len(taken)] = torch.tensor(taken, dtype=torch.int32)
    return found


def summed(given: list[Tensor], spans: sparse.Spans, numbers: Tensor, before: int) -> tuple[np.ndarray, np.ndarray]:
    """To k and v [B, T, Hk, d]: of each query and key that it reads p g to v and pull q to k, as `training` has them."""
    q, k, v, lse, delta, gradient = (each.numpy() for each in given)
    to_k, to_v, group = np.zeros_like(k), np.zeros_like(v), q.shape[2] // k.shape[2]
    for row, t, h in np.ndindex(*q.shape[:3]):
        head = h // group
        keys = list[int]()
        for block in numbers[row, head, t].tolist():
            first = int(spans.first[row, block])
            keys += [key for key in range(first, first + BLOCK) if block >= 0 and key <= t - before]
        keys += range(int(spans.tails[row, t]), t + 1) if not before else []
        for key in keys:
            p = math.exp(q[row, t, h] @ k[row, key, head] / math.sqrt(DIM) - lse[row, t, h])
            pull = p * (gradient[row, t, h] @ v[row, key, head] - delta[row, t, h]) / math.sqrt(DIM)
            to_k[row, key, head] += pull * q[row, t, h]
            to_v[row, key, head] += p * gradient[row, t, h]
    return to_k, to_v


@pytest.mark.parametrize(("before", "heads"), [(0, (3, 1)), (4, (3, 1)), (0, (4, 2)), (5, (1, 1))])
def test_each_query_gives_to_each_key_that_it_reads_once(
    before: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of more queries than a piece has, and groups that do not fill a tile; a window that cuts blocks, behind which no
    tail is read. Nothing is read beyond what is there, and of the pieces that there could be none is written but those that
    there are."""
    from shoal.model.gpu import training

    monkeypatch.setattr(sparse, "PIECE", PIECE)
    docs = torch.tensor([[sum(end <= t for end in ends) for t in range(LENGTH)] for ends in ENDS])
    spans = sparse.Spans.packed(docs, BLOCK)
    shapes = [(heads[0], DIM), (heads[1], DIM), (heads[1], DIM), (heads[0],), (heads[0],), (heads[0], DIM)]
    given = [beside_nan(normal(i, ROWS, LENGTH, *shape)) for i, shape in enumerate(shapes)]
    q, k, v, lse, delta, gradient = given
    lse += 3
    numbers = chosen(spans, heads[1], before)
    lists = [beside_nan(each) for each in sparse.lists(numbers, spans.first.shape[1])]
    order, offsets, of, begins = lists
    first, tails, block_of = (beside_nan(each) for each in (spans.first, spans.tails, spans.block_of))
    pieces = [beside_nan(torch.full((len(of), BLOCK, DIM), torch.nan, dtype=torch.float64)) for _ in range(2)]
    found = [beside_nan(torch.full(k.shape, torch.nan, dtype=torch.float64)) for _ in range(2)]
    shape: dict[str, Any] = sparse._shape(q, k, of_keys=True) | {"S": BLOCK}
    tile, blocks, tall = shape.pop("TILE"), first.shape[1], shape.pop("TALL")
    training._to_pieces[(len(of),)](
        q, k, v, lse, delta, gradient, first, order, offsets, of, begins, *pieces, LENGTH, blocks, before,
        **shape, TALL=launch._power(BLOCK), ROWS=max(tall, launch._power(shape["G"])), PIECE=PIECE,
    )  # fmt: skip
    there = int(begins[-1])
    assert there > sum(int(count > 0) for count in offsets.diff()), "some blocks have several pieces"
    for each in pieces:
        assert each[:there].isfinite().all() and each[there:].isnan().all()
    training._to_kv[(-(-LENGTH // tile), heads[1], ROWS)](
        q, k, v, tails, lse, delta, gradient, block_of, first, begins, *pieces, *found, LENGTH, blocks, before,
        **shape, TALL=tall, TILE=tile,
    )  # fmt: skip
    for got, want in zip(found, summed(given, spans, numbers, before), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=1e-11, atol=1e-12)


def test_a_piece_of_more_numbers_than_32_bits_count_is_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Number 2^23, of 2^8 numbers, and the one before it: in files that are nearly all holes, where what 32 bits would make of
    that place is a hole, too. Of all its programs the interpreter runs that one."""
    from triton.runtime.interpreter import interpreter_builder

    from shoal.model.gpu import training

    piece, length, dim = 2**23, 3, 128
    q, k, v, gradient = (normal(i, 1, length, 1, dim).float() for i in range(4))
    lse, delta = torch.full((1, length, 1), 8.0), torch.zeros(1, length, 1)
    of = torch.zeros(piece + 1, dtype=torch.int32)
    # the last query chose the one block, which ends before it
    first, order, offsets, begins, block_of = (
        torch.tensor(each, dtype=torch.int32) for each in ([[0]], [2], [0, 1], [piece, piece + 1], [[0, 0, -1]])
    )
    pieces = [
        torch.from_numpy(np.memmap(tmp_path / name, np.float32, "w+", shape=2**32 + 4 * dim))[2**31 :] for name in "kv"
    ]
    shape: dict[str, Any] = {
        "HEADS": 1, "KV_HEADS": 1, "G": 1, "D": dim, "WIDE": dim, "S": 2, "TALL": 16, "SCALE": 1.0, "PRECISION": "ieee",
        "EXACT": False,
    }  # fmt: skip
    lists = order, offsets, of, begins
    with monkeypatch.context() as patch:
        patch.setattr(interpreter_builder, "grid_idx", (piece, 0, 0), raising=False)
        patch.setattr(interpreter_builder, "set_grid_idx", lambda *_: None)
        training._to_pieces[(1,)](
            q, k, v, lse, delta, gradient, first, *lists, *pieces, length, 1, 1, **shape, ROWS=16, PIECE=4
        )
    found = [torch.zeros_like(k) for _ in range(2)]
    given = (q, k, v, first, lse, delta, gradient, block_of, first, begins, *pieces)
    training._to_kv[(1, 1, 1)](*given, *found, length, 1, 1, **shape, TILE=16)
    weight = (k[0, :2, 0] @ q[0, 2, 0] - 8).exp()[:, None]
    want = weight * (v[0, :2, 0] @ gradient[0, 2, 0])[:, None] * q[0, 2, 0], weight * gradient[0, 2, 0]
    for got, those in zip(found, want, strict=True):
        torch.testing.assert_close(got[0, :, 0], torch.cat([those, torch.zeros(1, dim)]), rtol=1e-4, atol=1e-6)


def test_keys_of_a_row_beyond_what_32_bits_count_get_what_its_queries_give(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the second row, 2^31 numbers after the first one's, its first tile alone: in files that are nearly all holes, where
    what 32 bits would make of that place is a hole, too. Two queries read keys of their tail."""
    from triton.runtime.interpreter import interpreter_builder

    from shoal.model.gpu import training

    length, dim, tile = 2**24, 128, 16
    x, to_k, to_v = (
        torch.from_numpy(np.memmap(tmp_path / name, np.float32, "w+", shape=2**32 + tile * dim))[2**31 :]
        for name in ("x", "k", "v")
    )
    x[length * dim : (length + 2) * dim] = torch.linspace(-1, 1, 2 * dim)
    own = x[length * dim : (length + 2) * dim].view(2, dim)
    lse, delta = (torch.zeros(length + tile) for _ in range(2))
    lse[length:] = 43.0
    tails, block_of = (torch.zeros(length + tile, dtype=torch.int32) for _ in range(2))
    tails[length:] = torch.tensor([0, 0, *range(2, tile)])
    block_of[length:] = -1
    first, begins = torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    monkeypatch.setattr(interpreter_builder, "grid_idx", (0, 0, 1), raising=False)
    monkeypatch.setattr(interpreter_builder, "set_grid_idx", lambda *_: None)
    training._to_kv[(1,)](
        x, x, x, tails, lse, delta, x, block_of, first, begins, x, x, to_k, to_v, length, 1, 0, HEADS=1, KV_HEADS=1, G=1,
        D=dim, WIDE=dim, S=2, TALL=16, TILE=tile, SCALE=1.0, PRECISION="ieee", EXACT=False,
    )  # fmt: skip
    scores = (own @ own.T).tril()  # of query and key
    weights = (scores - 43).exp().tril()
    for got, want in ((to_v, weights.T @ own), (to_k, (weights * scores).T @ own)):
        assert want.abs().max() > 0.1, "what is compared is no hole"
        torch.testing.assert_close(got[length * dim :][: 2 * dim].view(2, dim), want, rtol=1e-4, atol=1e-5)
