"""What launches the kernels of a decoding step, on programs that do in torch what each kernel says: grids, constants, the
order of arguments, and who reads what another wrote. Against torch over pages; the kernels themselves are of tests/triton."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from shoal.model import paged, quant
from shoal.model.cache import PagedStep, Rows
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.reach import ALL, Reach
from tests.triton import mixed
from tests.triton.stored import Stored, store
from tests.unit.model.launched import stand_in, written_down
from tests.unit.model.test_launch import step_of

STRIDES = 3  # of a memory: unit, head, slot or block


def complete(t: int, window: int, shape: dict[str, Any]) -> int:
    """Blocks that the query at t may choose of."""
    return int(max(t - window + shape["S"], 0) // shape["S"] if shape["BEYOND"] else (t + 1) // shape["S"])


def at(tables: Any, requests: Any, row: int, place: int, size: int) -> tuple[int, int]:
    return int(tables[requests[row], place // size]), place % size


def rated(
    q: Any, summaries: Any, tables: Any, requests: Any, row: int, head: int, many: int, shape: dict[str, Any]
) -> Any:
    """z [G, many]."""
    group, dim = shape["G"], shape["D"]
    mine = q[row, head * group : (head + 1) * group]
    found = [
        summaries[unit, head, j]
        for unit, j in (at(tables, requests, row, b, shape["PAGED"]) for b in range(many))
    ]  # fmt: skip
    if not found:
        return q.new_zeros(group, 0)
    every = torch.stack(found)
    z = mine @ every[:, :dim].T * shape["SCALE"]
    return z + mine.square() @ every[:, dim:].T * shape["SCALE"] ** 2 / 2 if shape["VARIANCE"] else z


def listed(z: Any, many: int, shape: dict[str, Any]) -> list[int]:
    if many <= shape["K"]:
        return [*range(many)]
    score = z[0] if shape["G"] == 1 else z.softmax(-1).sum(0)
    others = sorted(range(shape["SINKS"], many), key=lambda b: -float(score[b]))
    return sorted([*range(shape["SINKS"]), *others][: shape["K"]])


def reads(t: int, window: int, dense: int, found: list[int], shape: dict[str, Any]) -> tuple[list[int], list[int]]:
    """The keys of the window, and of the other branch: what it chose, and the tail."""
    low = 0 if t < dense else max(0, t - window + 1)
    far = [b * shape["S"] + i for b in found for i in range(shape["S"])]
    if shape["BEYOND"]:
        return [*range(low, t + 1)], [key for key in far if key < low]
    return [*range(low, t + 1)], [*far, *range((t + 1) // shape["S"] * shape["S"], t + 1)] if shape["K"] else []


def weighed(
    q: Any, kv: Any, tables: Any, requests: Any, row: int, head: int, keys: list[int], more: Any, shape: dict[str, Any]
) -> tuple[Any, Any, Any]:
    """Undivided sum of values [d], largest score, and divisor of one query head."""
    dim, own = shape["D"], head // shape["G"]
    slots = torch.stack(
        [kv[unit, own, slot] for unit, slot in (at(tables, requests, row, key, shape["P"]) for key in keys)]
    )
    z = slots[:, :dim] @ q[row, head] * shape["SCALE"] + more
    e = (z - z.max()).exp()
    return e @ slots[:, dim:], z.max(), e.sum()


def joined(pieces: list[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """Of some pieces, and none, as one."""
    if not pieces:
        return 0.0, torch.tensor(-torch.inf), torch.tensor(0.0)
    sums, tops, totals = (torch.stack(each) for each in zip(*pieces, strict=True))
    weight = (tops - tops.max()).exp()
    return weight @ sums, tops.max(), weight @ totals


def attend(
    grid: Any, q: Any, kv: Any, summaries: Any, tables: Any, positions: Any, requests: Any, z: Any, chosen: Any, bias: Any,
    gamma: Any, part: Any, stats: Any, arrived: Any, out: Any, *sizes: int, **shape: Any,
) -> None:  # fmt: skip
    *strides, window, dense, count, nears, pieces, crew = sizes
    assert strides == [tables.stride(0), *kv.stride()[:STRIDES], *summaries.stride()[:STRIDES]]
    fars, group, kv_heads = pieces - nears, shape["G"], shape["KV_HEADS"]
    assert chosen.shape == (len(q), kv_heads, max(1, fars), max(1, shape["K"])) and shape["FULL"] >= shape["K"]
    assert not shape["K"] or shape["BLOCKS"] >= count
    assert shape["GROUP"] >= group and shape["PAGED"] == summaries.shape[2] and shape["P"] == kv.shape[2]
    if shape["ALONE"]:
        assert pieces <= 2 and nears == 1 and grid[2] == 1 and not shape["SHARED"]
    else:
        assert grid[2] == nears + fars * crew and (crew == 1 or shape["SHARED"])
        assert part.shape[2] == pieces == stats.shape[2] and part.shape[3] == shape["D"] and stats.shape[3] == 2
        counted = grid[0] * grid[1] * (1 + fars * shape["SHARED"])
        assert arrived.dtype == torch.int32 and len(arrived) >= counted and not arrived.any()
    for row, own in itertools.product(range(grid[0]), range(grid[1])):
        t = int(positions[row])
        many = complete(t, window, shape) if shape["K"] and t >= dense else 0
        scores = q.new_zeros(group, 0)
        if many > shape["K"]:
            assert z.shape == (len(q), shape["HEADS"], fars, count), "memory of each piece"
            scores = rated(q, summaries, tables, requests, row, own, many, shape)
        branches = reads(t, window, dense, listed(scores, many, shape), shape)
        for head in range(own * group, (own + 1) * group):
            found = list[list[tuple[Any, Any, Any]]]()
            lift = bias[head] if shape["BEYOND"] and t >= dense else 0.0
            for keys, of, more in zip(branches, (nears, max(1, fars)), (lift, 0.0), strict=True):
                each = -(-len(keys) // of) or 1
                cut = [keys[at : at + each] for at in range(0, len(keys), each)]
                found.append([weighed(q, kv, tables, requests, row, head, some, more, shape) for some in cut])
            (near, _, total), (far, _, other) = map(joined, found)
            if shape["GATED"]:
                share = gamma[head]
                out[row, head] = far / other + share * (near / total - far / other) if other else near / total
            else:
                sums, _, total = joined([*found[0], *found[1]])
                out[row, head] = sums / total


@pytest.fixture(autouse=True)
def in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "attention", _attend=attend)
    monkeypatch.setattr(fused, "usable", lambda x: False)


@pytest.fixture(params=["alone", "in pieces"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces = 1 if request.param == "alone" else 2
    monkeypatch.setattr(launch, "_pieces", lambda programs, near, far: (pieces, pieces * (far > 0)))


def same(case: Stored, reach: Reach) -> None:
    with torch.no_grad():
        want = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
        got = launch.attend(case.q, case.kv, case.summaries, case.step, reach)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


GAMMA = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)


@pytest.mark.parametrize("variance", [False, True])
@pytest.mark.parametrize(("group", "few"), [(2, 4096), (1, 4096), (2, 0)])
def test_both_branches(group: int, few: int, variance: bool, cut: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores are made by who chooses, or by teams; rows of one request in strips."""
    monkeypatch.setattr(launch, "FEW_NUMBERS", few)
    monkeypatch.setattr(launch, "ALONE_BLOCKS", few)
    monkeypatch.setattr(launch, "SCORED", 4 * 18 * 3)
    case = store(1, [70, 38, 9, 1], [3, 2, 1, 1], kv_heads=4 // group, group=group, variance=variance)
    for top_k in (3, 40):
        same(case, Reach(10, top_k, 1, GAMMA))


@pytest.mark.parametrize("dense", [0, 40])
def test_one_softmax_over_both(dense: int, cut: None) -> None:
    case = store(3, [70, 38, 41, 1], [3, 2, 1, 1])
    same(case, Reach(10, 3, 1, None, torch.linspace(-1, 2, 4, dtype=torch.float64), dense))


@pytest.mark.parametrize(("window", "dense"), [(7, 0), (ALL, ALL)])
def test_the_window_alone_and_all_of_the_context(window: int, dense: int, cut: None) -> None:
    case = store(4, [50, 9], [1, 4])
    same(case, Reach(window, 0, 0, None, dense=dense))


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


@pytest.mark.parametrize("kind", mixed.REACHES)
@torch.no_grad()
def test_beside_prompts_all_others_are_attended_by_themselves(
    kind: str, cut: None, on: None, gathered: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "LONG", mixed.LONG)
    launched, once = list[int](), launch._attend
    monkeypatch.setattr(launch, "_attend", lambda q, *given: (launched.append(len(q)), once(q, *given)))
    case, reach = mixed.mixed(), mixed.REACHES[kind]
    got = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
    lasts = [mixed.LENGTHS[r] - mixed.NEW[r] + count - 1 for r, count in mixed.SHARED[kind]]
    assert gathered == [(1, last // 8 + 1) for last in lasts]
    assert sum(launched) == len(mixed.alone(kind)), "no row of a prompt goes through the kernel as well"
    monkeypatch.setattr(launch, "ON", set())
    want = paged.paged_attention(case.q, case.kv, case.summaries, case.step, reach)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


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
    assert not written_down(monkeypatch, "attention"), "nothing is computed"
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


def test_runs_between_spans_are_all_other_rows() -> None:
    for spans, wanted in (
        ([], [(0, 9)]), ([(0, 9)], []), ([(0, 2), (2, 3)], [(5, 9)]), ([(1, 2), (4, 5)], [(0, 1), (3, 4)]),
    ):  # fmt: skip
        assert [*launch._between(spans, 9)] == wanted
    assert [*launch._between([], 0)] == []


def test_programs_of_two_forwards_count_apart_and_those_of_a_forward_in_one_place(
    cut: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two engines of a process, or a forward after one that ended in the middle, share no count; layers and strips of rows do,
    as each launch ends before the next begins. Where keys are not cut there is none."""
    told = written_down(monkeypatch, "attention")
    one, other = (store(1, [70, 38], [3, 1]) for _ in range(2))
    with torch.no_grad():
        for case, most in ((one, 2**24), (one, 4 * 20 * 2), (other, 2**24)):
            monkeypatch.setattr(launch, "SCORED", most)
            launch.attend(case.q, case.kv, case.summaries, case.step, Reach(10, 3, 1, GAMMA))
    counts = [(each["arrived"].data_ptr(), each["arrived"].numel()) for each in told if not each["ALONE"]]
    if counts:
        assert len(told) == 4 == len(counts) and {size for _, size in counts} == {2 * 4 * 2 + launch.PROGRAMS}
        assert len({at for at, _ in counts[:3]}) == 1 and counts[3][0] != counts[0][0]
        assert "arrived" in one.step.rows._made and one.step.rows is not other.step.rows
    else:
        assert "arrived" not in one.step.rows._made


@pytest.mark.parametrize(
    ("rows", "blocks", "values", "top_k", "way"),
    [
        (1, 256, 64, 3, "apart"),
        (1, 257, 64, 3, "shared"),
        (1, 128, 128, 3, "apart"),
        (1, 256, 128, 3, "shared"),
        (1, 300, 64, 300, "apart"),
        (64, 4096, 64, 3, "alone"),
        (64, 4097, 64, 3, "shared"),
        (64, 4097, 2, 3, "apart"),
    ],
)
def test_teams_score_where_blocks_are_many(
    rows: int, blocks: int, values: int, top_k: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one launch whatever the way. A row and KV head's only program scores more, and is none where these are too many. Where
    all blocks are read none is scored."""
    told = written_down(monkeypatch, "attention")
    step = step_of([1] * rows, blocks, page=4)
    q, kv = torch.zeros(rows, 4, 64), torch.zeros(2, 2, 4, 128)
    launch.attend(q, kv, torch.zeros(2, 2, 1, values), step, Reach(300, top_k, 1, torch.zeros(4)))
    assert [("alone" if each["ALONE"] else "shared" if each["SHARED"] else "apart") for each in told] == [way]
    assert (told[0]["grid"][2] == 1) == (way == "alone")


def empty(
    rows: int, pages: int, *, group: int = 2, dim: int = 16, kind: torch.dtype = torch.float32, values: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, PagedStep]:
    """Rows of a request each, two KV heads, pages and blocks of 4."""
    q, kv = torch.zeros(rows, 2 * group, dim, dtype=kind), torch.zeros(2, 2, 4, 2 * dim, dtype=kind)
    return q, kv, torch.zeros(2, 2, 1, values), step_of([1] * rows, pages, page=4)


@pytest.mark.parametrize(
    ("reach", "wanted"),
    [
        (Reach(10, 3, 1, GAMMA), (10, 16)),
        (Reach(10, 3, 1, None, GAMMA, 40), (40, 16)),
        (Reach(100, 3, 1, GAMMA), (80, 16)),
        (Reach(10, 3, 1, None), (10, 0)),
        (Reach(ALL, 0, 0, None, dense=ALL), (80, 0)),
    ],
)
def test_what_is_cut_are_the_keys_of_the_window_and_of_the_blocks_with_a_tail(
    reach: Reach, wanted: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For programs of each row and KV head, of tables of 80 keys; where blocks are read, each piece has room for their list."""
    told, cut = written_down(monkeypatch, "attention"), list[tuple[int, ...]]()
    monkeypatch.setattr(launch, "_pieces", lambda *given: (cut.append(given), (2, 3 if given[2] else 0))[1])
    q, kv, summaries, step = empty(3, 20, kind=torch.bfloat16)
    launch.attend(q, kv, summaries, step, reach)
    assert cut == [(6, *wanted)]
    pieces = 5 if wanted[1] else 2
    assert (told[0]["grid"], told[0]["nears"], told[0]["pieces"]) == ((3, 2, pieces), 2, pieces)
    assert [told[0][name].dtype for name in ("z", "part", "stats", "chosen")] == [*[torch.float32] * 3, torch.int32]


def test_a_team_scores_by_what_its_blocks_and_their_summaries_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes: 16 tokens of 64 numbers in bf16, for 300 summaries of 128 numbers in fp32, which are five tiles. Each piece has
    as many programs as a team has members."""
    told, teams = written_down(monkeypatch, "attention"), list[tuple[Any, ...]]()
    monkeypatch.setattr(launch, "_pieces", lambda *given: (2, 7))
    monkeypatch.setattr(launch, "_teams", lambda *given: (teams.append(given), (3, 5))[1])
    q, kv, summaries, step = empty(3, 300, dim=32, kind=torch.bfloat16, values=128)
    launch.attend(q, kv, summaries, step, Reach(10, 3, 1, torch.zeros(4)))
    assert teams == [(6, 2, 7, pytest.approx(16 * 64 * 2 / (300 * 128 * 4)), 5)]
    (one,) = told
    assert (one["grid"], one["nears"], one["pieces"], one["crew"]) == ((3, 2, 2 + 3 * 5), 2, 2 + 3, 5)
    assert one["z"].shape == (3, 4, 3, 300) and one["chosen"].shape == (3, 2, 3, 3) and one["SHARED"]


@pytest.mark.parametrize(
    ("group", "dim", "pages", "wanted"),
    [
        (1, 16, 256, (1, 64, 256, 4)),
        (2, 16, 1024, (2, 64, 1024, 4)),
        (3, 128, 1025, (4, 16, 4096, 8)),
        (8, 128, 4097, (8, 8, 2**14, 16)),
        (64, 256, 4, (64, 1, 256, 4)),
    ],
)
def test_what_is_joined_or_chosen_at_once_fits_the_registers_of_its_warps(
    group: int, dim: int, pages: int, wanted: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """8,192 numbers of pieces at a time, of 64 pieces at most, and one at least; room for blocks in one of four sizes, of which
    a warp holds 512 scores, but in four warps at least."""
    told = written_down(monkeypatch, "attention")
    q, kv, summaries, step = empty(1, pages, group=group, dim=dim, values=dim)
    launch.attend(q, kv, summaries, step, Reach(10, 3, 1, torch.zeros(2 * group)))
    launch.attend(q, kv, summaries, step, Reach(10, 0, 0, None))
    one, alone = told
    assert tuple(one[name] for name in ("GROUP", "EACH", "BLOCKS", "num_warps")) == wanted
    assert (alone["BLOCKS"], alone["num_warps"]) == (16, 4), "nothing is chosen"


@pytest.mark.parametrize(("pages", "rows"), [(1, [10, 10, 3]), (2, [5, 5, 5, 5, 3]), (100, [1] * 23)])
def test_rows_are_attended_in_strips_of_as_many_scores_as_may_exist(
    pages: int, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 of 4 heads; where nothing is scored, all at once."""
    told = written_down(monkeypatch, "attention")
    monkeypatch.setattr(launch, "SCORED", 40)
    q, kv, summaries, step = empty(23, pages)
    launch.attend(q, kv, summaries, step, Reach(10, 3, 1, GAMMA))
    assert [each["grid"][0] for each in told] == rows == [len(each["q"]) for each in told]
    told.clear()
    launch.attend(q, kv, summaries, step, Reach(10, 0, 0, None))
    assert [each["grid"][0] for each in told] == [23]


def test_keys_in_int8_are_told_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    told = written_down(monkeypatch, "attention")
    q, _, summaries, step = empty(1, 2)
    launch.attend(q, torch.zeros(2, 2, 4, 36, dtype=torch.int8), summaries, step, Reach(10, 3, 1, GAMMA))
    assert told[0]["INT8"] and told[0]["slot_step"] == 36


@pytest.mark.parametrize(
    ("programs", "pieces", "share", "tiles", "wanted"),
    [
        (2, (4, 8), 1.03, 16, (8, 16)),  # a row of 1b at 32k
        (2, (4, 8), 0.26, 64, (6, 21)),  # and at 128k
        (2, (4, 1), 0.26, 3, (1, 3)),
        (16, (4, 8), 1.03, 16, (4, 3)),
        (64, (1, 2), 100.0, 16, (2, 1)),
        (264, (1, 1), 0.06, 256, (1, 1)),
        (4000, (1, 1), 0.06, 256, (1, 1)),
    ],
)
def test_teams_fill_a_device_and_no_more(
    programs: int, pieces: tuple[int, int], share: float, tiles: int, wanted: tuple[int, int]
) -> None:
    teams, crew = launch._teams(programs, *pieces, share, tiles)
    assert (teams, crew) == wanted
    assert programs * (pieces[0] + teams * crew) <= max(launch.PROGRAMS, 2 * programs)
    assert programs * teams <= programs + launch.PROGRAMS, "there is a count for each"


# ---- a linear in int8


def levels(grid: Any, x: Any, levels: Any, scales: Any, **shape: Any) -> None:
    assert shape["I"] == x.shape[1] <= shape["WIDE"] and (shape["TOP"], shape["ZERO"]) == (63, 64) and x.is_contiguous()
    assert shape["num_warps"] == launch._warps(x.shape[1])
    for row in range(*grid):
        scales[row] = quant.token_scale(x[row])
        levels[row] = quant.token_levels(x[row], scales[row])


def product(
    grid: Any,
    levels: Any,
    weight: Any,
    scales: Any,
    weight_scales: Any,
    out: Any,
    rows: int,
    outputs: int,
    **shape: Any,
) -> None:
    assert levels.shape == (rows, shape["I"]) and weight.shape == (outputs, shape["I"]) and weight.is_contiguous()
    for column, row in itertools.product(*map(range, grid)):
        m, o = (slice(at * size, (at + 1) * size) for at, size in ((row, shape["ROWS"]), (column, shape["COLUMNS"])))
        total = levels[m].long() @ weight[o].long().T
        out[m, o] = total.float() * weight_scales[o] * scales[m, None]


@pytest.mark.parametrize(
    ("rows", "tiles"), [(1, (3, 1)), (16, (3, 1)), (17, (2, 1)), (64, (2, 1)), (65, (2, 2)), (129, (2, 3))]
)
def test_a_linear_in_int8_covers_all_rows_and_outputs(
    rows: int, tiles: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """70 outputs: of 16 rows at most in tiles of 32, so that more programs share them; of others in tiles of 64 by 64."""
    grids = list[tuple[int, int]]()
    stand_in(
        monkeypatch,
        "integers",
        _levels=levels,
        _product=lambda grid, *given, **shape: (grids.append(grid), product(grid, *given, **shape)),
    )
    g = torch.Generator().manual_seed(rows)
    weight, scale = quant.quantize_rows(torch.randn(70, 40, generator=g))
    x = torch.randn(rows, 80, generator=g)[:, ::2]
    got = launch.int8_product(weight, scale)(x)
    torch.testing.assert_close(got, quant.int8_linear_reference(x, weight, scale), rtol=1e-6, atol=1e-6)
    assert grids == [tiles]
