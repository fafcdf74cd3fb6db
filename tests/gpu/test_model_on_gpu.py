"""The model on a GPU against the same on the CPU, and its attention in bf16 against the reference in float64."""

import dataclasses

import pytest
import torch

from shoal import Model, presets
from shoal.model.attention import hybrid_attention
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.net import Net
from shoal.model.reference import reference_attention
from shoal.model.router import Router
from shoal.train.loss import LossModel
from shoal.train.parallel import Ranks, shard_
from shoal.train.recompute import Recompute

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1200),  # kernels of each shape are compiled first
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
HOW = {"window": 32, "block": 4, "top_k": 8, "sinks": 1}


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative, in the 2-norm: a block chosen otherwise, at a tie in bf16, is one row of many."""
    return float((got.double().cpu() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("summary", ["mean", "mean_var"])
def test_forward_and_backward_equal_the_reference(dtype: torch.dtype, summary: str) -> None:
    g = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 256, h, 32, generator=g).to(dtype) for h in (8, 2, 2)]
    docs = torch.tensor([[0] * 90 + [1] * 166])
    exact = [x.double().requires_grad_() for x in drawn]
    want = reference_attention(*exact, **HOW, local_weight=0.7, docs=docs, summary=summary)
    wanted = torch.autograd.grad(want.square().sum(), exact)
    fast = [x.to(DEVICE, copy=True).requires_grad_() for x in drawn]
    got = hybrid_attention(*fast, **HOW, local_weight=0.7, docs=docs.to(DEVICE), summary=summary)
    found = torch.autograd.grad(got.square().sum(), fast)
    limit = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert got.dtype == dtype and got.device.type == DEVICE
    for a, b in zip([got, *found], [want, *wanted], strict=True):
        assert error(a, b.detach()) < limit


def test_a_net_trains_as_on_the_cpu() -> None:
    """Loss and all gradients in float64, through layers of each kind: by kernels here, under masks there."""
    c = dataclasses.replace(presets.get("test").model, attn_pattern="SHLD", dense_length=16, top_k=3)
    docs = torch.tensor([[0] * 30 + [1] * 66])
    tokens = torch.randint(20, 260, (1, 96), generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", DEVICE):
        net = Net(c).init_(0).double().to(device)
        hidden = net(tokens.to(device), docs=docs.to(device))[c.layers]
        loss = net.head(hidden, c.layers).log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None].to(device)).mean()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for want, got in zip(*found, strict=True):
        assert error(got, want) < 1e-8


@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_compiled_layers_train_as_they_do_alone(recompute: Recompute, caplog: pytest.LogCaptureFixture) -> None:
    """All gradients in float32, of layers of each kind, none of which the card's compiler refuses."""
    c = dataclasses.replace(presets.get("test").model, attn_pattern="SHLD", dense_length=16, top_k=3)
    docs = torch.tensor([[0] * 30 + [1] * 66], device=DEVICE)
    tokens = torch.randint(20, 260, (1, 96), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    found = []
    for compiled in (False, True):
        model = LossModel(Net(c).init_(0))
        shard_(model, Ranks(0, 1, torch.device(DEVICE)), recompute=recompute, compiled=compiled)
        hidden = model.net(tokens, docs=docs)[c.layers]
        model.net.head(hidden, c.layers).log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None]).mean().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert not [line for line in caplog.records if line.name == "shoal.train.compiled"]
    assert len(found[0]) == len(found[1])
    for want, got in zip(*found, strict=True):
        assert error(got, want.double().cpu()) < 1e-3


def test_scores_stay_exact_under_autocast() -> None:
    """Training in bf16 chooses the blocks that decoding will choose."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, h, 32, generator=g).to(DEVICE) for h in (8, 2, 2))
    plain = hybrid_attention(q, k, v, **HOW, local_weight=0.0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = hybrid_attention(q, k, v, **HOW, local_weight=0.0)
    assert error(cast, plain.double().cpu()) < 2e-2


@torch.no_grad()
def test_logits_and_pages_are_those_of_the_cpu() -> None:
    """By the kernels, which have no part in what takes gradients."""
    model, c = Model.from_preset("test", dtype="float64"), presets.get("test").model
    ids = torch.randint(9, 265, (90,), generator=torch.Generator().manual_seed(0))
    want = model.logits(ids)
    model.to(DEVICE)
    assert error(model.logits(ids), want) < 1e-9
    table = torch.arange(1, 13, device=DEVICE)[None]
    caches = [GroupCache.zeros(c, 13, torch.float64, DEVICE) for _ in model.net.groups]
    out = []
    for start, end in ((0, 37), *((t, t + 1) for t in range(37, 90))):
        at = torch.arange(start, end, device=DEVICE)
        step = PagedStep(at, table[0, at // c.page] * c.page + at % c.page, table, [0, end - start], c.page, c.block)
        x = model.net.embed_inputs(ids[start:end].to(DEVICE))
        for group, cache in zip(model.net.groups, caches, strict=True):
            x = group.paged(x, step, cache)
        out.append(model.net.head(x, c.layers))
    assert error(torch.cat(out), want) < 1e-9


def test_the_router_is_exact_where_fp32_is_tf32() -> None:
    model = Model.from_preset("test")
    torch.manual_seed(0)
    model.router = Router(model.config).requires_grad_(False)
    x = torch.randn(8, 2 * model.config.width + 3, generator=torch.Generator().manual_seed(0))
    want, got = model.router(x), model.on_gpu("float32").router(x.to(DEVICE))  # type: ignore[misc]
    assert torch.get_float32_matmul_precision() == "high"
    for there, here in zip(got, want, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-6)


def test_int8_on_a_gpu_is_the_arithmetic_of_the_cpu() -> None:
    model = Model.from_preset("test").quantized()
    ids = torch.randint(9, 265, (60,), generator=torch.Generator().manual_seed(0))
    want = model.logits(ids)
    on_gpu = Model.from_preset("test").quantized()
    on_gpu.to(DEVICE)
    # norms round otherwise there, and a level at a tie may then differ: a few levels of thousands
    assert error(on_gpu.logits(ids), want.double()) < 1e-2


@pytest.mark.parametrize("name", ["int_mm", "float"])
def test_int8_kernels_of_a_gpu_give_the_reference_to_the_bit(name: str) -> None:
    from shoal.model import int8

    assert int8.self_test(int8.KERNELS[name], DEVICE) is None
