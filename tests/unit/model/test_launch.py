"""What stands between torch and the kernels of a GPU, and needs none: where they are used, how work is cut, and the smaller
launches. What the kernels make of it is of tests/triton, and needs Triton."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shoal.model.cache import PagedStep
from shoal.model.gpu import launch, sparse
from shoal.model.reach import ALL, Reach
from tests.pretend_gpu import CPU, GPU, pretended
from tests.unit.model.launched import stand_in, written_down

META = torch.device("meta")


def test_a_power_of_two_is_the_least_that_holds_a_size() -> None:
    sizes = (1, 15, 16, 17, 64, 65, 1000)
    assert [launch._power(size) for size in sizes] == [16, 16, 16, 32, 64, 128, 1024]
    assert [launch._fit(size) for size in sizes] == [1, 16, 16, 32, 64, 128, 1024]
    assert [launch._warps(size) for size in (1, 512, 513, 1025, 8192, 8193, 10**6)] == [1, 1, 2, 4, 16, 16, 16]


@pytest.mark.parametrize("head", [8, 64, 65, 128, 256, 512])
def test_tiles_of_a_head_are_no_larger_than_what_lies_in_shared_memory(head: int) -> None:
    """64 keys of 64 numbers, and of wider heads as many numbers; 16 keys at least."""
    assert launch._tile(torch.zeros(1, head)) == {8: 64, 64: 64, 65: 32, 128: 32, 256: 16, 512: 16}[head]
    for kind in (torch.float64, torch.float32, torch.bfloat16):
        held, read = sparse._tiles(head, torch.zeros(1, dtype=kind))
        padded = max(16, 1 << (head - 1).bit_length()) * kind.itemsize
        most = 16 if kind == torch.float64 else 64
        assert held == max(16, min(most, 16384 // padded)) and read == max(16, min(most, 8192 // padded))


def test_one_program_holds_the_queries_or_the_keys() -> None:
    q, k = torch.zeros(2, 10, 6, 100), torch.zeros(2, 10, 2, 100)
    of_queries, of_keys = sparse._shape(q, k), sparse._shape(q, k, of_keys=True)
    assert of_queries == {
        "HEADS": 6, "KV_HEADS": 2, "G": 3, "D": 100, "WIDE": 128, "TALL": 32, "TILE": 16, "SCALE": 0.1,
        "PRECISION": "wide", "EXACT": False,
    }  # fmt: skip
    assert of_keys == of_queries | {"TALL": 16, "TILE": 32}
    reads = sparse._reads(q.double(), k, torch.zeros(2, 2, 10, 5, dtype=torch.int32), 4)
    assert reads == {name: value for name, value in of_queries.items() if name != "TALL"} | {
        "TILE": 16, "EXACT": True, "S": 4, "K": 5, "ROWS": 16,
    }  # fmt: skip


def test_keys_are_cut_into_enough_pieces_to_fill_a_device_and_none_is_short() -> None:
    for programs, near, far in itertools.product(
        (1, 2, 7, 64, 127, 128, 500), (1, 64, 500, 5000), (0, 1, 65, 2000, 4096)
    ):
        found = launch._pieces(programs, near, far)
        if programs >= launch.BUSY and near + far <= launch.MOST_KEYS:
            assert found == (1, int(far > 0)), "these fill a device by themselves"
            continue
        each = max(launch.LEAST_KEYS, -(-(near + far) * programs // launch.PROGRAMS))  # keys of a piece, at least
        assert found[0] == max(1, near // each) and bool(found[1]) == bool(far)
        for keys, count in zip((near, far), found, strict=True):
            assert count <= 1 or count * each <= keys < (count + 1) * each
        assert programs * sum(found) <= launch.PROGRAMS + 2 * programs


def test_a_row_is_of_the_request_that_owns_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each request has one, nothing is copied to the device."""
    copies, send = list[list[int]](), launch.sent
    monkeypatch.setattr(
        launch, "sent", lambda values, device: (copies.append(values.tolist()), send(values, device))[1]
    )
    assert [launch._requests(starts, META).device for starts in ([0, 1, 2], [0, 2])] == [META] * 2
    copies.clear()
    for counts in ([1, 1, 1], [3, 1, 2], [4], [2, 1]):
        starts = [0, *itertools.accumulate(counts)]
        found = launch._requests(starts, CPU)
        assert found.tolist() == [r for r, count in enumerate(counts) for _ in range(count)]
        assert found.dtype == torch.int32
    assert copies == [[0, 0, 0, 1, 2, 2], [0, 0, 0, 0], [0, 0, 1]]


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


def test_what_kernels_of_attention_have_in_common() -> None:
    q, kv, summaries = torch.zeros(3, 4, 10), torch.zeros(5, 2, 8, 20), torch.zeros(5, 2, 2, 20)
    shape = launch._shape(q, kv, summaries, step_of([1, 1, 1], 6), Reach(8, 3, 1, None, torch.zeros(4)))
    assert shape == {
        "G": 2, "HEADS": 4, "KV_HEADS": 2, "D": 10, "WIDE": 16, "PAGED": 2, "S": 4, "K": 3, "BEYOND": True, "VARIANCE": True,
        "ROWS": 16, "TILE": 64, "SCALE": pytest.approx(10**-0.5), "EXACT": False,
    }  # fmt: skip
    shape = launch._shape(q.double(), kv, summaries[..., :10], step_of([1] * 3, 6), Reach(8, 12, 1, torch.zeros(4)))
    assert (shape["BEYOND"], shape["VARIANCE"], shape["ROWS"], shape["EXACT"]) == (False, False, 2, True)
    assert launch._shape(q, kv, summaries, step_of([1] * 3, 6), Reach(8, 12, 1, None))["K"] == 0, "the window alone"
    assert [launch._blocks(n) for n in (1, 256, 257, 1024, 4096, 4097, 2**14)] == [
        256,
        256,
        1024,
        1024,
        4096,
        2**14,
        2**14,
    ]


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


