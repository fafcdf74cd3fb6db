"""Training, from a plan to a model directory: the same loop alone, under torchrun and under Ray Train.

    join the ranks -> build the model -> find what to go on from -> open the data -> shard the model -> draw or load
      -> (one update -> say so -> now and then: evaluate on held-out rows, save a checkpoint) until the run's share is done
      -> evaluate, save, write the model's directory, tensor by tensor

A file RUN/stop asks for a checkpoint and an early end.

All ranks decide together: whatever depends on a clock or a disk is read on rank 0 and agreed on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.data.batches import Batch
from shoal.errors import ConfigError, DataError, ShoalError
from shoal.model.cost import parameters
from shoal.model.gpu import trial
from shoal.model.linears import fake_quantize_
from shoal.train import fresh
from shoal.train.bucket import need_possible, placed
from shoal.train.compiled import compiles
from shoal.train.feed import Feed, open_feed
from shoal.train.heldout import Bpb, HeldoutReport, measure
from shoal.train.log import Report, Speaker, ignore
from shoal.train.loss import LossModel
from shoal.train.meter import Meter, matmul_rate, training_flops
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
from shoal.train.refusal import need_memory_of_gpu, need_replaceable
from shoal.train.run import Clock, Run, StoppedError, enough_memory, only_writer, stop_file
from shoal.train.start import Start
from shoal.train.state import TrainState
from shoal.train.step import rehearse, update
from shoal.train.timing import Tracer, Watch


@dataclass(frozen=True)
class FitResult:
    """What a run came to; the same on every rank."""

    out: str  # the model directory
    steps: int
    tokens: int  # padding left out
    seconds: float  # of training, over all sittings
    bpb: Bpb  # held-out bits a byte: modality -> exit name -> value
    # what it starts from, measured likewise: of a quantising run as it is ("fp32") and rounded without training
    # ("post-training"), of one that trains early exits with these as they begin ("begun")
    rounded: dict[str, Bpb] = field(default_factory=dict)
    # of one that adds early exits: sha256 of all that full depth reads, before and after; the same where these are all that was
    # trained. Of one that adds biases: of all but these
    backbone: tuple[str, str] = ("", "")


def fit(plan: FitPlan, report: Report = ignore) -> FitResult:
    """Train as `plan` says, going on from its newest checkpoint if it has one, and write the model directory.

    `report` gets every record on rank 0, and the checkpoint records on every rank. Raises CheckpointError, ConfigError or
    DataError when the plan cannot be followed, ResourceError when memory is short or another run writes to the same folder,
    ShoalError when the loss is not finite; what was saved stays resumable.
    """
    ranks = Ranks.join()
    plan = placed(plan)
    with enough_memory(plan, ranks), only_writer(plan, ranks) as plan, contextlib.ExitStack() as at_end:
        return _fit(plan, ranks, Speaker(plan.run, ranks.first, report), at_end)


def _fit(plan: FitPlan, ranks: Ranks, say: Speaker, at_end: contextlib.ExitStack) -> FitResult:
    with ranks.alike():
        need_possible(plan)
        need_replaceable(plan)  # where its model goes is looked at before it is trained
    with ranks.alike(), ranks.at_leisure():  # one machine may have what another has to fetch
        plan = located(plan)
        start = Start.of(plan, ranks)
    with ranks.alike():
        identity = plan.identity(start.read)
        if plan.dtype == "bfloat16" and ranks.device.type == "cpu":
            raise ConfigError("dtype", got=plan.dtype, allowed="auto or float32 without a GPU")
        if ranks.device.type == "cuda":
            need_memory_of_gpu(plan, ranks.world, torch.cuda.get_device_properties(ranks.device).total_memory)
    run = Run(plan, ranks, say)
    at_end.callback(run.store.leave, ranks)
    at_end.callback(run.abandon)
    state = run.begin(identity)
    with ranks.alike():
        plan = _as_begun(plan, state, ranks, say)
        feed = open_feed(plan, start.tokenizer, start.template, ranks)
        if plan.keep_best and not feed.heldout:
            raise DataError("keep_best", got="no held-out rows", do="give --heldout, or leave it out")
    start.prepare(plan, feed, ranks)
    state.parts = plan.parts_at(ranks.world)
    exits_, teacher = trained_exits(plan.model.exits, plan.train), start.teacher(plan)
    model = LossModel(start.net, exits_, teacher, trained_only=plan.frozen)
    model.low = plan.dtype != "float32"
    trial.of_training(plan.model, plan.row_length, ranks.device, low=model.low, alone=ranks.world == 1)
    compiled = compiles(plan.compile, ranks.device)
    shard_(model, ranks, replicas=plan.replicas, recompute=plan.recompute, compiled=compiled)
    if any(parameter.is_meta for parameter in model.parameters()):
        fresh.fill_(model, start.net, plan.train.seed, ranks.device)
    optimizer = make_optimizer(model, plan.train)
    rounded = _rounded(plan, model, feed, ranks)  # before a checkpoint takes the place of the weights
    run.load(model, optimizer, feed)
    followed = run.schedule(state)
    if compiled and _done(plan, run, state) < 1.0:
        _rehearsed(plan, run, state)
    heads = min(2, len(model.exits)) if rotates(plan.model, plan.train) else len(model.exits)
    frozen = plan.biases_only or plan.train.lora_rank > 0
    work = training_flops(plan.model, heads, plan.row_length, frozen=frozen, exits_only=plan.exits_only)
    meter = Meter(work, matmul_rate(ranks.device), ranks.world)
    say("start", _summary(plan, ranks, meter), mix=dict(feed.mix), step=state.step)
    if chats := feed.chats:
        say("chats", chats, step=state.step)

    done = _updates(plan, run, state, meter, followed)
    final = _last(plan, run, state, done)
    backbone = start.export(plan, model, ranks)
    count = plan.model_place, state.step, state.tokens, state.seconds
    result_ = FitResult(*count, final.bpb, rounded, (start.backbone, backbone))
    say("end", asdict(result_), step=state.step)
    return result_


def _updates(plan: FitPlan, run: Run, state: TrainState, meter: Meter, followed: Mapping[int, float]) -> float:
    """Update after update, with what is due between them, until the run is done; `state` goes along. Returns the share that is
    done. `followed`: as of `Run.schedule`."""
    ranks, say, feed, model = run.ranks, run.say, run.feed, run.model
    clock = Clock(ranks, state.seconds, stop_file(plan.run))
    tracer = Tracer(plan.run, plan.profile, ranks)
    done, took = _done(plan, run, state), clock.last_step
    while done < 1.0:
        tracer.before()
        watch = Watch()
        with watch("data"):
            batches, problem = _read(feed, state.step)
        # The schedules are read at the end of this update, so that the first has a rate and the last has the lowest.
        # One that was compiled in, or measured after, is no measure of the next: of the last two the shorter is.
        expected, took = min(took, clock.last_step), clock.last_step
        end = state.seconds + expected
        share = progress(plan, step=state.step + 1, seconds=end, steps_in_epoch=feed.steps_in_epoch)
        # never back, where a clock goes faster than before
        at = followed.get(state.step + 1, max(state.schedule, share))
        done = max(share, at)
        rate, weights = _rate(plan, at), _weights(plan, at, state.step)
        skip = left_out(plan.model, plan.train, state.step)
        # Rounding begins when the rate has warmed up: AdamW's moments are empty until then, and rounding is noise to them.
        fake_quantize_(model.net, plan.quantize and at > plan.train.warmup)
        how: dict[str, Any] = {"config": plan.train, "weights": weights, "rate": rate, "ranks": ranks, "skip": skip}
        result = update(model, run.optimizer, batches, watch=watch, problem=problem, **how)
        state.step, state.tokens = state.step + 1, state.tokens + result.tokens
        state.cursor, state.seconds, state.schedule = feed.cursor(state.step), clock.step(), at
        if not expected:  # nobody knew how long it takes: the run's time may have ended in it
            done = max(done, _done(plan, run, state))
        meter.add(result.tokens, clock.last_step)
        shown = {"progress": done, "schedule": at, "rate": rate, "eta": clock.eta(done), "seconds": clock.last_step}
        told = watch.told(ranks, clock.last_step)
        say("step", meter.read() | asdict(result) | shown | told, step=state.step)
        if traced := (tracer.after(state.step) if done < 1.0 else tracer.close(state.step)):
            say("trace", step=state.step, path=str(traced))
        fake_quantize_(model.net, plan.quantize)  # what is measured is what will be served
        _between(plan, run, state, done, stopped=clock.stopped)
    return done


def _read(feed: Feed, step: int) -> tuple[list[Batch], ShoalError | None]:
    """This rank's micro-batches of an update, or what of ours it met: the others, which read other rows, hear of it in the
    update's first exchange."""
    try:
        return feed.at(step), None
    except ShoalError as error:
        return [], error


