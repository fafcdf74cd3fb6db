"""The `shoal` command. Each subcommand is a few lines: read the options, call one function, print the result.

Exit codes: 0 done, 1 failed (one line says why; --debug shows the traceback), 2 usage.
Heavy imports wait until a command needs them, so `shoal --help` is quick.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from shoal import presets
from shoal.bench.commands import bench
from shoal.errors import ShoalError, UsageError

app = typer.Typer(
    help="Train and serve language models that choose their own depth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would swallow what stands in brackets, the defaults
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(width=None if sys.stdout.isatty() else 110)
LOOPBACK, PORT = "127.0.0.1", 8000
INTERRUPTED = 130  # exit code

Out = Annotated[Path, typer.Option("--out", help="Directory to write; made when the work is complete.")]
ModelDir = Annotated[Path, typer.Option("--model", help="Model directory.")]
Preset = Annotated[str, typer.Option(help=f"One of: {', '.join(presets.NAMES)}.")]
Minutes = Annotated[float | None, typer.Option(help="Stop after this many minutes.")]
Steps = Annotated[int | None, typer.Option(help="Stop after this many updates.")]
Tokens = Annotated[int | None, typer.Option(help="Stop after this many tokens.")]
Workers = Annotated[
    str,
    typer.Option(help="Training workers, one process each: N, or MIN:MAX to take as many as the cluster has room for."),
]
Accumulate = Annotated[int | None, typer.Option(help="Micro-batches a worker merges into an update [preset's].")]
Resume = Annotated[str, typer.Option(help="auto: go on from the run's newest checkpoint; never: start anew.")]
Heldout = Annotated[
    Path | None,
    typer.Option(help="Held-out chats (JSONL): measured on, and the depth router is fitted on them. [no router]"),
]
Replay = Annotated[
    Path | None, typer.Option(help="Directory of shards to go back to now and then, against forgetting. [none]")
]
Mirror = Annotated[
    str | None,
    typer.Option(help="Folder or s3://BUCKET/PREFIX that checkpoints are copied to as well, and fetched from. [none]"),
]
Track = Annotated[
    list[str] | None, typer.Option(help="Show the run in tensorboard, mlflow or wandb as well; repeat. [none]")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE of TrainConfig or of the run, such as optimizer=muon; repeat. [preset's]"),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


@app.command()
def quickstart(
    root: Annotated[Path, typer.Option(help="Directory of the run.")] = Path("runs/quickstart"),
    stop: Annotated[bool, typer.Option("--exit", help="Stop after the sample answers instead of serving.")] = False,
    port: Annotated[int, typer.Option(help="HTTP port on 127.0.0.1.")] = 8000,
    scale: Annotated[float, typer.Option(help="Share of the usual training minutes (1 is about 9).")] = 1.0,
) -> None:
    """From a raw corpus to a chat that answers, on this machine. Finished stages are not run again."""
    from shoal.quickstart import run

    run(root, stay=not stop, port=port, scale=scale, console=out)


@app.command()
def prepare(
    out_dir: Annotated[str, typer.Option("--out", help="Directory to write, or s3://BUCKET/PREFIX.")],
    source: Annotated[
        list[str] | None, typer.Option(help="NAME=URI of a folder, a file or s3://...; repeat. [the demo corpus]")
    ] = None,
    mix: Annotated[str | None, typer.Option(help="Shares by token [text=60,image=20,code=20].")] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of: {', '.join(presets.NAMES)} [tiny].")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON with any of: source, mix, preset, seed, tokenizer, operators, s3; options override it."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of split, order and packing [0].")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json to use: ours, or any byte-level BPE. [fitted to a sample]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Raw text, code and images to packed shards, with a tokenizer and a report."""
    from shoal.data.order import parse_mix
    from shoal.data.settings import prepare_config
    from shoal.on_ray.prepare import prepare as run
    from shoal.on_ray.resources import local_ray
    from shoal.progress import progress

    asked = prepare_config(config, source=source, mix=mix, preset=preset, seed=seed, tokenizer=tokenizer)
    with local_ray(), progress("prepare") as tell:
        report = run(
            out_dir,
            sources=asked.source or None,
            mix=parse_mix(asked.mix),
            preset=presets.get(asked.preset),
            seed=asked.seed,
            tokenizer=asked.tokenizer,
            operators=asked.operators,
            s3=asked.s3,
            on_progress=tell,
        )
    _print(report, as_json, f"shards in {out_dir}")


