"""A GPU where there is none: tensors that say that they lie on `cuda:0`, hold their values in memory, and refuse to meet one
that does not. So whole programs can be run, values read and all, to see that nothing mixes devices.

torch's own `FakeTensorMode` does the same without values: an engine, which reads what it draws, ends there at its first token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.model import sending
from tests.trees import tree_leaves, tree_map

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
_aten = torch.ops.aten
COPIES = {_aten.copy_.default, _aten._to_copy.default}  # from one device to another
PLACES = {_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default}  # CUDA takes them from the CPU
WAITS = {_aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}  # for how many there are, or whether
DIVISIONS = {_aten.div.Tensor: _aten.mul.Tensor, _aten.div_.Tensor: _aten.mul_.Tensor}
PRODUCTS = {
    getattr(_aten, name).default for name in ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear")
}  # fmt: skip
READS = {Tensor.tolist, Tensor.item, Tensor.__int__, Tensor.__float__, Tensor.__bool__, Tensor.__index__}


precision: list[str] = []  # of products in fp32, as the process was told last (`torch.set_float32_matmul_precision`)
# what the host waited for, in order: values that it read, copies to its memory, and from any that is not pinned
waited: list[str] = []
# pinned memory that may still be copied from, and what it held when it was sent
copying: list[tuple[Tensor, np.ndarray]] = []
launched: list[str] = []  # operators that compute there, or copy
NO_LAUNCH = {
    "empty", "empty_like", "new_empty", "view", "slice", "select", "expand", "transpose", "permute", "alias", "unbind", "split",
    "detach", "t", "squeeze", "unsqueeze", "as_strided", "_unsafe_view", "lift_fresh", "_reshape_alias",
}  # fmt: skip


class OnGpu(Tensor):
    """`held` [any shape], said to lie on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )
        made.held = held
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READS:
            wait(function.__name__)
            return function(args[0].held)
        if function in (Tensor.__getitem__, Tensor.__setitem__) and any(map(_of_the_host, _parts(args[1]))):
            wait("an index from the host")
        if function is Tensor.__setitem__:
            args[0].held[_held(args[1])] = _held(args[2])
            return None
        if function is Tensor.copy_ and isinstance(args[0], OnGpu) and not isinstance(args[1], OnGpu):
            _send(args[1], True in args[2:] or bool((kwargs or {}).get("non_blocking")))
            args[0].held.copy_(args[1])
            return args[0]
        try:
            with torch._C.DisableTorchFunctionSubclass():  # what comes back is what `_run` gives, not made one of these
                return function(*args, **(kwargs or {}))
        except RuntimeError as error:  # some, such as indexing, ask for the device itself before torch asks `_run`
            if "not linked with support for cuda" not in str(error):
                raise
            return tree_map(
                lambda x: OnGpu(x) if isinstance(x, Tensor) else x, function(*_held(args), **_held(kwargs or {}))
            )

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def wait(what: str) -> None:
    """The host waits. Raises AssertionError where memory was written that was copied from until then. What only operators of
    torch wait for, where there are no kernels, is not trusted to have ended a copy."""
    waited.append(what)
    if "nonzero" in what:
        return
    found, copying[:] = list(copying), []
    assert all(np.array_equal(source.numpy(), was) for source, was in found), (
        "memory of the host was written while it was copied"
    )


def _parts(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _of_the_host(index: Any) -> bool:
    """Are these places that must be copied to the device first?"""
    return isinstance(index, (list, np.ndarray)) or (
        isinstance(index, Tensor) and index.dim() > 0 and not isinstance(index, OnGpu)
    )


def _send(source: Tensor, non_blocking: bool) -> None:
    """Memory of the host is copied to the device."""
    if non_blocking and getattr(source, "pinned", False):
        copying.append((source, source.numpy().copy()))
    else:
        wait("from the host")


def _pinned(values: Tensor) -> Tensor:
    found = values.clone()
    found.pinned = True  # type: ignore[attr-defined]
    return found


def _held(values: Any) -> Any:
    return tree_map(lambda x: x.held if isinstance(x, OnGpu) else x, values)


def _run(function: Any, args: Any, kwargs: Any) -> Any:
    """What `function` gives, on the device where CUDA would leave it. Raises RuntimeError where CUDA would."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, OnGpu)}
    if there and function not in COPIES | PLACES and any(t.dim() and not isinstance(t, OnGpu) for t in tensors):
        raise RuntimeError(f"{function}: expected all tensors to be on the same device, found cuda:0 and cpu")
    asked = kwargs.get("device")
    if asked is not None:
        kwargs = {**kwargs, "device": CPU}
    if function is _aten.copy_.default:
        moved = isinstance(args[0], OnGpu)
    else:
        moved = torch.device(asked).type == "cuda" if asked is not None else bool(there)
    source = args[1] if function is _aten.copy_.default else args[0] if args else None
    if function in WAITS or (function in COPIES and not moved and isinstance(source, OnGpu)):
        wait(str(function))
    if function in COPIES and moved and isinstance(source, Tensor) and not isinstance(source, OnGpu):
        named = dict(zip((each.name for each in function._schema.arguments), args, strict=False)) | kwargs
        _send(source, bool(named.get("non_blocking")))
    name = function.name().removeprefix("aten::")
    if (there or moved) and name.partition(".")[0] not in NO_LAUNCH:
        launched.append(name)
    if function in DIVISIONS and isinstance(args[0], OnGpu) and not isinstance(args[1], OnGpu):
        # by a number of the host: a GPU multiplies with its reciprocal (aten/src/ATen/native/cuda/BinaryDivTrueKernel.cu)
        kind = torch.promote_types(args[0].dtype, torch.float32)
        function, args = DIVISIONS[function], (args[0], 1 / torch.as_tensor(args[1], dtype=kind))
    args, kwargs = _held((args, kwargs))
    if function in PRODUCTS and moved and precision[-1:] == ["high"]:
        args = tree_map(_tf32, args)
    if function is _aten.mm.dtype:  # there is none on a CPU
        function, args = _aten.mm.default, tuple(x.to(args[2]) for x in args[:2])

    def placed(x: Any) -> Any:
        if not (isinstance(x, Tensor) and moved):
            return x
        return there[id(x)] if id(x) in there else OnGpu(x)

    return tree_map(placed, function(*args, **kwargs))


def _tf32(x: Any) -> Any:
    """`x` as a tensor core reads it: of fp32 the first ten bits behind the point."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & -(1 << 13)).view(torch.float32)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device, within which tensors can be made and moved."""
    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)  # what is launched here is done
        patch.setattr(sending, "pins", lambda device: device.type == "cuda")
        patch.setattr(Tensor, "pin_memory", _pinned)
        copying.clear()
        precision.clear()
        patch.setattr(torch, "set_float32_matmul_precision", precision.append)  # torch's own would stay
        # parameters that move are made anew: put into the old ones, they would be none of these
        patch.setattr(torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True)
        # inference mode keeps views from tensors of a class of one's own
        patch.setattr(torch.inference_mode, "__enter__", lambda mode: None)
        patch.setattr(torch.inference_mode, "__exit__", lambda mode, *_: None)
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes them in memory, and then moves them
        try:
            with torch.no_grad():
                yield GPU
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
