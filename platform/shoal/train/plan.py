"""What one run is to do: `FitPlan`, and the plans of the stages."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from shoal import presets
from shoal.config import Dtype, ModelConfig, TrainConfig, check_exits, dump
from shoal.data import models, remote
from shoal.data.sources.s3 import is_remote
from shoal.errors import ConfigError, DataError, UsageError
from shoal.machine import sha256_of
from shoal.model import described
from shoal.train import exits, log
from shoal.train.compiled import Compile
from shoal.train.recompute import Recompute

ROW = 1024  # tokens of a row at most, where exits learn, and of an open model, whose training length is all of its context
TUNES, TUNED_RANK = ("none", "lora", "all"), 16  # what of a backbone learns with its exits
OPEN_ROWS, OPEN_RATE, OPEN_LORA_RATE = 4, 5e-5, 2e-4  # of an open model: `ROW`s in an update, and rates of learning
REPLAY_EVERY = 4  # updates of a fine-tuning with replay, the last of which reads packed rows
QUANTIZE_STEPS = 100  # updates in which a model learns to be rounded, unless another length is given
CHAT_ROWS = 16  # training lengths in an update of stages 2 and 3: chats are short, and more updates beat larger ones


@dataclass(frozen=True)
class FitPlan:
    """One training run, complete: plain values only, so that it travels to workers and into files as it is."""

    model: ModelConfig
    train: TrainConfig
    data: str  # folder of shards, or a .jsonl of chats
    run: str  # folder of the run: checkpoints/, metrics.jsonl, model/; or s3://BUCKET/PREFIX of one
    name: str = "shoal"  # of the model
    out: str = ""  # model directory to write, or s3://BUCKET/PREFIX; default: RUN/model
    init: str = ""  # model directory to start from, or s3://BUCKET/PREFIX; default: fresh weights from train.seed
    steps: int | None = None  # the run ends at the first of these limits; at least one is set
    tokens: int | None = None  # padding included
    epochs: float | None = None  # passes over the data
    minutes: float | None = None  # of wall clock, evaluations included, start-up left out
    replay: str = ""  # folder of shards that a run on chats goes back to now and then, against forgetting
    replay_every: int = REPLAY_EVERY  # updates, the last of which reads packed rows of `replay`; 2 or more
    heldout: str = ""  # .jsonl of chats to measure a fine-tuning run on; shards bring their own held-out rows
    row_tokens: int = 0  # longest row of chats that is read; 0: the training length, of an open model at most `ROW`
    mix: Mapping[str, float] | None = None  # share of each modality by token; default: what the shards were made for
    quantize: bool = False  # train with INT8 rounding in the forward pass, and write the INT8 model
    eval_every: int = 100  # steps between held-out evaluations; 0: only at the end
    eval_rows: int = 32  # held-out rows of each modality that are read
    checkpoint_minutes: float = 1.0  # between checkpoints
    keep: int = 2  # checkpoints kept
    keep_best: bool = False  # keep the one of the best evaluation too, and write the model from it
    mirror: str = ""  # folder or s3://BUCKET/PREFIX that checkpoints are copied to as well, and fetched from
    replicas: int = 1  # groups of workers that each hold a whole sharded model (HSDP)
    # activation checkpointing: true, of layers: least memory, a third more work; selective, of what is cheap in them
    recompute: Recompute = False
    compile: Compile = "auto"  # torch.compile each layer; auto: on a GPU, where it pays
    # what a GPU computes in; auto: bf16, with norms, softmax, scores of blocks and logits in fp32. float32: as TF32
    dtype: Dtype = "auto"
    profile: int = 0  # updates that are traced, for Perfetto
    resume: Literal["auto", "never"] = "auto"  # auto: go on from the newest whole checkpoint of the run
    # of a run that is begun anew, whose it is: its workers, started again, go on from what they wrote
    command: str = ""
    # folder of a run whose schedule, as it was recorded, is followed again: the same rates at each step
    rates_of: str = ""
    uri: str = ""  # of a run in S3, where `run` is this machine's folder of it
    lease: str = ""  # of a run in S3: which command's its workers are (data/lease.py); "": it has none yet
    parts: int = 0  # micro-batches of a global batch, over all workers; 0: `accumulate` on each of them

    def __post_init__(self) -> None:
        if self.resume not in ("auto", "never"):
            raise UsageError("resume", got=self.resume, allowed="auto, never")
        if self.recompute not in get_args(Recompute):
            raise ConfigError("recompute", got=self.recompute, allowed=get_args(Recompute))
        if self.compile not in get_args(Compile):
            raise ConfigError("compile", got=self.compile, allowed=get_args(Compile))
        if self.dtype not in get_args(Dtype):
            raise ConfigError("dtype", got=self.dtype, allowed=get_args(Dtype))
        limits = (self.steps, self.tokens, self.epochs, self.minutes)
        if not any(limits):
            raise UsageError("how long to train", do="give --steps, --tokens, --epochs or --minutes")
        if not all(limit is None or 0 < limit < math.inf for limit in limits):
            raise UsageError("length of the run", got=limits, allowed="positive numbers")
        least = {"replay_every": 2, "keep": 1, "replicas": 1}
        least |= dict.fromkeys(("eval_every", "eval_rows", "checkpoint_minutes", "parts", "profile"), 0)
        for name, value in least.items():
            if not value <= getattr(self, name) < math.inf:
                raise ConfigError(name, got=getattr(self, name), allowed=f"{value} or more")
        if not 0 <= self.row_tokens <= self.model.context:
            raise ConfigError("row_tokens", got=self.row_tokens, allowed=f"0 to {self.model.context}, the context")
        check_exits(self.model, self.train)
        if self.model.quantization != "none":
            raise ConfigError("model.quantization", got=self.model.quantization, allowed="none: train the fp32 model")
        if self.adapts and (not self.init or self.quantize or (self.frozen and self.train.lora_rank)):
            raise ConfigError("train.trains", got=self.train.trains, allowed="all but in `shoal adapt`")
        if self.adapts and not (self.biases_only or self.model.exit_ffn):
            allowed = "all for a model without exits that could be trained"
            raise ConfigError("train.trains", got=self.train.trains, allowed=allowed)
        if self.train.dpo and (not self.init or self.quantize or self.replay or self.on_shards):
            raise ConfigError("train.dpo", got=self.train.dpo, allowed="0 but in fine-tuning on pairs, without replay")
        if self.train.lora_rank and (not self.init or self.quantize):
            allowed = "0 but in fine-tuning"
            raise ConfigError("train.lora_rank", got=self.train.lora_rank, allowed=allowed, do="train all")

    @property
    def model_dir(self) -> Path:
        """Where the finished model goes, of a run in a folder."""
        return Path(self.model_place)

    @property
    def model_place(self) -> str:
        """Where the finished model goes: a folder, or ``s3://...``."""
        run = self.uri or self.run
        place = self.out or f"{run.rstrip('/')}/model"
        return place if is_remote(place) else str(Path(place))

    @property
    def router_data(self) -> str:
        """What the finished model's router is fitted on: held-out chats, or shards, which hold rows out; "" for chats alone."""
        return self.heldout or (self.data if self.on_shards else "")

    @property
    def on_shards(self) -> bool:
        """Are the data a corpus, and no chats?"""
        return remote.is_corpus(self.data) or Path(self.data).is_dir()

    @property
    def has_teacher(self) -> bool:
        """Is the model that the run starts from kept beside it? INT8 and sparse layers stand in for it, DPO prefers more."""
        return (self.quantize and self.train.distill > 0) or self.train.dpo > 0 or self.biases_only

    @property
    def exits_only(self) -> bool:
        """Do all weights stay as they are but those of the early exits?"""
        return self.train.trains == "exits"

    @property
    def biases_only(self) -> bool:
        """Do all weights stay as they are but the biases of sparse layers?"""
        return self.train.trains == "biases"

    @property
    def frozen(self) -> bool:
        """Is what is trained new, and all that was there before left as it is?"""
        return self.exits_only or self.biases_only

    @property
    def adapts(self) -> bool:
        """Is something added to a model, and taught?"""
        return self.train.trains != "all"

    @property
    def row_length(self) -> int:
        """Tokens of the longest row that is trained on."""
        cut = (self.adapts or bool(self.model.of_open_models)) and not self.on_shards
        return self.row_tokens or (min(self.model.train_length, ROW) if cut else self.model.train_length)

    @property
    def limits(self) -> dict[str, float | None]:
        """How long the run is, by name; the schedule of a run follows from these, its seconds and its steps."""
        return {"steps": self.steps, "tokens": self.tokens, "epochs": self.epochs, "minutes": self.minutes}

    @property
    def measured_on(self) -> str:
        """What decides which evaluation is the best: the held-out rows that are read. "" where nothing hangs on it."""
        if not self.keep_best:
            return ""
        return f"{self.eval_rows} rows of {fingerprint(self.heldout) if self.heldout else 'the shards'}"

    @property
    def batch_rows(self) -> int:
        """Rows of one global batch."""
        return max(1, self.train.batch_tokens // self.model.train_length)

    def parts_at(self, world: int) -> int:
        """Micro-batches of a global batch, over `world` workers."""
        return self.parts or world * self.train.accumulate

    def micro_rows(self, world: int) -> int:
        """Rows of one micro-batch of one worker. Raises ConfigError when the batch does not divide evenly."""
        parts = self.parts_at(world)
        if self.batch_rows % parts:
            fits = [n for n in range(1, self.train.accumulate + 1) if not self.batch_rows % (world * n)]
            do = f"use --accumulate {fits[-1]}, or " if fits else ""
            raise ConfigError(
                f"train.batch_tokens / train_length = {self.train.batch_tokens} / {self.model.train_length} = "
                f"{self.batch_rows} rows do not divide over {world} worker(s) x {self.train.accumulate} micro-batch(es)",
                do=f"{do}make train.batch_tokens a multiple of {parts * self.model.train_length}",
            )
        return self.batch_rows // parts

    def at_world(self, most: int, world: int) -> FitPlan:
        """This plan, made for `most` workers, for `world` of them: as many micro-batches in all, so that an update is the same
        one and needs no more memory. Raises ConfigError where there are fewer than workers."""
        return self.in_parts(most * self.train.accumulate, world)

    def in_parts(self, parts: int, world: int) -> FitPlan:
        """This plan with `parts` micro-batches in a global batch, over `world` workers; where they do not divide, some have one
        less and go through an empty one. Raises ConfigError where there are fewer than workers."""
        if parts < world:
            raise ConfigError(
                f"{parts} micro-batch(es) of a global batch are too few for {world} worker(s)",
                do=f"use at most {parts} worker(s), or begin a run with another --accumulate",
            )
        each = -(-parts // world)
        return dataclasses.replace(self, parts=parts, train=dataclasses.replace(self.train, accumulate=each))

    def identity(self, base: Mapping[str, str] | None = None) -> dict[str, Any]:
        """What a resumed run must share with the checkpoint; `base`: sha256 of what it starts from, by name. How the batch is
        split, how long the run is and where files lie may change."""
        train = dump(self.train)
        del train["accumulate"]  # kept beside it, as the number of micro-batches over all workers
        return {
            "model": dump(self.model),
            "train": train,
            "data_sha256": fingerprint(self.data),
            "replay_sha256": fingerprint(self.replay) if self.replay else None,
            "mix": dict(self.mix) if self.mix is not None else None,
            "quantize": self.quantize,
            "base": dict(base or {}),
            **({"row_tokens": self.row_tokens} if self.row_tokens else {}),
            **({"replay_every": self.replay_every} if self.replay_every != REPLAY_EVERY else {}),
        }


def pretrain_plan(preset: str, data: str, run: str, **more: Any) -> FitPlan:
    """Stage 1 from a preset. `more`: fields of FitPlan, and of TrainConfig to change."""
    base = presets.get(preset)
    return planned(base.model, base.train, {"name": preset, "data": data, "run": run, **more})


def finetune_plan(model: str, data: str, run: str, **more: Any) -> FitPlan:
    """Stage 2 from a model directory: a lower rate, all exits from the start, two passes unless told otherwise."""
    name, config = described.read_config(models.here(model, weights=False))
    train = TrainConfig(
        learning_rate=1.5e-3,
        weight_decay=0.01,
        exit_warmup=0.0,
        exit_weights=_exit_weights(config),
    )
    train = _batched(train, config)
    if config.of_open_models:  # what has learned from a trillion tokens is moved gently; thin matrices further
        rate = OPEN_LORA_RATE if more.get("lora_rank") else OPEN_RATE
        train = dataclasses.replace(train, learning_rate=rate, weight_decay=0.0)
    if more.get("dpo"):  # it moves a model that answers already
        train = dataclasses.replace(train, learning_rate=train.learning_rate / 10, patch_weight=0.0)
    return planned(config, train, {"name": name, "data": data, "run": run, "init": model, **more}, epochs=2.0)


def quantize_plan(model: str, data: str, out: str, **more: Any) -> FitPlan:
    """INT8 from a model directory: a short, gentle run with INT8 rounding in the forward pass, held to what the model said
    before (decision 0003), then export."""
    name, config = described.read_config(models.here(model, weights=False))
    if (models.here(model, weights=False) / described.SOURCE).exists():
        # It is smoothed first, which makes a tied head a matrix of its own.
        config = dataclasses.replace(config, tied=False)
    train = TrainConfig(
        learning_rate=5e-5,
        distill=30.0,
        warmup=0.1,
        decay=0.9,
        weight_decay=0.0,
        exit_warmup=0.0,
        exit_weights=_exit_weights(config),
    )
    values = {"name": f"{name}-int8", "data": data, "run": run_beside(out), "out": out, "init": model, **more}
    return planned(config, _batched(train, config), values | {"quantize": True}, steps=QUANTIZE_STEPS)


def adapt_plan(model: str, data: str, out: str, *, tune: str = "none", **more: Any) -> FitPlan:
    """Early exits beside the frozen weights of a model directory, held to what full depth says. With `tune` "lora" or "all" the
    backbone learns, too: by cross-entropy at all exits, since nothing else holds full depth then. Raises UsageError."""
    if tune not in TUNES:
        raise UsageError("--tune", got=tune, allowed=TUNES)
    name, config = described.read_config(models.here(model, weights=False))
    adapted = exits.with_exits(config)
    train = TrainConfig(
        trains="exits",
        cross_entropy=0.0,
        distill=1.0,
        patch_weight=0.0,
        learning_rate=1e-3,
        warmup=0.02,
        decay=0.98,
        decay_shape="cosine",
        weight_decay=0.0,
        batch_tokens=ROW,
        accumulate=1,
        exit_warmup=0.0,
        exit_weights=(1.0,) * len(adapted.exits),
        rotate_exits="off",  # a forward pass of the backbone is most of an update, and all exits learn from one
    )
    if tune != "none":
        train = dataclasses.replace(
            _batched(train, config),
            trains="tuned",
            cross_entropy=1.0,
            learning_rate=OPEN_LORA_RATE if tune == "lora" else OPEN_RATE,
            lora_rank=TUNED_RANK if tune == "lora" else 0,
            exit_weights=_exit_weights(adapted),
        )
    values = {"name": name, "data": data, "run": run_beside(out), "out": out, "init": model, **more}
    return planned(adapted, train, values, minutes=10.0)


def run_beside(out: str) -> str:
    """Where the run is that writes the model `out`, of a stage that is asked for a model alone: beside it."""
    return f"{out.rstrip('/') if is_remote(out) else os.path.normpath(out)}.run"


def fingerprint(data: str) -> str:
    """sha256 of what decides the data: a shard folder's index, or the chat file. Raises DataError when it is not there."""
    path = Path(data)
    path = path / "index.json" if path.is_dir() else path
    try:
        return sha256_of(path)
    except OSError as error:
        raise DataError(
            f"cannot read {path}", got=error.strerror, do="give a folder made by `shoal prepare`, or a .jsonl of chats"
        ) from error


def located(plan: FitPlan, *, weights: bool = True) -> FitPlan:
    """The plan with shards, chats and the model in S3 as this machine's copies of them, fetched when they are not there; the
    model without its `weights` where nothing is trained."""
    places = {key: getattr(plan, key) for key in ("data", "replay", "heldout")}
    here: dict[str, Any] = {key: str(remote.local(at)) for key, at in places.items() if is_remote(at)}
    init = str(models.here(plan.init, weights=weights)) if is_remote(plan.init) else plan.init
    return dataclasses.replace(plan, init=init, **here)


def recorded(plan: FitPlan) -> dict[int, float]:
    """The schedule of the run that `plan` follows: for each step the share of that run at which it took its rates. Raises
    DataError where it is not known for all of the plan's steps."""
    known = log.schedule(plan.rates_of)
    if plan.steps is None or plan.steps > len(known):
        raise DataError(
            f"{plan.rates_of}: learning rates", got=f"{len(known)} steps", allowed=f"{plan.steps or 'as many'} or more"
        )
    return known


def planned(model: ModelConfig, train: TrainConfig, values: dict[str, Any], **length: float) -> FitPlan:
    """`values`: of FitPlan, and of TrainConfig to change in `train`. `length`: where these say nothing of it; a run that
    follows another's schedule is as long as that one."""
    own = {f.name for f in dataclasses.fields(FitPlan)}
    if not any(values.get(limit) for limit in ("steps", "tokens", "epochs", "minutes")):
        values |= {"steps": len(log.schedule(values["rates_of"])) or 1} if values.get("rates_of") else length
    changed = {key: value for key, value in values.items() if key not in own and value is not None}
    return FitPlan(
        model=model,
        train=dataclasses.replace(train, **changed),
        **{key: value for key, value in values.items() if key in own and value is not None},
    )


def _batched(train: TrainConfig, config: ModelConfig) -> TrainConfig:
    """`train` with as many tokens in an update of chats as pay, and in micro-batches that fit."""
    if not config.of_open_models:
        return dataclasses.replace(train, batch_tokens=CHAT_ROWS * config.train_length)
    return dataclasses.replace(train, batch_tokens=OPEN_ROWS * min(ROW, config.train_length), accumulate=OPEN_ROWS)


def _exit_weights(config: ModelConfig) -> tuple[float, ...]:
    return {1: (1.0,), 3: TrainConfig().exit_weights, 4: (0.15, 0.25, 0.4, 1.0)}[len(config.exits)]


def progress(plan: FitPlan, *, step: int, seconds: float, steps_in_epoch: int | None) -> float:
    """Share of the run that is done once `step` updates and `seconds` of training are: the largest of its limits'."""
    shares = [step / plan.steps] if plan.steps else []
    if plan.tokens:
        shares.append(step / math.ceil(plan.tokens / plan.train.batch_tokens))
    if plan.epochs and steps_in_epoch:
        shares.append(step / math.ceil(plan.epochs * steps_in_epoch))
    if plan.minutes:
        shares.append(seconds / (60 * plan.minutes))
    return min(1.0, max(shares))