def _done(plan: FitPlan, run: Run, state: TrainState) -> float:
    """The share of the run that `state` has done."""
    share = progress(plan, step=state.step, seconds=state.seconds, steps_in_epoch=run.feed.steps_in_epoch)
    return max(share, state.schedule)


def _rehearsed(plan: FitPlan, run: Run, state: TrainState) -> None:
    """Compile the layers before the clock of the run starts, by a pass forward and backward that is forgotten; where it trains
    to be rounded, as they are and rounded."""
    with run.ranks.alike():
        batch = run.feed.at(state.step)[0]
    weights = _weights(plan, state.schedule, state.step)
    skip = left_out(plan.model, plan.train, state.step)
    for rounded in sorted({False, plan.quantize}):
        fake_quantize_(run.model.net, rounded)
        rehearse(run.model, batch, config=plan.train, weights=weights, ranks=run.ranks, skip=skip)


def _rate(plan: FitPlan, at: float) -> float:
    """The learning rate with the share `at` of the run done. By the clock nobody knows how long the first update takes, so that
    it is at 0: it has the lowest rate, and not none."""
    return learning_rate(at, plan.train) or plan.train.learning_rate * plan.train.min_lr_ratio


def _weights(plan: FitPlan, at: float, step: int) -> tuple[float, ...]:
    """Weights of the exits' losses in the update after `step`, with the share `at` of the run done."""
    weights = exit_weights(at, plan.train)
    return one_early_exit(weights, step) if rotates(plan.model, plan.train) else weights


