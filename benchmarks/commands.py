"""The command line of the benchmarks; each imports its benchmark only when it runs."""

# long: a function for each benchmark, which holds nothing but the options that it has

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from shoal.errors import UsageError
from shoal.options import Commands
from shoal.progress import results

bench = Commands(help="Benchmarks; the last line is JSON.", no_args_is_help=True)
out = results()
N = TypeVar("N", int, float)


def _some(param: typer.CallbackParam, value: int) -> int:
    """Refuses less than one of what an option counts: a run would end in its last line, of nothing."""
    if value < 1:
        raise UsageError(param.opts[0], got=value, allowed="1 or more")
    return value


Rounds = Annotated[
    int, typer.Option(help="Counted runs of each variant, in turns; medians are printed.", callback=_some)
]


def _numbers(name: str, text: str, kind: Callable[[str], N], such_as: str) -> tuple[N, ...]:
    """Those of the option `name`, with commas between. Raises UsageError for others than positive ones, or 0."""
    try:
        found = tuple(kind(number) for number in text.split(","))
    except ValueError as error:
        raise UsageError(name, got=text, allowed=f"numbers, such as {such_as}") from error
    if not all(0 <= number < math.inf for number in found):
        raise UsageError(name, got=text, allowed=f"numbers from 0 on, such as {such_as}")
    return found


@bench.command("decode")
def decode(
    shape: Annotated[
        str | None, typer.Option(help="82m or 5m: the peers' shapes; on a GPU a preset. [5m; on a GPU 1b]")
    ] = None,
    batches: Annotated[str | None, typer.Option(help="Batch sizes. [1,8,32; on a GPU 1,8,64,256]")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens decoded a request.")] = 64,
    rounds: Rounds = 3,
    parts: Annotated[
        str | None,
        typer.Option(
            help="Which tables. [speed,prefill,split,context,pool,drafts,adapters; of a --model speed,prefill,split,drafts]"
        ),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, where prefill is measured.")] = 512,
    model: Annotated[
        Path | None,
        typer.Option(help="Directory of a model in fp32 or bf16, in place of --shape; also in INT8. [none]"),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="The same weights as a GGUF file, for llama.cpp. [random ones of the shape]")
    ] = None,
    peer: Annotated[
        list[str],
        typer.Option(
            help="Another server in the same turns, as KIND=PYTHON: vllm, vllm-eager, vllm-shoal (this very checkpoint in"
            " vLLM), transformers, llama.cpp (--gguf as it comes), llama.cpp-q8_0, llama.cpp-f32."
        ),
    ] = [],  # noqa: B006
    threads: Annotated[
        str | None,
        typer.Option(help="Numbers of compute threads, one after the other: 1,2. [OMP_NUM_THREADS, or all cores]"),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            help="cuda: steps beside a GPU's bandwidth and a plain GPT, at contexts of 1k to 128k, and vLLM's."
        ),
    ] = "cpu",
) -> None:
    """Tokens per second of answers and of prompts (beside other servers), a step's stages, contexts, a pool, drafts."""
    from benchmarks import peers
    from benchmarks.decode import decode as run

    chosen = peers.parse(peer)
    if device != "cpu":
        from benchmarks.device import on_device

        sizes = _numbers("--batches", batches or "1,8,64,256", int, "1,8,64,256")
        on_device(out, device=device, shape=shape or "1b", batches=sizes, rounds=rounds, peer=chosen)
        return
    shape = shape or "5m"
    sizes = _numbers("--batches", batches or "1,8,32", int, "1,8,32")
    counts = _numbers("--threads", threads, int, "1,2") if threads is not None else ()
    tables = tuple(parts.split(",")) if parts is not None else None
    run(
        out, shape=shape, batches=sizes, tokens=tokens, rounds=rounds, parts=tables, peer=chosen, prompt=prompt, model=model,
        gguf=gguf, threads=counts,
    )  # fmt: skip


@bench.command("quality")
def quality(
    model: Annotated[Path, typer.Option(help="Directory of a model in fp32 or bf16, with early exits or without.")],
    data: Annotated[Path, typer.Option(help="Held-out texts and chats, .jsonl, as of `shoal evaluate`.")],
    against: Annotated[Path | None, typer.Option(help="The same in INT8. [none]")] = None,
    gguf: Annotated[Path | None, typer.Option(help="The same weights as a GGUF file, for llama.cpp. [none]")] = None,
    peer: Annotated[
        list[str],
        typer.Option(
            help="Whose own logprobs of the same ids, as KIND=PYTHON: llama.cpp (--gguf as it comes), llama.cpp-q8_0,"
            " llama.cpp-f32, transformers."
        ),
    ] = [],  # noqa: B006
) -> None:
    """Bits a byte, KL and same tokens of every exit, in INT8, and with int8 keys and values; beside others' logprobs."""
    from benchmarks import peers
    from benchmarks.quality import quality as run

    run(out, model=model, against=against, data=data, peer=peers.parse(peer), gguf=gguf)


