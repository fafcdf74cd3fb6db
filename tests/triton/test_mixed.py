"""Prompts beside requests that decode, through the kernels and torch, against the definitions in float64 (`reference.py`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.model import paged, reference
from shoal.model.cache import PagedStep, Rows
from shoal.model.gpu import launch
from shoal.model.reach import Reach
from tests.triton import mixed
from tests.triton.seen import Seen
from tests.triton.stored import Stored
from tests.triton.test_attention import whole

pytestmark = pytest.mark.timeout(600)  # the interpreter is slow, and so is a busy machine


def definition(case: Stored, request: int, reach: Reach) -> torch.Tensor:
    """[n, H, d] of the rows of a request."""
    q, k, v, asked = whole(case, request)
    how: dict[str, Any] = {"block": 4, "window": reach.window, "top_k": max(1, reach.top_k), "sinks": reach.sinks}
    if reach.bias is not None:
        return reference.reference_sparse(q, k, v, **how, bias=reach.bias, dense_length=reach.dense)[0, asked]
    share = 1.0 if reach.gamma is None else reach.gamma.double()
    return reference.reference_attention(q, k, v, **how, local_weight=share)[0, asked]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt has a few rows, and keys are cut alike however many rows a launch has."""
    monkeypatch.setattr(launch, "LONG", mixed.LONG)
    monkeypatch.setattr(launch, "_pieces", lambda programs, near, far: (2, 2 * (far > 0)))


@pytest.mark.parametrize("kind", mixed.REACHES)
@torch.no_grad()
def test_a_step_of_prompts_and_others_is_the_definition(kind: str, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch gathers keys of one prompt at a time, up to the last row that it reads them for, and asks for no place."""
    gathered, gather = list[tuple[int, int]](), paged._all
    monkeypatch.setattr(
        paged, "_all", lambda kv, reads, *given: (gathered.append(reads.shape[::2]), gather(kv, reads, *given))[1]
    )
    monkeypatch.setattr(Rows, "parted", None)
    case, reach = mixed.mixed(), mixed.REACHES[kind]
    got = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
    assert launch.shared(case.step, reach) == mixed.SHARED[kind]
    for r in range(len(mixed.NEW)):
        span = slice(*case.step.starts[r : r + 2])
        torch.testing.assert_close(got[span], definition(case, r, reach), atol=1e-12, rtol=0)
    lasts = [mixed.LENGTHS[r] - mixed.NEW[r] + count - 1 for r, count in mixed.SHARED[kind]]
    assert gathered == [(1, last // 8 + 1) for last in lasts]
    assert sum(len(given["q"]) for given in seen.given) == len(mixed.alone(kind))
    assert len(seen.given) == 1 + (kind in ("D", "H within its window")) * 2 + (kind == "S")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", mixed.REACHES)
@torch.no_grad()
def test_each_row_is_to_the_bit_what_it_is_in_other_company(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows by themselves as in a step of these alone, each with a table of its own; and prompts as in a step of torch's."""
    case, reach, rows = mixed.mixed(dtype), mixed.REACHES[kind], mixed.alone(kind)
    got = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
    tables, starts = case.step.tables[case.requests[rows]], [*range(len(rows) + 1)]
    apart = PagedStep(case.step.positions[rows], case.step.slots[rows], tables, starts, 8, 4)
    assert torch.equal(got[rows], launch.attend(case.q[rows], case.kv, case.summaries, apart, reach))
    monkeypatch.setattr(launch, "ON", set())
    for r, count in mixed.SHARED[kind]:
        some = slice(case.step.starts[r], case.step.starts[r] + count)
        prompt = PagedStep(
            case.step.positions[some], case.step.slots[some], case.step.tables[r : r + 1], [0, count], 8, 4
        )
        want = paged.paged_attention(case.q[some], case.kv, case.summaries, prompt, reach)
        assert torch.equal(got[some], want)
