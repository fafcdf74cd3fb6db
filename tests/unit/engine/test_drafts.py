"""What a draft is made with, against what any other row is made with."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from shoal import Engine, Model, Request, Sampling, presets
from shoal.config import GROUPS
from shoal.engine import drafts
from shoal.engine.drafts import Drafted, Drafter, Rounds
from shoal.engine.plan import Work
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


def states(one: Drafter) -> list[float]:
    return [float(state) for state in one.ahead.holding.states]
