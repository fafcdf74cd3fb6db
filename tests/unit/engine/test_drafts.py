"""What a draft is made with, against what any other row is made with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal import Engine, Model, Request, Sampling, presets
from shoal.config import GROUPS
from shoal.engine import drafts
from shoal.engine.device import Unread
from shoal.engine.drafts import Drafted, Drafter, Rounds
from shoal.engine.plan import Sampled, Work
from shoal.errors import GenerationError
from shoal.model.block import KNOWN, known_rope, rope_tables
from shoal.model.net import Net
from tests.unit.engine.test_speculative import EAGER

pytest.importorskip("numba")
FP32 = Model.from_preset("test", seed=3)
MODELS = {"fp64": EAGER, "fp32": FP32, "int8": FP32.quantized()}
TOKENS = [20, 77, 20, 259]


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_a_drafts_embedding_and_head_are_those_of_any_row(name: str) -> None:
    net = MODELS[name].net
    rows = net.embed_few(TOKENS)
    assert torch.equal(torch.from_numpy(rows), net.embed_inputs(torch.tensor(TOKENS)))
    for exit_ in net.config.exits:
        head = net.head_of(exit_, len(TOKENS))
        assert head is not None
        for count in (1, 2, 4):
            torch.testing.assert_close(
                torch.from_numpy(head.logits(rows[:count])), net.head(torch.from_numpy(rows[:count]), exit_)
            )


@torch.inference_mode()
def test_an_exit_of_its_own_width_takes_another_way_and_one_with_a_head_of_its_own_does_not() -> None:
    config = presets.get("test").model
    for more, there in (({"exit_ffn": 16}, False), ({"tied": False}, True)):
        net = Net(dataclasses.replace(config, **more)).init_(1).requires_grad_(False)  # type: ignore[arg-type]
        head, x = net.head_of(config.exits[0], 2), torch.from_numpy(net.embed_few(TOKENS[:2]))
        assert (head is not None) == there
        if head is not None:
            torch.testing.assert_close(torch.from_numpy(head.logits(x.numpy())), net.head(x, config.exits[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rotation_that_is_looked_up_is_the_one_that_is_made(dtype: torch.dtype) -> None:
    config = presets.get("tiny").model
    for places in ([0], [5, 3, 5], list(range(300, 340)), [KNOWN - 1], [KNOWN], [7, KNOWN + 900]):
        positions = torch.tensor(places)
        with torch.inference_mode():
            got = known_rope(positions, config, dtype)
        for part, wanted in zip(got, rope_tables(positions, config, dtype), strict=True):
            assert torch.equal(part, wanted)


def test_a_gate_that_changes_is_seen() -> None:
    group = Model.from_preset("test", seed=3).net.groups[0]
    attention = group.blocks[0].attention  # type: ignore[union-attr]

    @torch.inference_mode()
    def share() -> torch.Tensor | None:
        found: torch.Tensor | None = group._parts(1, torch.float32)[0][2].gamma  # type: ignore[operator]
        return found

    before = share()
    assert before is not None and share() is before, "looked for once"
    with torch.no_grad():
        attention.gate.fill_(3.0)  # type: ignore[union-attr, operator]
    after = share()
    assert after is not None and torch.equal(after, torch.sigmoid(attention.gate))  # type: ignore[arg-type, union-attr]
    attention.mix_local = 0.25  # type: ignore[union-attr]
    after = share()
    assert after is not None and torch.equal(after, torch.full_like(after, 0.25))


@pytest.mark.parametrize("name", ["fp32", "int8"])
def test_one_answer_is_drafted_to_the_bit_as_by_a_step_for_each_draft(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its prompt ends with a page that is stored already."""
    found = []
    for way in (drafts.draft, lambda *_: False):
        monkeypatch.setattr(drafts, "draft", way)
        e = Engine(MODELS[name], speculative_max_batch=1)
        for temperature in (0.0, 0.0, 0.8):
            sampling = Sampling(temperature=temperature, seed=5, max_tokens=24, ignore_eos=True, speculative=5)
            (answer,) = e.generate(
                [Request([20 + i for i in range(2 * MODELS[name].config.page)], sampling, depth="full")]
            )
            found.append((answer.tokens, e.stats()["spec_decode_num_accepted_tokens_total"], e.runner.cache.kv.clone()))
    for (tokens, accepted, kv), (wanted, others, memory) in zip(found[:3], found[3:], strict=True):
        assert (tokens, accepted) == (wanted, others)
        assert torch.equal(kv, memory)


# --- who drafts, by hand: no model runs ------------------------------------------------------------------------------------

LAST = 99  # ends an answer


