"""The model on a GPU against the same on the CPU, and its attention in bf16 against the reference in float64."""

import pytest
import torch

from shoal import Model, presets
from shoal.model.attention import hybrid_attention
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.reference import reference_attention

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
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
    fast = [x.cuda().requires_grad_() for x in drawn]
    got = hybrid_attention(*fast, **HOW, local_weight=0.7, docs=docs.cuda(), summary=summary)
    found = torch.autograd.grad(got.square().sum(), fast)
    limit = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    assert got.dtype == dtype and got.device.type == "cuda"
    for a, b in zip([got, *found], [want, *wanted], strict=True):
        assert error(a, b.detach()) < limit


def test_scores_stay_exact_under_autocast() -> None:
    """Training in bf16 chooses the blocks that decoding will choose."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 256, h, 32, generator=g).cuda() for h in (8, 2, 2))
    plain = hybrid_attention(q, k, v, **HOW, local_weight=0.0)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        cast = hybrid_attention(q, k, v, **HOW, local_weight=0.0)
    assert error(cast, plain.double().cpu()) < 2e-2


def test_logits_and_pages_are_those_of_the_cpu() -> None:
    model, c = Model.from_preset("test", dtype="float64"), presets.get("test").model
    ids = torch.randint(9, 265, (90,), generator=torch.Generator().manual_seed(0))
    want = model.logits(ids)
    model.net.cuda()
    assert error(model.logits(ids), want) < 1e-9
    table = torch.arange(1, 13, device="cuda")[None]
    caches = [GroupCache.zeros(c, 13, torch.float64, "cuda") for _ in model.net.groups]
    out = []
    for start, end in ((0, 37), *((t, t + 1) for t in range(37, 90))):
        at = torch.arange(start, end, device="cuda")
        step = PagedStep(at, table[0, at // c.page] * c.page + at % c.page, table, [0, end - start], c.page, c.block)
        x = model.net.embed_inputs(ids[start:end].cuda())
        for group, cache in zip(model.net.groups, caches, strict=True):
            x = group.paged(x, step, cache)
        out.append(model.net.head(x, c.layers))
    assert error(torch.cat(out), want) < 1e-9


def test_int8_on_a_gpu_is_the_arithmetic_of_the_cpu() -> None:
    model = Model.from_preset("test").quantized()
    ids = torch.randint(9, 265, (60,), generator=torch.Generator().manual_seed(0))
    want = model.logits(ids)
    on_gpu = Model.from_preset("test").quantized()
    on_gpu.net.cuda()
    # norms round otherwise there, and a level at a tie may then differ: a few levels of thousands
    assert error(on_gpu.logits(ids), want.double()) < 1e-2


@pytest.mark.parametrize("name", ["int_mm", "float"])
def test_int8_kernels_of_a_gpu_give_the_reference_to_the_bit(name: str) -> None:
    from shoal.model import int8

    assert int8.self_test(int8.KERNELS[name], "cuda") is None
