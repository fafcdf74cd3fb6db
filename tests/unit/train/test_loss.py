"""The losses against sums written out by hand, place by place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import presets
from shoal.data.batches import Batch
from shoal.inputs.tokenizer import PATCH_ID, Tokenizer
from shoal.model.net import Net
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.loss import PATCH_EPS, LossModel, Sums, predicted_patches
from shoal.train.parallel import Ranks
from shoal.train.plan import pretrain_plan

CONFIG = presets.get("test").model


@pytest.fixture(scope="module")
def model() -> LossModel:
    return LossModel(Net(CONFIG).init_(0).double())


@pytest.fixture
def batch(shards: Path, alone: Ranks) -> Batch:
    """A micro-batch with text, code and images, as pretraining reads it."""
    plan = pretrain_plan("test", str(shards), "unused", steps=1, accumulate=1)
    (micro,) = open_feed(plan, shard_tokenizer(shards), "", alone).at(0)
    return micro


def run(model: LossModel, batch: Batch) -> Sums:
    return model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid)


def test_cross_entropy_counts_targets_and_nothing_else(model: LossModel, batch: Batch) -> None:
    sums = run(model, batch)
    hidden = model.net(batch.tokens, batch.patches, batch.grid, batch.docs, exits=CONFIG.exits)
    assert 0 < int((batch.targets >= 0).sum()) < batch.targets.numel()
    for place, layers in enumerate(CONFIG.exits):
        by_hand = torch.zeros(len(batch.tokens), dtype=torch.float64)
        logits = model.net.head(hidden[layers], layers)
        for row, column in (batch.targets >= 0).nonzero().tolist():
            scores = logits[row, column]
            by_hand[row] += scores.exp().sum().log() - scores[batch.targets[row, column]]
        torch.testing.assert_close(sums.ce[place], by_hand, rtol=1e-12, atol=1e-9)


def test_patch_error_is_on_normalised_next_patches(model: LossModel, batch: Batch) -> None:
    """Of each image, every patch but the first of a row of the picture is predicted by the patch before it, and the
    first by the control token that opens the row."""
    hidden = model.net(batch.tokens, batch.patches, batch.grid, batch.docs)[CONFIG.layers]
    guesses = model.net.patch_head(model.net.exit_norms[str(CONFIG.layers)](hidden))
    by_hand, seen = torch.zeros((), dtype=torch.float64), 0
    for row, column in (batch.tokens == PATCH_ID).nonzero().tolist():
        pixels = batch.patches[seen].double() / 127.5 - 1
        target = (pixels - pixels.mean()) / (pixels.var(correction=0) + PATCH_EPS).sqrt()
        by_hand += (guesses[row, column - 1] - target).square().mean()
        seen += 1
    assert seen == len(batch.patches) > 0
    torch.testing.assert_close(run(model, batch).patch, by_hand, rtol=1e-12, atol=1e-12)


def test_a_model_without_images_has_no_loss_of_patches() -> None:
    """It has no parameters for them; to it the id of a patch is a word's."""
    net = Net(replace(CONFIG, image_size=0)).init_(0).double()
    tokens = torch.tensor([[20, PATCH_ID, 21, 22]])
    targets = torch.tensor([[PATCH_ID, 21, -1, -1]])
    docs, none = torch.zeros_like(tokens), torch.zeros(0, 3 * CONFIG.patch**2)
    sums = LossModel(net)(tokens, targets, docs, none, torch.zeros(0, 2, dtype=torch.long))
    hidden = net(tokens, docs=docs)[CONFIG.layers]
    scores = net.head(hidden, CONFIG.layers)[0, :2].log_softmax(-1)
    torch.testing.assert_close(sums.ce[-1], -(scores[0, PATCH_ID] + scores[1, 21])[None])
    assert (float(sums.patch), float(sums.patch_apart)) == (0.0, 0.0)


def test_a_patch_is_never_predicted_from_another_document() -> None:
    tokens = torch.tensor([[PATCH_ID, PATCH_ID, 20, PATCH_ID]])
    docs, patches = torch.tensor([[0, 1, 1, 1]]), torch.zeros(3, 3)
    assert predicted_patches(tokens, docs, patches).tolist() == [[False, False, False, True]]
    assert not predicted_patches(tokens, torch.full((1, 4), -1), patches).any(), "padding"
    assert not predicted_patches(tokens, docs, patches[:0]).any(), "of a model without images, whose id it is a word's"