@app.command()
def augment(
    data: Annotated[Path, typer.Option(help='JSONL of {"messages": [{"role", "content"}, ...]}.')],
    out_file: Annotated[Path, typer.Option("--out", help="JSONL to write: all rows, and the changed copies.")],
    share: Annotated[float, typer.Option(help="Share of the rows that get a changed copy, 0 to 1.")] = 0.3,
    synonyms: Annotated[
        Path | None, typer.Option(help="Words of your domain, a line each: WORD = OTHER, OTHER. [general words only]")
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Held-out chats (JSONL): no copy asks what one of them asks. [none]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of what is changed, and how.")] = 0,
    as_json: Json = False,
) -> None:
    """More chats to fine-tune on: some again in other words, with typing slips, or with other names in their code."""
    from shoal.data.augment import Augmenter, questions
    from shoal.data.augment import augment as run
    from shoal.data.wording import read_synonyms

    words = read_synonyms(synonyms) if synonyms is not None else {}
    kept_out = questions(heldout) if heldout is not None else frozenset[str]()
    result = run(data, out_file, Augmenter(share, seed, words, kept_out))
    ways = ", ".join(f"{count} {way}" for way, count in result["by_way"].items()) or "nothing could be changed"
    _print(result, as_json, f"{result['rows']} rows and {result['copies']} copies ({ways}) in {out_file}")


@app.command()
def pretrain(
    data: Annotated[
        str, typer.Option(help="Directory of shards, made by `shoal prepare`, or s3://BUCKET/PREFIX of one.")
    ],
    run: Annotated[Path, typer.Option("--out", help="Directory of the run; the model is written to OUT/model.")],
    preset: Preset = "tiny",
    minutes: Minutes = None,
    tokens: Tokens = None,
    steps: Steps = None,
    workers: Workers = "1",
    accumulate: Accumulate = None,
    resume: Resume = "auto",
    mirror: Mirror = None,
    track: Track = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 1: unsupervised training on text, code and images, by the shards' mix."""
    from shoal.train.plan import pretrain_plan

    more = _more(settings, mirror=mirror, accumulate=accumulate, resume=resume)
    plan = pretrain_plan(preset, data, str(run), minutes=minutes, tokens=tokens, steps=steps, **more)
    _fit(plan, workers, as_json, track=track)


@app.command()
def finetune(
    model: ModelDir,
    data: Annotated[Path, typer.Option(help='JSONL of {"messages": [{"role", "content"}, ...]}.')],
    run: Annotated[Path, typer.Option("--out", help="Directory of the run; the model is written to OUT/model.")],
    heldout: Heldout = None,
    replay: Replay = None,
    minutes: Minutes = None,
    tokens: Tokens = None,
    steps: Steps = None,
    workers: Workers = "1",
    accumulate: Accumulate = None,
    resume: Resume = "auto",
    mirror: Mirror = None,
    track: Track = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Stage 2: supervised training on chats, with loss on the answers only [2 epochs]."""
    from shoal.train.plan import finetune_plan

    more = _more(settings, mirror=mirror, accumulate=accumulate, resume=resume) | _chats(heldout, replay)
    plan = finetune_plan(str(model), str(data), str(run), minutes=minutes, tokens=tokens, steps=steps, **more)
    _fit(plan, workers, as_json, heldout, track)


@app.command()
def quantize(
    model: ModelDir,
    out_dir: Out,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of chats, or a directory of shards, to train on [needed unless --no-train]."),
    ] = None,
    heldout: Heldout = None,
    replay: Replay = None,
    train: Annotated[bool, typer.Option(help="Train with INT8 rounding; --no-train only rounds.")] = True,
    minutes: Minutes = None,
    steps: Steps = None,
    workers: Workers = "1",
    as_json: Json = False,
) -> None:
    """INT8: a short quantisation-aware training [100 updates], then export; what rounding alone would have cost is shown."""
    from shoal.model import checkpoint
    from shoal.model.model import Model
    from shoal.train import routing
    from shoal.train.plan import quantize_plan

    if train:
        if data is None:
            raise UsageError("what to train on", do="give --data, or --no-train")
        limits = {"minutes": minutes, "steps": steps}
        plan = quantize_plan(str(model), str(data), str(out_dir), **_chats(heldout, replay), **limits)
        _fit(plan, workers, as_json, heldout)
        return
    _, config = checkpoint.read_config(model)
    if config.quantization != "none":
        raise UsageError(
            f"{model} is quantised", got=config.quantization, do="give the fp32 model that it was made from"
        )
    Model.load(model).quantized().save(out_dir)
    report: dict[str, Any] = {"out": str(out_dir)}
    if heldout is not None:
        report["router"] = routing.refit(out_dir, heldout)
    _print(report, as_json, f"model in {out_dir}")


@app.command()
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


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="Model directory [the config's].")] = None,
    config: Annotated[Path | None, typer.Option(help="Serve config, such as serve_configs/local.yaml.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name that requests use; commas between several [the model's own].")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on [127.0.0.1, or the config's].")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port [8000, or the config's].")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="File of API keys, one a line. [open to all]")] = None,
    ray: Annotated[bool, typer.Option(help="On Ray Serve; --no-ray serves from this process.")] = True,
    replicas: Annotated[str | None, typer.Option(help="Engine replicas, N or MIN:MAX [1, or the config's].")] = None,
    metrics: Annotated[bool | None, typer.Option(help="Answer /metrics, to all [yes, or the config's].")] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="Origin whose pages may call the API; repeat, or * for any. [none]")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Longest time of a request, in seconds; then 408 [600, or the config's].")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="stored: as the model was written, refused where INT8 fails its self-test; auto: fp32 there, "
            "and the reason is said [stored, or the config's]."
        ),
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(help="Folder of training runs to show on the pages, read only. [none shown]")
    ] = None,
    ui: Annotated[bool | None, typer.Option(help="Show the pages at /ui [yes, or the config's].")] = None,
) -> None:
    """The OpenAI-compatible API at http://HOST:PORT/v1, and the pages at /ui, until Ctrl-C."""
    if model is None and config is None:
        raise UsageError("what to serve", do="give --model DIR or --config FILE")
    if precision not in (None, "stored", "auto"):
        raise UsageError("--precision", got=precision, allowed=["stored", "auto"])
    if seconds is not None and not 0 < seconds < float("inf"):
        raise UsageError("--seconds", got=seconds, allowed="a number above 0")
    if not ray:
        if model is None or config is not None or replicas is not None:
            raise UsageError("--no-ray serves one model from this process", do="give --model DIR, and no --config")
        options: dict[str, Any] = {
            "metrics": metrics is not False,
            "cors": cors or (),
            "api_keys": api_keys,
            "runs": runs,
            "seconds": seconds,
        }
        if precision == "auto":
            options["on_fallback"] = partial(print, "shoal: in fp32, since", file=sys.stderr)
        _serve_here(model, host or LOOPBACK, port or PORT, page=ui is not False, name=name, **options)
        return
    from shoal.on_ray.resources import local_ray, need_free_port
    from shoal.on_ray.serve import run
    from shoal.on_ray.serve_config import ServeArgs, load_serve_config, parse_replicas, serve_config, shows_page

    given: dict[str, Any] = {
        "model": str(model) if model else None,
        "name": name,
        "ui": ui,
        "metrics": metrics,
        "cors": cors or None,
    }
    given |= {"precision": precision, "seconds": seconds}
    args: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    args |= {"api_keys": str(api_keys)} if api_keys else {}
    args |= {"runs": str(runs.absolute())} if runs else {}
    args |= parse_replicas(replicas) if replicas else {}
    if config is not None:
        deploy = load_serve_config(config, host=host, port=port, **args)
    else:
        deploy = serve_config(ServeArgs(**{"ui": True, **args}), host=host or LOOPBACK, port=port or PORT)
    need_free_port(deploy.http_options.host, deploy.http_options.port)
    with local_ray():
        run(deploy, on_ready=lambda url: _ready(url, page=shows_page(deploy)))


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Server's address, ending in /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Name of the model [the server's first].")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SHOAL_API_KEY", help="API key, if the server wants one.")
    ] = None,
) -> None:
    """Talk to a server from the terminal."""
    from shoal.api.chat_client import chat as run

    run(url, model, api_key)


