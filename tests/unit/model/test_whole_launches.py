"""Attention over whole rows: where each query's blocks lie, by counting, document by document; and what launches its kernels,
forward and backward, on programs that do in torch what each kernel says. Against the definition, and its gradients. The kernels
themselves are of tests/triton."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from shoal.model.gpu import launch, sparse
from shoal.model.gpu.sparse import Spans
from shoal.model.reach import Reach
from shoal.model.reference import reference_attention, reference_sparse
from tests.pretend_gpu import OnGpu, pretended, waited
from tests.unit.model.launched import stand_in, written_down

DOCS = torch.tensor([[0] * 7 + [1] * 23, [0] + [1] * 14 + [2] * 15])
META = torch.device("meta")


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
    assert (grid[0] - 1) * shape["TALL"] < length
    for tile, head, row in itertools.product(*map(range, grid)):
        for t in range(tile * shape["TALL"], min(length, (tile + 1) * shape["TALL"])):
            read(q, k, v, (row, t, head), seen(starts, row, t, window), out, lse, shape)


def seen(starts: Any, row: int, t: int, window: int) -> list[int]:
    """The keys of the query at t."""
    return [*range(max(int(starts[row, t]), t - window + 1), t + 1)]


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
    assert (grid[0] - 1) * shape["EACH"] < count and scores.dtype == summaries.dtype
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
    assert shape["num_warps"] == launch._warps(blocks)
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
        keys = listed(runs, tails, (row, t, kv_head), before, shape)
        for head in range(kv_head * shape["G"], (kv_head + 1) * shape["G"]):
            read(q, k, v, (row, t, head), keys, out, lse, shape)


def listed(runs: Any, tails: Any, at: tuple[int, int, int], before: int, shape: Any) -> list[int]:
    """The keys of what a query chose."""
    row, t, kv_head = at
    assert runs.shape[-1] == shape["K"] and shape["ROWS"] >= shape["G"]
    keys = [place + i for place in runs[row, kv_head, t].tolist() if place >= 0 for i in range(shape["S"])]
    return [key for key in keys if key <= t - before] if before else [*keys, *range(int(tails[row, t]), t + 1)]


def pulls(q: Any, k: Any, v: Any, lse: Any, delta: Any, gradient: Any, at: Any, keys: list[int], shape: Any) -> Any:
    """Weights of the `keys` [n] of the query and head at (row, t, head), and the gradients of their scores [n]."""
    row, _, own = *at[:2], at[2] // shape["G"]
    p = ((k[row, keys, own] @ q[at]) * shape["SCALE"] - lse[at]).exp()
    return p, p * (v[row, keys, own] @ gradient[at] - delta[at]) * shape["SCALE"]


def near_to_q(
    grid: Any, q: Any, k: Any, v: Any, starts: Any, lse: Any, delta: Any, gradient: Any, to: Any, length: int, window: int,
    **shape: Any,
) -> None:  # fmt: skip
    assert gradient.is_contiguous() and (grid[0] - 1) * shape["TALL"] < length
    for tile, head, row in itertools.product(*map(range, grid)):
        for t in range(tile * shape["TALL"], min(length, (tile + 1) * shape["TALL"])):
            keys = seen(starts, row, t, window)
            to[row, t, head] = (
                pulls(q, k, v, lse, delta, gradient, (row, t, head), keys, shape)[1] @ k[row, keys, head // shape["G"]]
            )


def near_to_kv(
    grid: Any, q: Any, k: Any, v: Any, starts: Any, lse: Any, delta: Any, gradient: Any, to_k: Any, to_v: Any, length: int,
    window: int, **shape: Any,
) -> None:  # fmt: skip
    """A tile of keys a program, of all queries that see one of them."""
    assert (grid[0] - 1) * shape["TILE"] < length
    for tile, kv_head, row in itertools.product(*map(range, grid)):
        mine = range(tile * shape["TILE"], min(length, (tile + 1) * shape["TILE"]))
        to_k[row, mine, kv_head] = to_v[row, mine, kv_head] = 0.0
        for t, g in itertools.product(range(mine.start, length), range(shape["G"])):
            at, keys = (row, t, kv_head * shape["G"] + g), [key for key in seen(starts, row, t, window) if key in mine]
            p, pull = pulls(q, k, v, lse, delta, gradient, at, keys, shape)
            to_k[row, keys, kv_head] += pull[:, None] * q[at]
            to_v[row, keys, kv_head] += p[:, None] * gradient[at]


def to_q(
    grid: Any, q: Any, k: Any, v: Any, runs: Any, tails: Any, lse: Any, delta: Any, gradient: Any, to: Any, length: int,
    before: int, **shape: Any,
) -> None:  # fmt: skip
    assert gradient.is_contiguous()
    for at, kv_head in itertools.product(*map(range, grid)):
        row, t = divmod(at, length)
        keys = listed(runs, tails, (row, t, kv_head), before, shape)
        for head in range(kv_head * shape["G"], (kv_head + 1) * shape["G"]):
            to[row, t, head] = (
                pulls(q, k, v, lse, delta, gradient, (row, t, head), keys, shape)[1] @ k[row, keys, kv_head]
            )


def to_pieces(
    grid: Any, q: Any, k: Any, v: Any, lse: Any, delta: Any, gradient: Any, first: Any, order: Any, offsets: Any, of: Any,
    begins: Any, to_k: Any, to_v: Any, length: int, blocks: int, before: int, **shape: Any,
) -> None:  # fmt: skip
    """What PIECE of the queries that chose a block give to its keys; what no piece is stays as it was."""
    assert shape["TALL"] >= shape["S"] and shape["ROWS"] >= shape["G"] and first.shape[1] == blocks
    to_k.fill_(math.nan), to_v.fill_(math.nan)
    for piece in range(*grid):
        if (whose := int(of[piece])) < 0:
            continue
        kv_head, row = whose // blocks % shape["KV_HEADS"], whose // blocks // shape["KV_HEADS"]
        start = int(offsets[whose]) + (piece - int(begins[whose])) * shape["PIECE"]
        place = int(first[row, whose % blocks])
        to_k[piece], to_v[piece] = 0.0, 0.0
        for t in order[start : min(int(offsets[whose + 1]), start + shape["PIECE"])].tolist():
            keys = [key for key in range(place, place + shape["S"]) if key <= t - before]
            for head in range(kv_head * shape["G"], (kv_head + 1) * shape["G"]):
                p, pull = pulls(q, k, v, lse, delta, gradient, (row, t, head), keys, shape)
                to_k[piece, : len(keys)] += pull[:, None] * q[row, t, head]
                to_v[piece, : len(keys)] += p[:, None] * gradient[row, t, head]


def to_kv(
    grid: Any, q: Any, k: Any, v: Any, tails: Any, lse: Any, delta: Any, gradient: Any, block_of: Any, first: Any, begins: Any,
    pieces_k: Any, pieces_v: Any, to_k: Any, to_v: Any, length: int, blocks: int, before: int, **shape: Any,
) -> None:  # fmt: skip
    """A tile of keys a program: of queries that read them as their tail, and of the pieces of their block."""
    assert (grid[0] - 1) * shape["TILE"] < length
    for tile, kv_head, row in itertools.product(*map(range, grid)):
        for key in range(tile * shape["TILE"], min(length, (tile + 1) * shape["TILE"])):
            sums = [torch.zeros_like(to_k[row, key, kv_head]) for _ in range(2)]
            readers = [t for t in range(key, min(length, key + shape["S"])) if not before and tails[row, t] <= key]
            for t, g in itertools.product(readers, range(shape["G"])):
                at = (row, t, kv_head * shape["G"] + g)
                p, pull = pulls(q, k, v, lse, delta, gradient, at, [key], shape)
                sums[0] += pull * q[at]
                sums[1] += p * gradient[at]
            if (block := int(block_of[row, key])) >= 0:
                slot, whose = key - int(first[row, block]), (row * shape["KV_HEADS"] + kv_head) * blocks + block
                for piece in range(int(begins[whose]), int(begins[whose + 1])):
                    sums[0] += pieces_k[piece, slot]
                    sums[1] += pieces_v[piece, slot]
            to_k[row, key, kv_head], to_v[row, key, kv_head] = sums


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "window", _near=near, _near_to_q=near_to_q, _near_to_kv=near_to_kv)
    stand_in(monkeypatch, "choice", _rate=rate, _pick=pick)
    stand_in(monkeypatch, "training", _forward=forward, _to_q=to_q, _to_pieces=to_pieces, _to_kv=to_kv)


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


GRADED = {
    "the window": Reach(5, 0, 0, None),
    "both": Reach(5, 2, 1, torch.tensor([0.3, 0.6], dtype=torch.float64)),
    "one softmax": Reach(5, 2, 1, None, torch.tensor([0.5, -1.0], dtype=torch.float64), 6),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # where the definition sorts
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", GRADED)
def test_gradients_are_those_of_the_definition(
    kind: str, kv_heads: int, in_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To q, k, v and the gate, of blocks that more queries chose than one program adds up."""
    monkeypatch.setattr(sparse, "PIECE", 3)
    reach, dense = GRADED[kind], GRADED[kind].dense
    gate = [each.clone() for each in (reach.gamma, reach.bias) if each is not None]
    given = [each.requires_grad_() for each in (*drawn(2, kv_heads), *gate)]
    q, k, v, *gate = given
    how = {"window": 5, "block": 4, "sinks": 1, "docs": DOCS, "summary": "mean_var"}
    if kind == "one softmax":
        ours = Reach(5, 2, 1, None, gate[0], dense)
        want = reference_sparse(q, k, v, **how, top_k=2, bias=gate[0], dense_length=dense)  # type: ignore[arg-type]
    else:
        ours = Reach(5, reach.top_k, 1, *(gate or [None]))
        want = reference_attention(q, k, v, **how, top_k=2, local_weight=gate[0] if gate else 1.0)  # type: ignore[arg-type]
    got = sparse.attend(q, k, v, Spans.packed(DOCS, 4, 5, dense), ours, True)
    weight = torch.randn(got.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weight.transpose(0, 1).contiguous().transpose(0, 1)  # a gradient lies in any order
    for one, other in zip(*(torch.autograd.grad((x * weight).sum(), given) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_under_autocast_what_is_read_is_rounded_and_the_choice_is_made_of_what_is_not(
    in_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As decoding chooses."""
    q, k, v = (each.float() for each in drawn(2, 1))
    rated, choose = list[Any](), sparse.choose
    monkeypatch.setattr(sparse, "choose", lambda *given: (rated.append((given, choose(*given))), rated[-1][1])[1])
    spans, reach = Spans.packed(DOCS, 4, 5, 6), Reach(5, 2, 1, None, torch.tensor([0.5, -1.0]), 6)
    want = sparse.attend(q, k, v, spans, reach)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sparse.attend(q, k, v, spans, reach)
    assert got.dtype == torch.bfloat16 and want.dtype == torch.float32
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.05)
    (plain, first), (cast, second) = rated
    assert torch.equal(first, second) and [each.dtype for each in (*plain[:2], *cast[:2])] == [torch.float32] * 4


@pytest.mark.parametrize(
    ("scored", "heads", "wanted"),
    [
        (2**25, 4, (8, 100)),
        (14000, 4, (8, 64)),
        (14000, 2, (16, 64)),
        (199, 4, (8, 8)),
        (199, 64, (1, 1)),
        (1000, 64, (1, 5)),
    ],
)
def test_a_launch_scores_as_many_queries_as_there_is_room_for(
    scored: int, heads: int, wanted: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2 rows of 100 tokens, 2 KV heads and 50 blocks with 256 values each, of which a program holds 16 rows; whole programs,
    and one at least."""
    monkeypatch.setattr(sparse, "SCORED", scored)
    assert sparse._strip(torch.zeros(2, 100, heads, 128), torch.zeros(2, 50, 2, 256)) == wanted


def test_gradients_in_fp16_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ON", {"cpu"})
    monkeypatch.setattr(launch, "able", lambda _: True)
    x = torch.zeros(1, 4, 1)
    for kind in launch.TYPES:
        assert sparse.usable(x.to(kind), 2) is (kind != torch.float16)
        with torch.no_grad():
            assert sparse.usable(x.to(kind), 2)


def test_all_of_a_launch_lies_where_its_rows_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without values, where nothing is waited for; of groups wider than a tile, in fp32 where q is bf16."""
    told = [written_down(monkeypatch, module) for module in ("window", "choice", "training")]
    q, k = (torch.zeros(2, 30, heads, 128, dtype=torch.bfloat16, device=META) for heads in (128, 2))
    spans = Spans.packed(DOCS.to(META), 4, 5)
    assert {each.device for each in vars(spans).values() if isinstance(each, torch.Tensor)} == {META}
    summaries = torch.zeros(2, 7, 2, 128, device=META)
    numbers = sparse._choose._init_fn(q, summaries, spans.ends, spans.many, 2, 1)
    lists = (numbers, spans.first, spans.tails, spans.block_of)
    for name, given, last in (("near", (spans.starts,), (5,)), ("chosen", lists, (4, 0))):
        out, lse = getattr(sparse, f"_{name}")._init_fn(q, k, k, *given, *last)
        found = getattr(sparse, f"_{name}_back")._init_fn(q, k, k, *given, out, lse, out, lse, *last)
        assert [(each.shape, each.device) for each in found] == [(x.shape, META) for x in (q, k, k)]
    assert [each["name"] for each in itertools.chain(*told)] == [
        "_near", "_near_to_q", "_near_to_kv", "_rate", "_pick", "_forward", "_to_q", "_to_pieces", "_to_kv",
    ]  # fmt: skip
    scores, pieces = told[1][0]["scores"], told[2][2]
    assert (scores.dtype, pieces["to_k"].dtype, pieces["to_v"].dtype, pieces["ROWS"]) == (*[torch.float32] * 3, 64)


def test_a_choice_on_a_gpu_is_made_there(in_torch: None) -> None:
    """Nothing of it comes from the host, which waits for nothing."""
    (q, k, _), reach = drawn(2, 1), GRADED["one softmax"]
    want = sparse.choose(q, k, Spans.packed(DOCS, 4, 5, 6), reach, True)
    with pretended() as gpu:
        q, k, docs = (each.to(gpu) for each in (q, k, DOCS))
        waited.clear()
        got = sparse.choose(q, k, Spans.packed(docs, 4, 5, 6), reach, True)
        assert not waited
    assert isinstance(got, OnGpu) and torch.equal(got.held, want) and bool((want >= 0).any())
