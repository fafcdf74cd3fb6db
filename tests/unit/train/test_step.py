"""One update: what it computes does not depend on how the batch is cut, and nothing is written when something is off."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal import presets
from shoal.data.batches import Batch
from shoal.errors import DataError, ShoalError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.model.net import Net
from shoal.train import step
from shoal.train.feed import open_feed, shard_tokenizer
from shoal.train.loss import LossModel, Places, Sums
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks
from shoal.train.plan import pretrain_plan
from shoal.train.step import StepReport, count, update

PRESET = presets.get("test")
WEIGHTS = (0.2, 0.3, 0.5)


def fresh() -> LossModel:
    return LossModel(Net(PRESET.model).init_(0).double())


def one_update(model: LossModel, batches: list[Batch], ranks: Ranks, config=PRESET.train) -> StepReport:
    optimizer = make_optimizer(model, config)
    return update(model, optimizer, batches, config=config, weights=WEIGHTS, rate=1e-3, ranks=ranks)


def rows_of(batch: Batch) -> list[Batch]:
    """A batch as micro-batches of one row."""
    ends = (batch.tokens == 8).sum(1).cumsum(0).tolist()
    return [
        Batch(
            batch.tokens[row : row + 1], batch.targets[row : row + 1], batch.docs[row : row + 1],
            batch.patches[start:end], batch.grid[start:end], batch.row_bytes[row : row + 1], (batch.modalities[row],),
        )
        for row, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]  # fmt: skip


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_micro_batches_of_shards_give_one_update(shards: Path, alone: Ranks, accumulate: int) -> None:
    """(8 x 1) = (4 x 2) = (1 x 8), images included: every parameter is the same to float64 rounding."""

    def trained(parts: int) -> tuple[StepReport, dict[str, torch.Tensor]]:
        plan = pretrain_plan("test", str(shards), "unused", steps=1, accumulate=parts)
        batches = open_feed(plan, shard_tokenizer(shards), "", alone).at(0)
        assert len(batches) == parts
        model = fresh()
        return one_update(model, batches, alone), model.state_dict()

    whole, want = trained(1)
    report, got = trained(accumulate)
    assert report.loss == pytest.approx(whole.loss, rel=1e-12)
    assert (report.targets, report.patches, report.tokens) == (whole.targets, whole.patches, whole.tokens)
    assert report.bpb == pytest.approx(whole.bpb, rel=1e-12)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-10)


def test_masked_rows_of_different_lengths_give_one_update(shards: Path, chats: Path, alone: Ranks) -> None:
    """Chats, where rows have few targets and not equally many: a mean of means would be wrong here."""
    config = replace(PRESET.train, batch_tokens=400, accumulate=1)
    plan = replace(pretrain_plan("test", str(chats), "unused", steps=1), train=config)
    (batch,) = open_feed(plan, shard_tokenizer(shards), DEFAULT_TEMPLATE, alone).at(0)
    counts = (batch.targets >= 0).sum(1)
    assert len(counts) > 3 and len(counts.unique()) > 1
    whole, cut = fresh(), fresh()
    report, by_row = one_update(whole, [batch], alone), one_update(cut, rows_of(batch), alone)
    assert by_row.loss == pytest.approx(report.loss, rel=1e-12)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_report_is_the_loss_that_was_minimised(shards: Path, alone: Ranks) -> None:
    plan = pretrain_plan("test", str(shards), "unused", steps=1, accumulate=2)
    batches = open_feed(plan, shard_tokenizer(shards), "", alone).at(0)
    report = one_update(fresh(), batches, alone)
    assert len(report.ce) == 3 and report.patches > 0
    weighted = sum(w * ce for w, ce in zip(WEIGHTS, report.ce, strict=True))
    assert report.loss == pytest.approx(weighted + PRESET.train.patch_weight * report.patch)
    assert report.ce[-1] == pytest.approx(math.log(PRESET.model.vocab), abs=0.4), "untrained, so near a uniform guess"
    assert report.tokens == sum(int((b.docs >= 0).sum()) for b in batches)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_step_writes_nothing(shards: Path, alone: Ranks, bad: float) -> None:
    plan = pretrain_plan("test", str(shards), "unused", steps=1, accumulate=2)
    batches = open_feed(plan, shard_tokenizer(shards), "", alone).at(0)
    model = fresh()
    with torch.no_grad():
        model.net.patch_head.weight[0, 0] = bad
    before = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer(model, PRESET.train)
    with pytest.raises(ShoalError, match=r"not finite.*left as they were"):
        update(model, optimizer, batches, config=PRESET.train, weights=WEIGHTS, rate=1e-3, ranks=alone)
    assert not optimizer.state, "no moments either"
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


def test_ranks_with_different_numbers_of_micro_batches_are_refused(shards: Path) -> None:
    class Two(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.tensor([1.0, 5, 0, 5, 5, 1, 0, 0, 0])  # the other rank has one micro-batch

    plan = pretrain_plan("test", str(shards), "unused", steps=1, accumulate=2)
    batches = open_feed(plan, shard_tokenizer(shards), "", Ranks(0, 1, torch.device("cpu"))).at(0)
    with pytest.raises(DataError, match="micro-batches differ by worker"):
        count(batches, Two(0, 2, torch.device("cpu")))


def test_with_a_teacher_the_loss_and_its_gradient_are_what_the_definition_says(shards: Path, alone: Ranks) -> None:
    """Sum over exits of share (cross-entropy + distill KL) over the targets of the whole batch, and of the patch errors over
    its patches."""
    plan = pretrain_plan("test", str(shards), "unused", steps=1, accumulate=2)
    batches = open_feed(plan, shard_tokenizer(shards), "", alone).at(0)
    model = LossModel(Net(PRESET.model).init_(0).double(), teacher=Net(PRESET.model).init_(1).double())
    config = replace(PRESET.train, distill=0.3, patch_weight=0.7, clip=1e9)
    found = [model(b.tokens, b.targets, b.docs, b.patches, b.grid, distill=True) for b in batches]
    targets = sum(int((b.targets >= 0).sum()) for b in batches)
    by_exit = sum(sums.ce.sum(1) + 0.3 * sums.kl for sums in found) / targets
    by_patch = sum(sums.patch + 0.3 * sums.patch_apart for sums in found) / sum(len(b.patches) for b in batches)
    loss = by_exit @ torch.tensor(WEIGHTS, dtype=torch.float64) + 0.7 * by_patch
    trained = [p for p in model.parameters() if p.requires_grad]
    wanted = torch.autograd.grad(loss, trained)
    report = one_update(model, batches, alone, config)
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-7), "shares are fp32"
    assert sum(float(sums.patch_apart.detach()) for sums in found) > 0
    for p, gradient in zip(trained, wanted, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-6, atol=1e-9)


def made(rows: list[tuple[list[int], list[int], list[int], int, str]]) -> Batch:
    """Of rows: tokens, targets, documents, bytes and modality."""
    tokens, targets, docs, lengths, modalities = zip(*rows, strict=True)
    return Batch(
        *map(torch.tensor, (tokens, targets, docs)), torch.zeros((0, PRESET.model.patch_values), dtype=torch.uint8),
        torch.zeros((0, 2), dtype=torch.long), torch.tensor(lengths), modalities,
    )  # fmt: skip


PLAIN = [
    ([20, 21, 22], [21, 22, -1], [0, 0, 0], 7, "text"),
    ([20, 21, 0], [21, -1, -1], [0, 0, -1], 3, "image"),  # a row of images is no text
    ([0, 0, 0], [-1, -1, -1], [-1, -1, -1], 0, "code"),  # a blank one
]


def test_two_ranks_that_run_the_same_are_let_on_and_two_that_do_not_are_told(alone: Ranks) -> None:
    class Two(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + theirs

    class Seen(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            seen.append(values)
            return values

    seen: list[torch.Tensor] = []
    for way in ([1, 2], [1, 4]):
        count([made(PLAIN)], Seen(0, 1, torch.device("cpu")), way)
    mine, theirs = seen
    with pytest.raises(ShoalError, match=r"different layers or exits: got \[1, 2\]"):
        count([made(PLAIN)], Two(0, 2, torch.device("cpu")), [1, 2])
    theirs = mine
    assert count([made(PLAIN)], Two(0, 2, torch.device("cpu")), [1, 2]).targets == 6


def test_preferences_lose_what_the_definition_of_dpo_says() -> None:
    """-log sigmoid(beta ((r_w - ce_w) - (r_l - ce_l))) of each counted pair, by exit."""
    ce = torch.tensor([[1.0, 3.0, 5.0, 2.0], [2.0, 2.0, 9.0, 9.0]], dtype=torch.float64)
    reference = torch.tensor([[2.0, 2.5, 4.0, 4.0], [2.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    both = step.preference_losses(ce, reference, 0.5, torch.tensor([True, True]))
    by_hand = [-math.log(1 / (1 + math.exp(-0.5 * gain))) for gain in ((2 - 1) - (2.5 - 3), (4 - 5) - (4 - 2))]
    assert both.tolist() == pytest.approx([sum(by_hand), 2 * math.log(2)])
    one = step.preference_losses(ce, reference, 0.5, torch.tensor([True, False]))
    assert one.tolist() == pytest.approx([by_hand[0], math.log(2)])


def test_an_update_on_preferences_divides_by_pairs_and_does_not_count_blank_ones(alone: Ranks) -> None:
    model = LossModel(Net(PRESET.model).init_(0).double(), teacher=Net(PRESET.model).init_(1).double())
    pairs = [([20, 21, 22], [21, 22, -1], [0] * 3, 2, "chat"), ([20, 23, 24], [-1, 24, -1], [0] * 3, 1, "chat")]
    blank = [([0] * 3, [-1] * 3, [-1] * 3, 0, "chat")] * 2
    batches = [made(pairs), made(pairs[::-1]), made(blank)]
    found = [model(b.tokens, b.targets, b.docs, b.patches, b.grid, reference=True) for b in batches[:2]]
    losses = sum(step.preference_losses(sums.ce, sums.reference, 0.25, torch.tensor([True])) for sums in found) / 2
    config = replace(PRESET.train, dpo=0.25, clip=1e9)
    report = one_update(model, batches, alone, config)
    assert report.loss == pytest.approx(float(losses.detach() @ torch.tensor(WEIGHTS, dtype=torch.float64)), rel=1e-6)
    assert report.targets == 6 and report.ce[-1] == pytest.approx(
        sum(float(s.ce[-1].sum().detach()) for s in found) / 6
    )


def test_bits_a_byte_are_of_rows_of_text_at_full_depth(alone: Ranks) -> None:
    model, batch = fresh(), made(PLAIN)
    nats = model(batch.tokens, batch.targets, batch.docs, batch.patches, batch.grid).ce[-1][0]
    assert one_update(model, [batch], alone).bpb == pytest.approx(float(nats.detach()) / math.log(2) / 7)
    assert math.isnan(one_update(fresh(), [made(PLAIN[1:2])], alone).bpb)


@pytest.mark.parametrize(("clip", "scale"), [(5.0, 1.0), (5.001, 1.0), (2.5, 0.5)])
def test_a_gradient_is_clipped_beyond_its_bound_alone(clip: float, scale: float) -> None:
    """A norm that is the bound is let be: clipping would divide by a little more."""
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = torch.optim.SGD(module.parameters(), lr=9.0)
    before = module.weight.detach().clone()
    assert float(step.gradient_norm(module)) == 5.0  # type: ignore[arg-type]
    step.write(optimizer, module, loss=1.0, norm=5.0, rate=0.5, clip=clip)  # type: ignore[arg-type]
    torch.testing.assert_close(
        before - module.weight.detach(), 0.5 * scale * torch.tensor([[3.0, 4.0]]), rtol=1e-5, atol=0
    )
    if scale == 1:
        assert module.weight.grad.tolist() == [[3.0, 4.0]]


def test_who_cannot_read_its_batches_says_so_on_every_rank(alone: Ranks) -> None:
    """It is told before numbers of micro-batches, which differ for that."""

    class Two(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            return values + torch.tensor([0.0, 0, 0, 0, 0, 0, 0, 0, 1])

        def gather(self, value: object) -> list:
            return [value, DataError("theirs")]

    with pytest.raises(DataError, match=r"^mine$"):
        count([], alone, problem=DataError("mine"))
    with pytest.raises(DataError, match=r"^mine$"):
        model, how = fresh(), {"config": PRESET.train, "weights": WEIGHTS, "rate": 1e-3, "ranks": alone}
        update(model, make_optimizer(model, PRESET.train), [], problem=DataError("mine"), **how)
    for problem, told in ((DataError("mine"), "mine"), (None, "theirs")):
        with pytest.raises(DataError, match=rf"^{told}$"):
            count([made(PLAIN)], Two(0, 2, torch.device("cpu")), problem=problem)


def test_gradients_from_before_an_update_are_not_its_own(alone: Ranks) -> None:
    clean, left = fresh(), fresh()
    for p in left.parameters():
        p.grad = torch.ones_like(p)
    reports = [one_update(model, [made(PLAIN)], alone) for model in (clean, left)]
    assert reports[0].grad_norm == reports[1].grad_norm
    for one, other in zip(clean.parameters(), left.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_rehearsal_changes_nothing_and_leaves_no_gradient(alone: Ranks) -> None:
    """With shares and skipped layers as they are told, and every exchange."""
    model = fresh()
    before = copy.deepcopy(model.state_dict())
    asked, told, forward = list[bool](), list[dict](), LossModel.forward

    def seen(self: LossModel, *given: object, **how: object) -> Sums:
        told.append(how)
        return forward(self, *given, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossModel, "forward", seen)
        patch.setattr(step, "sync_gradients", lambda model, on: asked.append(on))
        step.rehearse(model, made(PLAIN), config=PRESET.train, weights=(0.0, 0.4, 0.6), ranks=alone, skip=[1])
    assert [how["exits"] for how in told] == [[2, 4]] and told[0]["skip"] == [1]
    assert isinstance(told[0]["places"], Places), "found before the batch is moved: a device is not waited for"
    assert asked == [True] and all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