def drafter(number: int, count: int, kept: bool = False, grammar: object = None) -> Drafter:
    """One whose newest token is its `number`, which is to draft `count` more; what it drafted may be `kept`."""
    ahead = SimpleNamespace(
        tokens=[50, 51, number], holding=SimpleNamespace(states=[]), there=(), ends=lambda token: token == LAST
    )
    running = SimpleNamespace(tokens=[50, 51, number], grammar=grammar)
    work = Work(running, 2, 1, 0, GROUPS, sample=True, drafts=count)  # type: ignore[arg-type]
    return Drafter(work, ahead, number, Drafted() if kept else None)  # type: ignore[arg-type]


def test_what_was_drafted_is_settled_from_the_answer_s_length_and_what_it_has_spent() -> None:
    for tolerance, told in ((0.25, 0.25), (None, 0.0)):
        running: Any = SimpleNamespace(prompt_len=5, tolerance=tolerance, spent=1.5, there=["unread"])
        drafted = Drafted([7, 8], ["law", "another"])  # type: ignore[list-item]
        chain = drafted.chain(6, Work(running, 9, 3, 1, GROUPS, verify=True))
        assert vars(chain) == {
            "first": 6, "drafts": [7, 8], "exits": ["law", "another"], "tolerance": told, "spent": 1.5, "answered": 5,
            "there": ["unread"],
        }  # fmt: skip


def test_a_draft_that_ends_the_answer_is_the_last_and_is_none_of_its_rows() -> None:
    law: Any = "law"
    for drawn, token, given, rows, tokens, exits, over in (
        (True, 7, law, [7], [7], [law], False), (True, 7, None, [7], [7], [], False),
        (True, LAST, law, [], [LAST], [law], True), (False, 7, law, [], [], [], True),
    ):  # fmt: skip
        for kept in (True, False):
            one = drafter(3, 2, kept)
            one.take(token, drawn, given)
            assert (one.ahead.tokens, one.over) == ([50, 51, 3, *rows], over)
            assert one.drafted == (Drafted(tokens, exits) if kept else None)


def test_who_drafts_is_verified_and_who_does_not_goes_on_from_its_state() -> None:
    one, other = drafter(3, 2), drafter(4, 0)
    assert (one.more, other.more) == (True, False)
    one.ahead.holding.states += ["a"]
    assert one.more
    one.ahead.holding.states += ["b"]
    assert not one.more
    one.ahead.tokens += [7, 8]
    kept = {**vars(one.work), "running": one.ahead}
    assert vars(one.rest()) == {**kept, "count": 3, "first": 1, "drafts": 0, "verify": True}
    assert vars(other.rest()) == {**vars(other.work), "running": other.ahead, "first": 1}


def test_the_host_waits_for_drafts_where_it_draws_them_or_a_grammar_must_know_them() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    free, guided, beside = (
        drafter(1, drafts_, grammar=grammar).work for drafts_, grammar in ((2, None), (2, 1), (0, 1))
    )
    for works, waits in (([free], False), ([free, beside], False), ([free, guided], True), ([guided], True)):
        assert (Rounds.of(works, cuda) is None) is waits and Rounds.of(works, cpu) is None


class Steps:
    """In place of group 1 and the sampler: `script` says what each request draws, None for nothing. States are a number of step
    and row, and all logits lie in the same memory."""

    def __init__(self, script: dict[int, list[int | None]]) -> None:
        self.script, self.memory, self.told = script, torch.zeros(9, 2), list[Any]()

    def __call__(self, going: Sequence[Drafter], more: int, newest: Tensor | None) -> tuple[Tensor, Tensor | None]:
        step = len(self.told)
        self.told.append(([each.place for each in going], more, None if newest is None else newest.tolist()))
        states = torch.tensor([[10.0 * step + row] for row in range(len(going))])
        self.memory[:] = torch.arange(9)[:, None] + 10 * step
        return states, self.memory[:more] if more else None

    def _next(self, aheads: Sequence[Any]) -> list[int | None]:
        return [self.script[ahead.tokens[2]].pop(0) for ahead in aheads]

    def sample(self, logits: Tensor, aheads: Sequence[Any]) -> list[Sampled]:
        assert len(logits) == len(aheads)
        found = self._next(aheads)
        return [Sampled(7, error=GenerationError("none")) if one is None else Sampled(one) for one in found]

    def propose(self, logits: Tensor, aheads: Sequence[Any]) -> tuple[Tensor, Tensor]:
        assert len(logits) == len(aheads)
        found = self._next(aheads)
        highest = [[math.nan if one is None else 1.0] for one in found]
        return torch.tensor([7 if one is None else one for one in found]), torch.tensor(highest)


