"""The stages that train: pretrain, finetune, adapt, quantize. Their shared options are the fields of `Training`."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from shoal import presets
from shoal.errors import UsageError
from shoal.stages.stage import Json, ModelOut, ModelPlace, Stage, out, print_result, say

if TYPE_CHECKING:
    from shoal.train.plan import FitPlan

RunPlace = Annotated[
    str, typer.Option("--out", help="Directory of the run, or s3://BUCKET/PREFIX; the model is written to OUT/model.")
]
Heldout = Annotated[
    str | None,
    typer.Option(help="Held-out chats (JSONL): measured on, and the depth router is fitted on them. [no router]"),
]
Replay = Annotated[
    str | None, typer.Option(help="Directory of shards to go back to now and then, against forgetting. [none]")
]
OF_PLAN = (
    "minutes", "tokens", "epochs", "steps", "accumulate", "batch_tokens", "learning_rate", "seed", "resume", "rates_of",
    "mirror", "profile", "dtype",
)  # fmt: skip  # fields of `Training` that a plan takes as they are


@dataclass(frozen=True, kw_only=True)
class Training(Stage):
    """What every stage that trains can be told, and the way from its plan to a model with a router."""

    minutes: Annotated[float | None, typer.Option(help="Stop after this many minutes.")] = None
    tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None
    epochs: Annotated[float | None, typer.Option(help="Stop after this many passes over the data.")] = None
    steps: Annotated[int | None, typer.Option(help="Stop after this many updates.")] = None
    workers: Annotated[
        str,
        typer.Option(
            help="Training workers, one process each: N, or MIN:MAX to take as many as the cluster has room for."
        ),
    ] = "1"
    cpus_per_worker: Annotated[
        float, typer.Option(help="Logical CPUs that each worker reserves; whole ones with MIN:MAX workers.")
    ] = 1.0
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--no-gpu", help="One GPU a worker [where the cluster has them now].")
    ] = None
    max_failures: Annotated[
        int,
        typer.Option(
            help="Times that all workers start again after one died; -1: always. Preempted nodes do not count.",
        ),
    ] = 2
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens in an update [stage's].")] = None
    accumulate: Annotated[
        int | None, typer.Option(help="Micro-batches that a worker merges into an update [stage's].")
    ] = None
    learning_rate: Annotated[float | None, typer.Option(help="Highest rate of learning in the updates [stage's].")] = (
        None
    )
    seed: Annotated[int | None, typer.Option(help="Seed of fresh weights and of the order of the data [0].")] = None
    resume: Annotated[str, typer.Option(help="auto: go on from the run's newest checkpoint; never: start anew.")] = (
        "auto"
    )
    rates_of: Annotated[
        str | None,
        typer.Option(
            help="Directory of a run whose schedule is followed again, update by update: as many, at the same rates. [none]"
        ),
    ] = None
    mirror: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3://BUCKET/PREFIX that checkpoints are copied to as well, and fetched from. [none]"
        ),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(help="What a GPU computes in: auto, which is bfloat16, or float32, which is TF32. [auto]"),
    ] = None
    profile: Annotated[
        int | None, typer.Option(help="Updates to trace, for ui.perfetto.dev: OUT/traces has a file a worker. [0]")
    ] = None
    track: Annotated[
        list[str] | None, typer.Option(help="Show the run in tensorboard, mlflow or wandb as well; repeat. [none]")
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE of TrainConfig or of the run, such as optimizer=muon; repeat. [stage's]"),
    ] = None
    as_json: Json = False

    def of_sparse(self) -> dict[str, Any]:
        """What the report says of layers that were made sparse."""
        return {}

    @abstractmethod
    def plan(self) -> FitPlan:
        """What is asked for, as the loop takes it. Raises UsageError, CheckpointError."""

    def given(self, **paths: str | Path | None) -> dict[str, Any]:
        """What a plan takes as `more`, with those of `paths` that are given. Raises UsageError for an option that is given by
        name and by --set."""
        from shoal.train.settings import merged

        named = {name: getattr(self, name) for name in OF_PLAN}
        named |= {key: str(path) for key, path in paths.items() if path is not None}
        return merged(named, self.settings or ())

    def run(self) -> None:
        """Train on Ray, show the run's lines, and fit the router."""
        from shoal.data.sources.s3 import is_remote
        from shoal.evaluate import routing
        from shoal.on_ray.measure import measuring
        from shoal.on_ray.train import parse_workers, train
        from shoal.train import log
        from shoal.train.bucket import folder_of
        from shoal.train.trackers import together, trackers

        plan, workers = self.plan(), parse_workers(self.workers)
        if not 0 < self.cpus_per_worker < math.inf:
            raise UsageError("--cpus-per-worker", got=self.cpus_per_worker, allowed="a number above 0")
        shown = trackers(self.track or (), folder_of(plan.run), plan.name)
        how: dict[str, Any] = {
            "workers": workers,
            "cpus_per_worker": self.cpus_per_worker,
            "gpus": self.gpu,
            "max_failures": self.max_failures,
        }
        with log.Console(plan.name, stream=sys.stderr) as console:
            result = train(plan, **how, on_progress=together(console, *shown))
        report = {"out": result.out, "steps": result.steps, "tokens": result.tokens, "bpb": result.bpb}
        if "fp32" in result.rounded:
            report["rounded"] = result.rounded
            if not self.as_json:
                out.print(_rounding_table(result.rounded, result.bpb))
        if plan.biases_only:
            report |= self.of_sparse()
        elif result.backbone[0]:
            begun, (before, after) = result.rounded["begun"], result.backbone
            report |= {"begun": begun, "backbone": {"before": before, "after": after}}
            same = f"full depth is equal to the bit: sha256 {before[:16]} of all that it reads, before and after"
            other = f"full depth was tuned, and is another model: sha256 {before[:16]} of all that it read, now {after[:16]}"
            say(same if before == after else other)
            if not self.as_json and result.bpb:
                out.print(_exits_table(begun, result.bpb))
        place = plan.model_place if is_remote(plan.model_place) else plan.model_dir
        with measuring(place, gpus=self.gpu) as run:
            report["router"] = routing.finish(place, plan.router_data, say, run=run)
        print_result(report, self.as_json, f"model in {result.out}")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Training):
    """Stage 1: unsupervised training on text, code and images, by the shards' mix."""

    data: Annotated[
        str, typer.Option(help="Directory of shards, made by `shoal prepare`, or s3://BUCKET/PREFIX of one.")
    ]
    out: RunPlace
    preset: Annotated[str, typer.Option(help=f"One of: {', '.join(presets.NAMES)}.")] = "tiny"

    def plan(self) -> FitPlan:
        from shoal.train.plan import pretrain_plan

        return pretrain_plan(self.preset, self.data, self.out, **self.given())


