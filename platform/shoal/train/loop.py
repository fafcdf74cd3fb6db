"""Training, from a plan to a model directory: the same loop alone, under torchrun and under Ray Train.

    join the ranks -> open the data -> build the whole model -> shard it -> resume
      -> (one update -> say so -> now and then: evaluate on held-out rows, save a checkpoint) until the run's share is done
      -> evaluate, save, gather the model and write its directory

A file RUN/stop asks for a checkpoint and an early end.

All ranks decide together: whatever depends on a clock or a disk is read on rank 0 and agreed on.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import asdict, dataclass, field
from typing import Any

from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import checkpoint as model_directory
from shoal.model.cost import parameters
from shoal.model.linears import export_int8, fake_quantize_
from shoal.model.net import Net
from shoal.train import log, lora
from shoal.train.checkpoint import full_state
from shoal.train.feed import Feed, open_feed, shard_tokenizer
from shoal.train.heldout import Bpb, measure
from shoal.train.log import Report, Speaker, ignore
from shoal.train.loss import LossModel
from shoal.train.meter import Meter, matmul_rate
from shoal.train.optim import (
    exit_weights,
    learning_rate,
    left_out,
    make_optimizer,
    one_early_exit,
    rotates,
    trained_exits,
)
from shoal.train.parallel import Ranks, shard_
from shoal.train.plan import FitPlan, located, progress
from shoal.train.run import Clock, Run, StoppedError, enough_memory, stop_file
from shoal.train.step import update


@dataclass(frozen=True)
class FitResult:
    """What a run came to; the same on every rank."""

    out: str  # the model directory
    steps: int
    tokens: int  # padding left out
    seconds: float  # of training, over all sittings
    bpb: Bpb  # held-out bits a byte: modality -> exit name -> value
    rounded: dict[str, Bpb] = field(
        default_factory=dict
    )  # of a quantising run: the model it starts from, as it is ("fp32") and
    # rounded without training ("post-training"), measured likewise


def fit(plan: FitPlan, report: Report = ignore) -> FitResult:
    """Train as `plan` says, going on from its newest checkpoint if it has one, and write the model directory.

    `report` gets every record on rank 0, and the checkpoint records on every rank. Raises CheckpointError, ConfigError or
    DataError when the plan cannot be followed, ResourceError when memory is short, ShoalError when the loss is not finite;
    what was saved stays resumable.
    """
    ranks = Ranks.join()
    with enough_memory(plan, ranks):
        return _fit(plan, ranks, Speaker(plan.run, ranks.first, report))


def _fit(plan: FitPlan, ranks: Ranks, say: Speaker) -> FitResult:
    with ranks.alike():
        plan = located(plan)
        start = _Start.of(plan)
        feed = open_feed(plan, start.tokenizer, start.template, ranks)
    teacher = copy.deepcopy(start.net) if plan.has_teacher else None
    model = LossModel(start.net, trained_exits(plan.model.exits, plan.train), teacher)
    shard_(model, ranks, replicas=plan.replicas, recompute=plan.recompute, compiled=plan.compile)
    optimizer = make_optimizer(model, plan.train)
    run = Run(plan, ranks, model, optimizer, say, feed)
    rounded = _rounded(plan, model, feed, ranks)  # before a checkpoint takes the place of the weights
    state = run.resume()
    heads = min(2, len(model.exits)) if rotates(plan.model, plan.train) else len(model.exits)
    meter = Meter(plan.model, matmul_rate(ranks.device), ranks.world, heads=heads)
    say("start", _summary(plan, ranks, meter), mix=dict(feed.mix), step=state.step)
    if chats := feed.chats:
        say("chats", chats, step=state.step)

    rates = log.rates(plan.rates_of) if plan.rates_of else {}
    clock = Clock(ranks, state.seconds, stop_file(plan.run))
    done = progress(plan, step=state.step, seconds=state.seconds, steps_in_epoch=feed.steps_in_epoch)
    while done < 1.0:
        batches = [batch.to(ranks.device) for batch in feed.at(state.step)]
        # The schedules are read at the end of this update, so that the first has a rate and the last has the lowest.
        end = state.seconds + clock.last_step
        done = progress(plan, step=state.step + 1, seconds=end, steps_in_epoch=feed.steps_in_epoch)
        rate = rates[state.step + 1] if plan.rates_of else learning_rate(done, plan.train)
        weights = exit_weights(done, plan.train)
        if rotates(plan.model, plan.train):
            weights = one_early_exit(weights, state.step)
        skip = left_out(plan.model, plan.train, state.step)
        # Rounding begins when the rate has warmed up: AdamW's moments are empty until then, and rounding is noise to them.
        fake_quantize_(model.net, plan.quantize and done > plan.train.warmup)
        result = update(
            model, optimizer, batches, config=plan.train, weights=weights, rate=rate, ranks=ranks, skip=skip
        )
        state.step, state.tokens, state.cursor = (
            state.step + 1,
            state.tokens + result.tokens,
            feed.cursor(state.step + 1),
        )
        state.seconds = clock.step()
        meter.add(result.tokens, clock.last_step)
        say("step", meter.read() | asdict(result), step=state.step, progress=done, rate=rate, eta=clock.eta(done))
        fake_quantize_(model.net, plan.quantize)  # what is measured is what will be served
        if plan.eval_every and state.step % plan.eval_every == 0 and done < 1.0:
            run.evaluate(state, done)
        if (clock.stopped or state.seconds - run.saved_at >= 60 * plan.checkpoint_minutes) and done < 1.0:
            run.save(state, done, must=clock.stopped)
        run.tell_copies(state)
        if clock.stopped and done < 1.0:
            run.close(state)
            raise StoppedError(f"stopped at step {state.step}", do="the same command goes on from there")

    final = run.evaluate(state, done)
    run.save(state, done, must=True)
    if plan.keep_best:
        final = run.take_best(state, final)
    run.close(state)
    start.export(plan, model, ranks)
    result_ = FitResult(str(plan.model_dir), state.step, state.tokens, state.seconds, final.bpb, rounded)
    say("end", asdict(result_))
    return result_


def _rounded(plan: FitPlan, model: LossModel, feed: Feed, ranks: Ranks) -> dict[str, Bpb]:
    """Held-out bits a byte that a quantising run starts from, see `FitResult`; leaves the model rounding."""
    if not plan.quantize:
        return {}
    found = {}
    for name, on in (("fp32", False), ("post-training", True)):
        fake_quantize_(model.net, on)
        found[name] = measure(model, feed.heldout, ranks).bpb
    return found


@dataclass
class _Start:
    """Where the weights come from, and with them the tokenizer and the chat template that the model will be written with."""

    net: Net
    tokenizer: Tokenizer
    template: str

    @classmethod
    def of(cls, plan: FitPlan) -> _Start:
        """From the plan's model directory, or fresh with the tokenizer of its shards. Equal on every rank."""
        if plan.init:
            parts = model_directory.read(plan.init)
            if parts.config != plan.model:
                raise CheckpointError(f"{plan.init} is of another configuration", do="plan with the model's own")
            net, tokenizer, template = parts.net, parts.tokenizer, parts.chat_template
            if plan.train.lora_rank:
                lora.adapt_(net, plan.train.lora_rank, plan.train.seed)
        else:
            net, tokenizer, template = (
                Net(plan.model).init_(plan.train.seed),
                shard_tokenizer(plan.data),
                DEFAULT_TEMPLATE,
            )
        if len(tokenizer) > plan.model.vocab:
            raise ConfigError(
                "model.vocab", got=plan.model.vocab, allowed=f"at least {len(tokenizer)}, the tokenizer's"
            )
        return cls(net, tokenizer, template)

    def export(self, plan: FitPlan, model: LossModel, ranks: Ranks) -> None:
        """Gather the model and write its directory, INT8 when the plan quantises."""
        state = {name.removeprefix("net."): tensor for name, tensor in full_state(model).items()}
        if ranks.first:
            config = plan.model
            if plan.train.lora_rank:
                state = lora.merged(state)
            if plan.quantize:
                whole = Net(config)
                whole.load_state_dict(state)
                config, state = dataclasses.replace(config, quantization="w8a8"), export_int8(whole)
            model_directory.save(
                plan.model_dir,
                config=config,
                state=state,
                tokenizer=self.tokenizer,
                name=plan.name,
                chat_template=self.template,
            )
        ranks.wait()


def _summary(plan: FitPlan, ranks: Ranks, meter: Meter) -> dict[str, Any]:
    """What the first record says of the run."""
    return {
        "name": plan.name,
        "parameters": parameters(plan.model).total,
        "world": ranks.world,
        "device": str(ranks.device),
        "batch_tokens": plan.train.batch_tokens,
        "micro_batches": plan.train.accumulate,
        "matmul_rate": meter.rate / ranks.world,
        "progress": 0.0,
    }