@bench.command("tolerance")
def tolerance(
    model: Annotated[Path, typer.Option(help="Trained model directory, in fp32 or INT8.")],
    data: Annotated[Path, typer.Option(help="Directory with its held-out chats, made by `shoal prepare`.")],
    batches: Annotated[str, typer.Option(help="Answers at once.")] = "1,4,16",
    tolerances: Annotated[str, typer.Option(help="Nats a token that an answer may lose.")] = "0,0.05,0.1,0.2",
    prompts: Annotated[int, typer.Option(help="Questions of each task.", callback=_some)] = 16,
    rounds: Rounds = 3,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
) -> None:
    """What a tolerance buys: speed, depth, nats spent, scores; verified, routed, both, at fixed exits. A quarter of an hour."""
    from benchmarks.tolerance import tolerance as run

    sizes = _numbers("--batches", batches, int, "1,4,16")
    values = _numbers("--tolerances", tolerances, float, "0,0.1")
    run(
        out, model=model, data=data, batches=sizes, tolerances=values, prompts=prompts, rounds=rounds, temperature=temperature
    )  # fmt: skip


@bench.command("serve")
def serve(
    model: Annotated[Path | None, typer.Option(help="Model directory [random weights of the preset].")] = None,
    preset: Annotated[str, typer.Option(help="Whose shape the random weights have.")] = "mini",
    port: Annotated[int, typer.Option(help="HTTP port of the services that are measured.")] = 8123,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 256,
    rounds: Rounds = 3,
    parts: Annotated[str, typer.Option(help="Which measurements.")] = "start,latency,throughput,overload,scale",
    page: Annotated[Path, typer.Option(help="Where the page with the plot goes.")] = Path("bench-serve.html"),
) -> None:
    """What HTTP and Ray Serve add to an engine: first token, throughput, overload, scaling. Takes some five minutes."""
    from benchmarks.serve import serve_bench

    chosen = tuple(parts.split(","))
    serve_bench(out, model=model, preset=preset, port=port, tokens=tokens, rounds=rounds, parts=chosen, out=page)


@bench.command("gateways")
def gateways(
    numbers: Annotated[str, typer.Option(help="Of gateways, each in its turn; with commas.")] = "1,2",
    clients: Annotated[int, typer.Option(help="Requests at once, each one a stream.")] = 32,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer, each an event of its own.")] = 64,
    seconds: Annotated[float, typer.Option(help="Seconds for which each number is measured.")] = 10.0,
    rounds: Rounds = 3,
    port: Annotated[int, typer.Option(help="HTTP port of the services that are measured.")] = 8124,
    limited: Annotated[bool, typer.Option(help="Also for a key whose limits all gateways count together.")] = True,
) -> None:
    """What one gateway carries, and what two do, before a replica that costs nothing. Takes some five minutes."""
    from benchmarks.gateways import gateways_bench

    several = _numbers("--numbers", numbers, int, "1,2")
    gateways_bench(
        out, numbers=several, clients=clients, tokens=tokens, seconds=seconds, rounds=rounds, port=port, limited=limited
    )


@bench.command("batch")
def batch(
    model: Annotated[Path | None, typer.Option(help="Model directory [random weights of the preset].")] = None,
    preset: Annotated[str, typer.Option(help="Whose shape the random weights have.")] = "mini",
    requests: Annotated[
        int, typer.Option(help="Lines of the shorter of two runs; the longer one has three times as many.")
    ] = 192,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 64,
    rounds: Rounds = 3,
) -> None:
    """What `shoal batch` adds to an engine: tokens a second beside the engine's own. Takes some ten minutes."""
    from benchmarks.batch import batch_bench

    if requests < 1 or tokens < 1:
        raise UsageError("--requests and --tokens", got=min(requests, tokens), allowed="1 or more")
    batch_bench(out, model=model, preset=preset, requests=requests, tokens=tokens, rounds=rounds)


