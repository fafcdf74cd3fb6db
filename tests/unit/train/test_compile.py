"""Each layer by torch.compile, as on a GPU by default: here on the CPU by its C++ compiler, and by backends that refuse."""

import dataclasses
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters

from shoal import presets
from shoal.errors import ConfigError
from shoal.model.block import Block, rope_tables
from shoal.model.gpu import launch
from shoal.model.gpu.sparse import Spans
from shoal.model.net import Net
from shoal.train import compiled, log
from shoal.train.compiled import Compiler, compiles
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.loop import fit
from shoal.train.loss import LossModel
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks, shard_
from shoal.train.plan import pretrain_plan
from shoal.train.recompute import Recompute
from shoal.train.refusal import check
from shoal.train.settings import settings
from shoal.train.step import rehearse, update

TEST = presets.get("test").model
SHORT = dataclasses.replace(TEST, layers=4, attn_pattern="HL", train_length=24)
COMPILE = torch.compile
MOST = 12  # graphs of one kind of a layer, in training


def test_it_is_asked_for_by_a_word_or_left_to_the_device() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles("auto", cuda) and not compiles("auto", cpu)
    assert all(compiles(True, device) and not compiles(False, device) for device in (cuda, cpu))
    assert [settings([f"compile={word}"])["compile"] for word in ("auto", "true", "false")] == ["auto", True, False]
    assert pretrain_plan("test", "data", "run", steps=1).compile == "auto"
    with pytest.raises(ConfigError, match="compile: got 'some'"):
        pretrain_plan("test", "data", "run", steps=1, compile="some")


def losses(shards: Path, alone: Ranks, pattern: str, **how: bool) -> list[float]:
    """Of three updates on one batch: another shape would be compiled once more."""
    plan = pretrain_plan("test", str(shards), "unused", steps=3, accumulate=4)
    model = LossModel(Net(dataclasses.replace(plan.model, attn_pattern=pattern)).init_(0))
    shard_(model, alone, **how)
    optimizer, batches = (
        make_optimizer(model, plan.train),
        open_feed(plan, shard_tokenizer(shards), "", alone).at(0)[:1],
    )
    given = {"config": plan.train, "weights": (0.2, 0.3, 0.5), "rate": 1e-2, "ranks": alone}
    return [update(model, optimizer, batches, **given).loss for _ in range(3)]


COMPILED = [("", "L", True), *(pytest.param("inductor", *rest, marks=[
    pytest.mark.drill, pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
]) for rest in (("L", True), ("H", False), ("H", True)))]  # fmt: skip


