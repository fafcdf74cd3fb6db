"""Steps that vLLM replays, without a GPU: vLLM's own runner, dispatcher and wrapper of CUDA graphs, where a graph is a tape as
strict as a device (`tests.recorded.Tape`), and our kernels run in Triton's interpreter."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import AsyncEngineArgs
from vllm.compilation import cuda_graph
from vllm.config import CUDAGraphMode, set_current_vllm_config
from vllm.config.compilation import CompilationMode
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.utils import AttentionGroup

from shoal import Model
from shoal.config import ModelConfig
from shoal.errors import ResourceError
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.reach import Reach
from shoal.vllm_plugin import graphs
from shoal.vllm_plugin.attention import HybridBackend, HybridImpl, Step, StepBuilder
from tests.recorded import Tape, kernels_on_tape
from tests.vllm.test_same_tokens import Prompt, Vllm, assert_same, ours, theirs

pytestmark = [
    pytest.mark.timeout(600),  # the interpreter is slow, and so is a busy machine
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="runs with TRITON_INTERPRET=1 alone: make test-vllm"
    ),
]
CPU = torch.device("cpu")
MOST = 4  # rows of a graph
PAGE, PAGES = 16, 16  # of 256 tokens: SHAPE of conftest.py is sparse from 32 on


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of this CPU take the way of those of a GPU, and a tape keeps what is launched."""
    from triton.runtime.interpreter import InterpretedFunction

    monkeypatch.setattr(launch, "ON", {"cpu"})
    monkeypatch.setattr(launch, "BUSY", 4)  # rows by which the kernels are tried: 128 take the interpreter a minute
    usable = launch.usable
    monkeypatch.setattr(launch, "usable", lambda x: len(x) <= MOST and usable(x))  # prompts would take it minutes
    monkeypatch.setattr(launch, "is_in_torch_dispatch_mode", lambda: False)
    monkeypatch.setattr(fused, "usable", lambda x: False)
    monkeypatch.setattr(fused, "few", lambda rows: False)
    monkeypatch.setattr(InterpretedFunction, "run", kernels_on_tape(InterpretedFunction.run))


class Graph:
    """In place of a `torch.cuda.CUDAGraph`."""

    replayed = 0

    def __init__(self) -> None:
        self.tape = Tape()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        Tape.now = self.tape
        try:
            with self.tape:
                yield
        finally:
            Tape.now = None

    def replay(self) -> None:
        Graph.replayed += 1
        for call in self.tape.calls:
            call()