def test_triton_is_there_if_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for found in (None, object()):
        monkeypatch.setattr(launch, "find_spec", {"triton": found}.get)
        assert launch.installed.__wrapped__() is bool(found)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[list[dict[str, Any]]]:
    """What is launched on a GPU of the least capability with Triton, of which nothing is known yet."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(launch, "installed", lambda: True)
    monkeypatch.setattr(launch, "GIVEN_UP", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    launch._tried.cache_clear()
    with pretended():
        yield written_down(monkeypatch, "pointwise")
    launch._tried.cache_clear()


def test_a_gpu_that_runs_a_small_kernel_runs_them_all(tried: list[dict[str, Any]]) -> None:
    """Asked for once; until one is refused there."""
    assert [launch.able(GPU) for _ in range(2)] == [True, True]
    assert [(each["name"], each["grid"], each["x"].device, each["eps"]) for each in tried] == [
        ("_norm", (1,), GPU, 0.0)
    ]
    assert tried[0]["x"].shape == (1, 16) == (1, *tried[0]["weight"].shape)
    launch.GIVEN_UP.add(GPU)
    assert launch.able(GPU) is False


def test_an_interpreter_is_not_tried_nor_what_has_no_triton(
    tried: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert launch.able(CPU) is True, "it is for tests alone, where Triton's interpreter runs"
    launch._tried.cache_clear()
    monkeypatch.setattr(launch, "installed", lambda: False)
    assert launch.able(CPU) is launch.able(GPU) is False
    assert tried == [] == caplog.records


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
    tried: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def norm(*_: Any, **__: Any) -> None:
        if fault is not None:
            raise fault

    stand_in(monkeypatch, "pointwise", _norm=norm)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert [launch.able(GPU) for _ in range(2)] == [False, False] and launch._tried(GPU) is False
    wanted = f"decoding and training on cuda:0 go on without Triton's kernels: {said}"
    assert [record.getMessage() for record in caplog.records] == [wanted]


def of_triton(module: str) -> Exception:
    return type("CompilationError", (Exception,), {"__module__": module})("out of resource: shared memory")


def test_kernels_are_given_up_where_one_is_refused_and_for_nothing_else(
    tried: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
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


def test_what_is_computed_in_is_fp32_or_better_and_products_are_what_torch_s_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of fp32 in TF32 where torch's are; scores of blocks in what is near fp32. An interpreter has no product in bf16."""
    assert [launch.fp(kind) for kind in launch.TYPES] == [*[torch.float32] * 3, torch.float64]
    with pretended() as gpu:
        x = torch.zeros(1, device=gpu)
        for allowed in (True, False):
            monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
            assert [launch._precision(each) for each in (x, x.bfloat16())] == ["tf32" if allowed else "ieee", "ieee"]
        assert sparse._nearly_fp32(x) == "tf32x3"
    assert launch._precision(torch.zeros(1)) == sparse._nearly_fp32(torch.zeros(1)) == "wide"


# ---- launches, by kernels that do in torch what their programs would


def norm(grid: Any, x: Any, added: Any, weight: Any, total: Any, out: Any, eps: float, **shape: Any) -> None:
    (rows,), width = grid, shape["D"]
    assert shape["WIDE"] == launch._power(width) and shape["num_warps"] == launch._warps(width)
    assert all(each.is_contiguous() for each in (x, added, total, out))
    for row in range(rows):
        at = slice(row * width, row * width + width)
        whole = x.view(-1)[at] + (added.view(-1)[at] if shape["ADDS"] else 0)
        if shape["ADDS"]:
            total.view(-1)[at] = whole
        out.view(-1)[at] = whole / (whole.square().mean() + eps).sqrt() * weight


def gate(grid: Any, both: Any, out: Any, **shape: Any) -> None:
    inner, tile = shape["F"], shape["TILE"]
    assert both.is_contiguous() and tile <= 1024 and (grid[1] - 1) * tile < inner
    for row, piece in itertools.product(*map(range, grid)):
        some = range(piece * tile, min(inner, piece * tile + tile))
        for at in some:
            up = both.view(-1)[row * 2 * inner + inner + at]
            z = both.view(-1)[row * 2 * inner + at]
            out.view(-1)[row * inner + at] = z * torch.sigmoid(z) * up


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 20), (0, 4)])
def test_norms_are_launched_for_each_row(
    shape: tuple[int, ...], kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, "pointwise", _norm=norm)
    g = torch.Generator().manual_seed(1)
    x, added = (torch.randn(*shape[:-1], 2 * shape[-1], generator=g, dtype=kind)[..., ::2] for _ in range(2))
    weight = torch.rand(shape[-1], generator=g, dtype=kind)

    def by_hand(whole: torch.Tensor) -> torch.Tensor:
        return whole / (whole.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight

    torch.testing.assert_close(launch.rms_norm(x, weight, 0.5), by_hand(x))
    total, out = launch.add_norm(x, added, weight, 0.5)
    torch.testing.assert_close((total, out), (x + added, by_hand(x + added)))


@pytest.mark.parametrize("inner", [1, 20, 1024, 1500])
def test_a_gate_is_launched_for_each_number(inner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "pointwise", _swiglu=gate)
    both = torch.randn(2, 1, 2 * inner, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = both.chunk(2, -1)
    torch.testing.assert_close(launch.swiglu(both), torch.nn.functional.silu(left) * right)
    assert launch.swiglu(both[:0]).shape == (0, 1, inner)