@pytest.mark.parametrize(("backend", "pattern", "recompute"), COMPILED)
def test_compiled_layers_train_alike_and_in_one_graph_each(
    shards: Path, alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    backend: str, pattern: str, recompute: bool,
) -> None:  # fmt: skip
    """Three updates of a run. C++ takes a second or two for each of ten kernels of a local layer and twenty of a hybrid one: as
    drills. Without a `backend` the graphs, forward and backward, are run as they are."""
    ran = list[int]()

    def as_it_is(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(lambda *given: ran.append(1) or graph.forward(*given))

    if not backend:
        monkeypatch.setattr(
            torch, "compile", partial(COMPILE, backend=aot_autograd(fw_compiler=as_it_is, bw_compiler=as_it_is))
        )
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("shoal.model.attention.STRIP", 96)  # a row in one strip: half as many kernels to compile
    torch._dynamo.reset()
    counters.clear()
    want = losses(shards, alone, pattern)
    assert not ran
    found = losses(shards, alone, pattern, compiled=True, recompute=recompute)
    assert found == pytest.approx(want, rel=1e-5) and want[-1] < want[0]
    if backend:
        assert found != want, "to the bit only where nothing was compiled"
    else:
        assert len(ran) >= 2 * 3 * TEST.layers, "forward and backward of each layer, in each update"
    assert not counters["graph_break"], "where a graph breaks, little is left to compile"
    assert counters["stats"]["unique_graphs"] == 1, "layers of one shape are compiled once"


def test_a_machine_without_a_compiler_is_told_before_training(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.train.refusal.COMPILER", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"compile: got 'no no-such-compiler.*leave it out"):
        check(pretrain_plan("test", str(shards), "run", steps=1, compile=True), 1)


# ---- what cannot be compiled ends nothing


def gradients(*, compiled: bool, recompute: Recompute = False) -> dict[str, Tensor]:
    """Of two micro-batches, one after the other, of layers of two kinds."""
    net = Net(SHORT).init_(0)
    model = LossModel(net)
    shard_(model, Ranks(0, 1, torch.device("cpu")), compiled=compiled, recompute=recompute)
    for seed in range(2):
        tokens = torch.randint(10, SHORT.vocab, (1, 24), generator=torch.Generator().manual_seed(seed))
        docs = (torch.arange(24) > 9).long().expand_as(tokens)
        net.head(net(tokens, docs=docs)[SHORT.layers], SHORT.layers).logsumexp(-1).sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def refusing(at: int, *, backward: bool) -> Callable[..., Any]:
    """torch.compile whose graph number `at` is refused by the backend, forward or backward; the others run as they are."""
    made = [0]

    def fails(graph: Any, inputs: Any) -> Any:
        made[0] += 1
        if made[0] == at:
            raise RuntimeError("no such kernel on this card\nand more of it")
        return make_boxed_func(graph.forward)

    def runs(graph: Any, inputs: Any) -> Any:
        return make_boxed_func(graph.forward)

    ways = {"fw_compiler": runs, "bw_compiler": fails} if backward else {"fw_compiler": fails, "bw_compiler": runs}
    return partial(COMPILE, backend=aot_autograd(**ways))


FAILS = [  # which graph, whether in backward, and what layers compute again; no drill: one of them
    (1, False, False),
    *(pytest.param(*rest, marks=pytest.mark.drill) for rest in (
        (1, False, True), (1, False, "selective"), (1, True, False), (1, True, True), (1, True, "selective"), (2, True, False),
        (2, True, True), (2, True, "selective"),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("at", "backward", "recompute"), FAILS)
def test_a_layer_that_is_not_compiled_runs_as_it_is_and_the_log_says_so_once(
    at: int, backward: bool, recompute: Recompute, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fails in backward alone is met in forward; and where the first kind of a layer was compiled and the second is not,
    the first runs again in backward as it ran."""
    want = gradients(compiled=False, recompute=recompute)
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", refusing(at, backward=backward))
    with caplog.at_level(logging.WARNING, logger=compiled.__name__):
        found = gradients(compiled=True, recompute=recompute)
    said = "layers go on without torch.compile: RuntimeError: no such kernel on this card"
    assert [line.getMessage() for line in caplog.records if line.name == compiled.__name__] == [said]
    assert found.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(found[name], want[name], rtol=1e-4, atol=1e-5)


def test_what_is_no_fault_of_the_compiler_is_raised_and_gives_up_nothing() -> None:
    def wrong(x: Tensor) -> Tensor:
        raise ValueError("of the layer")

    def full(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("full")

    def plain(x: Tensor) -> Tensor:
        return x + 1

    compiler = Compiler()
    for quick, slow, kind in ((wrong, wrong, ValueError), (full, plain, torch.OutOfMemoryError)):
        with pytest.raises(kind):
            compiler.either(quick, slow)(torch.zeros(1))
    assert not compiler.failed
    assert compiler.either(wrong, plain)(torch.zeros(1)) == 1 and compiler.failed
    assert compiler.either(full, plain)(torch.zeros(1)) == 1, "and not even tried again"


@pytest.mark.drill
@pytest.mark.parametrize("kind", "LHSD")
def test_rows_of_many_lengths_are_a_few_graphs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As chats have them: of one row and more, within a window, within all chosen blocks, and beyond; by the way that rows take
    on a GPU, of which only the graphs are made. H has what L does in it; S has what D does, up to a length."""
    monkeypatch.setattr(launch, "ON", {"cpu"})
    monkeypatch.setattr(launch, "able", lambda device: True)
    config = dataclasses.replace(TEST, attn_pattern=kind, window=16, dense_length=24)
    graphs = list[object]()

    def seen(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lambda *given: (torch.zeros(1),) * len(graph.graph.output_node().args[0])

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(COMPILE, backend=seen))
    layer = Compiler().graph(Block(config, 0).forward)
    for rows, length in (
        (2, 96),
        (2, 40),
        (1, 96),
        (3, 16),
        (2, 7),
        (1, 1),
        (4, 33),
        (8, 48),
        (5, 24),
        (3, 90),
        (2, 13),
    ):
        spans = Spans.packed(torch.zeros(rows, length, dtype=torch.long), config.block, 16, 24)
        layer(torch.zeros(rows, length, config.width), spans, rope_tables(spans.positions, config, torch.float32))
    assert 2 <= len(graphs) <= MOST < compiled.MOST_GRAPHS / 8, (
        "of kinds of layers, gradients or none, rounding or none"
    )


def test_a_rehearsal_leaves_all_as_it_was(shards: Path, alone: Ranks) -> None:
    plan = pretrain_plan("test", str(shards), "unused", steps=3, accumulate=4)
    model = LossModel(Net(plan.model).init_(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = open_feed(plan, shard_tokenizer(shards), "", alone).at(0)[0]
    rehearse(model, batch, config=plan.train, weights=(0.2, 0.3, 0.5), ranks=alone, skip=())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_run_that_compiles_is_the_run_that_does_not(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearsed, to be rounded or not; where what is compiled runs as it is."""
    asked = list[object]()
    monkeypatch.setattr(torch, "compile", lambda forward, **how: asked.append(forward) or forward)
    losses = []
    for how in (False, True):
        asked.clear()
        plan = pretrain_plan("test", str(shards), str(tmp_path / str(how)), steps=2, eval_rows=4, compile=how)
        fit(dataclasses.replace(plan, quantize=True))
        assert len(asked) == how * plan.model.layers
        losses.append([record["loss"] for record in log.read(plan.run) if record["kind"] == "step"])
    assert losses[0] == losses[1] and len(losses[0]) == 2