def test_logits_in_parts_give_the_same_gradient(
    model: LossModel, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond LOGITS_AT_ONCE the logits are made again in backward instead of being kept. Asked for by `grad`, which takes none
    of what leaves its gradients beside the graph."""

    def gradient() -> torch.Tensor:
        (found,) = torch.autograd.grad(run(model, batch).ce.sum(), model.net.embed.weight)
        return found

    whole = gradient()
    monkeypatch.setattr("shoal.train.loss.LOGITS_AT_ONCE", 50 * CONFIG.vocab)
    torch.testing.assert_close(gradient(), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("logits", "rows", "parts", "again"),
    [
        (2**25, 1024, [7], 0),
        (7 * CONFIG.vocab, 1024, [7], 0),
        (3 * CONFIG.vocab, 1024, [3, 3, 1], 3),
        (2**25, 2, [2, 2, 2, 1], 0),
        (CONFIG.vocab - 1, 1024, [1] * 7, 7),
    ],
)
def test_no_more_logits_are_held_than_may_be_and_one_row_s_in_any_case(
    model: LossModel, monkeypatch: pytest.MonkeyPatch, logits: int, rows: int, parts: list[int], again: int
) -> None:
    """And those of more than that are made again in backward."""
    states = torch.randn(7, CONFIG.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets, held, made, at_once = torch.arange(40, 47), list[int](), list[int](), model._losses_at_once
    whole = at_once(states, targets, 4, None)

    def watch(hidden: torch.Tensor, *more: Any) -> torch.Tensor:
        held.append(len(hidden))
        return at_once(hidden, *more)

    def remade(work: Any, *args: Any, use_reentrant: bool) -> Any:
        made.append(1)
        assert not use_reentrant
        return work(*args)

    monkeypatch.setattr("shoal.train.loss.LOGITS_AT_ONCE", logits)
    monkeypatch.setattr("shoal.train.loss.ROWS_AT_ONCE", rows)
    monkeypatch.setattr("shoal.train.loss.checkpoint", remade)
    monkeypatch.setattr(model, "_losses_at_once", watch)
    torch.testing.assert_close(model._losses(states, targets, 4, None), whole, rtol=1e-12, atol=1e-12)
    assert (held, len(made)) == (parts, again)


def test_a_batch_without_images_still_gives_every_parameter_a_gradient(model: LossModel) -> None:
    """Under FSDP a parameter without one would make the other ranks wait for ever."""
    ids = torch.tensor([Tokenizer.bytes_only().encode("no image here")])
    none = torch.zeros((0, CONFIG.patch_values), dtype=torch.uint8)
    text = Batch(ids, ids.roll(-1, 1), torch.zeros_like(ids), none, torch.zeros((0, 2), dtype=torch.long),
                 torch.tensor([12]), ("text",))  # fmt: skip
    model.zero_grad()
    sums = run(model, text)
    assert sums.patch.item() == 0.0
    (sums.ce.sum() + sums.patch).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []


def test_an_exit_that_is_left_out_costs_nothing_and_takes_no_gradient(model: LossModel, batch: Batch) -> None:
    whole = run(model, batch)
    model.zero_grad()
    sums = model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid, exits=(2, 4))
    assert torch.equal(sums.ce[1:], whole.ce[1:]) and not sums.ce[0].any()
    sums.ce.sum().backward()
    assert model.net.exit_norms["1"].weight.grad is None and model.net.exit_norms["2"].weight.grad.any()


@pytest.mark.parametrize("at_once", [2**25, 50 * CONFIG.vocab], ids=["whole", "in parts"])
def test_self_distillation_is_the_divergence_from_full_depth(
    model: LossModel, batch: Batch, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """KL(full || exit) over every target, written out; full depth takes no gradient from it."""
    monkeypatch.setattr("shoal.train.loss.LOGITS_AT_ONCE", at_once)
    model.zero_grad()
    sums = model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid, distill=True)
    assert torch.allclose(sums.ce, run(model, batch).ce) and not run(model, batch).kl.any()
    hidden = model.net(batch.tokens, batch.patches, batch.grid, batch.docs, exits=CONFIG.exits)
    where = batch.targets >= 0
    p = model.net.head(hidden[4], 4)[where].softmax(-1)
    for place, e in enumerate(CONFIG.exits):
        q = model.net.head(hidden[e], e)[where].softmax(-1)
        torch.testing.assert_close(sums.kl[place], (p * (p / q).log()).sum(), rtol=1e-9, atol=1e-9)
    assert sums.kl[-1] == 0 < sums.kl[0]
    sums.kl.sum().backward()
    assert not model.net.exit_norms["4"].weight.grad.any(), "the teacher"
    assert not any(p.grad.any() for p in model.net.groups[3].parameters()), "and what only the teacher needs"
    assert model.net.exit_norms["1"].weight.grad.any()


@pytest.mark.parametrize("at_once", [2**25, 50 * CONFIG.vocab], ids=["whole", "in parts"])
def test_a_teacher_is_compared_with_exit_by_exit_and_patch_by_patch(
    batch: Batch, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """KL(teacher || exit) over every target and the distance of predicted patches, written out; the teacher stays as it is."""
    monkeypatch.setattr("shoal.train.loss.LOGITS_AT_ONCE", at_once)
    nets = [Net(CONFIG).init_(seed).double() for seed in (0, 1)]
    model = LossModel(nets[0], teacher=nets[1])
    sums = model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid, distill=True)
    where = batch.targets >= 0
    args = (batch.tokens, batch.patches, batch.grid, batch.docs)
    mine, theirs = (net(*args, exits=CONFIG.exits) for net in nets)
    for place, e in enumerate(CONFIG.exits):
        q, p = (net.head(hidden[e], e)[where].softmax(-1) for net, hidden in zip(nets, (mine, theirs), strict=True))
        torch.testing.assert_close(sums.kl[place], (p * (p / q).log()).sum(), rtol=1e-9, atol=1e-9)
    last, at = CONFIG.layers, predicted_patches(batch.tokens, batch.docs, batch.patches)[:, 1:]
    guesses = [
        net.patch_head(net.exit_norms[str(last)](hidden[last][:, :-1][at]))
        for net, hidden in zip(nets, (mine, theirs), strict=True)
    ]
    apart = (guesses[0] - guesses[1]).square().mean(-1).sum()
    torch.testing.assert_close(sums.patch_apart, apart, rtol=1e-9, atol=1e-9)
    assert torch.allclose(sums.ce, run(LossModel(nets[0]), batch).ce), "what is shown is still what the corpus says"
    (sums.kl.sum() + sums.patch_apart).backward()
    assert all(p.grad is None and not p.requires_grad for p in nets[1].parameters())
    assert all(p.grad is not None for p in nets[0].parameters() if p.requires_grad)


def test_a_net_that_is_its_teachers_equal_has_nothing_to_learn(batch: Batch) -> None:
    net, teacher = (Net(CONFIG).init_(0).double() for _ in range(2))
    model = LossModel(net, teacher=teacher)
    sums = model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid, distill=True)
    assert not sums.kl.any() and sums.patch_apart == 0
    assert not run(model, batch).kl.any(), "and nothing is asked of it without `distill`"


def test_the_teacher_is_no_part_of_what_is_stored() -> None:
    net, teacher = (Net(CONFIG).init_(seed) for seed in (0, 1))
    assert LossModel(net, teacher=teacher).state_dict().keys() == LossModel(net).state_dict().keys()


def test_a_layer_that_is_left_out_is_not_there(model: LossModel, batch: Batch) -> None:
    """As if its outputs were zero: the residual stream passes it by."""
    args = (batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid)
    skipped = model(*args, skip={1, 3})
    silent = LossModel(Net(CONFIG).double())
    silent.load_state_dict(model.state_dict())
    for layer in (1, 3):
        block = silent.net.groups[layer].blocks[0]
        with torch.no_grad():
            block.attention.out.weight.zero_()
            block.mlp.down.weight.zero_()
    torch.testing.assert_close(skipped.ce, silent(*args).ce, rtol=1e-12, atol=1e-9)
    assert not torch.allclose(skipped.ce, run(model, batch).ce)


def test_24_each_loss_keeps_to_its_tokens(model: LossModel, batch: Batch) -> None:
    """The cross-entropy takes nothing from the patch head, and where there is no target (a prompt in fine-tuning) no gradient;
    that the patch error reads patches alone stands above, written out."""
    model.zero_grad()
    run(model, batch).ce.sum().backward()
    assert model.net.patch_head.weight.grad is None
    states = torch.randn(1, 6, CONFIG.width, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([-1, -1, 40, 41, -1])
    rows = (targets >= 0).nonzero().flatten()
    model._losses(states[0, rows], targets[rows], 4, None)[0].sum().backward()
    assert states.grad[0].any(-1).tolist() == [False, False, True, True, False, False]


def test_frozen_weights_are_no_part_of_the_state_as_long_as_that_is_asked_for() -> None:
    net = Net(CONFIG)
    net.groups[0].requires_grad_(False)
    names = {f"net.{name}" for name, _ in net.named_parameters()}
    trained = {name for name in names if not name.startswith("net.groups.0.")}
    model = LossModel(net, trained_only=True)
    assert set(model.state_dict()) == trained < names
    assert set(model.state_dict(prefix="x.")) == {f"x.{name}" for name in trained}
    model.trained_only = False
    assert set(model.state_dict()) == names == set(LossModel(net).state_dict())