@dataclass(frozen=True, kw_only=True)
class Finetune(Training):
    """Stage 2: supervised training on chats, with loss on the answers only [2 epochs]. `--set lora_rank=16` leaves an adapter
    in OUT/adapter as well, to be served beside the base; of an open model PEFT loads it, too."""

    model: ModelPlace
    data: Annotated[
        str,
        typer.Option(help='JSONL of chats: OpenAI\'s {"messages", "tools"}, ShareGPT\'s, Alpaca\'s, or {"text"}.'),
    ]
    out: RunPlace
    heldout: Heldout = None
    replay: Replay = None

    def plan(self) -> FitPlan:
        from shoal.train.plan import finetune_plan

        more = self.given(heldout=self.heldout, replay=self.replay)
        return finetune_plan(self.model, self.data, self.out, **more)

    def run(self) -> None:
        from shoal.data.models import here
        from shoal.open_weights import adapter
        from shoal.train import lora

        plan, to = self.plan(), Path(self.out) / "adapter"
        adapts = plan.train.lora_rank > 0
        if adapts:
            adapter.require_replaceable(to)
        super().run()
        if adapts:
            base = here(self.model, weights=False)
            adapter.write(Path(self.out) / lora.FILE, base, to, alpha=lora.SCALE * plan.train.lora_rank)
            say(f"adapter{' for PEFT' if plan.model.of_open_models else ''} in {to}")


