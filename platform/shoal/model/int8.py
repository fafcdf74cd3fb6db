"""INT8 products behind one function, `pack`: every kernel gives the integers of `quant.int8_linear_reference`, and the same
fp32 result to the bit, so which one runs decides the speed and nothing else.

    numba      levels, product and scales in one call over the weight as it is stored (`cpu.integers`)
    fbgemm     torch's, with a packed copy of the weight; takes quantised dtypes, which are deprecated (pytorch #184982)
    onednn     torch's, with a packed copy; plain int8
    triton     levels in one launch, product and scales in another, for CUDA (`gpu.integers`)
    int_mm     `torch._int_mm`, for CUDA (on a CPU without VNNI tens of times slower than fp32)
    float      levels multiplied as floats, on any device

`trusted` tests a kernel on this machine before it is used. `choice` measures those that passed once for each shape, and
remembers. Weights alone in int8, with activations left in fp32, are no kernel here: those are other numbers (decision 0003).

Letters: M rows, I input width, O output width.
"""

from __future__ import annotations

import logging
import time
import warnings
from bisect import bisect_left
from collections.abc import Callable
from functools import cache
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ResourceError, first_line
from shoal.model.cpu import fused
from shoal.model.cpu.parts import Matrix
from shoal.model.gpu import launch
from shoal.model.quant import (
    TOP,
    WEIGHT_TOP,
    ZERO,
    fake_linear,
    int8_linear_reference,
    quantize_rows,
    token_levels,
    token_scale,
)

log = logging.getLogger(__name__)
Run = Callable[[Tensor], Tensor]  # x [M, I] fp32 -> [M, O] fp32
Build = Callable[[Tensor, Tensor], Run]  # int8 weight [O, I] and fp32 scale [O, 1] -> Run
MEASURED = (1, 8, 64)  # rows at which kernels are timed; each stands for up to as many, the last for more as well
WORTH = 0.8  # of the fastest's time so far: what a kernel with a packed copy of the weight must reach to displace one without
MOST_INPUTS = 2**31 // (ZERO * 2 * WEIGHT_TOP)  # beyond, a 32-bit sum could overflow
_EXACT = 2**24 // (ZERO * WEIGHT_TOP)  # inputs whose sums fp32 holds exactly


class Numba:
    """The numba kernel of one weight."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        step = _compiled().STEP
        padded = F.pad(weight, (0, -weight.shape[1] % step)) if weight.shape[1] % step else weight
        shift = (ZERO * weight.sum(1, dtype=torch.int32)).to(torch.int32)
        self.matrix = Matrix(padded, shift, scale.view(-1))
        self._arrays = [part.numpy() for part in self.matrix]

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty(len(x), len(self.matrix[0]))
        _compiled().linear(x.detach().contiguous().numpy(), *self._arrays, out.numpy())
        return out


class Kernels:
    """The product with one weight: by the kernel that `choice` found for each number of rows. A packed copy is made when it is
    first needed."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        self._weight, self._scale = weight, scale
        self.names = choice(weight.shape[1], weight.shape[0], weight.device, torch.get_num_threads())
        self._built: dict[str, Run] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_empty(0, len(self._weight))
        return self._run(self.names[_bucket(len(x))])(x)

    def matrix(self, rows: int) -> Matrix | None:
        """What `cpu.decode.layer` reads, where the numba kernel is the one for so many rows."""
        name = self.names[_bucket(rows)]
        run = self._run(name) if name == "numba" else None
        return run.matrix if isinstance(run, Numba) else None

    def _run(self, name: str) -> Run:
        if name not in self._built:
            self._built[name] = KERNELS[name](self._weight, self._scale)
        return self._built[name]


def pack(weight: Tensor, scale: Tensor) -> Kernels:
    """A function x [M, I] fp32 -> [M, O] fp32 for int8 `weight` [O, I] and `scale` [O, 1], by the fastest kernels for this
    shape that can be trusted here. Raises ResourceError where there is none."""
    return Kernels(weight.contiguous(), scale.float().contiguous())


@cache
def choice(inputs: int, outputs: int, device: torch.device, threads: int) -> tuple[str, ...]:
    """The name of the fastest kernel at each of `MEASURED`, measured here and now. Which one it is changes no result."""
    names = trusted(device)
    fast = [name for name in names if name != "float"] if inputs <= MOST_INPUTS else []
    if device.type == "cuda" and len(fast) == 1:
        fast = names  # beside one that it may refuse at this shape
    fast = fast or ["float"]
    if len(fast) == 1:
        return tuple(fast) * len(MEASURED)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-WEIGHT_TOP, WEIGHT_TOP + 1, (outputs, inputs), generator=generator, dtype=torch.int8)
    weight, scale = weight.to(device), torch.ones(outputs, 1, device=device)
    built = {name: KERNELS[name](weight, scale) for name in fast}
    return tuple(_fastest(built, torch.randn(rows, inputs, generator=generator).to(device)) for rows in MEASURED)


