"""An update of training on a GPU that is not there: torch's fake tensors on `cuda:0`, with shapes, dtypes and devices but
no values. So a model of any size is run, forward, backward and optimizer, in a few seconds; what mixes devices, or waits for a
value, ends it. Of our operators the shapes alone are run: Triton's kernels have tests of their own, and need not be there.

A torch for CPUs ends at the first backward of such a tensor, as it knows no streams of a GPU. `SOURCE` gives it one that does
nothing, and must be loaded before torch: so this is a program of its own. It prints a line of JSON.

    python -m tests.fake_gpu LIBRARY PRESET TOKENS [WAY]

PRESET is a name, or NAME/LAYERS for a model of its shapes with fewer of them. WAY: float32, sparse, compile, int8, taught,
preferences or images; or shards, where this is the first of two ranks, and the other says nothing (torch's fake process group);
or a fault that is to be found: leak, sync; and, of shards, norm, logits, softmax or sums. Without a preset it reads
`FILE PRESET TOKENS [WAY]` from lines of its input. Each is done by a copy of this process, which has imported torch, and writes
what it says to FILE; its exit status is answered by a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections import Counter
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from filelock import FileLock

SOURCE = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace {
using c10::Device, c10::Stream, c10::DeviceType;
struct CUDAHooks : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};
struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device there() { return {DeviceType::CUDA, 0}; }
  static Stream only() { return Stream(Stream::DEFAULT, there()); }
  Device exchangeDevice(Device) const override { return there(); }
  Device getDevice() const override { return there(); }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
using at::CUDAHooksArgs, at::CUDAHooksRegistry, at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks)
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
}
"""
TORCH = Path(importlib.util.find_spec("torch").submodule_search_locations[0])  # type: ignore[union-attr, index]
FREE = (
    "aten.detach", "aten.alias", "aten.lift_fresh", "aten.empty", "aten.new_empty", "aten.empty_like",
    "aten.empty_strided", "aten.record_stream",
)  # fmt: skip  # operators that launch nothing, beside views
# what an update would import first, once for all copies: half a second of each was torch's
NEEDED = (
    *(f"shoal.train.{name}" for name in ("parallel", "checkpoint", "loss", "optim", "snapshot", "start", "step")),
    "numba", "torch._dynamo", "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes",
)  # fmt: skip
# what one of our operators launches in bf16, operators of torch in it among them; "choose" for a strip of scores.
# tests/triton/test_launches.py holds them
OURS = {"near": 1, "near_back": 7, "choose": 2, "chosen": 7, "chosen_back": 41}


