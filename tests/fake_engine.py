"""An engine on a GPU that is not there: torch's fake tensors on `cuda:0` (as `tests/fake_gpu.py`, whose streams it takes), with
shapes, dtypes and devices but no values, and a host whose tensors are real, as an engine reads its own. So a model of any size
serves whole requests in a few seconds: what mixes devices ends it, and so does every read of a value but by `tolist`, which is
noted, and whose numbers are made up. Kernels of ours note what they are given, and do nothing.

    python -m tests.fake_engine LIBRARY CASE...

prints a line of JSON: of each case what was found, or the error that ended it. A case is PRESET, PRESET:int8, PRESET:KIND (D or
S, of all layers), or PRESET:FAULT, with a layer in each group; or PRESET:whole, of all layers, which serves nothing and tells
what it takes of the device's memory.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

from tests.fake_gpu import TORCH

KERNELS = {
    "pointwise": ("_norm", "_swiglu"), "store": ("_store", "_summarise"), "attention": ("_attend",),
    "integers": ("_levels", "_product"), "thin": ("_thin", "_wide"),
}  # fmt: skip
DENSE = 4096  # tokens up to which layers of the kind S read all
PAGES = 10**9  # bytes that only a layer's memory of keys and values has
TOKEN = 65.0  # every number that is read: a token, and all else that is finite, true, and no reason for an early exit


def main(library: str, *cases: str) -> None:
    for name in ("libc10", "libtorch_cpu"):
        ctypes.CDLL(f"{TORCH}/lib/{name}.so", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)
    for name in ("torch._subclasses.fake_tensor", "torch._dynamo", "shoal.engine.engine", "PIL.Image"):
        importlib.import_module(name)
    print(json.dumps({case: _in_a_copy(*case.partition(":")[::2]) for case in cases}), flush=True)


def _in_a_copy(preset: str, fault: str) -> dict[str, Any]:
    """What `_served` gives in a copy of this process, which has imported torch; or the error that ended it."""
    source, sink = os.pipe()
    if not os.fork():
        try:
            found = _served(preset, fault)
        except BaseException as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(sink, "w") as to:
            to.write(json.dumps(found))
        os._exit(0)
    os.close(sink)
    with os.fdopen(source) as said:
        told: dict[str, Any] = json.loads(said.read())
    os.wait()
    return told


def _served(preset: str, fault: str) -> dict[str, Any]:
    """What requests of each kind make an engine of a model of `preset` do."""

    from shoal import presets
    from shoal.config import GROUPS
    from shoal.engine.graphs import Graphs
    from shoal.inputs.tokenizer import Tokenizer
    from shoal.model.model import Model
    from shoal.model.net import Net
    from shoal.model.router import Router

    c = presets.get(preset).model
    if fault != "whole":
        c = dataclasses.replace(c, layers=GROUPS)
    if fault == "int8":
        c = dataclasses.replace(c, quantization="w8a8")
    if fault in ("D", "S"):
        c = dataclasses.replace(c, attn_pattern=fault, dense_length=DENSE * (fault == "S"))
    watch = Watch()
    with there(watch, fault):
        model = Model(c, Net(c), Tokenizer.bytes_only(), router=Router(c).requires_grad_(False))
        engine = _engine(model.on_gpu())
        if fault == "whole":
            return {"rows": engine.scheduler.max_batch_tokens, "memory": _memory(engine)}
        run, takes = engine.runner.run, Graphs.takes
        engine.runner.graphs = Graphs(model.net, engine.runner.cache, 8, lambda run: run)
        watch.clear()

        def counted(plan: Any) -> Any:
            watch.waits.clear()
            watch.gathers.clear()
            outcome = run(plan)
            one = takes(engine.runner.graphs, plan.works)  # type: ignore[arg-type]
            kind = "decode" if one else "route" if plan.decisions else "prompt"
            watch.steps.append((kind, [*watch.waits]))
            counts = [work.count for work in plan.works]
            ends = [work.end for work in plan.works]
            watch.sizes.append((counts, ends, max(watch.gathers, default=0)))
            return outcome

        engine.runner.run = counted  # type: ignore[method-assign]
        answers = engine.generate(_asked(c))
        for answer in answers:
            assert answer.finished is not None
            if answer.finish_reason == "error":
                raise RuntimeError(f"{answer.finished.error}")
        parts = (*model.net.state_dict().values(), *model.router.state_dict().values())  # type: ignore[union-attr]
        memory = _tables(engine)
        router = sorted({str(p.dtype) for p in model.router.parameters()})  # type: ignore[union-attr]
        return {
            "steps": watch.steps, "sizes": watch.sizes, "kinds": watch.kinds, "kernels": watch.kernels, "answers": len(answers),
            "devices": sorted({str(each.device) for each in (*parts, *memory)}), "rows": engine.scheduler.max_batch_tokens,
            "router": router,
        }  # fmt: skip


def _tables(engine: Any) -> list[Any]:
    """Memory of pages that requests come to lie in."""
    return [engine.runner.cache.kv, engine.runner.cache.summaries]


def _memory(engine: Any) -> int:
    return sum(each.nbytes for each in _tables(engine))


def _engine(model: Any) -> Any:
    """Of `model`; what its sampler must know of the vocabulary is read before it is on the device."""
    from shoal.engine import runner
    from shoal.engine.engine import Engine
    from shoal.engine.sampler import Sampler
    from shoal.model.cache import Rows
    from shoal.model.model import forbidden
    from shoal.model.router import Router

    closed = forbidden(model.tokenizer, model.config.vocab)

    def sampler(_: Any, ends: Any) -> Sampler:
        made = Sampler(closed, ends)
        made._ids = made._ids.to(model.device, non_blocking=True)
        return made

    with ExitStack() as stack:
        for where, name, instead in (
            (runner, "Sampler", sampler),
            (type(model), "forbidden", lambda _: closed),
            (Router, "reads_nll", False),
            (Rows, "end", lambda *_: 0),  # of what is tried as a model is loaded
        ):
            stack.enter_context(mock.patch.object(where, name, instead))
        # of a small model a GPU holds more units than a host should list
        return Engine(model, max_batch=8, units=None if model.config.layers > 20 else 40_000)


def _asked(c: Any) -> list[Any]:
    """Requests: depths, a prompt of several chunks, an image, the router, and all that a sampler does on the device."""
    import numpy as np
    from PIL import Image

    from shoal import Request, Sampling
    from shoal.engine.events import Guide
    from shoal.inputs.chat import Encoded
    from shoal.inputs.media import to_patches
    from shoal.inputs.tokenizer import Tokenizer

    def request(depth: str, length: int = 20, **more: Any) -> Request:
        sampling = Sampling(**{"temperature": 0.0, "max_tokens": 3, "ignore_eos": True, "seed": 1, **more})
        return Request([60 + i % 100 for i in range(length)], sampling, depth=depth)

    every = {"temperature": 0.7, "top_p": 0.9, "top_k": 9, "min_p": 0.01, "logprobs": 2, "repetition_penalty": 1.2}
    said = Tokenizer.bytes_only().decode([int(TOKEN)])
    picture = Image.fromarray(np.zeros((c.image_size, c.image_size, 3), dtype=np.uint8))
    image = to_patches(picture, c)
    return [
        request("full"), request("shallow"), request("middle"), request("auto"), request("auto", 300),
        request("full", **every, presence_penalty=0.5, logit_bias={70: 1.0}, min_tokens=2),
        request("full", guided=Guide("choice", [said, 4 * said]), ignore_eos=False),
        Request(Encoded([*image.tokens(), 70, 71], [image]), Sampling(temperature=0, max_tokens=2, ignore_eos=True)),
        request("full", min(2 * 8192 + 40, c.context - 3)),
    ]  # fmt: skip


class Watch:
    """What was found, of all operators and kernels that had to do with the device."""

    def __init__(self) -> None:
        self.waits: list[str] = []  # of the host, in the step that runs
        self.steps: list[tuple[str, list[str]]] = []  # what kind of a step, and its waits
        self.gathers: list[int] = []  # bytes of what was gathered from a memory of pages, in the step that runs
        # rows and lengths of a step's requests; the largest gather
        self.sizes: list[tuple[list[int], list[int], int]] = []
        self.kinds: dict[str, list[str]] = {}  # of an operator: dtypes that it was given first, and gave
        self.kernels: dict[str, list[list[str]]] = {}  # of a kernel: dtypes of its tensors

    def clear(self) -> None:
        self.steps.clear()
        self.sizes.clear()
        self.kinds.clear()
        self.kernels.clear()

    def launched(self, name: str, given: Any) -> None:
        """A kernel. Raises RuntimeError for a tensor of the host."""
        import torch

        tensors = [x for x in given if isinstance(x, torch.Tensor)]
        if any(x.device.type != "cuda" for x in tensors):
            raise RuntimeError(f"{name}: a tensor of the host")
        seen, kinds = self.kernels.setdefault(name, []), [_name(x.dtype) for x in tensors]
        seen.extend([kinds] if kinds not in seen else [])

    def ran(self, function: Any, args: Any, kwargs: Any, given: list[Any], made: list[Any]) -> None:
        """An operator: what it gave to the device, or took from there."""
        name = str(function).removeprefix("aten.").rsplit(".", 1)[0]
        source, copies = (given[-1:] if name == "copy_" else given[:1]), name in ("copy_", "_to_copy", "to")
        named = dict(zip((each.name for each in function._schema.arguments), args, strict=False)) | kwargs
        # CUDA may wait for its stream before it copies from memory that is not pinned, whatever it is told
        waits = not (named.get("non_blocking") and source and getattr(source[0], "pinned", False))
        to = {x.device.type for x in made}
        if copies and source and source[0].device.type != next(iter(to)):
            if "cpu" in to:
                self.waits.append("to the host")
            elif waits:
                self.waits.append("from the host")
        elif any(x.dim() and x.device.type == "cpu" for x in given) and "cuda" in to:
            self.waits.append(f"{name} from the host")
        if name in ("index", "index_select", "gather") and given[0].nbytes > PAGES:
            self.gathers.append(made[0].nbytes)
        if "cuda" in to:
            pair = f"{_name(given[0].dtype) if given else ''} -> {_name(made[0].dtype)}"
            seen = self.kinds.setdefault(name, [])
            seen.extend([pair] if pair not in seen else [])


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


class Kernel:
    """`kernel[grid](...)`."""

    def __init__(self, name: str, watch: Watch) -> None:
        self.name, self.watch = name, watch

    def __getitem__(self, grid: Any) -> Any:
        return lambda *given, **named: self.watch.launched(self.name, given)


# long: everything that is imported here must come after the library
@contextmanager
def there(watch: Watch, fault: str) -> Iterator[None]:
    """The device. Operators with one of its tensors are fake; all others are what they ever are."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode

    import shoal.model.gpu
    from shoal.model import int8, linears, sending
    from shoal.model.gpu import launch
    from shoal.model.net import Net
    from tests.trees import tree_leaves, tree_map

    def pinned(x: Any) -> Any:
        found = x.clone()
        found.pinned = True
        return found

    def faked(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
            return x
        return torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="cpu")  # by the mode around

    class Apart(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
            asked = kwargs.get("device")
            if any(isinstance(x, FakeTensor) for x in given) or (
                asked is not None and torch.device(asked).type == "cuda"
            ):
                out = function(*tree_map(faked, args), **tree_map(faked, kwargs))
                made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
                if made and (not function.is_view or "aten.to." in str(function)):
                    watch.ran(function, args, kwargs, given, made)
                return out
            with unset_fake_temporarily():
                return function(*args, **kwargs)

    def tolist(x: Any) -> Any:
        assert x.device.type == "cuda"
        watch.waits.append("tolist")
        return torch.full(x.shape, TOKEN).tolist()

    modules = {
        f"shoal.model.gpu.{name}": SimpleNamespace(NONE=0, HEAD=1, ALL=2, **{each: Kernel(each, watch) for each in kernels})
        for name, kernels in KERNELS.items()
    }  # fmt: skip
    patched = [
        (launch, "ON", {"cuda"}), (launch, "able", lambda _: True), (launch, "is_in_torch_dispatch_mode", lambda: False),
        (torch.cuda, "mem_get_info", lambda *_: (70 * 10**9, 80 * 10**9)), (FakeTensor, "tolist", tolist),
        (sending, "pins", lambda device: device.type == "cuda"), (torch.Tensor, "pin_memory", pinned),
        (torch, "set_float32_matmul_precision", lambda _: None), (linears.Held, "state", lambda _: []),
        (int8, "choice", lambda *_: ("triton",) * len(int8.MEASURED)),
        (torch.__future__, "get_overwrite_module_params_on_conversion", lambda: True),
        *((shoal.model.gpu, name.rpartition(".")[2], made) for name, made in modules.items()),
        *_faults(fault, launch, Net),
    ]  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, modules))  # type: ignore[arg-type]
        for where, name, instead in patched:
            stack.enter_context(mock.patch.object(where, name, instead, create=where is shoal.model.gpu))
        stack.enter_context(FakeTensorMode())
        stack.enter_context(Apart())
        yield


def _faults(fault: str, launch: Any, net: Any) -> list[tuple[Any, str, Any]]:
    """Mistakes that must be found."""
    import torch

    from shoal.model import sending

    norm, attend, exit_ = launch.rms_norm, launch.attend, net.exit
    made: dict[str, tuple[Any, str, Any]] = {
        "leak": (net, "exit", lambda self, x, layers: exit_(self, x, layers) + torch.ones(x.shape[-1])),
        "read": (net, "exit", lambda self, x, layers: exit_(self, x, layers) * bool(x.sum() > 0)),
        "copy": (net, "exit", lambda self, x, layers: exit_(self, x.cpu().to(x.device), layers)),
        "kernel": (launch, "rms_norm", lambda x, weight, eps: norm(x, torch.ones(x.shape[-1]), eps)),
        "pageable": (sending, "_ready", lambda values, device: values),
        "drift": (launch, "attend", lambda q, *given: attend(q, *given).float()),
    }
    return [made[fault]] if fault in made else []


if __name__ == "__main__":
    main(*sys.argv[1:])
