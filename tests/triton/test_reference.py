"""Every kernel against equations that share no code with it: `tests/reference.py` and the definition of attention in
`shoal.model.reference`, in float64. In fp32 as near as its roundings allow, in bf16 and fp16 by bounds that follow from where a
kernel rounds.

u = 2^-24 is what rounding to fp32 may lose of a number; CUT what rounding to bf16 may, 2^-8 on a GPU, and twice that in the
interpreter, which cuts; to fp16 2^-11, and LEAST of any number, as those below 2^-14 are multiples of 2^-24. Sums of n numbers
lose at most n u of the sum of their sizes.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal import presets
from shoal.model import slots
from shoal.model.block import pairs, rope_tables
from shoal.model.cpu.parts import Form
from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.reach import ALL, Reach
from shoal.model.reference import reference_attention, reference_sparse
from tests import reference
from tests.triton.rounded import U
from tests.triton.seen import attended
from tests.triton.stored import Stored, step_of, store

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

CUT = {torch.float32: 0.0, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11}
LEAST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2.0**-25}
KINDS = [torch.float32, torch.bfloat16, torch.float16]


def normal(seed: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact(x: torch.Tensor) -> np.ndarray:
    found: np.ndarray = x.double().numpy()
    return found


def near(got: torch.Tensor | np.ndarray, want: np.ndarray, bound: Any) -> None:
    off = np.abs((exact(got) if isinstance(got, torch.Tensor) else got) - want)
    assert (off <= bound).all(), f"{(off / np.maximum(bound, 1e-300)).max():.3g} times the bound"


# ---- norm, activation, and what is stored


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("width", [1, 12, 70])
@torch.no_grad()
def test_norm_and_sum_are_the_equations(width: int, dtype: torch.dtype) -> None:
    """The sum is stored rounded, and normed as it is stored. A norm rounds its sum of squares, of which the root takes half,
    and some five times more."""
    x, added, scales = (normal(i, 3, width, dtype=dtype) * 3 for i in range(3))
    weight = scales[0]
    total, normed = launch.add_norm(x, added, weight, 1e-3)
    near(total, exact(x) + exact(added), (U + CUT[dtype]) * np.abs(exact(x) + exact(added)) + LEAST[dtype])
    for got, of in ((launch.rms_norm(x, weight, 1e-3), x), (normed, total)):
        want = reference.rms(exact(of), exact(weight), 1e-3)
        near(got, want, ((width / 2 + 6) * U + CUT[dtype]) * np.abs(want) + LEAST[dtype])


@pytest.mark.parametrize("dtype", KINDS)
@torch.no_grad()
def test_the_activation_is_the_equation(dtype: torch.dtype) -> None:
    """exp, a sum, a quotient and a product; far below 0 it is 0."""
    both = normal(1, 4, 2 * 37, dtype=dtype) * 8
    both[0, :3] = torch.tensor([-200.0, 0.0, 80.0])
    gate, up = np.split(exact(both), 2, axis=-1)
    want = gate * np.exp(-np.logaddexp(0, -gate)) * up
    near(launch.swiglu(both), want, (8 * U + CUT[dtype]) * np.abs(want) + 1e-36 + LEAST[dtype])


def read(kv: torch.Tensor, table: torch.Tensor, count: int, dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys and values [n, Hk, d] that stand in the pages of `table`, and what each was multiplied by [n, Hk, 2] (1: nothing),
    by the description in `slots.py`."""
    page = kv.shape[2]
    found = torch.stack([kv[table[t // page], :, t % page] for t in range(count)])
    if kv.dtype != torch.int8:
        both = exact(found)
        return both[..., :dim], both[..., dim:], np.ones((*both.shape[:2], 2))
    raw = found.numpy()
    halves = np.ascontiguousarray(raw[..., 2 * dim :]).view(np.uint16).astype(np.uint32)
    scale = (halves << 16).view(np.float32).astype(np.float64)
    return raw[..., :dim] * scale[..., :1], raw[..., dim : 2 * dim] * scale[..., 1:], scale


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize(
    ("norm", "biased", "variance"), [("head", False, True), ("all", True, False), ("none", True, True)]
)
@torch.no_grad()
def test_what_is_stored_is_the_equations(norm: str, biased: bool, variance: bool, kv: str, dtype: torch.dtype) -> None:
    """q, keys, values and summaries of a document: most of it as one chunk, the rest a row a step. Rotation adds two products,
    of numbers that are rounded; int8 is off by half a level, and its scale is rounded up to bf16."""
    heads, kv_heads, dim, count, first, seed = 4, 2, 12, 20, 14, 5
    qkv = normal(seed, count, (heads + 2 * kv_heads) * dim, dtype=dtype)
    none = qkv.new_zeros(0)
    bias = normal(6, qkv.shape[1], dtype=dtype) if biased else none
    sizes = {"head": (dim, dim), "all": (heads * dim, kv_heads * dim), "none": (0, 0)}[norm]
    weights = [normal(7 + i, size, dtype=dtype) if size else none for i, size in enumerate(sizes)]
    config = dataclasses.replace(
        presets.get("test").model, heads=heads, kv_heads=kv_heads, head_dim=dim, block=4, page=8
    )
    case = store(seed, [count], [count], dim=dim, dtype=dtype, kv_dtype=slots.stored_as(kv, dtype), variance=variance)
    case.kv.fill_(-1 if kv == "int8" else torch.nan)
    case.summaries.fill_(torch.nan)
    queries = []
    for begin, end in [(0, first), *((t, t + 1) for t in range(first, count))]:
        step = step_of(case.step.tables, [(begin, end)], 8, 4)
        rope = rope_tables(step.positions, config, torch.float32)
        form = Form(config.norm_eps, pairs(config), False)
        given = (qkv[begin:end], bias, *weights, form, rope, case.kv, case.summaries, step)
        queries.append(launch.project_and_store(*given))
    rows = (exact(qkv) + (exact(bias) if biased else 0)).reshape(count, -1, dim)
    parts = np.split(rows, [heads, heads + kv_heads], axis=1)
    for i, weight in enumerate(weights):
        if norm == "all":
            parts[i] = reference.rms(parts[i].reshape(count, -1), exact(weight), config.norm_eps).reshape(
                parts[i].shape
            )
        elif norm == "head":
            parts[i] = reference.rms(parts[i], exact(weight), config.norm_eps)
        parts[i] = reference.turned(parts[i], config.rope_theta)
    q, k, v = parts
    rounds = [2 * (sizes[0] / 2 + 12) * U, 2 * (sizes[1] / 2 + 12) * U, 2 * U]

    def bound(i: int) -> np.ndarray:
        found: np.ndarray = rounds[i] * np.abs(parts[i]).max(-1, keepdims=True) + CUT[dtype] * np.abs(parts[i])
        return found + LEAST[dtype]

    near(torch.cat(queries), q, bound(0))
    keys, values, scales = read(case.kv, case.step.tables[0], count, dim)
    for i, (got, want) in enumerate(((keys, k), (values, v)), 1):
        scale = scales[..., i - 1 : i]
        near(got, want, bound(i) + (0.5 + 2.0**-12) * scale * (kv == "int8"))
        if kv == "int8":
            least = np.abs(want).max(-1, keepdims=True) / 127
            assert (np.abs(scale / least - 1 - 2.0**-8) <= 2.0**-8 + CUT[dtype] + rounds[i]).all()
    for t in range(3, count, 4):
        block = keys[t - 3 : t + 1]
        got = exact(case.summaries[case.step.tables[0, t // 8], :, t % 8 // 4])
        near(got[:, :dim], block.mean(0), 8 * U * np.abs(block).max(0))
        if variance:
            near(got[:, dim:], block.var(0), 32 * U * np.square(block).max(0))


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(1, 48, 13), (5, 88, 64), (18, 130, 30)])
def test_int8_is_whole_numbers_by_the_equations_to_the_bit(shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    x = normal(1, rows, inputs, dtype=torch.float32)
    x[0, :4] = x[0].max() * torch.tensor([1, -1, 0.5, 0.0])
    weight = torch.randint(-127, 128, (outputs, inputs), generator=torch.Generator().manual_seed(2)).to(torch.int8)
    scale = normal(3, outputs, 1, dtype=torch.float32).abs()
    want = reference.int8_product(x.numpy(), weight.numpy(), scale.numpy())
    np.testing.assert_array_equal(launch.int8_product(weight, scale)(x).numpy(), want)


# ---- attention


def attention(q: Any, k: Any, v: Any, reach: Reach, block: int, summary: Any) -> np.ndarray:
    """As `defined`."""
    found: np.ndarray = defined(*(torch.as_tensor(each) for each in (q, k, v)), reach, block, summary).numpy()
    return found


def defined(q: Tensor, k: Tensor, v: Tensor, reach: Reach, block: int, summary: Any) -> Tensor:
    """[B, T, H, d] by the definition, of a layer of this `reach`."""
    length = q.shape[1]
    # what chooses nothing has no second branch: a share of 0
    how: dict[str, Any] = {"block": block, "sinks": reach.sinks, "top_k": max(1, reach.top_k), "summary": summary}
    if reach.bias is not None:
        return reference_sparse(q, k, v, **how, window=reach.window, bias=reach.bias, dense_length=reach.dense)
    share: Any = 1.0 if reach.gamma is None else reach.gamma.double()
    window = length if reach.dense else reach.window
    return reference_attention(q, k, v, **how, window=window, local_weight=share)


def bounds(q: Any, k: Any, v: Any, reach: Reach, block: int, summary: Any, eight: bool, cuts: float) -> Any:
    """How far a kernel may be from `attention` [1, T, H, d], each number by itself.

    A score is off by d roundings of its products' sizes, and where int8 keys are rounded to bf16 by a third of `cuts` of these.
    All weights of a row then are, relatively, by the exponential of twice that. In fp32 are sums, and a softmax that is kept
    while its largest score rises; `cuts` is what is lost to bf16 in all. All of it times what weights make of the sizes of the
    values, which is the definition once more."""
    keys = np.abs(k).repeat(q.shape[2] // k.shape[2], axis=2)  # [1, n, H, d]
    sizes = np.einsum("bthd,bnhd->bthn", np.abs(q), keys) / math.sqrt(q.shape[-1])
    most = sizes.max(-1, keepdims=True) + (0 if reach.bias is None else float(reach.bias.abs().max()))
    off = most * ((q.shape[-1] + 6) * U + cuts / 3 * eight)
    lost = np.expm1(2 * off) + (k.shape[1] + 16) * U + cuts
    return lost * attention(q, k, np.abs(v), reach, block, summary) + 1e-30


def least(v: Any, dtype: torch.dtype) -> float:
    """What is lost of small weights, of which the largest is 1, and of a small result; and in int8 of small values."""
    return float(LEAST[dtype] * (2 + v.shape[1] * np.abs(v).max()))


HOW = {
    "H": Reach(10, 3, 1, torch.linspace(0.2, 0.8, 4)),
    "S": Reach(10, 3, 1, None, torch.linspace(-1, 2, 4)),
    "S, dense at first": Reach(10, 3, 1, None, torch.linspace(-1, 2, 4), 40),
    "L": Reach(10, 0, 0, None),
    "D": Reach(ALL, 0, 0, None, dense=ALL),
}
# of rows of 40 tokens; a query before the dense length reads all, and so would every one of these
WHOLE = HOW | {"S, dense at first": dataclasses.replace(HOW["S"], dense=14)}


def whole(case: Stored, request: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, slice]:
    """q, k and v [1, n, heads, d] of a request as they stand in memory, with zeros for queries that the slice does not name."""
    count, span = len(case.k[request]), slice(*case.step.starts[request : request + 2])
    asked = slice(count - (span.stop - span.start), count)
    q = np.zeros((count, *case.q.shape[1:]))
    q[asked] = exact(case.q[span])
    k, v, _ = read(case.kv, case.step.tables[request], count, q.shape[-1])
    return q[None], k[None], v[None], asked


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("kind", HOW)
@pytest.mark.parametrize("cut", [1, 2])
def test_attention_over_pages_is_the_definition(
    kind: str, eight: bool, dtype: torch.dtype, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of each kind, blocks scored by mean and variance; by one program a row, and in pieces. Rounded to bf16 are
    weights, values that were int8, and the result."""
    monkeypatch.setattr(launch, "_pieces", lambda programs, near, far: (cut, cut * (far > 0)))
    case = store(3, [50, 33, 1], [2, 1, 1], dtype=dtype, kv_dtype=torch.int8 if eight else None, variance=True)
    got = exact(attended(case, HOW[kind]))
    for r in range(3):
        *given, asked = whole(case, r)
        given += [HOW[kind], 4, "mean_var"]
        want, bound = attention(*given)[0, asked], bounds(*given, eight, (2 + eight) * CUT[dtype])[0, asked]
        bound += least(given[2], dtype)
        near(got[slice(*case.step.starts[r : r + 2])], want, bound)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("kind", WHOLE)
def test_attention_over_whole_rows_is_the_definition(kind: str, dtype: torch.dtype) -> None:
    """As of training, forward: two documents of a row. To bf16 are rounded weights, each branch, and what is made of both; with
    a gate also their difference, which may be far larger than its share of the result."""
    q, k, v = (normal(i, 1, 40, heads, 16, dtype=dtype) for i, heads in enumerate((4, 2, 2)))
    docs = torch.tensor([[0] * 11 + [1] * 29])
    reach = WHOLE[kind]
    spans = Spans.packed(docs, 4, reach.window, reach.dense if reach.bias is not None else 0)
    with torch.no_grad():
        got = exact(sparse.attend(q, k, v, spans, reach, True))
    for document in (slice(0, 11), slice(11, 40)):
        given = [exact(each[:, document]) for each in (q, k, v)]
        bound = bounds(*given, reach, 4, "mean_var", False, 3 * CUT[dtype]) + 3 * least(given[2], dtype)
        if reach.gamma is not None:
            one = [dataclasses.replace(reach, gamma=torch.full((4,), share)) for share in (0.0, 1.0)]
            bound += CUT[dtype] * sum(attention(*given[:2], np.abs(given[2]), each, 4, "mean_var") for each in one)
        near(got[:, document], attention(*given, reach, 4, "mean_var"), bound)