app.add_typer(bench, name="bench")


@app.command("show-config")
def show_config(preset: Annotated[str, typer.Argument(help="Preset, or a model directory.")] = "tiny") -> None:
    """A preset's complete configuration, or a model's, as YAML."""
    import yaml

    from shoal.config import dump

    if (Path(preset) / "config.json").exists():
        from shoal.model.checkpoint import read_config

        name, model = read_config(preset)
        values: dict[str, Any] = {"name": name, "model": dump(model)}
    else:
        values = dump(presets.get(preset))
    out.print(yaml.safe_dump(values, sort_keys=False).rstrip(), highlight=False)


def main(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if args is None else args
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not debug:
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)
    try:
        code = app(arguments, standalone_mode=False)  # typer makes Ctrl-C a 130 of its own
        if code == INTERRUPTED:
            raise KeyboardInterrupt
        return code or 0
    except ShoalError as error:
        if debug:
            raise
        print(f"shoal: {error}", file=sys.stderr)
        return error.exit_code
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, typer.Abort):
        print("shoal: interrupted; finished work is kept, the same command goes on from it", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # the command-line parser's own errors
            print(f"shoal: {error.format_message()}", file=sys.stderr)
            return 2
        line = str(error).strip().splitlines()
        print(f"shoal: {type(error).__name__}: {line[0] if line else ''} (--debug shows where)", file=sys.stderr)
        return 1


def _more(settings: list[str] | None, **named: Any) -> dict[str, Any]:
    """Options of a plan, those by name before those of --set. Raises UsageError for one that is given both ways."""
    from shoal.train.settings import settings as parse

    given, found = {key: value for key, value in named.items() if value is not None}, parse(settings or ())
    if twice := given.keys() & found.keys():
        raise UsageError(f"--set {min(twice)} and --{min(twice)}", do="give one of them")
    return given | found


def _fit(plan: Any, workers: str, as_json: bool, heldout: Path | None = None, track: list[str] | None = None) -> None:
    """Train on Ray, show its lines, and fit the router when there are rows to fit it on."""
    from shoal.on_ray.resources import local_ray
    from shoal.on_ray.train import parse_workers, train
    from shoal.train import log, routing
    from shoal.train.trackers import together, trackers

    least, most = parse_workers(workers)
    cpus = 0.5 if least == most else 1.0  # Ray does not resize groups that take shares of a CPU
    more = trackers(track or (), plan.run, plan.name)
    with local_ray(), log.Console(plan.name, stream=sys.stderr) as console:
        tell = together(console, *more)
        result = train(plan, workers=(least, most), cpus_per_worker=cpus, on_progress=tell)
    report = {"out": result.out, "steps": result.steps, "tokens": result.tokens, "bpb": result.bpb}
    if result.rounded:
        report["rounded"] = result.rounded
        if not as_json:
            out.print(_rounding_table(result.rounded, result.bpb))
    if heldout is not None:
        report["router"] = routing.refit(result.out, heldout)
    _print(report, as_json, f"model in {result.out}")


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


def _chats(heldout: Path | None, replay: Path | None) -> dict[str, str]:
    """What a run on chats measures itself on and goes back to, where given."""
    return {key: str(path) for key, path in {"heldout": heldout, "replay": replay}.items() if path is not None}


def _serve_here(model: Path, host: str, port: int, *, page: bool, seconds: float | None, **options: Any) -> None:
    from shoal.api.limits import Limits
    from shoal.api.page import chat_page
    from shoal.api.server import run_local

    if seconds is not None:
        options["limits"] = Limits(seconds=seconds)
    mount = chat_page(f"http://{host}:{port}/v1") if page else None
    run_local(model, host=host, port=port, ui_mount=mount, on_ready=partial(_ready, page=page), **options)


def _ready(url: str, page: bool) -> None:
    at = f"   chat page {url}/ui" if page else ""
    out.print(f"API {url}/v1{at}   (Ctrl-C ends it)", highlight=False, soft_wrap=True)


def _print(result: Any, as_json: bool, line: str) -> None:
    if as_json:
        print(json.dumps(result, default=str))
    else:
        out.print(line, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
