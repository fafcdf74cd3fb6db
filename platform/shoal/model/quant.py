"""INT8: one quantiser, whose fake-quantised training form equals the serving kernel bitwise at the integer level.

    weights      symmetric, one scale an output row:   s_w = amax/127,  w_q = round(w/s_w)
    activations  dynamic, one scale a token, 7 bits:   s_x = amax/63,   x_q = round(x/s_x + 64) - 64
    result       (sum x_q w_q) s_w s_x

Why 7 bits: on CPUs without VNNI the int16 accumulator of the AVX2 kernel saturates with 8-bit activations (up to 7.7 %
error measured); 127 * 128 * 2 < 32767 cannot. Why the 64 inside the rounding: the kernel adds the zero point before it
rounds, and round(x + 64) - 64 differs from round(x) at ties. Why a scale a token: a row's result must not depend on its
batch mates.

Letters: M rows (tokens), I input width, O output width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.errors import CheckpointError, ResourceError
from shoal.model import fused, memory

ZERO = 64  # zero point of the unsigned 7-bit activations
TOP = 63  # largest activation level
WEIGHT_TOP = 127
LEAST_PACKED = 2**17  # weights


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [O, I] and fp32 scales [O, 1] of a weight [O, I]. Raises CheckpointError when it is not finite."""
    w = w.float()
    if not torch.isfinite(w).all():
        raise CheckpointError("weight to quantise is not finite", do="retrain, or load an earlier checkpoint")
    scale = (w.abs().amax(-1, keepdim=True) / WEIGHT_TOP).clamp(min=1e-12)
    return torch.round(w / scale).clamp(-WEIGHT_TOP, WEIGHT_TOP).to(torch.int8), scale


def token_scale(x: Tensor) -> Tensor:
    """Activation scale a token, [..., 1]; above 0 for a row of zeros as well."""
    return x.abs().amax(-1, keepdim=True).div_(TOP).clamp_(min=torch.finfo(x.dtype).tiny)


def token_levels(x: Tensor, scale: Tensor) -> Tensor:
    """Activation levels -64..63 as floats, rounded exactly as the kernel rounds."""
    return (torch.round(x / scale + ZERO) - ZERO).clamp(-ZERO, TOP)


def int8_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """The result by 64-bit integers, [..., O]: the definition that the kernels are held against."""
    s = token_scale(x)
    total = token_levels(x, s).long() @ weight.long().T
    return total.to(torch.float32) * scale.view(-1) * s


def fake_weight(w: Tensor) -> Tensor:
    """`w` [O, I] as the INT8 model will hold it, with a straight-through gradient."""
    scale = (w.detach().abs().amax(-1, keepdim=True) / WEIGHT_TOP).clamp(min=1e-12)
    return w + (torch.round(w.detach() / scale) * scale - w.detach())


def fake_activation(x: Tensor) -> Tensor:
    """`x` [..., I] as the INT8 kernel will see it, with a straight-through gradient."""
    d = x.detach()
    scale = token_scale(d)
    return x + (token_levels(d, scale) * scale - d)