@pytest.fixture
def graphs_here(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM asks of CUDA for graphs, and its config as on a platform that has them."""
    whole = CpuPlatform.check_and_update_config.__func__

    def as_ever(cls: Any, config: Any) -> None:
        whole(cls, config)
        config.compilation_config.cudagraph_capture_sizes = [1, 2, MOST]
        config.compilation_config.max_cudagraph_capture_size = MOST

    monkeypatch.setattr(CpuPlatform, "support_static_graph_mode", classmethod(lambda cls: True))
    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(as_ever))
    monkeypatch.setattr(CpuPlatform, "get_global_graph_pool", lambda self: None)
    monkeypatch.setattr(CpuPlatform, "opaque_attention_op", classmethod(lambda cls: False))  # else it is one operator
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: graph.recorded())
    monkeypatch.setattr(cuda_graph, "capture_pool", lambda pool, config: nullcontext(pool))
    monkeypatch.setattr(cuda_graph, "current_stream", lambda: None)
    monkeypatch.setattr(cuda_graph, "weak_ref_tensors", lambda x: x)
    monkeypatch.setattr(Graph, "replayed", 0)


def capture(engine: Any) -> Any:
    """As `GPUModelRunner` wraps and captures a model that it has loaded. Returns the runner."""
    runner = engine.llm_engine.model_executor.driver_worker.worker.model_runner
    config = runner.vllm_config
    assert runner.compilation_config.cudagraph_mode == CUDAGraphMode.FULL_DECODE_ONLY
    with set_current_vllm_config(config):
        runner.model = cuda_graph.CUDAGraphWrapper(runner.model, config, CUDAGraphMode.FULL)
        cuda_graph.validate_cudagraph_capturing_enabled()
        with torch.inference_mode():
            for mode, each in runner.cudagraph_dispatcher.get_capture_descs():
                runner._capture_cudagraphs(each, mode)
    return runner


def test_a_deployment_of_one_depth_replays_its_decoding_steps(
    model: Model, directory: Path, vllm: Vllm, request: pytest.FixtureRequest
) -> None:
    """Three requests in a graph of four rows, then one in another; chunks of prompts are launched. The tokens of our engine."""
    draw = np.random.default_rng(0)
    prompts = [Prompt([int(t) for t in draw.integers(20, 290, n)]) for n in (5, 33, 60)]
    expected = ours(model, prompts, ["shallow"] * len(prompts))
    request.getfixturevalue("graphs_here")
    how = {"hf_overrides": {"depth": "shallow"}, "max_num_seqs": MOST, "max_model_len": 256, "enforce_eager": False}
    engine = vllm(directory, max_num_batched_tokens=64, **how)
    runner = capture(engine)
    made = len(runner.model.concrete_cudagraph_entries)
    launched, forward = list[int](), HybridImpl.forward

    def seen(self: Any, *given: Any, **named: Any) -> Tensor:
        launched.append(len(given[1]))
        return forward(self, *given, **named)

    request.getfixturevalue("monkeypatch").setattr(HybridImpl, "forward", seen)
    assert_same(expected, theirs(model, engine, prompts))
    assert (made, Graph.replayed) == (3, 15), "of 17 steps the first two have prompts in them, and the last one request"
    assert launched and min(launched) > MOST, "a step that decodes was launched"


def configured(directory: Path, depth: str = "shallow", **given: Any) -> Any:
    how = {"dtype": "float32", "max_num_seqs": MOST, "max_model_len": PAGE * PAGES, "block_size": PAGE, **given}
    hf = {"depth": depth, "salted": True}
    return AsyncEngineArgs(model=str(directory), hf_overrides=hf, **how).create_engine_config()


def spec(c: ModelConfig) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=PAGE, num_kv_heads=c.kv_heads, head_size=c.head_dim, dtype=torch.float32)


class Layers:
    """A layer of both branches and a local one, over memory of their own."""

    def __init__(self, c: ModelConfig, units: int) -> None:
        g = torch.Generator().manual_seed(0)
        reaches = [Reach(c.window, c.top_k, c.sinks, torch.linspace(0.2, 0.8, c.heads)), Reach(c.window, 0, 0, None)]
        how = {"block": c.block, "values": c.summary_values}
        self.each = [
            HybridImpl(c.heads, c.head_dim, 0.25, c.kv_heads, reach=partial(reaches.__getitem__, at), **how)
            for at in range(len(reaches))
        ]
        self.heads = [c.heads, c.kv_heads, c.kv_heads]
        self.kv = torch.randn(2, units, c.kv_heads, PAGE, 2 * c.head_dim, generator=g)
        for layer, kv in zip(self.each, self.kv, strict=True):
            layer._beside(kv).copy_(torch.randn(layer._beside(kv).shape, generator=g))
        self.x = torch.zeros(MOST, sum(self.heads), c.head_dim)
        self.out = torch.zeros(2, MOST, c.heads, c.head_dim)

    def memory(self) -> list[Tensor]:
        return [self.kv, *(layer._summaries for layer in self.each)]

    def run(self, metadata: Step, b: int) -> None:
        q, k, v = self.x[:b].split(self.heads, dim=1)
        for layer, kv, out in zip(self.each, self.kv, self.out, strict=True):
            layer.forward(torch.nn.Identity(), q, k, v, kv, metadata, out[:b])


class Told:
    """What vLLM's second runner keeps of a step, and tells a builder; what lies there of padding is another step's."""

    def __init__(self, group: AttentionGroup) -> None:
        self._group = group
        self.positions = torch.full((MOST,), 200)
        self.slots = torch.arange(MOST) + 3 * PAGE
        self.tables = torch.arange(MOST * PAGES, dtype=torch.int32).view(MOST, PAGES) % 40

    def set(self, lengths: list[int], tables: Tensor) -> None:
        """The next step: each request's last token is its row."""
        for r, length in enumerate(lengths):
            self.positions[r] = length - 1
            self.tables[r] = tables[r]
            self.slots[r] = tables[r, (length - 1) // PAGE] * PAGE + (length - 1) % PAGE

    def metadata(self, requests: int, b: int, *, capture: bool = False) -> Step:
        starts = torch.arange(b + 1, dtype=torch.int32).clamp(max=requests)
        longest = PAGE * PAGES if capture else int(self.positions[:requests].max()) + 1
        found = build_attn_metadata(
            [[self._group]], b, b, starts, starts, 1, (self.positions + 1).int(), longest, [self.tables[:b]],
            self.slots[None, :b], SimpleNamespace(kv_cache_groups=[None]), positions=self.positions[:b],
            for_cudagraph_capture=capture,
        )  # fmt: skip
        step: Step = found["layer"]
        return step


def group(builder: StepBuilder) -> AttentionGroup:
    return AttentionGroup(HybridBackend, ["layer"], builder.kv_cache_spec, 0, metadata_builders=[builder])


@torch.no_grad()
def test_padding_writes_nowhere_and_a_replay_is_what_is_launched(directory: Path, graphs_here: None) -> None:
    """Other lengths, other pages, fewer requests than rows: what is stored to the bit, beside a step that is launched for these
    requests alone. Nobody tells a graph where a step lies but the builder."""
    config = configured(directory)
    c = config.model_config.hf_config.shape
    builder, anew = (StepBuilder(spec(c), ["layer"], config, CPU) for _ in range(2))
    assert builder.kept is not None
    anew.kept = None
    told, launched, layers = Told(group(builder)), Told(group(anew)), Layers(c, 1 + MOST * PAGES)
    made = dict[int, Graph]()
    for b in (1, 2, MOST):
        layers.run(told.metadata(b, b, capture=True), b)
        metadata, made[b] = told.metadata(b, b, capture=True), Graph()
        with made[b].recorded():
            layers.run(metadata, b)
    draw = torch.Generator().manual_seed(1)
    for lengths in ([40, 1, 255], [20], [256, 65, 4, 17], [33, 64], [4]):
        r = len(lengths)
        b = next(size for size in made if size >= r)
        tables = (torch.randperm(MOST * PAGES, generator=draw) + 1).view(MOST, PAGES)
        layers.kv.normal_(generator=draw)
        layers.kv[:, 0] = 7.0
        for row, length in enumerate(lengths):  # nothing after the last token is read, nor pages of nobody
            for page, unit in enumerate(tables[row].tolist()):
                layers.kv[:, unit, :, max(0, min(PAGE, length - 1 - page * PAGE)) :] = torch.nan
        layers.kv[:, tables[r:].flatten()] = torch.nan
        layers.x.normal_(generator=draw)
        before = [each.clone() for each in layers.memory()]
        told.set(lengths, tables)
        told.metadata(r, b)
        made[b].replay()
        mine = layers.out[:, :b].clone(), [each.clone() for each in layers.memory()]
        for each, was in zip(layers.memory(), before, strict=True):
            each.copy_(was)
        launched.set(lengths, tables)
        layers.run(launched.metadata(r, r), r)
        torch.testing.assert_close(mine[0][:, :r], layers.out[:, :r], atol=1e-5, rtol=1e-5)
        assert mine[0].isfinite().all(), "padding reads what it may not"
        for one, other in zip(mine[1], layers.memory(), strict=True):
            assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))
        assert not torch.equal(mine[1][0].nan_to_num(9), before[0].nan_to_num(9))


