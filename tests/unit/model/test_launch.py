"""What stands between torch and the kernels of a GPU, and needs none: how work is cut, and where each query's blocks lie. By
counting, document by document. What the kernels make of it is of tests/triton, and needs Triton."""

from __future__ import annotations

import itertools
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal.model.cache import PagedStep
from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.reach import ALL, Reach
from shoal.model.reference import reference_attention, reference_sparse

CPU = torch.device("cpu")
DOCS = torch.tensor([[0] * 7 + [1] * 23, [0] + [1] * 14 + [2] * 15])


def test_a_power_of_two_is_the_least_that_holds_a_size() -> None:
    sizes = (1, 15, 16, 17, 64, 65, 1000)
    assert [launch._power(size) for size in sizes] == [16, 16, 16, 32, 64, 128, 1024]
    assert [launch._power(size, 1) for size in sizes] == [1, 16, 16, 32, 64, 128, 1024]
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


def test_a_row_is_of_the_request_that_owns_it() -> None:
    for counts in ([1, 1, 1], [3, 1, 2], [4], [2, 1]):
        starts = [0, *itertools.accumulate(counts)]
        found = launch._requests(starts, CPU)
        assert found.tolist() == [r for r, count in enumerate(counts) for _ in range(count)]
        assert found.dtype == torch.int32


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


# ---- launches, by kernels that do in torch what their programs would, and where they stand


class Kernel:
    """`run` is called with the grid, as `kernel[grid](...)`."""

    def __init__(self, run: Any) -> None:
        self.run = run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **shape: self.run(grid, *given, **shape)


def norm(grid: Any, x: Any, added: Any, weight: Any, total: Any, out: Any, eps: float, **shape: Any) -> None:
    (rows,), width = grid, shape["D"]
    assert shape["WIDE"] == launch._power(width) and shape["num_warps"] == launch._warps(width)
    assert shape["EXACT"] == (x.dtype == torch.float64) and all(each.is_contiguous() for each in (x, added, total, out))
    for row in range(rows):
        at = slice(row * width, row * width + width)
        whole = x.view(-1)[at] + (added.view(-1)[at] if shape["ADDS"] else 0)
        if shape["ADDS"]:
            total.view(-1)[at] = whole
        out.view(-1)[at] = whole / (whole.square().mean() + eps).sqrt() * weight


