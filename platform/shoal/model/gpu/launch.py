"""A decoding step's operators in a few launches each, for CUDA: the torch side of the Triton kernels beside it.

`usable` says where they stand in for the torch operators: on a CUDA device, without gradients, with Triton installed (the
extra ``gpu``; torch for CUDA brings it). Everything works without them, and to the same results within rounding. No kernel was
run on a GPU yet: tests/triton runs them in Triton's interpreter, and compiles them for sm_80 and sm_90.

Letters: N rows (a token each), R requests, H query heads, Hk KV heads, G = H/Hk, d head dim, S block, P page, M units of a
table, K blocks read.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from shoal.errors import first_line
from shoal.model.cache import PagedStep
from shoal.model.cpu.parts import Form
from shoal.model.reach import Reach
from shoal.model.sending import sent

log = logging.getLogger(__name__)
ON = {"cuda"}  # devices; tests add the CPU, where Triton's interpreter runs
GIVEN_UP = set[torch.device]()  # in this process, by `give_up`
LEAST_CAPABILITY = (8, 0)
TYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
PROGRAMS = 264  # that fill a device: two for each of 132 multiprocessors; what a row reads is cut into as many pieces
BUSY = 128  # that keep it busy: from so many rows and KV heads on one reads all by itself, in one launch,
MOST_KEYS = 4096  # unless it may be more keys than these: beside short requests one program would read for long
LEAST_KEYS = 128  # of a piece: of each the sums of a group's heads must be joined
FEW_NUMBERS = 2**14  # of summaries that a piece of the chosen blocks scores itself: of more, a team (decision 0012)
ALONE_BLOCKS = 4096  # that a program scores which is a row's only one
JOINED = 2**13  # numbers of pieces that are joined at once: 64 registers of each of 128 threads
TILE = 64  # at most: keys of a step of the attention's loop, blocks that a program scores,
NUMBERS = 2**12  # and numbers of these
SCORED = 2**24  # scores that exist at once (fp32: 64 MB)
THIN = 4, 16, 512, 128  # of adapters: ranks of a program and of a step; inputs of a step, outputs of a program
MOST_BLOCKS = 2**14  # that one program chooses among
MOST_LAST = 2**31 - 1
LONG = 16  # rows of a request beyond which those that read all before them are left to torch, where queries share keys


def usable(x: Tensor) -> bool:
    """May the functions below be used on `x`?"""
    if x.device.type not in ON or torch.compiler.is_compiling():
        return False
    return x.dtype in TYPES and not torch.is_grad_enabled() and not is_in_torch_dispatch_mode() and able(x.device)


@cache
def installed() -> bool:
    """Is Triton there?"""
    return find_spec("triton") is not None


def able(device: torch.device) -> bool:
    """Can the kernels run on `device`? Tried once with a small one, as Triton may be there and its C compiler not, or a device
    older than those that they are compiled for in tests: the log says what is lacking, and torch's operators are used. So it
    is from then on where one that a model needs is refused (`give_up`); that is not kept with what was tried, as another
    thread may give up while this one still tries."""
    return _tried(device) and device not in GIVEN_UP


@cache
def _tried(device: torch.device) -> bool:
    if device.type != "cuda" or not installed():
        return installed()
    try:
        if torch.version.hip or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
            raise RuntimeError("they are for NVIDIA's devices from sm_80 on")
        with torch.no_grad():
            rms_norm(torch.ones(1, 16, device=device), torch.ones(16, device=device), 0.0)
    except Exception as error:  # Triton's errors have no class in common with torch's
        _told(device, error)
        return False
    return True


def refused(error: BaseException) -> bool:
    """Does it say that a kernel cannot be compiled, or asks for more than a device has (shared memory, registers)? Of what ends
    a device itself, or of its memory, it is not."""
    return type(error).__module__.partition(".")[0] == "triton" or "PassManager::run failed" in str(error)


def give_up(device: torch.device, error: Exception) -> None:
    """Go on without the kernels on `device` from now on, and say so once, where one was `refused`; raises any other `error`.
    Whoever calls it does again what it was at: nothing is stored but what is stored again."""
    if not refused(error):
        raise error
    if device not in GIVEN_UP:
        GIVEN_UP.add(device)
        _told(device, error)


def _told(device: torch.device, error: Exception) -> None:
    log.warning("decoding and training on %s go on without Triton's kernels: %s", device, first_line(error))


def fp(dtype: torch.dtype) -> torch.dtype:
    """What norms, rotation and softmax compute in for activations of `dtype`: fp32 or fp64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last axis."""
    from shoal.model.gpu import pointwise

    x = x.contiguous()
    out, width = torch.empty_like(x), x.shape[-1]
    if rows := x.numel() // width:
        pointwise._norm[(rows,)](
            x, x, weight, x, out, eps, D=width, WIDE=_power(width), ADDS=False, EXACT=_exact(x), num_warps=_warps(width)
        )
    return out


def add_norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + added, and its rms norm."""
    from shoal.model.gpu import pointwise

    x, added = x.contiguous(), added.contiguous()
    total, out, width = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    if rows := x.numel() // width:
        pointwise._norm[(rows,)](
            x, added, weight, total, out, eps,
            D=width, WIDE=_power(width), ADDS=True, EXACT=_exact(x), num_warps=_warps(width),
        )  # fmt: skip
    return total, out


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up, [..., F] for [..., 2F], gate first."""
    from shoal.model.gpu import pointwise

    inner = both.shape[-1] // 2
    both, tile = both.contiguous(), min(1024, _power(inner))
    out = both.new_empty(*both.shape[:-1], inner)
    if rows := out.numel() // inner:
        pointwise._swiglu[(rows, -(-inner // tile))](both, out, F=inner, TILE=tile, EXACT=_exact(both))
    return out


def project_and_store(
    qkv: Tensor,
    bias: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    form: Form,
    rope: tuple[Tensor, Tensor],
    kv: Tensor,
    summaries: Tensor,
    step: PagedStep,
) -> Tensor:
    """q [N, H, d] of `qkv` [N, (H + 2 Hk) d], normed and turned; k and v are written as `paged.write_kv` writes them, but that
    rows without a slot write nothing. `bias` and weights are as in `cpu.parts.Layer`."""
    from shoal.model.gpu import store

    dim, kv_heads, page = rope[0].shape[-1], kv.shape[1], kv.shape[2]
    heads = qkv.shape[-1] // dim - 2 * kv_heads
    q = qkv.new_empty(len(qkv), heads, dim)
    if not len(qkv):
        return q
    kind = store.NONE if not len(q_weight) else store.HEAD if len(q_weight) == dim else store.ALL
    wide, single = _power(dim), step.rows.longest <= 1 and not step.rows.apart
    strides = *kv.stride()[:3], *summaries.stride()[:3]
    shape = {
        "D": dim, "WIDE": wide, "P": page, "S": step.block, "TALL": _power(step.block),
        "VARIANCE": summaries.shape[-1] > dim, "INT8": kv.dtype == torch.int8,
    }  # fmt: skip
    tall = 1 if step.block * wide <= 1024 else 4
    store._store[(len(qkv), heads + 2 * kv_heads)](
        qkv.contiguous(), bias, q_weight, k_weight, rope[0].contiguous(), rope[1].contiguous(), step.slots, step.positions,
        q, kv, summaries, *strides, form.eps,
        **shape, HEADS=heads, KV_HEADS=kv_heads, HALF=form.half, BIASED=len(bias) > 0, NORM=kind, SINGLE=single,
        TOTAL=_power(dim * heads) if kind == store.ALL else wide, EXACT=_exact(qkv), num_warps=tall if single else 1,
    )  # fmt: skip
    if not single:
        store._summarise[(len(qkv), kv_heads)](
            kv, summaries, step.positions, step.slots, *strides, **shape, num_warps=tall
        )
    return q


def store(k: Tensor, v: Tensor, kv: Tensor, summaries: Tensor, step: PagedStep) -> None:
    """As `paged.write_kv` for k and v [N, Hk, d], but that rows without a slot write nothing, and nobody waits for which rows
    complete a block."""
    both = torch.cat([k, v], dim=1).flatten(1)
    none, rope = both.new_empty(0), both.new_empty(0, k.shape[-1])
    project_and_store(both, none, none, none, Form(0.0, 0, after=False), (rope, rope), kv, summaries, step)


def attends(step: PagedStep, reach: Reach) -> bool:
    """Is `attend` for the rows of `step` that are not `shared`? Not where one program would choose among too many blocks."""
    return not reach.chooses or step.tables.shape[1] * step.page // step.block <= MOST_BLOCKS


def shared(step: PagedStep, reach: Reach) -> list[tuple[int, int]]:
    """Requests of `step`, in order, of which more than `LONG` rows read all before them, and how many those are, its first:
    they are left to torch, where the queries of a request share its keys."""
    rows, keys = step.rows, step.tables.shape[1] * step.page
    before = keys if reach.way(keys, step.block) == "whole" else reach.dense  # where a row does
    if rows.longest <= LONG or not before:
        return []

    def found() -> list[tuple[int, int]]:
        early = ((r, min(count, before + count - 1 - rows.end(r))) for r, count in rows.of_at_least(LONG + 1))
        return [(r, count) for r, count in early if count > LONG]

    return rows.once(("shared", before), found)


def attend(q: Tensor, kv: Tensor, summaries: Tensor, step: PagedStep, reach: Reach) -> Tensor:
    """[N, H, d] for q [N, H, d] over pages, as `paged.paged_attention`, each row by its own position: kv [U, Hk, P, W],
    summaries [U, Hk, P/S, m]. Rows that are `shared` are not filled in."""
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    requests = step.rows.once("requests", lambda: _requests(step.starts, q.device))
    blocks = step.tables.shape[1] * step.page // step.block
    most = max(1, SCORED // (q.shape[1] * max(1, blocks))) if reach.chooses else max(1, len(q))
    for begin, end in _between([(step.starts[r], count) for r, count in shared(step, reach)], len(q)):
        for first in range(begin, end, most):
            some = slice(first, min(end, first + most))
            _attend(q[some], kv, summaries, step, reach, step.positions[some], requests[some], out[some])
    return out


def _between(spans: Sequence[tuple[int, int]], rows: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of rows of none of `spans`, which are in order: the first row of each, and how many it has."""
    at = 0
    for first, count in (*spans, (rows, 0)):
        if at < first:
            yield at, first
        at = first + count


