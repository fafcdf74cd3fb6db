"""The commands of `shoal` that train a model and measure it, a stage each: pretrain, finetune, quantize, evaluate."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoal import presets
from shoal.errors import UsageError

out = Console(width=None if sys.stdout.isatty() else 110)

ModelDir = Annotated[Path, typer.Option("--model", help="Model directory.")]
RunDir = Annotated[Path, typer.Option("--out", help="Directory of the run; the model is written to OUT/model.")]
Preset = Annotated[str, typer.Option(help=f"One of: {', '.join(presets.NAMES)}.")]
Heldout = Annotated[
    Path | None,
    typer.Option(help="Held-out chats (JSONL): measured on, and the depth router is fitted on them. [no router]"),
]
Replay = Annotated[
    Path | None, typer.Option(help="Directory of shards to go back to now and then, against forgetting. [none]")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


@dataclass(frozen=True)
class RunOptions:
    """The options of every command that trains; `with_run_options` makes each field one."""

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
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--no-gpu", help="One GPU a worker [where the cluster has them now].")
    ] = None
    accumulate: Annotated[int | None, typer.Option(help="Micro-batches a worker merges into an update [preset's].")] = (
        None
    )
    resume: Annotated[str, typer.Option(help="auto: go on from the run's newest checkpoint; never: start anew.")] = (
        "auto"
    )
    mirror: Annotated[
        str | None,
        typer.Option(
            help="Folder or s3://BUCKET/PREFIX that checkpoints are copied to as well, and fetched from. [none]"
        ),
    ] = None
    track: Annotated[
        list[str] | None, typer.Option(help="Show the run in tensorboard, mlflow or wandb as well; repeat. [none]")
    ] = None
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="KEY=VALUE of TrainConfig or of the run, such as optimizer=muon; repeat. [preset's]"
        ),
    ] = None
    as_json: Json = False

    def of_plan(self, **paths: Path | None) -> dict[str, Any]:
        """What a plan takes as `more`, with those of `paths` that are given. Raises UsageError for an option that is given by
        name and by --set."""
        from shoal.train.settings import merged

        names = ("minutes", "tokens", "epochs", "steps", "accumulate", "resume", "mirror")
        named = {name: getattr(self, name) for name in names}
        named |= {key: str(path) for key, path in paths.items() if path is not None}
        return merged(named, self.settings or ())

    def of_training(self) -> list[str]:
        """The options given that only a training run can follow, by their names on the command line."""
        names = {"settings": "set"}
        fields = [field for field in dataclasses.fields(self) if field.name != "as_json"]
        return [f"--{names.get(f.name, f.name)}" for f in fields if getattr(self, f.name) != f.default]


def with_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose last parameter is a `RunOptions`, with an option of its own for each field in that one's place."""
    hints = typing.get_type_hints(RunOptions, include_extras=True)
    shared = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=hints[f.name])
        for f in dataclasses.fields(RunOptions)
    ]
    own = typing.get_type_hints(command, include_extras=True)
    *first, last = inspect.signature(command).parameters.values()
    first = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=own[parameter.name]) for parameter in first
    ]

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = RunOptions(**{parameter.name: given.pop(parameter.name) for parameter in shared})
        command(**given, **{last.name: options})

    run.__signature__ = inspect.Signature([*first, *shared])  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in [*first, *shared]}
    return run


@with_run_options
def pretrain(
    data: Annotated[
        str, typer.Option(help="Directory of shards, made by `shoal prepare`, or s3://BUCKET/PREFIX of one.")
    ],
    run: RunDir,
    preset: Preset = "tiny",
    options: RunOptions = RunOptions(),
) -> None:
    """Stage 1: unsupervised training on text, code and images, by the shards' mix."""
    from shoal.train.plan import pretrain_plan

    _fit(pretrain_plan(preset, data, str(run), **options.of_plan()), options)


@with_run_options
def finetune(
    model: ModelDir,
    data: Annotated[Path, typer.Option(help='JSONL of {"messages": [{"role", "content"}, ...]}.')],
    run: RunDir,
    heldout: Heldout = None,
    replay: Replay = None,
    options: RunOptions = RunOptions(),
) -> None:
    """Stage 2: supervised training on chats, with loss on the answers only [2 epochs]."""
    from shoal.train.plan import finetune_plan

    more = options.of_plan(heldout=heldout, replay=replay)
    _fit(finetune_plan(str(model), str(data), str(run), **more), options)


