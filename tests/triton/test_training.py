"""The global branch of training in Triton against the definition in float64, gradients too."""

from __future__ import annotations

import pytest
import torch

from shoal.model import attention
from shoal.model.attention import hybrid_attention
from shoal.model.gpu import sparse
from shoal.model.reference import reference_attention

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine

HOW = {"window": 4, "top_k": 2, "sinks": 1}


@pytest.mark.parametrize(("dtype", "off"), [(torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 2**-4)])
@pytest.mark.parametrize(("block", "heads"), [(4, (2, 1)), (3, (3, 1)), (1, (2, 2))])
def test_outputs_and_gradients_are_those_of_the_definition(
    block: int, heads: tuple[int, int], dtype: torch.dtype, off: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of other lengths in a row, groups, incomplete last blocks. In the 2-norm: at a tie in bf16 a choice may
    differ."""
    g = torch.Generator().manual_seed(block)
    drawn = [
        torch.randn(1, 30, h, 8, generator=g, dtype=torch.float64).to(dtype) for h in (heads[0], heads[1], heads[1])
    ]
    weight = torch.randn(1, 30, heads[0], 8, generator=g, dtype=torch.float64)
    docs = torch.tensor([[0] * 7 + [1] * 23])
    exact = [x.double().requires_grad_() for x in drawn]
    want = reference_attention(*exact, block=block, **HOW, local_weight=0.4, docs=docs)
    wanted = torch.autograd.grad((want * weight).sum(), exact)
    calls, kernel = [], sparse.attend
    monkeypatch.setattr(attention.sparse, "attend", lambda *args: (calls.append(1), kernel(*args))[1])
    fast = [x.requires_grad_() for x in drawn]
    got = hybrid_attention(*fast, block=block, **HOW, local_weight=0.4, docs=docs)
    found = torch.autograd.grad((got * weight.to(dtype)).sum(), fast)
    assert calls and got.dtype == dtype
    for a, b in zip([got, *found], [want, *wanted], strict=True):
        assert (a.double() - b).norm() <= off * b.norm()


def test_short_rows_are_left_to_torch() -> None:
    """Where reading all costs little more."""
    q = torch.zeros(1, 64, 2, 8)
    assert sparse.usable(q, 64, 32) and not sparse.usable(q, 64, 33) and not sparse.usable(q, 65, 8)
    with torch.no_grad():
        assert not sparse.usable(q, 64, 8)
