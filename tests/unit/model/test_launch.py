"""What stands between torch and the kernels of a GPU, and needs none: where they are used, which rows are left to torch, and
where the blocks of whole rows lie. Launches and kernels are tested together in tests/triton, in Triton's interpreter."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.model import paged
from shoal.model.cache import PagedStep, Rows
from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.reach import ALL, Reach
from tests.pretend_gpu import GPU, pretended

META = torch.device("meta")


def step_of(counts: list[int], pages: int, page: int = 8, block: int = 4) -> PagedStep:
    starts = [0, *itertools.accumulate(counts)]
    rows = torch.zeros(starts[-1], dtype=torch.long)
    return PagedStep(rows, rows, torch.zeros(len(counts), pages, dtype=torch.long), starts, page, block)


def test_requests_whose_many_new_tokens_read_all_before_them_are_left_to_torch_and_no_others() -> None:
    """Not even beside such a one: what decodes would be gathered with all others, each padded to the longest."""
    gamma = torch.zeros(2)
    far, local, dense = Reach(8, 2, 1, gamma), Reach(8, 0, 0, None), Reach(1, 0, 0, None, dense=ALL)
    for reach in (far, local, dense):
        assert launch.attends(step_of([1, 17], 40), reach)
        assert launch.shared(step_of([1, 16], 40), reach) == [], "no more than 16 tokens of one request"
        assert launch.shared(step_of([1, 17, 5, 20], 1), reach) == [(1, 17), (3, 20)], "8 keys: a window is all of them"
    assert launch.shared(step_of([17], 40), far) == launch.shared(step_of([17], 40), local) == []
    assert launch.shared(step_of([17], 40), dense) == [(0, 17)]
    most = launch.MOST_BLOCKS
    assert launch.attends(step_of([1], most, 8, 8), far) and not launch.attends(step_of([1], most + 1, 8, 8), far)
    assert launch.attends(step_of([1], most + 1, 8, 8), local), "nothing is chosen"


# ---- where they are used


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def test_what_no_kernel_takes_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch compiles, watches or wants gradients, on other devices, and of other types."""
    monkeypatch.setattr(launch, "able", lambda device: True)
    x = torch.zeros(2)
    with torch.no_grad():
        assert launch.usable(x) is False, "on a CPU"
        monkeypatch.setattr(launch, "ON", {"cpu"})
        assert [launch.usable(x.to(kind)) for kind in launch.TYPES] == [True] * 4
        assert not launch.usable(x.to(torch.int8))
        with Watching():
            assert not launch.usable(x)
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            assert launch.usable(x) is False
        with torch.enable_grad():
            assert not launch.usable(x)
        monkeypatch.setattr(launch, "able", lambda device: False)
        assert not launch.usable(x)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[list[torch.Tensor]]:
    """What a small kernel is launched on, on a GPU of the least capability with Triton, of which nothing is known yet."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(launch, "installed", lambda: True)
    monkeypatch.setattr(launch, "GIVEN_UP", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    launch._tried.cache_clear()
    with pretended():
        found = list[torch.Tensor]()
        monkeypatch.setattr(launch, "rms_norm", lambda x, weight, eps: found.append(x))
        yield found
    launch._tried.cache_clear()


def test_a_gpu_that_runs_a_small_kernel_runs_them_all(tried: list[torch.Tensor]) -> None:
    """Asked for once; until one is refused there."""
    assert [launch.able(GPU) for _ in range(2)] == [True, True]
    assert [each.device for each in tried] == [GPU]
    launch.GIVEN_UP.add(GPU)
    assert launch.able(GPU) is False


@pytest.mark.parametrize(
    ("capability", "hip", "fault", "said"),
    [
        ((7, 5), None, None, "they are for NVIDIA's devices from sm_80 on"),
        ((9, 0), "6.4", None, "they are for NVIDIA's devices from sm_80 on"),
        ((9, 0), None, RuntimeError("Failed to find C compiler.\nPlease specify one"), "Failed to find C compiler."),
    ],
)
def test_a_gpu_that_runs_none_is_told_once(
    capability: tuple[int, int],
    hip: str | None,
    fault: Exception | None,
    said: str,
    tried: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def norm(*_: Any, **__: Any) -> None:
        if fault is not None:
            raise fault

    monkeypatch.setattr(launch, "rms_norm", norm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert [launch.able(GPU) for _ in range(2)] == [False, False] and launch._tried(GPU) is False
    wanted = f"decoding and training on cuda:0 go on without Triton's kernels: {said}"
    assert [record.getMessage() for record in caplog.records] == [wanted]


def of_triton(module: str) -> Exception:
    return type("CompilationError", (Exception,), {"__module__": module})("out of resource: shared memory")


def test_kernels_are_given_up_where_one_is_refused_and_for_nothing_else(
    tried: list[torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """By Triton, or by the compiler below it; told once a device."""
    others = [of_triton("tritonish.errors"), of_triton("other.triton"), RuntimeError("CUDA error: an illegal address")]
    for error in others:
        assert launch.refused(error) is False
        with pytest.raises(type(error)):
            launch.give_up(GPU, error)
    assert not launch.GIVEN_UP and not caplog.records
    for error in (of_triton("triton.compiler.errors"), RuntimeError("PassManager::run failed"), of_triton("triton")):
        assert launch.refused(error)
        launch.give_up(GPU, error)
    assert {GPU} == launch.GIVEN_UP and len(caplog.records) == 1
    assert caplog.records[0].getMessage().endswith("without Triton's kernels: out of resource: shared memory")
    launch.give_up(torch.device("cuda:1"), of_triton("triton"))
    assert len(launch.GIVEN_UP) == 2 == len(caplog.records)


# ---- which rows are left to torch, and where blocks of whole rows lie


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values, and those of the CPU, take the way of a GPU's."""
    monkeypatch.setattr(launch, "ON", {"cpu", "meta"})
    monkeypatch.setattr(launch, "able", lambda device: True)


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Requests and pages of each gather of keys and values."""
    found, gather = list[tuple[int, int]](), paged._all
    monkeypatch.setattr(
        paged, "_all", lambda kv, reads, *given: (found.append(reads.shape[::2]), gather(kv, reads, *given))[1]
    )
    return found


@pytest.mark.parametrize(
    ("reach", "pages"),
    [
        (Reach(ALL, 0, 0, None, dense=ALL), 1024),
        (Reach(512, 64, 1, None, torch.zeros(32, device="meta"), dense=32256), 1008),
        (Reach(512, 64, 1, None, torch.zeros(32, device="meta"), dense=4096), None),
        (Reach(512, 64, 1, torch.zeros(32, device="meta")), None),
    ],
)
@torch.inference_mode()
def test_beside_a_prompt_of_32k_nothing_is_gathered_for_who_decodes(
    reach: Reach, pages: int | None, on: None, gathered: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """63 rows of 1 to 2k tokens, sizes of a model of 8 billion. Tensors on meta have no values, so no place is waited for."""
    monkeypatch.setattr(launch, "_attend", lambda *given: None)  # nothing is computed
    ends, starts = [*range(1000, 1063), 32767], [*range(64), 63 + 1024]
    rows = Rows(torch.zeros(starts[-1], dtype=torch.long, device="meta"), starts, 32, 32, ends=ends)
    tables = torch.zeros(64, 1024, dtype=torch.long, device="meta")
    step = PagedStep(rows.positions, rows.positions, tables, starts, 32, 32, shared=rows)
    kv = torch.zeros(70000, 8, 32, 256, dtype=torch.bfloat16, device="meta")
    q = torch.zeros(starts[-1], 32, 128, dtype=torch.bfloat16, device="meta")
    assert paged.paged_attention(q, kv, kv[:, :, :1, :128].float(), step, reach).shape == q.shape
    assert gathered == ([(1, pages)] if pages else []), "of 64 requests at 32k it would be 8.6 GB"


def test_of_a_prompt_in_a_sparse_layer_the_rows_before_its_dense_length_are_left_to_torch() -> None:
    """Where these are more than 16. The host knows where requests end, and no place is read: on meta that raises."""
    step, counts = step_of([1, 30, 30, 17, 20], 40), [0, 1, 31, 61, 78, 98]
    step.shared = Rows(step.positions.to("meta"), counts, 8, 4, ends=[300, 76, 80, 79, 19])
    first = [(1, 17), (4, 20)]  # from 47 on 17 of 64; from 51 on 13, from 63 on one
    for _ in range(2):
        assert launch.shared(step, Reach(8, 2, 1, None, torch.zeros(2), dense=64)) == first
    for dense in (24, 63):  # of the second request none, and 16
        assert launch.shared(step, Reach(8, 2, 1, None, torch.zeros(2), dense=dense)) == first[1:]
    assert launch.shared(step, Reach(8, 2, 1, None, torch.zeros(2), dense=320)) == [(1, 30), (2, 30), (3, 17), (4, 20)]


DOCS = torch.tensor([[0] * 7 + [1] * 23, [0] + [1] * 14 + [2] * 15])


@pytest.mark.parametrize("block", [1, 3, 4, 8])
@pytest.mark.parametrize(("window", "dense"), [(1, 0), (4, 0), (6, 5), (9, 12)])
def test_spans_are_what_counting_document_by_document_gives(block: int, window: int, dense: int) -> None:
    window = max(window, block)
    spans = Spans.packed(DOCS, block, window, dense)
    for row, docs in enumerate(DOCS.tolist()):
        blocks = list[int]()  # where each complete one begins
        for t, doc in enumerate(docs):
            start = docs.index(doc)
            place, length = t - start, docs.count(doc)
            if place % block == block - 1:
                blocks.append(t - block + 1)
            own = [each for each in blocks if each >= start]
            assert (spans.positions[row, t], spans.starts[row, t]) == (place, start)
            assert (spans.ends[row, t], spans.many[row, t]) == (len(blocks), len(own))
            assert spans.tails[row, t] == start + len(own) * block
            of = start + place // block * block  # its block's first token
            whole = of + block <= start + length
            number = len(blocks) - (place % block == block - 1) if whole else -1
            assert spans.block_of[row, t] == number
            low = start if place < dense else max(start, t - window + 1)
            assert spans.low[row, t] == low
            few = 0 if place < dense else sum(each < low for each in own)
            assert (spans.few[row, t], spans.few_ends[row, t]) == (few, len(blocks) - len(own) + few)
        assert spans.first[row, : len(blocks)].tolist() == blocks
    for name, tensor in vars(spans).items():
        assert name in ("block", "positions") or (tensor.dtype == torch.int32 and tensor.is_contiguous()), name


def test_rows_of_more_blocks_than_a_program_chooses_among_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "able", lambda _: True)
    x = torch.zeros(1, launch.MOST_BLOCKS * 2 + 1, 1)
    assert not sparse.usable(x, 2), "on a CPU"
    monkeypatch.setattr(launch, "ON", {"cpu"})
    assert sparse.usable(x, 2) and not sparse.usable(torch.cat([x, x[:, :1]], 1), 2)
    assert not sparse.usable(x.to(torch.int8), 2)
    monkeypatch.setattr(launch, "able", lambda _: False)
    assert not sparse.usable(x, 2)
