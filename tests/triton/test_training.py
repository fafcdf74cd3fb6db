"""Attention over whole rows in Triton against the definition in float64: both branches, the choice, gradients too."""

from __future__ import annotations

import dataclasses
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from shoal import presets
from shoal.model import reference
from shoal.model.attention import hybrid_attention
from shoal.model.block import Block, rope_tables
from shoal.model.gpu import launch, sparse, trial
from shoal.model.gpu.sparse import Spans
from shoal.model.net import Net
from shoal.model.reach import ALL, Reach
from shoal.model.reference import reference_attention, reference_sparse

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

HOW = {"window": 4, "top_k": 2, "sinks": 1}
DOCS = torch.tensor([[0] * 7 + [1] * 23, [0] + [1] * 14 + [2] * 15])


def drawn(seed: int, heads: int, kv_heads: int, dtype: torch.dtype, length: int = 30, dim: int = 8) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(2, length, h, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes]


def same(got: list[Tensor], want: list[Tensor], off: float) -> None:
    """In the 2-norm: at a tie in bf16 a choice may differ."""
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= off * max(1, b.norm())


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2**-4)])
@pytest.mark.parametrize(("block", "heads"), [(4, (2, 1)), (3, (3, 1)), (1, (2, 2))])
def test_outputs_and_gradients_are_those_of_the_definition(
    block: int, heads: tuple[int, int], dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of other lengths in a row, groups, incomplete last blocks; and blocks that more queries chose than one program
    adds up."""
    monkeypatch.setattr(sparse, "PIECE", 5)
    given = drawn(block, *heads, dtype)
    weight = torch.randn(2, 30, heads[0], 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gamma = torch.linspace(0.2, 0.8, heads[0], dtype=torch.float64)
    exact, share = [x.double().requires_grad_() for x in given], gamma.clone().requires_grad_()
    want = reference_attention(*exact, block=block, **HOW, local_weight=share, docs=DOCS)
    wanted = torch.autograd.grad((want * weight).sum(), [*exact, share])
    fast, mine = [x.requires_grad_() for x in given], gamma.clone().requires_grad_()
    got = hybrid_attention(*fast, block=block, **HOW, local_weight=mine, docs=DOCS)
    found = torch.autograd.grad((got * weight.to(dtype)).sum(), [*fast, mine])
    assert got.dtype == dtype
    same([got, *found], [want, *wanted], off)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2**-4)])
@pytest.mark.parametrize(("block", "window", "dense", "heads"), [
    (4, 5, 0, (2, 1)), (3, 4, 9, (3, 1)), (2, 2, 14, (2, 2)), (1, 1, 6, (1, 1)),
])  # fmt: skip
def test_one_softmax_and_its_gradients_are_those_of_the_definition(
    block: int, window: int, dense: int, heads: tuple[int, int], dtype: torch.dtype, off: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of sparse layers: blocks that the window cuts, queries before the dense length and at it, others that have no block yet
    to choose, a document that is dense to its end, and a bias a head."""
    monkeypatch.setattr(sparse, "PIECE", 5)
    given = drawn(block, *heads, dtype)
    weight = torch.randn(2, 30, heads[0], 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    bias = torch.linspace(-1, 2, heads[0], dtype=torch.float64)
    exact, more = [x.double().requires_grad_() for x in given], bias.clone().requires_grad_()
    how = {"window": window, "block": block, "top_k": 2, "sinks": 1, "dense_length": dense, "docs": DOCS}
    want = reference_sparse(*exact, **how, bias=more)  # type: ignore[arg-type]
    wanted = torch.autograd.grad((want * weight).sum(), [*exact, more])
    fast, mine = [x.requires_grad_() for x in given], bias.clone().requires_grad_()
    spans, reach = (
        Spans.packed(DOCS, block, window, dense),
        Reach(window, 2, 1, None, mine.to(sparse.launch.fp(dtype)), dense),
    )
    got = sparse.attend(*fast, spans, reach)
    found = torch.autograd.grad((got * weight.to(dtype)).sum(), [*fast, mine])
    assert got.dtype == dtype
    same([got, *found], [want, *wanted], off)


@pytest.mark.parametrize("window", [1, 5, 16, 17, 40])
def test_a_window_across_tiles_is_that_of_the_definition(window: int) -> None:
    """Of layers that read the window alone; one of the length of a row reads all of each document."""
    given = [x.requires_grad_() for x in drawn(0, 2, 1, torch.float64, length=40)]
    docs = torch.tensor([[0] * 3 + [1] * 37, [0] * 25 + [1] * 15])
    spans = Spans.packed(docs, 4)
    for reach in (Reach(window, 0, 0, None), Reach(1, 0, 0, None, dense=ALL)):
        out, want = sparse.attend(*given, spans, reach), torch.zeros(2, 40, 2, 8, dtype=torch.float64)
        for row in range(2):
            for start, end in reference.documents(docs[row].tolist()):
                q, k, v = (x[row, start:end].transpose(0, 1) for x in given)
                mask = reference.local_mask(end - start, 40 if reach.dense else window).expand(1, -1, -1)
                want[row, start:end] = reference.masked_softmax(q, k, v, mask).transpose(0, 1)
        pairs = [torch.autograd.grad(x.square().sum(), given) for x in (out, want)]
        same([out, *pairs[0]], [want, *pairs[1]], 1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_tiles_of_other_heights_give_the_same(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of wide heads, of which a program holds more than its loop reads at a time: 32 queries or keys and 16, beside 64."""
    given, docs = drawn(2, 2, 1, torch.float32, length=40), torch.tensor([[0] * 40, [0] * 11 + [1] * 29])
    spans, share, found = Spans.packed(docs, 4, 6), torch.full((2,), 0.4), []
    for held, read in ((sparse.HELD, sparse.READ), (2**11, 2**10)):
        monkeypatch.setattr(sparse, "HELD", held)
        monkeypatch.setattr(sparse, "READ", read)
        fast = [x.clone().requires_grad_() for x in given]
        out = sparse.attend(*fast, spans, Reach(6, 3, 1, None if bias else share, share if bias else None))
        found.append([out, *torch.autograd.grad(out.square().sum(), fast)])
    assert sparse._tiles(8, given[0]) == (32, 16)
    same(found[1], [x.double() for x in found[0]], 1e-6)


@pytest.mark.parametrize("summary", ["mean", "mean_var"])
@pytest.mark.parametrize(("heads", "dtype"), [
    ((1, 1), torch.float64), ((3, 1), torch.float64), ((4, 2), torch.float64), ((4, 2), torch.float32),
    ((1, 1), torch.bfloat16), ((4, 2), torch.bfloat16),
])  # fmt: skip
def test_the_choice_is_that_of_the_definition(
    heads: tuple[int, int], dtype: torch.dtype, summary: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strips of a few queries; block by block, in fp32 and bf16 wherever scores differ by more than the rounding of fp32, in
    which they are made."""
    monkeypatch.setattr(sparse, "SCORED", 2 * heads[1] * 15 * 16)
    q, k, _ = drawn(1, *heads, dtype, length=45)
    compared = 0
    docs = torch.tensor([[0] * 9 + [1] * 36, [0] * 22 + [1] * 23])
    spans, reach = Spans.packed(docs, 3), Reach(4, 4, 1, None)
    numbers = sparse.choose(q, k, spans, reach, summary == "mean_var")
    for row in range(2):
        for start, end in reference.documents(docs[row].tolist()):
            one = (x[row, start:end].transpose(0, 1).double() for x in (q, k))
            scores = reference.block_scores(*one, 3, summary)  # type: ignore[arg-type]
            chosen = reference.chosen_blocks(scores, 3, 4, 1)
            rest = torch.nn.functional.pad(scores[..., 1:], (0, 4), value=-math.inf).sort(-1, descending=True).values
            # between the last that is chosen and the next; where there are fewer, it is endless or none
            apart, least = (rest[..., 2] - rest[..., 3]).abs(), 1e-5 if dtype != torch.float64 else 0.0
            sure = ~(apart < least)
            for head in range(heads[1]):
                for t in range(start, end):
                    got = numbers[row, head, t]
                    places = [int(spans.first[row, n]) - start for n in got if n >= 0]
                    if sure[head, t - start]:
                        assert places == (3 * chosen[head, t - start].nonzero().flatten()).tolist()
                        compared += 1
    assert compared >= 0.9 * 2 * 45 * heads[1]


def test_equal_scores_go_to_the_lower_block() -> None:
    """Zero keys score all blocks alike, with one head (z itself) and with two (softmax)."""
    for heads in (1, 2):
        q, k = torch.ones(1, 12, heads, 8), torch.zeros(1, 12, 1, 8)
        k[0, 4:6] = -0.0
        numbers = sparse.choose(q, k, Spans.packed(torch.zeros(1, 12, dtype=torch.long), 2), Reach(2, 3, 1, None))
        assert numbers[0, 0, 11].tolist() == [0, 1, 2] and numbers[0, 0, 2].tolist() == [0, -1, -1]


def test_a_batch_of_more_numbers_than_32_bits_count_is_reached(tmp_path: Path) -> None:
    """The gradient of a block of the second row, 2^31 numbers after the first one's: in a file that is nearly all holes, where
    what 32 bits would make of that place is a hole, too."""
    from shoal.model.gpu import training

    length, dim = 2**24, 128
    whole = torch.from_numpy(np.memmap(tmp_path / "holes", np.float32, "w+", shape=2**32 + 2 * dim))
    x = whole[2**31 :]
    x[length * dim : length * dim + dim] = torch.linspace(-1, 1, dim)
    log, less = torch.zeros(length + 2), torch.zeros(length + 2)
    log[length] = 43.0
    numbers = [torch.tensor(each, dtype=torch.int32) for each in ([0, 0], [0], [0, 0, 1], [1], [0, 0, 1])]
    to_k, to_v = torch.zeros(1, 2, dim), torch.zeros(1, 2, dim)
    training._to_pieces[(1,)](
        x, x, x, log, less, x, *numbers, to_k, to_v, length, 1, 0, HEADS=1, KV_HEADS=1, G=1, D=dim, WIDE=dim, S=2, TALL=16,
        ROWS=16, PIECE=4, SCALE=1.0, PRECISION="ieee", EXACT=False,
    )  # fmt: skip
    own = x[length * dim : length * dim + dim]
    weight = (own @ own - 43.0).exp()
    torch.testing.assert_close(to_v[0], torch.stack([weight * own, 0 * own]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(to_k[0], torch.stack([weight * (own @ own) * own, 0 * own]), rtol=1e-4, atol=1e-4)


def test_who_chose_each_block_is_listed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "PIECE", 2)
    numbers = torch.tensor([[[[-1, -1], [0, -1], [0, 2], [0, 2]]]], dtype=torch.int32)
    order, offsets, of, begins = sparse.lists(numbers, 3)
    assert order[:5].tolist() == [1, 2, 3, 2, 3] and offsets.tolist() == [0, 3, 3, 5]
    assert begins.tolist() == [0, 2, 2, 3] and of.tolist() == [0, 0, 2, -1, -1, -1, -1]


def test_a_net_trains_through_the_kernels_as_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and all gradients in fp64; layers of both branches, of the window alone, of all of the context, and sparse ones."""
    config = dataclasses.replace(presets.get("test").model, attn_pattern="SHLD", dense_length=16, top_k=3)
    docs = torch.tensor([[0] * 20 + [1] * 44])
    tokens = torch.randint(20, 260, (1, 64), generator=torch.Generator().manual_seed(0))
    found = []
    for on in (True, False):
        if not on:
            monkeypatch.setattr(sparse.launch, "ON", set())
        net = Net(config).init_(0).double()
        hidden = net(tokens, docs=docs)[config.layers]
        logits = net.head(hidden, config.layers)
        (-logits.log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])).mean().backward()
        found.append([logits.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12 * math.sqrt(b.numel()))


@pytest.mark.parametrize(("kind", "backend"), [*((kind, "aot_eager") for kind in "HSLD"), ("S", "inductor")])
def test_a_compiled_layer_is_one_graph(
    kind: str, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its kernels in it as operators, which by inductor's code, too, get memory as they ask for it; the same output and
    gradients."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = dataclasses.replace(presets.get("test").model, attn_pattern=kind, window=6, top_k=2)
    docs = torch.tensor([[0] * 10 + [1] * 20])
    spans = Spans.packed(docs, config.block, config.window)
    rope = rope_tables(spans.positions, config, torch.float64)
    block = Block(config, 0).double()
    with torch.no_grad():
        for p in block.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 8)
    x = torch.randn(1, 30, config.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # the window alone asks for no gate
    trained = [p for name, p in block.named_parameters() if kind != "L" or not name.endswith("gate")]
    torch._dynamo.reset()
    counters.clear()
    found = []
    for forward in (block.forward, torch.compile(block.forward, backend=backend, fullgraph=True)):
        out = forward(x, spans, rope)
        found.append([out, *torch.autograd.grad(out.square().sum(), trained)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_what_training_launches_is_tried_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All nine kernels of attention; where one is refused, in backward too, that is told once, and rows go under masks."""
    from triton.runtime.errors import OutOfResources
    from triton.runtime.interpreter import InterpretedFunction

    config = dataclasses.replace(presets.get("test").model, attn_pattern="HSLD", top_k=2)
    run, launched, refuses = InterpretedFunction.run, set[str](), set[str]()

    def counted(self: Any, *args: Any, **named: Any) -> None:
        launched.add(self.fn.__name__)
        if self.fn.__name__ in refuses:
            raise OutOfResources(131072, 101376, "shared memory")
        run(self, *args, **named)

    monkeypatch.setattr(InterpretedFunction, "run", counted)
    there = torch.device("cpu")
    trial.of_training(config, 13, there, low=False, alone=True)
    every = {"_near", "_near_to_q", "_near_to_kv", "_rate", "_pick", "_forward", "_to_q", "_to_pieces", "_to_kv"}
    assert launched == every and launch.able(there)
    refuses.add("_to_pieces")
    try:
        with caplog.at_level(logging.WARNING):
            trial.of_training(config, 13, there, low=True, alone=False)
        assert not sparse.usable(torch.zeros(1, 13, 8), config.block)
        assert [line.getMessage().partition(" Reducing")[0] for line in caplog.records] == [
            "decoding and training on cpu go on without Triton's kernels: out of resource: shared memory, Required: 131072, "
            "Hardware limit: 101376."
        ]
    finally:
        launch.GIVEN_UP.clear()
        launch._tried.cache_clear()


def test_endless_rows_stay_under_masks() -> None:
    assert sparse.usable(torch.zeros(1, 64, 8), 4) and not sparse.usable(torch.zeros(1, 2**14 + 1, 1), 1)


def test_gradients_in_fp16_are_left_to_torch() -> None:
    """Rows that are evaluated in it are not."""
    x = torch.zeros(1, 64, 8, dtype=torch.float16)
    assert not sparse.usable(x, 4)
    with torch.no_grad():
        assert sparse.usable(x, 4) and sparse.usable(x.float(), 4)
