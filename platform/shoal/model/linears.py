"""The weights of the network, each with the product that it is for: in fp32, with the rounding of INT8 while training, and in
INT8. Names of tensors are those of compressed-tensors (`weight`, `weight_scale`).

Letters: M rows (tokens), I input width, O output width, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.model import int8
from shoal.model.cpu import fused, memory
from shoal.model.cpu.parts import Matrix
from shoal.model.quant import fake_linear, fake_weight, quantize_rows

LEAST_PACKED = 2**17  # weights
BATCH = 16  # rows that a packed copy is for


class Weight(nn.Module):
    """An [O, I] weight and the product with it. With `fake` on, both sides are rounded as INT8 will round them; once
    packed by `prepack_`, inference reads a copy laid out for the CPU's kernel."""

    fake = False

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self._packed: Tensor | None = None
        # which weight, in which version: one that has changed since is not served stale
        self._packed_from: tuple[int, int]

    def product(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if self.fake:
            return fake_linear(x, self.weight)
        if fused.few(x.numel() // x.shape[-1]) and fused.usable(x):
            return fused.product(x, self.weight)
        if self._packed is not None and not torch.is_grad_enabled() and self._packed_from == self._state():
            out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, None, "none", [], "")
            return out
        return F.linear(x, self.weight)

    def product_in_fp32(self, x: Tensor) -> Tensor:
        """`product`, for logits: on a GPU the sums of a model in bf16 are not rounded to 8 bits, in training neither."""
        cast = torch.is_autocast_enabled(x.device.type)
        kind = torch.get_autocast_dtype(x.device.type) if cast else x.dtype
        if self.fake or not x.is_cuda or kind not in (torch.bfloat16, torch.float16):
            return self.product(x)
        found: Tensor = _Fp32Product.apply(x.reshape(-1, x.shape[-1]).to(kind), self.weight.to(kind))  # type: ignore[no-untyped-call]
        return found.view(*x.shape[:-1], -1)

    def matrix(self, rows: int, dtype: torch.dtype) -> Matrix | None:
        """What `cpu.decode.layer` reads for `rows` rows in `dtype`; None where a call of its own computes the product
        faster."""
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]  # `self.weight` takes a search: 0.6 us
        return Matrix(weight, *fused.PLAIN) if not self.fake and fused.few(rows) and weight.dtype == dtype else None

    @torch.no_grad()
    def prepack(self) -> None:
        """Lay the weight out for oneDNN, which takes its memory a second time."""
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach())
        memory.prefer_large(torch.ops.mkldnn.data_ptr(self._packed), torch.ops.mkldnn._nbytes(self._packed))
        self._packed_from = self._state()

    def _state(self) -> tuple[int, int]:
        return self.weight.data_ptr(), _version(self.weight)


