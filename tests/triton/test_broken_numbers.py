"""NaN and infinity in what a kernel reads come out of it, as on a CPU, so that the sampler refuses the row. `tl.max` drops NaN,
so a level, a scale or a score that is taken from it alone would turn a broken model into a plausible one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.model import slots
from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.paged import write_kv
from shoal.model.quant import quantize_rows
from shoal.model.reach import Reach
from tests.triton.stored import store

pytestmark = pytest.mark.timeout(600)

BROKEN = [torch.nan, torch.inf, -torch.inf]
# what a GPU's arithmetic gives; the C library's NaN has other bits
GPU_NAN = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _int8(x: Tensor) -> Tensor:
    found: Tensor = launch.int8_product(*quantize_rows(drawn(5, x.shape[1])))(x)
    return found


ROWS: dict[str, Callable[[Tensor], Tensor]] = {  # kernels that give a row [O] of a row [I]
    "rms_norm": lambda x: launch.rms_norm(x, torch.ones(x.shape[1]), 1e-6),
    "add_norm": lambda x: launch.add_norm(x, torch.ones_like(x), torch.ones(x.shape[1]), 1e-6)[1],
    "swiglu": lambda x: launch.swiglu(torch.cat([torch.ones_like(x), x], dim=1)),
    "int8": _int8,
}


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("kernel", ROWS)
def test_a_broken_row_stays_broken_and_alone(kernel: str, value: float) -> None:
    x = drawn(3, 12)
    sound = ROWS[kernel](x.clone())
    x[1, 7] = value
    got = ROWS[kernel](x)
    assert not got[1].isfinite().all()
    assert torch.equal(got[[0, 2]], sound[[0, 2]])


@pytest.mark.parametrize("value", [*BROKEN, GPU_NAN])
def test_a_key_in_int8_is_broken_where_torch_stores_a_broken_one(value: float) -> None:
    case = store(1, [21, 8], [11, 1], dim=12, dtype=torch.float32, kv_dtype=torch.int8)
    k, v = drawn(len(case.q), 4, 12).split(2, dim=1)
    k[4, 1, 5] = value
    memories = [(case.kv.clone(), case.summaries.clone()) for _ in range(2)]
    launch.store(k, v, *memories[0], case.step)
    write_kv(k, v, *memories[1], case.step)
    got, want = (slots.decode(kv[case.step.slots // 8, :, case.step.slots % 8], torch.float32)[0] for kv, _ in memories)
    torch.testing.assert_close(got, want, equal_nan=True)
    assert got[4, 1].isnan().all() and got[[*range(4), *range(5, len(k))]].isfinite().all()


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("heads", [(2, 1), (1, 1)])
def test_a_query_with_a_broken_number_reads_nothing_sound(heads: tuple[int, int], value: float) -> None:
    """Its scores are broken in the choice of blocks too, and no block outside its document is named."""
    q, k, v = drawn(1, 30, heads[0], 8), drawn(1, 30, heads[1], 8), drawn(1, 30, heads[1], 8)
    q[0, 25, 0, 3] = value
    spans, reach = Spans.packed(torch.zeros(1, 30, dtype=torch.long), 4), Reach(4, 2, 1, torch.full((heads[0],), 0.5))
    got = sparse.attend(q, k, v, spans, reach)
    assert got[0, 25, 0].isnan().all()
    assert got[0, [*range(25), *range(26, 30)]].isfinite().all()
    chosen = sparse.choose(q, k, spans, reach)[0, :, 25]
    assert ((chosen >= 0) & (chosen < 30 // 4)).all()