def _between(plan: FitPlan, run: Run, state: TrainState, done: float, *, stopped: bool) -> None:
    """What is due between two updates: an evaluation, a checkpoint, word of what was copied. Raises StoppedError, with a
    checkpoint, for a run that was `stopped`. Nothing is due when all is `done`: that is the end's."""
    run.look(state)
    if plan.eval_every and state.step % plan.eval_every == 0 and done < 1.0:
        run.evaluate(state, done)
    if (stopped or run.due(state.seconds)) and done < 1.0:
        run.save(state, done, must=stopped, beside=plan.checkpoint_minutes > 0 and not stopped)
    run.tell_copies(state)
    if stopped and done < 1.0:
        run.close(state)
        raise StoppedError(f"stopped at step {state.step}", do="the same command goes on from there")


def _last(plan: FitPlan, run: Run, state: TrainState, done: float) -> HeldoutReport:
    """The run's last evaluation and checkpoint; with `keep_best`, the best evaluation, whose weights are then the model's."""
    final = run.evaluate(state, done)
    run.save(state, done, must=True)
    if plan.keep_best:
        final = run.take_best(state, final)
    run.close(state)
    return final


def _as_begun(plan: FitPlan, state: TrainState, ranks: Ranks, say: Speaker) -> FitPlan:
    """`plan` with as many micro-batches in a global batch as the run began with, where its order hangs on that: chats are cut
    into groups of so many tokens, and another number would read some rows twice and others never. Raises ConfigError where
    they are fewer than ranks."""
    if Path(plan.data).is_dir() or state.parts in (0, plan.parts_at(ranks.world)):
        return plan
    kept = plan.in_parts(state.parts, ranks.world)
    text = (
        f"the run goes on with the {state.parts} micro-batches an update that it began with, "
        f"{kept.train.accumulate} a worker: with others it would read some rows twice and others never"
    )
    say("warning", step=state.step, text=text)
    return kept


def _rounded(plan: FitPlan, model: LossModel, feed: Feed, ranks: Ranks) -> dict[str, Bpb]:
    """Held-out bits a byte that a run starts from, see `FitResult`; leaves the model rounding where it quantises."""
    if not plan.quantize:
        return {"begun": measure(model, feed.heldout, ranks).bpb} if plan.adapts else {}
    found = {}
    for name, on in (("fp32", False), ("post-training", True)):
        fake_quantize_(model.net, on)
        found[name] = measure(model, feed.heldout, ranks).bpb
    return found


def _summary(plan: FitPlan, ranks: Ranks, meter: Meter) -> dict[str, Any]:
    """What the first record says of the run."""
    return {
        "name": plan.name,
        "parameters": parameters(plan.model).total,
        "world": ranks.world,
        "device": str(ranks.device),
        "batch_tokens": plan.train.batch_tokens,
        "micro_batches": plan.train.accumulate,
        "limits": plan.limits,
        "matmul_rate": meter.rate / ranks.world,
        "progress": 0.0,
    }