def states(one: Drafter) -> list[float]:
    return [float(state) for state in one.ahead.holding.states]


def test_a_step_for_each_draft_is_of_those_who_draft_on() -> None:
    """Four tokens are drafted, then two, then one. Of those who are over no row runs that nobody drafts behind."""
    some = [drafter(0, 0), drafter(1, 3, kept=True), drafter(2, 1), drafter(3, 3, kept=True), drafter(4, 2, kept=True)]
    steps: Any = Steps({1: [60, 61, 62], 2: [70], 3: [80, LAST], 4: [None]})
    drafts.by_steps(steps, steps, list(some), None)
    assert steps.told == [([1, 2, 3, 4, 0], 4, None), ([1, 3, 2], 2, None), ([1], 1, None), ([1], 0, None)]
    assert [states(one) for one in some] == [[4], [0, 10, 20, 30], [1, 12], [2, 11], [3]]
    assert [one.ahead.tokens[3:] for one in some] == [[], [60, 61, 62], [70], [80], []]
    assert [one.over for one in some] == [False, False, False, True, True]
    told = [one.drafted and (one.drafted.tokens, [float(law[0]) for law in one.drafted.exits]) for one in some]
    assert told == [None, ([60, 61, 62], [0, 10, 20]), None, ([80, LAST], [2, 11]), ([], [])], "copies"


def test_drafts_that_the_host_has_not_read_go_on_as_if_none_ended_an_answer() -> None:
    some = [drafter(0, 0), drafter(1, 3, kept=True), drafter(2, 1), drafter(3, 3, kept=True), drafter(4, 2, kept=True)]
    steps: Any = Steps({1: [60, 61, 62], 2: [70], 3: [80, LAST, 81], 4: [None, 90]})
    rounds, unread = Rounds(), Unread()
    assert rounds.newest is None
    drafts.by_steps(steps, steps, list(some), rounds)
    assert steps.told == [
        ([1, 3, 4, 2, 0], 4, None), ([1, 3, 4, 2], 3, [60, 80, 7, 70]), ([1, 3, 4], 2, [61, LAST, 90]),
        ([1, 3], 0, [62, 81]),
    ]  # fmt: skip
    assert [states(one) for one in some] == [[4], [0, 10, 20, 30], [3, 13], [1, 11, 21, 31], [2, 12, 22]]
    assert [one.ahead.tokens[3:] for one in some] == [[], [0] * 3, [0], [0] * 3, [0] * 2], "as many as there may be"
    assert [[int(token) for token in one.ahead.there] for one in some] == [
        [], [60, 61, 62], [70], [80, LAST, 81], [7, 90],
    ]  # fmt: skip
    rounds.wait_in(unread)
    assert len(unread.tensors) == 6 and not any(one.over for one in some)
    unread.read()
    assert [one.ahead.tokens for one in some] == [
        [50, 51, number, *more] for number, more in enumerate(([], [60, 61, 62], [70], [80], []))
    ]
    assert [one.over for one in some] == [False, False, False, True, True] and not any(one.ahead.there for one in some)
    told = [one.drafted and (one.drafted.tokens, [float(law[0]) for law in one.drafted.exits]) for one in some]
    assert told == [None, ([60, 61, 62], [0, 10, 20]), None, ([80, LAST], [1, 11, 21]), ([], [2, 12])]


def test_of_drafts_without_a_tolerance_nothing_is_kept_but_themselves() -> None:
    one, rounds, unread = drafter(1, 2), Rounds(), Unread()
    steps: Any = Steps({1: [60, 61]})
    drafts.by_steps(steps, steps, [one], rounds)
    rounds.wait_in(unread)
    unread.read()
    assert (one.ahead.tokens, one.drafted, states(one)) == ([50, 51, 1, 60, 61], None, [0, 10, 20])


class Stretching:
    """In place of a network, group 1 of which says where it was asked to run and gives the number of time and row."""

    def __init__(self, head: bool, there: bool = True) -> None:
        self.config, self.dtype, self.there = SimpleNamespace(exits=(1, 2, 4)), torch.float32, there
        self.groups, self.asked, self.ran = [self], list[Any](), list[Any]()
        self.read = list[int]()  # rows whose logits were made, of each time
        self.own = SimpleNamespace(logits=self._logits) if head else None

    def _logits(self, states: Any) -> Any:
        self.read.append(len(states))
        return states + 100

    def stretch(self, *given: Any) -> Any:
        self.asked.append(given)
        return self if self.there else None

    def embed_few(self, tokens: list[int]) -> list[int]:
        return [*tokens]

    def after(self, tokens: list[int], time: int) -> Any:
        self.ran.append((time, tokens))
        return np.array([[10.0 * time + row] for row in range(len(tokens))])

    def head_of(self, exit_: int, rows: int) -> Any:
        assert (exit_, rows) == (1, 5)
        return self.own

    def head(self, states: Tensor, exit_: int) -> Tensor:
        assert exit_ == 1 and self.own is None
        found: Tensor = self._logits(states)
        return found