@dataclass(frozen=True, kw_only=True)
class Adapt(Training):
    """Early exits for a model that has none: each learns what full depth says, which stays equal to the bit [10 minutes]; but
    with --tune, which lets the rest learn with them. With --sparse no exits: attention that reads a part of a long context."""

    model: ModelPlace
    data: Annotated[
        str,
        typer.Option(
            help='JSONL of chats or {"text"}, as of finetune, like what will be served; or a directory of shards.'
        ),
    ]
    out: ModelOut
    heldout: Heldout = None
    tune: Annotated[
        str,
        typer.Option(help="What else learns: none; lora, thin matrices beside all layers; all. Full depth changes."),
    ] = "none"
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse",
            help="Instead of exits: dense layers read window and best blocks, where measuring says that they may.",
        ),
    ] = False
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="What sparse layers may cost together: nats of KL, the mean over tokens beyond the dense length [0.01]."
        ),
    ] = None
    dense_length: Annotated[
        int | None,
        typer.Option(help="Tokens up to which sparse layers read all [a quarter of the context, at most 8192]."),
    ] = None

    def plan(self) -> FitPlan:
        from shoal.train.plan import adapt_plan

        if self.sparse:
            return self._sparse_plan()
        for name in ("tolerance", "dense_length"):
            if getattr(self, name) is not None:
                raise UsageError(f"--{name.replace('_', '-')}", got=getattr(self, name), do="give --sparse with it")
        more = self.given(heldout=self.heldout)
        return adapt_plan(self.model, self.data, self.out, tune=self.tune, **more)

    def _sparse_plan(self) -> FitPlan:
        from shoal.evaluate import sparsity
        from shoal.on_ray.measure import measuring
        from shoal.progress import progress
        from shoal.train.bucket import folder_of
        from shoal.train.plan import run_beside
        from shoal.train.sparse import sparse_plan

        if self.tune != "none":
            raise UsageError("--tune with --sparse", got=self.tune, do="leave one of them out")
        tolerance = sparsity.TOLERANCE if self.tolerance is None else self.tolerance
        run, length = str(folder_of(run_beside(self.out))), self.dense_length or 0
        with measuring(self.model, gpus=False, whole=True) as do, progress("sparse layers") as tell:
            found = sparsity.chosen(
                self.model, self.data, run, tolerance=tolerance, dense_length=length, tell=tell, by=do
            )
        say(
            f"{found['layers']} of {len(found['pattern'])} layers sparse beyond {found['dense_length']:,} tokens, for "
            f"{found['kl']:.4f} nats a token there: {found['pattern']}"
        )
        return sparse_plan(self.model, self.data, self.out, found, **self.given(heldout=self.heldout))

    def of_sparse(self) -> dict[str, Any]:
        from shoal.evaluate import pieces, sparsity
        from shoal.evaluate.pieces import Piece, wherever
        from shoal.model.described import read_json
        from shoal.on_ray.measure import measuring
        from shoal.train.bucket import folder_of
        from shoal.train.plan import run_beside

        found = read_json(folder_of(run_beside(self.out)) / sparsity.FILE)
        with measuring(self.out, gpus=False, whole=True) as do:
            args = (wherever(self.out), wherever(self.data), do is not pieces.here)
            (learned,) = do([Piece(sparsity.learned, args)])
        found |= {"learned": learned, "asked": None}
        say(
            f"KL beyond {found['dense_length']:,} tokens: {found['kl']:.4f} nats a token, {found['learned']:.4f} learned"
        )
        say("all weights are equal to the bit, and up to that length so is what the model says")
        return {"sparse": {key: value for key, value in found.items() if key != "asked"}}