class _Fp32Product(torch.autograd.Function):
    """x [M, I] times the transpose of weight [O, I], summed and left in fp32; gradients are products in the dtype of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        given = gradients[0].to(x.dtype)
        return given @ weight, given.T @ x


class Linear(Weight):
    """x [..., I] -> [..., O], no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Int8Linear(nn.Module):
    """The serving form of `Linear`: int8 weight [O, I] and fp32 weight_scale [O, 1]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight: Tensor
        self.weight_scale: Tensor
        self.register_buffer("weight", torch.zeros(outputs, inputs, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.ones(outputs, 1))
        self._kernels: int8.Kernels | None = None
        # which weight and scale, in which versions: kernels keep what follows from them
        self._made_for: tuple[int, int, int, int]

    @property
    def kernels(self) -> int8.Kernels:
        """What computes the product, chosen at the first use."""
        weight, scale = self._buffers["weight"], self._buffers["weight_scale"]  # `self.weight` takes a search: 0.6 us
        assert weight is not None and scale is not None
        now = weight.data_ptr(), _version(weight), scale.data_ptr(), _version(scale)
        if self._kernels is None or self._made_for != now:
            self._kernels, self._made_for = int8.pack(weight, scale), now
        return self._kernels

    def matrix(self, rows: int, dtype: torch.dtype) -> Matrix | None:
        """As `Weight.matrix`."""
        return self.kernels.matrix(rows) if dtype == torch.float32 else None

    def product(self, x: Tensor) -> Tensor:
        """x [..., I] -> [..., O]."""
        if x.dim() == 2 and x.dtype == torch.float32:  # decoding: four operators less
            return self.kernels(x)
        flat = x.reshape(-1, x.shape[-1]).float()
        return self.kernels(flat).view(*x.shape[:-1], -1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x)


class Held:
    """All tensors of `module`, to be asked whether they are those of before."""

    def __init__(self, module: nn.Module) -> None:
        self._module = [module]  # in a list, or it would be a part of who holds this
        self._places: list[tuple[Mapping[str, Tensor | None], str]] = []
        self._rounded: list[Weight] = []

    def state(self) -> list[object]:
        """Where they lie, in which version, and which weights are rounded as in training."""
        if not self._places:
            parts = list(self._module[0].modules())
            stores = [store for part in parts for store in (part._parameters, part._buffers)]
            self._places = [(store, name) for store in stores for name, tensor in store.items() if tensor is not None]
            self._rounded = [part for part in parts if isinstance(part, Weight)]
        tensors: list[Any] = [store[name] for store, name in self._places]
        # without `_version`: a call for each of 250 tensors is 30 us a step
        found: list[object] = [(each.data_ptr(), 0 if each.is_inference() else each._version) for each in tensors]
        return found + [weight.fake for weight in self._rounded]


def _version(tensor: Tensor) -> int:
    """How often it was changed in place; what was made in inference mode does not count that."""
    return 0 if tensor.is_inference() else tensor._version


class Embedding(Weight):
    """The token table [V, D], tied: rows in (`forward`), logits out (`logits`)."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, fake_weight(self.weight) if self.fake else self.weight)

    def rows(self, tokens: Sequence[int]) -> np.ndarray:
        """[N, D], what `forward` gives on a CPU for a few tokens, in a tenth of the time."""
        weight = self.weight.detach().numpy()
        return weight[tokens] if not self.fake else self(torch.tensor(tokens)).detach().numpy()

    def logits(self, h: Tensor) -> Tensor:
        return self.product_in_fp32(h)


class Int8Embedding(Int8Linear):
    """The serving form of `Embedding`: int8 per row, used both ways."""

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__(width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[tokens].float() * self.weight_scale[tokens]

    def rows(self, tokens: Sequence[int]) -> np.ndarray:
        """As `Embedding.rows`."""
        weight, scale = self.weight.numpy(), self.weight_scale.numpy()
        found: np.ndarray = weight[tokens].astype(np.float32) * scale[tokens]
        return found

    def logits(self, h: Tensor) -> Tensor:
        return self.product(h)


def fake_quantize_(net: nn.Module, on: bool = True) -> None:
    """Switch every `Linear` and `Embedding` of `net` to (or from) fake-quantised arithmetic, in place."""
    for module in net.modules():
        if isinstance(module, Weight):
            module.fake = on


def prepack_(net: nn.Module) -> None:
    """Make the weights of `net` ready for decoding, so that no request has to wait: on large pages; in INT8 with their kernels
    tested and chosen; in fp32 packed for oneDNN where several threads read them (one thread does without a copy, by
    `fused.product`); below `LEAST_PACKED` weights the operator's own 8 us cost more than it saves. Raises ResourceError where
    no INT8 kernel can be trusted."""
    memory.gather_(module.weight for module in net.modules() if isinstance(module, (Weight, Int8Linear)))
    packs = torch.backends.mkldnn.is_available() and not fused.few(BATCH)
    for module in net.modules():
        if isinstance(module, Int8Linear):
            _ = module.kernels
        elif isinstance(module, Weight):
            w = module.weight
            if packs and w.device.type == "cpu" and w.dtype == torch.float32 and w.numel() >= LEAST_PACKED:
                module.prepack()


def export_int8(net: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state of the INT8 twin of `net`: int8 weights with fp32 scales where `net` has a `Weight`, every other tensor as it
    is. `state`: other values for it, whose head may be its own where that of `net` is tied. Raises CheckpointError naming a
    weight that is not finite."""
    return dict(as_int8(net, (net.state_dict() if state is None else state).items()))


def as_int8(net: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """As `export_int8`, of tensors that come one after the other, none of which is held: each in its place, and the scales,
    which are small, in the end."""
    names = dict.fromkeys([name for name, module in net.named_modules() if isinstance(module, Weight)] + ["output"])
    scales: dict[str, Tensor] = {}
    for name, tensor in tensors:
        made, (module, _, what) = tensor.detach(), name.rpartition(".")
        if what == "weight" and module in names:
            made, scales[module] = quantize_rows(made, name)
        yield name, made
    yield from ((f"{name}.weight_scale", scales[name]) for name in names if name in scales)