class Weight(nn.Module):
    """An [O, I] weight and the product with it. With `fake` on, both sides are rounded as INT8 will round them; once
    packed by `prepack_`, inference reads a copy laid out for the CPU's kernel."""

    fake = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self._packed: Tensor | None = None
        self._packed_from = (-1, -1)  # which weight, in which version: one that has changed since is not served stale

    def product(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.fake:
            return F.linear(fake_activation(x), fake_weight(self.weight))
        if fused.few(x):
            return fused.product(x, self.weight)
        if self._packed is not None and not torch.is_grad_enabled() and self._packed_from == self._state():
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
            return out
        return F.linear(x, self.weight)

    def matrix(self) -> fused.Matrix | None:
        """What `fused.layer` reads; None where the product is another one."""
        return None if self.fake else (self.weight, None)

    @torch.no_grad()
    def prepack(self) -> None:
        """Lay the weight out for oneDNN. The memory of the weight is needed twice then."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        memory.prefer_large(torch.ops.mkldnn.data_ptr(self._packed), torch.ops.mkldnn._nbytes(self._packed))
        self._packed_from = self._state()

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), self.weight._version


class Linear(Weight):
    """x [..., I] -> [..., O], no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Int8Linear(nn.Module):
    """The serving form of `Linear`: int8 weight [O, I] and fp32 weight_scale [O, 1] (compressed-tensors names)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.weight_scale: Tensor
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(outputs, 1))
        self._kernel: Callable[[Tensor], Tensor] | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        self._kernel = None  # moved: what was packed for the old place is of no use in the new one
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def matrix(self) -> fused.Matrix | None:
        """What `fused.layer` reads."""
        return self.weight, self.weight_scale

    def forward(self, x: Tensor) -> Tensor:
        if fused.few(x) and x.dtype == torch.float32:
            return fused.product(x, self.weight, self.weight_scale)
        if self._kernel is None:  # packed once, at the first use
            self._kernel = pack(self.weight, self.weight_scale)
        if x.dim() == 2 and x.dtype == torch.float32:  # decoding: four operators less, a quarter of the call at M = 1
            return self._kernel(x)
        flat = x.reshape(-1, x.shape[-1]).float()
        return self._kernel(flat).view(*x.shape[:-1], -1).to(x.dtype)


class Embedding(Weight):
    """The token table [V, D], tied: rows in (`forward`), logits out (`logits`)."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, fake_weight(self.weight) if self.fake else self.weight)

    def logits(self, h: Tensor) -> Tensor:
        return self.product(h)


class Int8Embedding(Int8Linear):
    """The serving form of `Embedding`: int8 per row, used both ways."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].float() * self.weight_scale[tokens]

    def logits(self, h: Tensor) -> Tensor:
        return super().forward(h)


def fake_quantize_(net: nn.Module, on: bool = True) -> None:
    """Switch every `Linear` and `Embedding` of `net` to (or from) fake-quantised arithmetic, in place."""
    for module in net.modules():
        if isinstance(module, Weight):
            module.fake = on


def prepack_(net: nn.Module) -> None:
    """Make the weights of `net` ready for decoding: on large pages, and packed in fp32 where that pays on a CPU: one thread,
    d 768 -> 4096, is 2.2 times faster at M = 1 and 3.4 at M = 4; below `LEAST_PACKED` weights the operator's own 8 us cost
    more than it saves."""
    memory.gather_(module.weight for module in net.modules() if isinstance(module, (Weight, Int8Linear)))
    if not torch.backends.mkldnn.is_available():
        return
    for module in net.modules():
        if isinstance(module, Weight):
            w = module.weight
            if w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= LEAST_PACKED:
                module.prepack()


def export_int8(net: nn.Module) -> dict[str, Tensor]:
    """The state of the INT8 twin of `net`: int8 weights with fp32 scales where `net` has a `Weight`, every
    other tensor as it is."""
    state = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    for name, module in net.named_modules():
        if isinstance(module, Weight):
            weight, scale = quantize_rows(state[f"{name}.weight"])
            state[f"{name}.weight"], state[f"{name}.weight_scale"] = weight, scale
    return state


def pack(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """A function x [M, I] fp32 -> [M, O] fp32 for int8 `weight` [O, I] and `scale` [O, 1], by this machine's kernel, or on a
    GPU by `_float`."""
    name = kernel_name() if weight.device.type == "cpu" else "float"
    return _KERNELS[name](weight.contiguous(), scale.contiguous())


@cache
def kernel_name() -> str:
    """The first kernel that agrees with the integer reference on this machine, a saturating input included.

    Raises ResourceError when none does: wrong arithmetic is never served.
    """
    tried = []
    for name, build in _KERNELS.items():
        try:
            problem = self_test(build)
        except (RuntimeError, AttributeError) as error:  # an operator that this build of torch lacks
            problem = str(error).splitlines()[0]
        if problem is None:
            return name
        tried.append(f"{name}: {problem}")
    raise ResourceError("no INT8 kernel passes the self-test here", got="; ".join(tried), do="serve the fp32 model")


def self_test(build: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]) -> str | None:
    """None when the kernel equals the integer reference to fp32 rounding, else what differs."""
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 96, 64), (5, 256, 33), (3, 512, 48)):
        weight = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
        weight[0] = WEIGHT_TOP  # with the all-ones input below: the largest sums there are
        scale = torch.rand(outputs, 1, generator=generator) + 0.01
        x = torch.randn(rows, inputs, generator=generator)
        x[0] = 1.0
        got, want = build(weight, scale)(x), int8_linear_reference(x, weight, scale)
        worst = ((got - want).abs() / want.abs().clamp(min=1.0)).max().item()
        if worst > 1e-5:
            return f"relative error {worst:.1e} at {rows}x{inputs}x{outputs}"
    return None


def _fbgemm(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():  # quantised dtypes are deprecated (pytorch #184982); onednn below does without
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(weight), dtype=torch.long)
        quantized = torch._make_per_channel_quantized_tensor(weight, scale.view(-1).double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantized, None)

    def run(x: Tensor) -> Tensor:
        if fused.usable(x):
            unit, s = fused.scale_rows(x, TOP)
        else:
            s = token_scale(x)
            unit = x / s
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(unit, 1.0, ZERO, packed)
        return out.mul_(s)

    return run


def _onednn(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zeros = scale.view(-1), torch.zeros(len(weight), dtype=torch.long)

    def run(x: Tensor) -> Tensor:
        s = token_scale(x)
        levels = (token_levels(x, s) + ZERO).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out * s

    return run


def _float(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    """Levels and weights multiplied as floats, on any device: whole numbers this small are exact in fp32 and in TF32, and so
    are their sums up to 2^24. The weight is widened for each product: the memory of INT8, but not a speed above fp32's."""

    def run(x: Tensor) -> Tensor:
        s = token_scale(x)
        return F.linear(token_levels(x, s), weight.to(x.dtype)) * scale.view(-1) * s

    return run


def _reference(weight: Tensor, scale: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: int8_linear_reference(x, weight, scale)


_KERNELS: dict[str, Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]] = {
    "fbgemm": _fbgemm,
    "onednn": _onednn,
    "float": _float,
    "reference": _reference,
}
