"""The `shoal` command. Each subcommand is a few lines: read the options, call one function, print the result.

Exit codes: 0 done, 1 failed (one line says why; --debug shows the traceback), 2 usage.
Heavy imports wait until a command needs them, so `shoal --help` is quick.
"""

from __future__ import annotations

import logging
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import presets, stages
from shoal.bench.commands import bench
from shoal.errors import ShoalError, UsageError
from shoal.stages import Json, out, print_result

app = typer.Typer(
    help="Train and serve language models that choose their own depth.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would swallow what stands in brackets, the defaults
    context_settings={"help_option_names": ["-h", "--help"]},
)
LOOPBACK, PORT = "127.0.0.1", 8000
INTERRUPTED = 130  # exit code


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
    print_result(report, as_json, f"shards in {out_dir}")


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
    print_result(result, as_json, f"{result['rows']} rows and {result['copies']} copies ({ways}) in {out_file}")


for stage in (stages.pretrain, stages.finetune, stages.quantize, stages.evaluate):
    app.command()(stage)


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
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            help="auto: keys and values in the model's precision; int8: rounded, three to four times as many fit "
            "[auto, or the config's]."
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
    if kv_cache_dtype not in (None, "auto", "int8"):
        raise UsageError("--kv-cache-dtype", got=kv_cache_dtype, allowed=["auto", "int8"])
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
            "kv_cache_dtype": kv_cache_dtype or "auto",
        }
        if precision == "auto":
            options["on_fallback"] = partial(print, "shoal: in fp32, since", file=sys.stderr)
        _serve_here(model, host or LOOPBACK, port or PORT, page=ui is not False, name=name, **options)
        out.print("The service has stopped.")
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
    given |= {"precision": precision, "kv_cache_dtype": kv_cache_dtype, "seconds": seconds}
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
    out.print("The service has stopped.")


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
        serves = arguments[:1] == ["serve"]  # interrupted before it was ready, or again while it stopped
        left = "the service has stopped" if serves else "finished work is kept, the same command goes on from it"
        print(f"shoal: interrupted; {left}", file=sys.stderr)
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


if __name__ == "__main__":
    sys.exit(main())