@dataclass(frozen=True, kw_only=True)
class Quantize(Training):
    """INT8: a short quantisation-aware training [100 updates], then export; what rounding alone would have cost is shown."""

    model: ModelPlace
    out: ModelOut
    data: Annotated[
        str | None,
        typer.Option(help="JSONL of chats, or a directory of shards, to train on [needed unless --no-train]."),
    ] = None
    heldout: Annotated[
        str | None,
        typer.Option(
            help="Held-out chats (JSONL): measured on, and the depth router is fitted on them. "
            "[after shards their held-out rows, else no router]"
        ),
    ] = None
    replay: Replay = None
    train: Annotated[bool, typer.Option(help="Train with INT8 rounding; --no-train only rounds.")] = True

    def plan(self) -> FitPlan:
        from shoal.train.plan import quantize_plan

        if self.data is None:
            raise UsageError("what to train on", do="give --data, or --no-train")
        more = self.given(heldout=self.heldout, replay=self.replay)
        return quantize_plan(self.model, self.data, self.out, **more)

    def run(self) -> None:
        if self.out == self.model or os.path.realpath(self.out) == os.path.realpath(self.model):
            do = "give another folder: what was rounded does not become again what it was"
            raise UsageError("--out", got="the model that is to be rounded", do=do)
        if self.train:
            super().run()
        else:
            self._round()

    def _round(self) -> None:
        """Write the model in INT8 as rounding alone makes it, with a router where there are rows to fit it on."""
        from shoal.data.models import here
        from shoal.evaluate import routing
        from shoal.evaluate.pieces import Piece, wherever
        from shoal.evaluate.rounding import round_to
        from shoal.model import described
        from shoal.on_ray.measure import measuring

        _, config = described.read_config(here(self.model, weights=False))
        if config.quantization != "none":
            raise UsageError(
                f"{self.model} is quantised", got=config.quantization, do="give the fp32 model that it was made from"
            )
        if useless := self._of_training():
            raise UsageError(f"--no-train with {useless[0]}", do="leave one of them out: nothing is trained")
        with measuring(self.model, self.model, gpus=False) as run:  # both precisions at once, on CPUs
            list(run([Piece(round_to, (wherever(self.out), wherever(self.model)))]))
        with measuring(self.out) as run:
            report = {"out": self.out, "router": routing.finish(self.out, self.heldout or "", say, run=run)}
        print_result(report, self.as_json, f"model in {self.out}")

    def _of_training(self) -> list[str]:
        """The options given that only a training run can follow, by their names on the command line."""
        shared = {field.name for field in dataclasses.fields(Training)} - {"as_json"}
        given = [
            field.name
            for field in dataclasses.fields(self)
            if field.name in shared | {"data", "replay"} and getattr(self, field.name) != field.default
        ]
        return [f"--{name.replace('_', '-').replace('settings', 'set')}" for name in given]


def _exits_table(begun: dict[str, Any], after: dict[str, Any]) -> Table:
    """Held-out bits a byte of each exit, as it began and as it is now."""
    table = Table("held-out bits/byte", "exit", "at the start", "now", box=SIMPLE_HEAD, pad_edge=False)
    for modality, by_exit in after.items():
        for name, value in by_exit.items():
            table.add_row(modality, name, f"{begun[modality][name]:.4f}", f"{value:.4f}")
    return table


def _rounding_table(rounded: dict[str, Any], trained: dict[str, Any]) -> Table:
    """Held-out bits a byte at full depth before INT8, with rounding alone, and after training with it."""
    table = Table(
        "held-out bits/byte", "fp32", "INT8 by rounding alone", "INT8 trained", box=SIMPLE_HEAD, pad_edge=False
    )
    for modality, by_exit in trained.items():
        fp32, alone = (rounded[name][modality]["full"] for name in ("fp32", "post-training"))
        cells = (f"{value:.4f} ({value / fp32 - 1:+.2%})" for value in (alone, by_exit["full"]))
        table.add_row(modality, f"{fp32:.4f}", *cells)
    return table
