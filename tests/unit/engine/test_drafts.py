"""What a draft is made with, against what any other row is made with."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shoal import Engine, Model, Request, Sampling, presets
from shoal.engine import drafts
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