@with_run_options
def quantize(
    model: ModelDir,
    out_dir: Annotated[Path, typer.Option("--out", help="Directory to write; made when the work is complete.")],
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of chats, or a directory of shards, to train on [needed unless --no-train]."),
    ] = None,
    heldout: Annotated[
        Path | None,
        typer.Option(
            help="Held-out chats (JSONL): measured on, and the depth router is fitted on them. "
            "[after shards their held-out rows, else no router]"
        ),
    ] = None,
    replay: Replay = None,
    train: Annotated[bool, typer.Option(help="Train with INT8 rounding; --no-train only rounds.")] = True,
    options: RunOptions = RunOptions(),
) -> None:
    """INT8: a short quantisation-aware training [100 updates], then export; what rounding alone would have cost is shown."""
    from shoal.train.plan import quantize_plan

    if train:
        if data is None:
            raise UsageError("what to train on", do="give --data, or --no-train")
        more = options.of_plan(heldout=heldout, replay=replay)
        _fit(quantize_plan(str(model), str(data), str(out_dir), **more), options)
        return
    _round(model, out_dir, heldout, options, useless={"--data": data, "--replay": replay})


def evaluate(
    model: ModelDir,
    data: Annotated[Path, typer.Option(help="Directory of shards with held-out rows, made by `shoal prepare`.")],
    against: Annotated[Path | None, typer.Option(help="A second model directory, shown beside the first.")] = None,
    as_json: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file, and a page beside it.")
    ] = None,
) -> None:
    """Quality, speed and size of one model or two, on what neither was trained on."""
    from shoal.evaluation import compare, leave_a_core
    from shoal.progress import progress
    from shoal.quickstart import print_tables, write_report

    leave_a_core()
    models = {model.name: model}
    if against is not None:
        models[against.name if against.name != model.name else str(against)] = against
    with progress("evaluate") as tell:
        report = compare(models, data, on_progress=tell)
    print_tables(report, out)
    if as_json is not None:
        write_report(as_json, {"title": " and ".join(models), "corpus": {}, "stages": [], **report})
        out.print(f"report in {as_json} and {as_json.with_suffix('.html')}", highlight=False)


def print_result(result: Any, as_json: bool, line: str) -> None:
    """`result` as JSON for programs, or `line` for people."""
    if as_json:
        print(json.dumps(result, default=str))
    else:
        out.print(line, highlight=False)


def _fit(plan: Any, options: RunOptions) -> None:
    """Train on Ray, show its lines, and fit the router."""
    from shoal.on_ray.resources import local_ray
    from shoal.on_ray.train import parse_workers, train
    from shoal.train import log, routing
    from shoal.train.trackers import together, trackers

    least, most = parse_workers(options.workers)
    cpus = 0.5 if least == most else 1.0  # Ray does not resize groups that take shares of a CPU
    more = trackers(options.track or (), plan.run, plan.name)
    with local_ray(), log.Console(plan.name, stream=sys.stderr) as console:
        tell = together(console, *more)
        result = train(plan, workers=(least, most), cpus_per_worker=cpus, gpus=options.gpu, on_progress=tell)
    report = {"out": result.out, "steps": result.steps, "tokens": result.tokens, "bpb": result.bpb}
    if result.rounded:
        report["rounded"] = result.rounded
        if not options.as_json:
            out.print(_rounding_table(result.rounded, result.bpb))
    report["router"] = routing.finish(plan.model_dir, plan.router_data, _say)
    print_result(report, options.as_json, f"model in {result.out}")


def _round(
    model: Path, out_dir: Path, heldout: Path | None, options: RunOptions, *, useless: dict[str, Path | None]
) -> None:
    """Write `model` in INT8 as rounding alone makes it, with a router where there are rows to fit it on."""
    from shoal.model import checkpoint
    from shoal.model.model import Model
    from shoal.train import routing

    _, config = checkpoint.read_config(model)
    if config.quantization != "none":
        raise UsageError(
            f"{model} is quantised", got=config.quantization, do="give the fp32 model that it was made from"
        )
    if given := [*options.of_training(), *(name for name, path in useless.items() if path is not None)]:
        raise UsageError(f"--no-train with {given[0]}", do="leave one of them out: nothing is trained")
    Model.load(model).quantized().save(out_dir)
    report = {"out": str(out_dir), "router": routing.finish(out_dir, str(heldout or ""), _say)}
    print_result(report, options.as_json, f"model in {out_dir}")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


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
