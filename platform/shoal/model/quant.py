"""INT8: one quantiser, whose fake-quantised training form equals the serving kernel bitwise at the integer level.

    weights      symmetric, one scale an output row:   s_w = amax/127,  w_q = round(w/s_w)
    activations  dynamic, one scale a token, 7 bits:   s_x = amax/63,   x_q = round(x/s_x + 64) - 64
    result       (sum x_q w_q) s_w s_x

Why 7 bits: on CPUs without VNNI the int16 accumulator of the AVX2 kernel saturates with 8-bit activations (up to 7.7 %
error measured); 127 * 128 * 2 < 32767 cannot. Why the 64 inside the rounding: the kernel adds the zero point before it
rounds, and round(x + 64) - 64 differs from round(x) at ties. Why a scale a token: a row's result must not depend on its
batch mates. A change of any of this is a new `described.INT8_SCHEME`.

Letters: M rows (tokens), I input width, O output width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import CheckpointError

ZERO = 64  # zero point of the unsigned 7-bit activations
TOP = 63  # largest activation level
WEIGHT_TOP = 127


def quantize_rows(w: Tensor, name: str = "weight") -> tuple[Tensor, Tensor]:
    """int8 [O, I] and fp32 scales [O, 1] of a weight [O, I]. Raises CheckpointError with its `name` when it is not finite."""
    w = w.float()
    rows = (~torch.isfinite(w).all(-1)).nonzero().flatten().tolist()
    if rows:
        raise CheckpointError(
            f"{name} is not finite", got=f"{len(rows)} rows, the first {rows[0]}",
            do="retrain, or quantise an earlier checkpoint",
        )  # fmt: skip
    scale = row_scale(w)
    return torch.round(_quotient(w, scale)).clamp(-WEIGHT_TOP, WEIGHT_TOP).to(torch.int8), scale


def row_scale(w: Tensor) -> Tensor:
    """Weight scale an output row, [O, 1]; above 0 for a row of zeros as well."""
    return _quotient(w.abs().amax(-1, keepdim=True), WEIGHT_TOP).clamp(min=1e-12)


def token_scale(x: Tensor) -> Tensor:
    """Activation scale a token, [..., 1]; above 0 for a row of zeros as well."""
    return _quotient(x.abs().amax(-1, keepdim=True), TOP).clamp_(min=torch.finfo(x.dtype).tiny)


def _quotient(x: Tensor, by: Tensor | int) -> Tensor:
    """x / by as IEEE says, which every device must find. On a GPU a number is a tensor there: by one of the host torch does not
    divide, but multiplies with its reciprocal, and most of a 63rd are then off by a bit."""
    compiled = torch.compiler.is_compiling()
    if isinstance(by, int) and (x.is_cuda or compiled):
        by = torch.full((), by, dtype=x.dtype, device=x.device)
    if compiled:
        found: Tensor = torch.ops.shoal.quotient(x, by)
        return found
    return x / by


@torch.library.custom_op("shoal::quotient", mutates_args=())
def _alone(x: Tensor, by: Tensor) -> Tensor:
    """x / by, an operator that torch.compile leaves as it is. What it compiles for a GPU multiplies with the reciprocals of
    constants, and Triton's `/` is two bits off."""
    return x / by


@_alone.register_fake
def _like_x(x: Tensor, by: Tensor) -> Tensor:
    return torch.empty_like(x)


def token_levels(x: Tensor, scale: Tensor) -> Tensor:
    """Activation levels -64..63 as floats, rounded exactly as the kernel rounds."""
    return (torch.round(_quotient(x, scale) + ZERO) - ZERO).clamp(-ZERO, TOP)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The result by 64-bit integers, [..., O]: the definition that the kernels are held against."""
    s = token_scale(x)
    total = token_levels(x, s).long() @ weight.long().T
    return total.to(torch.float32) * scale.view(-1) * s


def fake_weight(w: Tensor) -> Tensor:
    """`w` [O, I] as the INT8 model will hold it, with a straight-through gradient: nothing lies beyond the largest level, so
    nothing is clamped."""
    return _Straight.apply(w, _dequantized(w.detach()))  # type: ignore[no-untyped-call]


def fake_linear(x: Tensor, w: Tensor) -> Tensor:
    """x [..., I] -> [..., O] in the arithmetic of the kernels: `int8_linear_reference` to the bit while sums stay below 2^24,
    whatever the order in which they are taken, since whole numbers are added. Gradients are those of the product of the rounded
    values, passed straight through the rounding."""
    return _Int8Product.apply(x, w)  # type: ignore[no-untyped-call]


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exact: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Int8Product(torch.autograd.Function):
    """Kept for backward: levels in int8, a quarter of what the rounded activations would take, and the weight itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # rounded in fp32, as in serving
            exact = x.to(torch.promote_types(x.dtype, torch.float32))
            x_scale, w_scale = token_scale(exact), row_scale(w)
            levels = token_levels(exact, x_scale)
            ctx.save_for_backward(levels.to(torch.int8), x_scale, w)
            return (F.linear(levels, torch.round(_quotient(w, w_scale))) * w_scale.view(-1) * x_scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        levels, x_scale, w = ctx.saved_tensors
        (g,) = gradients
        rounded = (levels * x_scale).to(g.dtype)
        return g @ _dequantized(w).to(g.dtype), (g.flatten(0, -2).T @ rounded.flatten(0, -2)).to(w.dtype)


def _dequantized(w: Tensor) -> Tensor:
    scale = row_scale(w)
    return torch.round(_quotient(w, scale)) * scale