def _fastest(runs: dict[str, Run], x: Tensor) -> str:
    """Its name. One that this device refuses at this shape is left out from here on, unless none is left."""
    spent = dict.fromkeys(runs, float("inf"))
    # one thread's own time does not depend on who else runs; several, and a GPU, are waited for
    clock = time.thread_time if torch.get_num_threads() == 1 and not x.is_cuda else time.perf_counter
    with torch.inference_mode():
        for _ in range(4):  # in turns, the least of each: the first also touches memory
            for name, run in list(runs.items()):
                start = clock()
                try:
                    run(x)
                except Exception as error:
                    if not launch.refused(error) or len(runs) == 1:
                        raise
                    log.warning("INT8 products go on without the kernel %s: %s", name, first_line(error))
                    del runs[name], spent[name]
                    continue
                if x.is_cuda:
                    torch.cuda.synchronize()
                spent[name] = min(spent[name], clock() - start)
    best, *others = spent
    for name in others:
        if spent[name] < WORTH * spent[best]:
            best = name
    return best


def _bucket(rows: int) -> int:
    return min(bisect_left(MEASURED, rows), len(MEASURED) - 1)


@cache
def trusted(device: torch.device) -> list[str]:
    """The kernels that agree with the integer reference on this machine, a saturating input included; those first that are
    preferred where speed is alike. Raises ResourceError when none does: wrong arithmetic is never served."""
    passed, failed = [], []
    for name, build in KERNELS.items():
        if name in (_ON_CUDA if device.type == "cuda" else _ON_CPU):
            try:
                problem = self_test(build, device)
            except Exception as error:
                # what this machine or this build of torch lacks; Triton's errors have no class in common with torch's
                problem = first_line(error)
            if problem is None:
                passed.append(name)
            else:
                failed.append(f"{name}: {problem}")
    if not passed:
        raise ResourceError(
            "no INT8 kernel passes the self-test on this machine", got="; ".join(failed),
            do="serve with --precision auto, which then computes in fp32, or serve the fp32 model",
        )  # fmt: skip
    return passed


@torch.inference_mode()
def self_test(build: Build, device: torch.device | str = "cpu") -> str | None:
    """None when the kernel gives the integers of the reference and its fp32 results to the bit, and training's rounding does as
    well; else what differs."""
    generator = torch.Generator().manual_seed(0)
    # of many rows tiles are others
    for rows, inputs, outputs in ((1, 96, 64), (5, 256, 33), (3, 512, 48), (70, 160, 72)):
        exact = torch.randn(outputs, inputs, generator=generator)
        exact[0], exact[1] = 1.0, -1.0  # with the all-ones input below: the largest sums there are
        x = torch.randn(rows, inputs, generator=generator)
        x[0] = 1.0
        weight, scale = quantize_rows(exact)
        want = int8_linear_reference(x, weight, scale)
        got = build(weight.to(device), scale.to(device))(x.to(device)).cpu()
        trained = fake_linear(x.to(device), exact.to(device)).cpu()
        for what, found in (("", got), ("training: ", trained)):
            if not torch.equal(found, want):
                worst = ((found - want).abs() / want.abs().clamp(min=1.0)).max().item()
                return f"{what}relative error {worst:.1e} at {rows}x{inputs}x{outputs}"
    return None


def _fbgemm(weight: Tensor, scale: Tensor) -> Run:
    with warnings.catch_warnings():
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


def _onednn(weight: Tensor, scale: Tensor) -> Run:
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    scales, zeros = scale.view(-1), torch.zeros(len(weight), dtype=torch.long)

    def run(x: Tensor) -> Tensor:
        s = token_scale(x)
        levels = (token_levels(x, s) + ZERO).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out.mul_(s)

    return run


def _int_mm(weight: Tensor, scale: Tensor) -> Run:
    """CUDA's takes more than 16 rows, and multiples of 8 otherwise: what is lacking is filled with zeros. Where nothing is, the
    weight is read where it lies: torch pads by nothing into a copy, of which no size of an engine knows."""
    outputs, inputs = weight.shape
    padded = F.pad(weight, (0, -inputs % 8, 0, -outputs % 8)) if inputs % 8 or outputs % 8 else weight
    columns = padded.T
    scales = scale.view(-1)

    def run(x: Tensor) -> Tensor:
        s = token_scale(x)
        levels = F.pad(token_levels(x, s).to(torch.int8), (0, -inputs % 8, 0, max(-len(x) % 8, 24 - len(x))))
        return torch._int_mm(levels, columns)[: len(x), :outputs] * scales * s

    return run


def _float(weight: Tensor, scale: Tensor) -> Run:
    """Whole numbers this small are exact in fp32 and in TF32, and so are their sums over `_EXACT` inputs. The weight is widened
    for each product: the memory of INT8, but not a speed above fp32's."""

    def run(x: Tensor) -> Tensor:
        s = token_scale(x)
        pieces = zip(token_levels(x, s).split(_EXACT, 1), weight.split(_EXACT, 1), strict=True)
        first, *others = (F.linear(levels, part.to(x.dtype)).to(torch.int32) for levels, part in pieces)
        return sum(others, first) * scale.view(-1) * s

    return run


KERNELS: dict[str, Build] = {
    "numba": Numba,
    "fbgemm": _fbgemm,
    "onednn": _onednn,
    "triton": launch.int8_product,
    "int_mm": _int_mm,
    "float": _float,
}
_ON_CPU, _ON_CUDA = ("numba", "fbgemm", "onednn", "float"), ("triton", "int_mm", "float")


@cache
def _compiled() -> ModuleType:
    from shoal.model.cpu import integers  # needs numba

    return integers