def build(root: Path) -> Path:
    """SOURCE as a library in a folder of `root`: some four seconds for who asks first, and others wait."""
    folder = root / hashlib.sha256(f"{version('torch')} {SOURCE}".encode()).hexdigest()[:16]
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{TORCH}/include", "streams.cpp", "-o", "made.so"]
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        if not (folder / "streams.so").exists():
            (folder / "streams.cpp").write_text(SOURCE, encoding="utf-8")
            subprocess.run([*command, f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10"], cwd=folder, check=True)
            (folder / "made.so").rename(folder / "streams.so")
    return folder / "streams.so"


def main(library: str, *asked: str) -> None:
    for name in ("libc10", "libtorch_cpu"):
        ctypes.CDLL(f"{TORCH}/lib/{name}.so", mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(library)
    if asked:
        _say(*asked)
        return
    for name in NEEDED:
        importlib.import_module(name)
    for line in sys.stdin:
        file, *asked = line.split()
        print(_in_a_copy(file, *asked), flush=True)


def _say(preset: str, tokens: str, fault: str = "") -> None:
    print(json.dumps(_update(preset, int(tokens), fault)), flush=True)


def _of_two() -> None:
    """This process is the first of a group of two, and FSDP's streams and events do nothing."""
    import torch.distributed as dist
    from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_init, _fsdp_param_group, _fsdp_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    handle = MagicMock()
    handle.current_device.return_value = 0
    for module in (_fsdp_collectives, _fsdp_init, _fsdp_param_group, _fsdp_state):
        module._get_device_handle = lambda _: handle  # type: ignore[attr-defined]


def _low_norm() -> None:
    """Norms compute in what they are given."""
    from shoal.model.block import Norm

    Norm.forward = lambda self, x: x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight  # type: ignore[method-assign]


def _low_logits() -> None:
    """Logits are rounded as other products are."""
    from shoal.model.linears import Weight

    Weight.product_in_fp32 = Weight.product  # type: ignore[method-assign]


def _low_softmax() -> None:
    """So are they, and cross-entropy is taken of that."""
    from shoal.train import loss

    _low_logits()
    loss._exact = lambda x: x


def _low_sums() -> None:
    """Gradients of all ranks are added up in bf16."""
    import torch

    from shoal.train import parallel

    policy = parallel.mixed_precision
    parallel.mixed_precision = lambda *given, **how: dataclasses.replace(
        policy(*given, **how), reduce_dtype=torch.bfloat16
    )


LOW = {"norm": _low_norm, "logits": _low_logits, "softmax": _low_softmax, "sums": _low_sums}


def _in_a_copy(file: str, *asked: str) -> int:
    """The exit status of a copy of this process that does what is asked and writes what it says to `file`."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        said = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1)
        os.dup2(said, 2)
        _say(*asked)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


# long: everything that is imported here must come after the library
def _update(preset: str, length: int, fault: str) -> dict[str, Any]:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
    from torch.utils._python_dispatch import TorchDispatchMode

    from shoal import presets
    from shoal.data.batches import Batch
    from shoal.inputs.tokenizer import PATCH_ID
    from shoal.model.block import Attention, Block
    from shoal.model.gpu import launch, sparse
    from shoal.model.linears import fake_quantize_
    from shoal.model.net import Net
    from shoal.train import parallel, snapshot, step
    from shoal.train.checkpoint import _tensors
    from shoal.train.loss import LossModel, Places
    from shoal.train.optim import make_optimizer
    from shoal.train.parallel import Ranks, shard_
    from shoal.train.start import whole_tensors
    from tests.trees import tree_leaves

    mode, device = FakeTensorMode(), torch.device("cuda:0")
    name, _, layers = preset.partition("/")
    c, train = presets.get(name).model, presets.get(name).train
    if layers:
        c = dataclasses.replace(c, layers=int(layers))
        train = dataclasses.replace(train, exit_weights=train.exit_weights[-len(c.exits) :])
    if fault == "sparse":
        c = dataclasses.replace(c, attn_pattern="S", dense_length=length // 4)
    found: dict[str, Any] = {"reads": 0, "largest": 0, "largest_of": "", "kinds": {}}
    layer: list[str] = []  # in which part of a layer an operator is
    launches: Counter[str] = Counter()
    graphs: list[Any] = []  # of layers, where they are compiled

    class Watched(TorchDispatchMode):
        """What each operator gives: how large, in which dtype, on which device."""

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            name = str(function).rsplit(".", 1)[0]
            there = [x for x in tree_leaves(out) if x.device.type == "cuda"]
            for x in there:
                if x.numel() > found["largest"]:
                    found["largest"], found["largest_of"] = x.numel(), f"{name} {list(x.shape)}"
            if there and not function.is_view and name not in FREE:
                strips = -(-args[0].shape[1] // sparse._strip(*args[:2])[1]) if name == "shoal.choose" else 1
                launches[layer[-1] if layer else "rest"] += OURS.get(name.removeprefix("shoal."), 1) * strips
                given = [x.dtype for x in tree_leaves(args) if x.dim()]
                seen = found["kinds"].setdefault(name, [])
                pair = f"{given[0] if given else ''} -> {there[0].dtype}".replace("torch.", "")
                seen.extend([pair] if pair not in seen else [])
            return out

    def outside(function: Any) -> Any:
        def run(*args: Any, **named: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **named)

        return run

    def there(values: torch.Tensor) -> Any:
        return mode.from_tensor(values).to(device)

    def read(values: torch.Tensor) -> list[float]:
        assert values.device == device
        found["reads"] += 1
        return [1.0] * len(values)

    step.count, step.read = outside(step.count), read
    Places.of = staticmethod(outside(Places.of))  # type: ignore[method-assign, assignment]
    Places.to = lambda self, device: Places(*map(there, self))  # type: ignore[method-assign]
    Batch.to = lambda self, device: Batch(*map(there, (getattr(self, name) for name in (  # type: ignore[method-assign]
        "tokens", "targets", "docs", "patches", "grid", "row_bytes"))), self.modalities)  # fmt: skip
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[attr-defined]
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    launch.able = lambda device: True  # type: ignore[assignment]
    snapshot.random_state = lambda ranks: {}
    shards = fault in ("shards", *LOW)
    if fault in LOW:
        LOW[fault]()
    if fault in ("leak", "sync"):
        forward, wrong = Attention.forward, {
            "leak": lambda x: x + torch.ones(x.shape), "sync": lambda x: x * bool(x.sum() > 0),
        }  # fmt: skip
        Attention.forward = lambda self, *args: wrong[fault](forward(self, *args))  # type: ignore[method-assign]

    shown = 16 if fault == "images" else 0
    ids = torch.full((2 if fault == "preferences" else 1, length), 299)
    ids[:, 8 : 8 + shown] = PATCH_ID
    docs = (torch.arange(length) > length // 3).long().expand_as(ids)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -1
    side = max(1, c.patch_values)
    batch = Batch(ids, targets, docs, torch.zeros(shown, side, dtype=torch.uint8),
                  torch.zeros(shown, 2, dtype=torch.long), torch.tensor([length] * len(ids)), ("text",) * len(ids))  # fmt: skip
    ranks = Ranks(0, 1, device)
    if shards:
        _of_two()
        parallel.init_device_mesh = outside(partial(parallel.init_device_mesh))  # type: ignore[attr-defined]

    def marked(block: Block) -> None:
        forward = block.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            layer.append("layer forward")
            try:
                return forward(*args, **kwargs)
            finally:
                layer.pop()

        block.forward = run  # type: ignore[method-assign]

    with mode:
        with torch.device("cuda:0"):
            # with a net beside it that it is held to, or preferred to
            model = LossModel(Net(c), teacher=Net(c) if fault in ("taught", "preferences") else None)
        fake_quantize_(model.net, fault == "int8")
        train = dataclasses.replace(train, distill=float(fault == "taught"), dpo=0.1 * (fault == "preferences"))
        model.low = fault != "float32"
        model.to = lambda _: model  # type: ignore[method-assign, assignment]  # fake parameters cannot be moved in place
        compiled = fault == "compile"
        if compiled:
            torch.compile = partial(torch.compile, backend=lambda graph, _: graphs.append(graph) or graph.forward)  # type: ignore[func-returns-value]
        shard_(model, Ranks(0, 2, device) if shards else ranks, compiled=compiled)
        for group in model.net.groups:
            for block in group.blocks:  # type: ignore[union-attr]
                marked(block)
        optimizer = make_optimizer(model, train)
        total = sum(train.exit_weights)
        weights = [weight / total for weight in train.exit_weights]
        given = {"config": train, "weights": weights, "rate": 1e-4, "ranks": ranks}
        with contextlib.nullcontext() if compiled else Watched():  # nothing is compiled beneath a mode
            step.update(model, optimizer, [batch, batch], **given)  # type: ignore[arg-type]
        trained = [p for p in model.parameters() if p.requires_grad]
        found["devices"] = sorted({str(x.device) for p in trained for x in (p, p.grad, *optimizer.state[p].values())})
        found["states"] = sorted({str(x.dtype) for p in trained for x in (p, p.grad, *optimizer.state[p].values())})
        if not shards:  # where they begin in the whole is a value
            copied = snapshot.Snapshot(ranks)
            copied.take(_tensors(model, optimizer))
            found["saved"] = [sorted({str(piece.tensor.device) for piece in copied._pieces}), len(copied._pieces)]
            exported = dict(whole_tensors(model, ranks))
            found["exported"] = [sorted({str(x.device) for x in exported.values()}), len(exported)]
            assert all(isinstance(x, FakeTensor) for x in exported.values())
    found["forward"] = launches["layer forward"] // (2 * c.layers)
    found["all"], found["graphs"] = sum(launches.values()), len(graphs)
    found["operators"] = sorted({str(node.target) for graph in graphs for node in graph.graph.nodes})
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