def standing(number: int, count: int, start: int, computed: int, kept: bool = False) -> Drafter:
    """One that drafts from the position `start` on, in units of its own of four slots each. Those of the first have room for no
    more, those of others for a longer answer."""
    one = drafter(number, count, kept)
    one.work.start = start
    one.work.running.adapter = None
    pages = -(-(start + 1 + count) // 4) if number == 1 else 6
    tables = np.array([[100 * group + 10 * number + page for page in range(1, pages + 1)] for group in range(GROUPS)])
    one.ahead.holding.tables, one.ahead.holding.computed = tables, [computed, *[50] * (GROUPS - 1)]
    return one


@pytest.mark.parametrize("head", [True, False])
def test_a_stretch_runs_over_the_rows_of_those_who_draft_on_and_each_keeps_its_own(head: bool) -> None:
    """Five draft first. One ends with its first draft, and its rows go on unread before one that drafts on, which then has no
    second; two were to make one alone."""
    some = [
        standing(1, 1, 3, 0), standing(2, 4, 2, 3, kept=True), standing(3, 3, 6, 6, kept=True), standing(4, 3, 13, 0),
        standing(5, 1, 18, 0),
    ]  # fmt: skip
    script: Any = Steps({1: [70], 2: [60, 61, 62, 63], 3: [LAST, 55], 4: [80, None], 5: [90]})
    net: Any = Stretching(head)
    cache: Any = SimpleNamespace(kv=torch.zeros(1, 2, 1, 4, 3))
    assert drafts.draft(net, cache, script, some)
    ((positions, slots, tables, memory, dtype),) = net.asked
    order = [some[1], some[2], some[3], some[0], some[4]]  # those that draft most come first
    assert positions.tolist() == [[one.work.start + time for one in order] for time in range(5)]
    assert memory is cache and dtype == torch.float32 and tables.shape == (5, 5) and slots.shape == (5, 5)
    assert tables.dtype == slots.dtype == positions.dtype == np.int64
    for r, one in enumerate(order):
        own = one.ahead.holding.tables[0, :5].tolist()
        assert tables[r].tolist() == own + [0] * (5 - len(own))
        for time in range(one.work.drafts + 1):
            at = one.work.start + time
            slot = own[at // 4] * 4 + at % 4 if at >= one.ahead.holding.computed[0] else -1
            assert slots[time, r] == slot, (r, time)
    assert net.ran == [(0, [2, 3, 4, 1, 5]), (1, [60, LAST, 80, 70, 90]), (2, [61, LAST, 7]), (3, [62]), (4, [63])]
    assert net.read == [5, 3, 1, 1], "of those who draft on alone"
    kept = [[float(row) for states_ in one.ahead.holding.states for row in states_] for one in some]
    assert kept == [[3, 13], [0, 10, 20, 30, 40], [1], [2, 12], [4, 14]]
    assert all(len(one.ahead.holding.states) == 1 for one in some)
    assert [one.ahead.tokens[3:] for one in some] == [[70], [60, 61, 62, 63], [], [80], [90]]
    assert [one.over for one in some] == [False, False, True, True, False]
    told = [one.drafted and (one.drafted.tokens, [float(law[0]) for law in one.drafted.exits]) for one in some]
    assert told == [None, ([60, 61, 62, 63], [100, 110, 120, 130]), ([LAST], [101]), None, None]


def test_where_there_is_no_stretch_nothing_is_done() -> None:
    """Beside an adapter, on a device, or where the loops cannot be used."""
    cpu: Any = SimpleNamespace(kv=torch.zeros(1, 2, 1, 4, 3))
    there: Any = SimpleNamespace(kv=torch.zeros(1, 2, 1, 4, 3, device="meta"))
    for adapter, cache, able in ((object(), cpu, True), (None, there, True), (None, cpu, False)):
        some, net = [standing(1, 2, 2, 0), standing(2, 2, 2, 0)], Stretching(True, able)
        some[1].work.running.adapter = adapter  # type: ignore[assignment]
        assert drafts.draft(net, cache, Steps({}), some) is False  # type: ignore[arg-type]
        assert net.ran == [] and [one.ahead.tokens[3:] for one in some] == [[], []]
        assert not any(one.ahead.holding.states or one.over for one in some)