@bench.command("train")
def train(
    preset: Annotated[
        str | None, typer.Option(help="Whose shape is trained; several for mfu. [mini; of a GPU 350m,1b]")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of an update, but in mfu.")] = 8192,
    steps: Annotated[int, typer.Option(help="Updates that are timed together where workers are measured.")] = 3,
    rounds: Rounds = 3,
    parts: Annotated[
        str | None, typer.Option(help="Which measurements. [rate,workers,checkpoint; of a GPU mfu]")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda: utilisation (MFU) beside a plain GPT.")] = "cpu",
    lengths: Annotated[str, typer.Option(help="Tokens of a row, in mfu.")] = "4096,16384",
) -> None:
    """Training: share of the matmul rate, beside a plain GPT, 2 workers against 2 threads, what a checkpoint costs."""
    from benchmarks.train import OF_GPU, PARTS
    from benchmarks.train import train as run

    shapes, chosen = ("350m,1b", OF_GPU) if device == "cuda" else ("mini", PARTS)
    sizes = _numbers("--lengths", lengths, int, "4096,16384")
    run(
        out, preset=preset or shapes, tokens=tokens, steps=steps, rounds=rounds, device=device, lengths=sizes,
        parts=tuple(parts.split(",")) if parts else chosen,
    )  # fmt: skip


@bench.command("checkpoint")
def checkpoint(
    preset: Annotated[str, typer.Option(help="What is trained.")] = "small",
    tokens: Annotated[int | None, typer.Option(help="Tokens of an update. [a row of the preset]")] = None,
    every: Annotated[float, typer.Option(help="Seconds from one checkpoint to the next.")] = 10.0,
    rounds: Annotated[
        int,
        typer.Option(
            help="Pairs of turns of updates, with a checkpoint and without, at most: as many as their spread asks for."
        ),
    ] = 20,
    seconds: Annotated[
        float, typer.Option(help="Seconds from the start on: no pair but the first is begun that would end later.")
    ] = 600.0,
    threads: Annotated[int | None, typer.Option(help="CPUs that training computes with. [all]")] = None,
) -> None:
    """What checkpoints beside training slow it by, a line a pair; it ends within --seconds, or with its first pair."""
    from benchmarks.checkpoint import checkpoint as run

    given: dict[str, float | None] = {
        "--tokens": tokens, "--every": every, "--rounds": rounds, "--seconds": seconds, "--threads": threads,
    }  # fmt: skip
    for name, value in given.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageError(name, got=value, allowed="a number above 0")
    run(out, preset=preset, tokens=tokens, every=every, rounds=rounds, seconds=seconds, threads=threads)


@bench.command("drift")
def drift(
    runs: Annotated[int, typer.Option(help="Runs of each kind of traffic, without and with a new subject.")] = 20,
    daily: Annotated[int, typer.Option(help="Sessions of a working day.")] = 400,
    seed: Annotated[int, typer.Option(help="Seed of the traffic.")] = 0,
) -> None:
    """How often `shoal watch` rings in 60 days of ordinary traffic, with weekends, sessions and both; and how soon it sees
    that a fifth of the sessions has a new subject. Simulated rows, no model. Fails where more than 5 % ring falsely, or
    fewer than 95 % are seen within three days. Some minutes."""
    from benchmarks.drift import drift as run

    run(out, runs=runs, daily=daily, seed=seed)


@bench.command("canary")
def canary(
    runs: Annotated[int, typer.Option(help="Trials of each pattern and kind of canary.", callback=_some)] = 100,
    shadows: Annotated[
        int, typer.Option(help="People whose requests are copied before any share.", callback=_some)
    ] = 200,
    people: Annotated[int, typer.Option(help="People whom each share must serve.", callback=_some)] = 300,
    patterns: Annotated[
        str, typer.Option(help="Patterns of the traffic, with commas.")
    ] = "independent,sessions,weekends,load step,one angry user",
) -> None:
    """How often a canary is taken back that is equal (at most 5 %), and one whose answers fail 10 points more often (at least
    90 %), by simulated traffic. Fails where a share is missed. Some minutes."""
    from benchmarks.canary import canary as run

    chosen = tuple(each.strip() for each in patterns.split(",") if each.strip())
    run(out, runs=runs, shadows=shadows, people=people, patterns=chosen)


@bench.command("intervals")
def intervals(
    runs: Annotated[int, typer.Option(help="Simulated runs of each kind and number of units.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the data.")] = 0,
) -> None:
    """How often the 95 % intervals that Shoal states hold the truth, with 5, 10 and 33 documents or people: of bits a byte,
    shares, means, paired differences, losses and regret. Simulated data, no model. Fails where one holds it in less than 93 %.
    Two minutes."""
    from benchmarks.intervals import intervals as run

    run(out, runs=runs, seed=seed)


@bench.command("recipes")
def recipes(
    run: Annotated[list[Path], typer.Option(help="Folder of a recipe's run that has its report; repeat.")],
) -> None:
    """The table that compares recipes with a rule and with imported weights, in Markdown, out of their reports."""
    from benchmarks.recipes import recipes_bench

    recipes_bench(run)


@bench.command("data")
def data(
    preset: Annotated[str, typer.Option(help="Whose vocabulary, row length and patches are used.")] = "tiny",
    sizes: Annotated[
        str, typer.Option(help="MB of input by which cost and memory are measured, the smallest first.")
    ] = "10,100",
    rounds: Rounds = 3,
    parts: Annotated[str, typer.Option(help="Which measurements.")] = "speed,size,documents,images",
    seconds: Annotated[
        float,
        typer.Option(help="Seconds of `size`: no larger one is begun that would end later, by what the last one took."),
    ] = 300.0,
) -> None:
    """Tokenise-and-pack beside `tokenizers` alone; cost and memory by size, a line each; text beside images. 1 GB takes a
    quarter hour: --seconds 1200."""
    from benchmarks.data import data as run

    megabytes = tuple(sorted(_numbers("--sizes", sizes, int, "10,100,1000")))
    if not megabytes[0]:
        raise UsageError("--sizes", got=sizes, allowed="numbers from 1 on")
    if not 0 < seconds < math.inf:
        raise UsageError("--seconds", got=seconds, allowed="a number above 0")
    run(out, preset=preset, sizes=megabytes, rounds=rounds, parts=tuple(parts.split(",")), seconds=seconds)