def _attend(
    q: Tensor,
    kv: Tensor,
    summaries: Tensor,
    step: PagedStep,
    reach: Reach,
    positions: Tensor,
    requests: Tensor,
    out: Tensor,
) -> None:
    """Fill `out` for the rows `q` [N, H, d] at `positions` [N] of `requests` [N], in one launch."""
    from shoal.model.gpu import attention

    rows, heads, dim = q.shape
    kv_heads, keys, blocks = kv.shape[1], step.tables.shape[1] * kv.shape[2], step.tables.shape[1] * summaries.shape[2]
    top_k = reach.top_k if reach.chooses else 0
    window, dense = min(reach.window, MOST_LAST), min(reach.dense, MOST_LAST)
    near, far = _pieces(rows * kv_heads, min(keys, max(window, dense)), (top_k + 1) * step.block if top_k else 0)
    rated, gated = 0 < top_k < blocks, reach.gamma is not None and far > 0
    alone = near == 1 >= far and not (rated and blocks > ALONE_BLOCKS)
    shape, kind, crew = _shape(q, kv, summaries, step, reach), fp(q.dtype), 1
    shared = rated and not alone and blocks * summaries.shape[-1] > FEW_NUMBERS
    if shared:
        read = (top_k + 1) * step.block * kv.shape[3] * kv.element_size()
        scored = blocks * summaries.shape[3] * summaries.element_size()
        far, crew = _teams(rows * kv_heads, near, far, read / scored, -(-blocks // shape["TILE"]))
    z = q.new_empty((rows, heads, far, blocks) if rated else (1,), dtype=kind)
    chosen = torch.empty(rows, kv_heads, max(1, far), max(1, top_k), dtype=torch.int32, device=q.device)
    pieces, part, stats, arrived = near + far, q, q, q
    if not alone:
        part, stats = (q.new_empty(rows, heads, pieces, each, dtype=kind) for each in (dim, 2))
        count = 2 * len(step.positions) * kv_heads + PROGRAMS  # of each row and KV head, and of each of their teams
        arrived = step.rows.once("arrived", lambda: torch.zeros(count, dtype=torch.int32, device=q.device))
    group, most = _fit(shape["G"]), _blocks(blocks) if top_k else 16
    attention._attend[(rows, kv_heads, 1 if alone else near + far * crew)](
        q, kv, summaries, step.tables, positions, requests, z, chosen, reach.bias if shape["BEYOND"] else q,
        reach.gamma if gated else q, part, stats, arrived, out,
        step.tables.stride(0), *kv.stride()[:3], *summaries.stride()[:3], window, dense, blocks, near, pieces, crew,
        **shape, P=kv.shape[2], SINKS=reach.sinks, GATED=gated, INT8=kv.dtype == torch.int8, SHARED=shared, ALONE=alone,
        BLOCKS=most, FULL=_fit(top_k), GROUP=group, EACH=max(1, min(64, JOINED // (group * shape["WIDE"]))),
        PRECISION=_precision(q), num_warps=max(4, _warps(most)),
    )  # fmt: skip


def _shape(q: Tensor, kv: Tensor, summaries: Tensor, step: PagedStep, reach: Reach) -> dict[str, Any]:
    """The constants that attention's kernels have in common, for `q` [N, H, d]."""
    group, dim, exact = q.shape[1] // kv.shape[1], q.shape[2], _exact(q)
    return {
        "G": group, "HEADS": q.shape[1], "KV_HEADS": kv.shape[1], "D": dim, "WIDE": _power(dim), "PAGED": summaries.shape[2],
        "S": step.block, "K": reach.top_k if reach.chooses else 0, "BEYOND": reach.bias is not None,
        "VARIANCE": summaries.shape[-1] > dim, "ROWS": _fit(group) if exact else _power(group), "TILE": _tile(q),
        "SCALE": 1 / math.sqrt(dim), "EXACT": exact,
    }  # fmt: skip


def _blocks(blocks: int) -> int:
    """Room for the scores of so many blocks: one of four sizes, as each is a kernel that must be compiled first."""
    return next(size for size in (256, 1024, 4096, MOST_BLOCKS) if blocks <= size)


def add_thin(x: Tensor, a: Tensor, b: Tensor, bounds: Tensor, room: int, of: Tensor, out: Tensor) -> None:
    """Add to out [N, O] what adapters give for the rows x [N, I]: that of row n is of[n] [none: below 0], whose matrices are
    the rows from bounds[0, of[n]] up to bounds[1, of[n]], `room` at most, of a [R, I] and b [R, O]."""
    from shoal.model.gpu import thin

    rows, inputs = x.shape
    if not rows or not room:
        return
    x, (few, some, wide, tile) = x.contiguous(), THIN
    between = torch.empty(rows, room, dtype=fp(x.dtype), device=x.device)
    given, more, outputs, exact = (bounds, of), (room, bounds.shape[1]), out.shape[-1], _exact(x)
    thin._thin[(rows, -(-room // few))](x, a, *given, between, inputs, *more, RANKS=few, TILE=wide, EXACT=exact)
    thin._wide[(rows, -(-outputs // tile))](between, b, *given, out, outputs, *more, RANKS=some, TILE=tile, EXACT=exact)


def int8_product(weight: Tensor, scale: Tensor) -> Any:
    """A function x [M, I] fp32 -> [M, O] fp32 for int8 `weight` [O, I] and `scale` [O, 1] (`int8.Build`)."""
    from shoal.model.gpu import integers
    from shoal.model.quant import TOP, ZERO

    outputs, inputs = weight.shape
    weight, scales = weight.contiguous(), scale.view(-1)

    def run(x: Tensor) -> Tensor:
        rows, x = len(x), x.contiguous()
        levels = torch.empty(rows, inputs, dtype=torch.int8, device=x.device)
        of, out = x.new_empty(rows), x.new_empty(rows, outputs)
        integers._levels[(rows,)](
            x, levels, of, I=inputs, WIDE=_power(inputs), TOP=TOP, ZERO=ZERO, num_warps=_warps(inputs)
        )
        tall, columns = (16, 32) if rows <= 16 else (64, 64)
        integers._product[(-(-outputs // columns), -(-rows // tall))](
            levels, weight, of, scales, out, rows, outputs, I=inputs, ROWS=tall, COLUMNS=columns, DEEP=128
        )
        return out

    return run


def _pieces(programs: int, near: int, far: int) -> tuple[int, int]:
    """Into how many pieces the keys of window and chosen blocks are cut, for so many rows and KV heads: enough to fill a
    device, or none where these do."""
    if programs >= BUSY and near + far <= MOST_KEYS:
        return 1, int(far > 0)
    each = max(LEAST_KEYS, -(-(near + far) * programs // PROGRAMS))
    return max(1, near // each), max(1, far // each) if far else 0


def _teams(programs: int, near: int, far: int, share: float, tiles: int) -> tuple[int, int]:
    """Into how many pieces, `far` at most, the chosen blocks are cut where each has a team that scores for it; and how many
    programs are a team, one at least of the `tiles` each. `share`: bytes of the chosen keys for one of summaries.

    One of F teams of C programs scores by 1/C of the summaries, then reads 1/F of the keys alone. As F C programs fill what the
    window's leave of a device, both together are least where they are equal (decision 0012)."""
    room = max(1, PROGRAMS // programs - near)
    teams = max(1, min(far, room, round(math.sqrt(room * share))))
    return teams, max(1, min(room // teams, tiles))


def _requests(starts: list[int], device: torch.device) -> Tensor:
    """The request of each row, [N]."""
    if starts[-1] == len(starts) - 1:  # one row a request: nothing is copied to the device
        return torch.arange(starts[-1], dtype=torch.int32, device=device)
    counts = np.diff(starts)
    return sent(np.repeat(np.arange(len(counts), dtype=np.int32), counts), device)


def _tile(q: Tensor) -> int:
    """Keys, or blocks, of a step for q [..., d]: of a wide head fewer, as several tiles of them lie in shared memory at once,
    of which the smallest device has 99 KB."""
    return max(16, min(TILE, NUMBERS // _power(q.shape[-1])))


def _precision(x: Tensor) -> str:
    if not x.is_cuda:
        return "wide"
    return "tf32" if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _exact(x: Tensor) -> bool:
    return x.dtype == torch.float64


def _power(size: int) -> int:
    """As `_fit`, and 16 at least: no side of a product is shorter."""
    return max(16, _fit(size))


def _fit(size: int) -> int:
    """The power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def _warps(size: int) -> int:
    """Warps for a program that holds so many numbers."""
    return min(16, max(1, _power(size) // 512))