def test_graphs_are_by_default_where_one_depth_is_served(
    directory: Path, graphs_here: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM has them for other models; by no more than a setting of vLLM they are off. Not where a device refuses a kernel:
    that is said when the model is loaded, and it serves."""
    config = configured(directory)
    shape = config.model_config.hf_config.shape
    how = config.compilation_config
    assert (how.mode, how.cudagraph_mode) == (CompilationMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY)
    support: Callable[[Any], AttentionCGSupport] = lambda c: StepBuilder.get_cudagraph_support(c, spec(shape))  # noqa: E731
    assert support(config) == AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    for second in (False, True):  # what each runner of vLLM makes of it
        told = {"use_v2_model_runner": second, "piecewise_capture_available": False}
        for can, mode in ((support(config), "FULL_DECODE_ONLY"), (AttentionCGSupport.NEVER, "NONE")):
            assert copy.copy(how).resolve_cudagraph_mode_and_sizes(can, "HybridBackend", **told).name == mode
    eager = configured(directory, enforce_eager=True)
    assert eager.compilation_config.cudagraph_mode == CUDAGraphMode.NONE
    assert StepBuilder(spec(shape), ["layer"], eager, CPU).kept is None
    each = configured(directory, "per-request", enforce_eager=True)
    assert support(each) == AttentionCGSupport.NEVER
    caplog.set_level("WARNING")
    monkeypatch.setattr(launch, "GIVEN_UP", set())

    def refuses(*_: Any) -> None:
        raise RuntimeError("PassManager::run failed")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "attend", refuses)
        assert support(config) == AttentionCGSupport.NEVER
    assert "go on without Triton's kernels: PassManager::run failed" in caplog.text
    launch.GIVEN_UP.clear()
    monkeypatch.setattr(launch, "ON", {"cuda"})
    assert support(config) == AttentionCGSupport.NEVER


def test_a_graph_that_cannot_be_recorded_names_what_turns_graphs_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    gpu = torch.device("cuda", 0)
    graphs.need_kernels(gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    graphs.need_kernels(CPU)
    with pytest.raises(ResourceError, match=r"CUDA graph of a Shoal model: .*--enforce-eager"):
        graphs.need_kernels(gpu)