def gate(grid: Any, both: Any, out: Any, **shape: Any) -> None:
    inner, tile = shape["F"], shape["TILE"]
    assert both.is_contiguous() and tile <= 1024 and tile & tile - 1 == 0
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
    kernels = SimpleNamespace(_norm=Kernel(norm), _swiglu=Kernel(gate))
    monkeypatch.setitem(sys.modules, "shoal.model.gpu.pointwise", kernels)
    monkeypatch.setattr("shoal.model.gpu.pointwise", kernels, raising=False)
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
    kernels = SimpleNamespace(_swiglu=Kernel(gate))
    monkeypatch.setitem(sys.modules, "shoal.model.gpu.pointwise", kernels)
    monkeypatch.setattr("shoal.model.gpu.pointwise", kernels, raising=False)
    both = torch.randn(2, 1, 2 * inner, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left, right = both.chunk(2, -1)
    torch.testing.assert_close(launch.swiglu(both), torch.nn.functional.silu(left) * right)
    assert launch.swiglu(both[:0]).shape == (0, 1, inner)


# ---- whole rows


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


@pytest.mark.parametrize("piece", [1, 3, 512])
def test_who_chose_each_block_is_listed(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "PIECE", piece)
    rows, heads, length, top_k, blocks = 2, 3, 20, 4, 5
    g = torch.Generator().manual_seed(1)
    numbers = torch.full((rows, heads, length, top_k), -1, dtype=torch.int32)
    for at in itertools.product(range(rows), range(heads), range(length)):
        many = int(torch.randint(0, top_k + 1, (), generator=g))
        some = torch.tensor([0, 1, 3, 4])[torch.randperm(4, generator=g)[:many]]  # the third is chosen by nobody
        numbers[at][:many] = some.sort().values
    order, offsets, of, begins = (each.tolist() for each in sparse.lists(numbers, blocks))
    pieces = 0
    for whose, (row, head, block) in enumerate(itertools.product(range(rows), range(heads), range(blocks))):
        wanted = [t for t in range(length) if block in numbers[row, head, t]]
        assert order[offsets[whose] : offsets[whose + 1]] == wanted
        assert begins[whose] == pieces
        assert of[pieces : pieces + -(-len(wanted) // piece)] == [whose] * -(-len(wanted) // piece)
        pieces += -(-len(wanted) // piece)
    assert begins[-1] == pieces <= len(of) and set(of[pieces:]) <= {-1}
    assert len(offsets) == len(begins) == rows * heads * blocks + 1
    first = torch.tensor([[0, 4, 8, 12, 16], [1, 5, 10, 14, 18]])
    runs = sparse._runs(numbers, first)
    for at in itertools.product(range(rows), range(heads), range(length), range(top_k)):
        assert runs[at] == (-1 if numbers[at] < 0 else first[at[0], numbers[at]])


def test_what_is_made_has_its_shape_and_type_before_any_kernel_runs() -> None:
    """By which torch compiles what calls them."""
    q, k = torch.zeros(2, 5, 6, 8, dtype=torch.bfloat16), torch.zeros(2, 5, 3, 8, dtype=torch.bfloat16)
    for out, lse in (sparse._like_near(q, k, k, k, 4), sparse._like_chosen(q, k, k)):
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (2, 5, 6), torch.float32)
    chosen = sparse._like_choose(q, torch.zeros(2, 4, 3, 8), k, k, 7, 1)
    assert (chosen.shape, chosen.dtype) == ((2, 3, 5, 7), torch.int32)
    for like in (sparse._like_near_back, sparse._like_chosen_back):
        assert [each.shape for each in like(q, k, k)] == [q.shape, k.shape, k.shape]


def test_what_is_taken_from_the_gradient_of_a_weight() -> None:
    out, gradient = torch.tensor([[[[1.0, 2.0]]]]), torch.tensor([[[[3.0, -1.0]]]])
    assert sparse._delta(out, gradient, torch.tensor([[[0.25]]])).tolist() == [[[0.75]]]
    assert sparse._delta(out, gradient, torch.zeros(1, 1, 1, dtype=torch.float64)).dtype == torch.float64


def test_rows_of_more_blocks_than_a_program_chooses_among_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "able", lambda _: True)
    x = torch.zeros(1, launch.MOST_BLOCKS * 2 + 1, 1)
    assert not sparse.usable(x, 2), "on a CPU"
    monkeypatch.setattr(launch, "ON", {"cpu"})
    assert sparse.usable(x, 2) and not sparse.usable(torch.cat([x, x[:, :1]], 1), 2)
    assert not sparse.usable(x.to(torch.int8), 2)
    monkeypatch.setattr(launch, "able", lambda _: False)
    assert not sparse.usable(x, 2)


# ---- attention of whole rows, by programs that do in torch what the kernels say


def near(
    grid: Any, q: Any, k: Any, v: Any, starts: Any, out: Any, lse: Any, length: int, window: int, **shape: Any
) -> None:
    assert all(each.is_contiguous() for each in (q, k, v, starts, out, lse))
    for tile, head, row in itertools.product(*map(range, grid)):
        for t in range(tile * shape["TALL"], min(length, (tile + 1) * shape["TALL"])):
            keys = range(max(int(starts[row, t]), t - window + 1), t + 1)
            read(q, k, v, (row, t, head), [*keys], out, lse, shape)


def read(q: Any, k: Any, v: Any, at: tuple[int, int, int], keys: list[int], out: Any, lse: Any, shape: Any) -> None:
    row, _, head = at
    own = head // shape["G"]
    z = (k[row, keys, own] @ q[at]) * shape["SCALE"]
    lse[at] = z.logsumexp(0) if keys else -1e30
    out[at] = z.softmax(0) @ v[row, keys, own] if keys else 0.0


def rate(
    grid: Any, q: Any, summaries: Any, ends: Any, many: Any, scores: Any, length: int, blocks: int, first: int, count: int,
    **shape: Any,
) -> None:  # fmt: skip
    """Scores of a strip of queries, EACH a program."""
    group, dim = shape["G"], shape["D"]
    assert shape["GROUP"] >= group and q.shape[1] == length and summaries.shape[1] == blocks
    for tile, kv_head, row in itertools.product(*map(range, grid)):
        for i in range(tile * shape["EACH"], min(count, (tile + 1) * shape["EACH"])):
            t, of = first + i, range(int(ends[row, first + i] - many[row, first + i]), int(ends[row, first + i]))
            mine = q[row, t, kv_head * group : (kv_head + 1) * group]
            found = summaries[row, of, kv_head]
            z = mine @ found[:, :dim].T * shape["SCALE"]
            if shape["VARIANCE"]:
                z += mine.square() @ found[:, dim:].T * shape["SCALE"] ** 2 / 2
            scores[row, kv_head, i, of] = z[0] if group == 1 else z.softmax(-1).sum(0)


def pick(
    grid: Any,
    scores: Any,
    ends: Any,
    many: Any,
    chosen: Any,
    length: int,
    blocks: int,
    first: int,
    count: int,
    **shape: Any,
) -> None:
    assert shape["TILE"] >= blocks and shape["WIDE"] >= shape["K"] and grid[0] == count and chosen.shape[2] == length
    for i, kv_head, row in itertools.product(*map(range, grid)):
        end, own = int(ends[row, first + i]), int(many[row, first + i])
        of = [*range(end - own, end)]
        rated = sorted(of[shape["SINKS"] :], key=lambda n: -float(scores[row, kv_head, i, n]))
        best = sorted((of[: shape["SINKS"]] + rated)[: shape["K"]])
        chosen[row, kv_head, first + i] = torch.tensor(best + [-1] * (shape["K"] - len(best)))


def forward(
    grid: Any, q: Any, k: Any, v: Any, runs: Any, tails: Any, out: Any, lse: Any, length: int, before: int, **shape: Any
) -> None:
    """Of what each query chose, and its tail; or of what of that lies before a window."""
    for at, kv_head in itertools.product(*map(range, grid)):
        row, t = divmod(at, length)
        keys = [place + i for place in runs[row, kv_head, t].tolist() if place >= 0 for i in range(shape["S"])]
        keys = [key for key in keys if key <= t - before] if before else [*keys, *range(int(tails[row, t]), t + 1)]
        for head in range(kv_head * shape["G"], (kv_head + 1) * shape["G"]):
            read(q, k, v, (row, t, head), keys, out, lse, shape)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kernels in (
        ("window", SimpleNamespace(_near=Kernel(near))),
        ("choice", SimpleNamespace(_rate=Kernel(rate), _pick=Kernel(pick))),
        ("training", SimpleNamespace(_forward=Kernel(forward))),
    ):
        monkeypatch.setitem(sys.modules, f"shoal.model.gpu.{name}", kernels)
        monkeypatch.setattr(f"shoal.model.gpu.{name}", kernels, raising=False)


def drawn(heads: int, kv_heads: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(heads)
    return [torch.randn(2, 30, h, 8, generator=g, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(("block", "heads", "window"), [(4, (2, 1), 5), (3, (4, 2), 3), (1, (2, 2), 4)])
def test_a_row_reads_its_window_and_what_it_chose(
    block: int, heads: tuple[int, int], window: int, variance: bool, in_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both branches under their shares; scores in strips, and wherever all blocks are read without any."""
    monkeypatch.setattr(sparse, "SCORED", 2 * heads[1] * (30 // block) * 16)
    given, share = drawn(*heads), torch.linspace(0.2, 0.8, heads[0], dtype=torch.float64)
    for top_k in (2, 40):
        how = {"window": window, "block": block, "top_k": top_k, "sinks": 1, "docs": DOCS}
        want = reference_attention(*given, **how, local_weight=share, summary="mean_var" if variance else "mean")  # type: ignore[arg-type]
        spans = Spans.packed(DOCS, block)
        got = sparse.attend(*given, spans, Reach(window, top_k, 1, share), variance)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    whole = sparse.attend(*given, spans, Reach(30, 40, 1, share), variance)
    torch.testing.assert_close(whole, sparse.attend(*given, spans, Reach(30, 0, 0, None)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(
    ("block", "window", "dense", "heads"), [(4, 5, 0, (2, 1)), (3, 4, 9, (3, 1)), (2, 2, 14, (2, 2)), (1, 1, 6, (1, 1))]
)
def test_a_row_of_a_sparse_layer_has_one_softmax_over_both(
    block: int, window: int, dense: int, heads: tuple[int, int], variance: bool, in_torch: None
) -> None:
    given, bias = drawn(*heads), torch.linspace(-1, 2, heads[0], dtype=torch.float64)
    how = {"window": window, "block": block, "top_k": 2, "sinks": 1, "dense_length": dense, "docs": DOCS}
    want = reference_sparse(*given, **how, bias=bias, summary="mean_var" if variance else "mean")  # type: ignore[arg-type]
    spans, reach = Spans.packed(DOCS, block, window, dense), Reach(window, 2, 1, None, bias, dense)
    torch.testing.assert_close(sparse.attend(*given, spans, reach, variance), want, rtol=0, atol=1e-12)
