"""`shoal bench decode --device cuda`: decoding steps of an engine's runner beside the bandwidth of a copy, by batch and
context; and in the same table a plain GPT with flash attention (`plain.PlainDecoder`), and vLLM where a Python that has it is
named: our model in it, and a Llama of the shape.

The least that a step can take is what it must read over the bandwidth: every weight of layers and head once, and of each
request the keys, values and summaries that its attention reads (`bytes_of_step`); of the others the same by what they are.
The memory of ours and of the plain GPT is filled without a prompt: prompts of 128k tokens of 256 requests would take longer
than all else. Models take their turns a batch at a time, and each leaves the device before the next one comes: vLLM takes
most of its memory.

Letters: S block, K blocks read, w window.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.plain import PlainDecoder, PlainGPT
from benchmarks.turns import show
from shoal import presets
from shoal.config import GROUPS, ModelConfig
from shoal.engine.events import Request, Sampling
from shoal.engine.graphs import Recorder
from shoal.engine.plan import Plan, Work
from shoal.engine.runner import Runner
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from shoal.errors import ResourceError, ShoalError, UsageError, first_line
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.cost import parameters
from shoal.model.model import Model
from shoal.model.net import Net

BATCHES = (1, 8, 64, 256)
CONTEXTS = (1024, 8192, 32768, 131072)
TOKENS = 32  # of an answer of a peer, beyond the first
PEERS = ("vllm", "vllm-shoal")


@dataclasses.dataclass(frozen=True)
class Steps:
    """Decoding steps of one model, of `batch` requests of `length` tokens: bytes that one must read, and its seconds; None
    where they do not fit the memory."""

    model: str
    batch: int
    length: int
    bytes: int
    seconds: float | None


def bytes_of_step(config: ModelConfig, batch: int, length: int, each: int = 2) -> int:
    """Bytes that a decoding step of `batch` requests of `length` tokens, the new one among them, must read at full depth, of
    weights, keys and values of `each` bytes: weights once, and of each request what its layers read. Summaries are fp32."""
    c, own = config, parameters(config)
    # of a table that is not tied a row a request, which is nothing
    weights = own.blocks + own.embedding // (1 if c.tied else 2) + c.width
    read = sum(_reads(c, length, c.attention_kind(layer), each) for layer in range(c.layers))
    return weights * each + batch * c.kv_heads * read


def _reads(c: ModelConfig, length: int, kind: str, each: int) -> int:
    """Bytes of a KV head of one layer: tokens that either branch reads, no more than there are, and summaries where there are
    more blocks than are read."""
    if kind == "D" or (kind == "S" and length <= c.dense_length):
        tokens, blocks = length, 0
    elif kind == "L":
        tokens, blocks = min(length, c.window), 0
    else:
        # with one softmax only blocks that begin before the window are chosen among
        blocks = length // c.block if kind == "H" else max(0, length - 1 - c.window + c.block) // c.block
        chosen = min(c.top_k, blocks) * c.block + (length % c.block if kind == "H" else 0)
        tokens = min(length, min(length, c.window) + chosen)
    return 2 * tokens * c.head_dim * each + (blocks if blocks > c.top_k else 0) * c.summary_values * max(4, each)


def need_cuda(device: str) -> torch.device:
    """Raises UsageError for another device than these, and ResourceError where there is none."""
    if device != "cuda":
        raise UsageError("--device", got=device, allowed=["cpu", "cuda"])
    if not torch.cuda.is_available():
        raise ResourceError(
            "--device cuda", got="no CUDA device here", do="run it on a machine with a GPU, or with --device cpu"
        )
    return torch.device("cuda")


def bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes a second that a copy reads and writes."""
    a = torch.zeros(size, dtype=torch.int8, device=device)
    b = torch.empty_like(a)
    return 2 * size / seconds(lambda: b.copy_(a), device)


def seconds(run: Callable[[], object], device: torch.device, rounds: int = 20) -> float:
    """Of one `run`: the median; the first three are not counted."""
    took = []
    for _ in range(3 + rounds):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - start)
    return statistics.median(took[3:])


def model_of(config: ModelConfig, device: torch.device) -> Model:
    """Random weights; on a GPU in bf16, as it is served."""
    model = Model(config, Net(config).init_(0), Tokenizer.bytes_only(), name="bench")
    return model.on_gpu() if device.type == "cuda" else model


def units_of(config: ModelConfig, batch: int, length: int) -> int:
    """Of so many requests of that length at full depth, and the null unit."""
    return 1 + batch * GROUPS * -(-length // config.page)


def step_seconds(model: Model, batch: int, length: int, rounds: int = 20) -> float:
    """Of one decoding step of `batch` greedy requests of `length` tokens, as an engine takes it: from plan to tokens."""
    config, pages = model.config, -(-length // model.config.page)
    runner = Runner(model, units_of(config, batch, length), graph_rows=batch)
    runner.cache.kv.normal_()
    runner.cache.summaries.normal_()
    works = []
    for number in range(batch):
        request = Request(
            [20 + number % 200], Sampling(temperature=0, max_tokens=length, ignore_eos=True), depth="full"
        )
        running = Running(
            request=request, tokens=[20 + number % 200] * length, prompt_len=1, page=config.page, order=(0, 0, 0),
            arrival=0.0, text=TextStream(model.tokenizer), seed=0, groups=GROUPS, layers=config.layers,
        )  # fmt: skip
        for group in range(GROUPS):
            first = 1 + (number * GROUPS + group) * pages
            running.holding.give(group, list(range(first, first + pages)))
            running.holding.computed[group] = length - 1
        works.append(Work(running, length - 1, 1, 0, GROUPS, sample=True))
    return seconds(lambda: runner.run(Plan(works)), model.device, rounds)


def plain_bytes(config: ModelConfig, batch: int, length: int, each: int = 2) -> int:
    """As `bytes_of_step`, of the plain GPT: as many layers, of the same width, a key and a value of that width each."""
    weights = config.layers * (12 * config.width**2 + 2 * config.width) + (config.vocab + 1) * config.width
    return each * (weights + 2 * batch * length * config.layers * config.width)


def plain_gpt(config: ModelConfig, device: torch.device, length: int) -> PlainGPT:
    """Random weights, for contexts of up to `length`; on a GPU in bf16, each layer compiled but for its attention."""
    sizes = {"vocab": config.vocab, "layers": config.layers, "width": config.width, "heads": config.heads}
    model = PlainGPT(**sizes, length=length)
    if device.type == "cuda":
        model = model.to(device, torch.bfloat16)
        for layer, name in itertools.product(model.layers, ("asked", "answered")):
            setattr(layer, name, torch.compile(getattr(layer, name)))
    return model


def plain_seconds(model: PlainGPT, batch: int, length: int, rounds: int = 20) -> float:
    """Of one greedy step of `batch` requests at the last of `length` places, to the tokens on the host; on a GPU it is one CUDA
    graph."""
    decoder, device = PlainDecoder(model, batch, length), model.tokens.weight.device
    for memory in decoder.kv:
        for each in memory:
            each.normal_()
    tokens = torch.arange(batch, device=device) % 200 + 20

    def step() -> None:
        tokens.copy_(decoder.step(tokens, length - 1).argmax(-1))

    run = Recorder()(step) if device.type == "cuda" else step

    def whole() -> list[int]:
        run()
        return tokens.tolist()

    return seconds(whole, device, rounds)


def peer_seconds(peer: peers.Peer, batch: int, length: int, rounds: int = 3) -> float | None:
    """Of one step of a peer, at contexts of up to `length`: what `TOKENS` tokens of an answer take beyond the first, the prompt
    being in its prefix cache; the median. None: its memory does not hold them."""
    prompt = max(1, length - TOKENS - 1)
    peer.seconds(batch, prompt, 1)
    took = [peer.seconds(batch, prompt, 1 + TOKENS) - peer.seconds(batch, prompt, 1) for _ in range(rounds)]
    found = statistics.median(took) / TOKENS
    return None if math.isnan(found) else found


def steps(
    which: str, config: ModelConfig, batch: int, lengths: Sequence[int], device: torch.device, rounds: int = 20,
    python: str = "",
) -> Iterator[Steps]:  # fmt: skip
    """Steps of `batch` requests at each of `lengths`, of "ours", the "plain" GPT, or a kind of peer, which `python` has. It is
    on the device while this runs. Raises ShoalError for a peer that does not start, or ends."""
    config = dataclasses.replace(config, max_length=max(*lengths, config.context))
    if which in ("ours", "plain"):
        must, timed = _own(which, config, device, max(lengths))
        for length in lengths:
            try:
                took = timed(batch, length, rounds)
            except torch.OutOfMemoryError:
                took = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
            yield Steps(which, batch, length, must(batch, length), took)
        return
    # a Llama has our shape, and reads all of the context
    reads = config if which == "vllm-shoal" else dataclasses.replace(config, attn_pattern="D")
    told = {"length": max(lengths), "dtype": "bfloat16", "steps": True}
    with peers.running({which: python}, _of_peer(which, config), more=told) as (peer,):
        for length in lengths:
            took = peer_seconds(peer, batch, length)
            yield Steps(which, batch, length, bytes_of_step(reads, batch, length), took)


def _own(
    which: str, config: ModelConfig, device: torch.device, longest: int
) -> tuple[Callable[[int, int], int], Callable[[int, int, int], float]]:
    """What counts the bytes of a step, and what times one."""
    if which == "plain":
        plain = plain_gpt(config, device, longest)
        each = plain.tokens.weight.itemsize
        return partial(plain_bytes, config, each=each), partial(plain_seconds, plain)
    model = model_of(config, device)
    return partial(bytes_of_step, config, each=model.net.dtype.itemsize), partial(step_seconds, model)


def _of_peer(which: str, config: ModelConfig) -> Model:
    """What a peer is told: a model in bf16, which it reads, or a shape without weights."""
    with torch.device("cpu" if which == "vllm-shoal" else "meta"):
        net = Net(config)
    net = net.init_(0).to(torch.bfloat16) if which == "vllm-shoal" else net
    return Model(config, net, Tokenizer.bytes_only(), name="bench")


def on_device(
    console: Console, *, device: str, shape: str, batches: tuple[int, ...], rounds: int, peer: dict[str, str],
    contexts: tuple[int, ...] = CONTEXTS,
) -> list[dict[str, Any]]:  # fmt: skip
    """The table, and its rows as JSON. What does not fit the memory, and a peer that fails, is so said."""
    there, config = need_cuda(device), presets.get(shape).model
    moved = bandwidth(there)
    title = f"decode, {shape} on {torch.cuda.get_device_name(there)}, bf16; a copy moves {moved / 1e9:,.0f} GB/s"
    table = Table("batch", "context", "model", "ms a step", "tokens/s", "GB read", "of bandwidth", title=title)
    rows, failed = list[dict[str, Any]](), dict[str, str]()
    for batch, which in itertools.product(batches, ("ours", "plain", *(name for name in PEERS if name in peer))):
        if which in failed:
            continue
        try:
            for found in steps(which, config, batch, contexts, there, rounds, peer.get(which, "")):
                row = {**dataclasses.asdict(found), "share": found.seconds and found.bytes / moved / found.seconds}
                rows.append(row)
                table.add_row(str(batch), f"{found.length:,}", which, *_cells(found, moved))
        except ShoalError as error:
            failed[which] = first_line(error)
            table.add_row(str(batch), "", which, "failed")
    for which, why in failed.items():
        console.print(f"{which}: {why}", markup=False)
    result = {"bench": "decode", "device": device, "shape": shape, "bandwidth": moved, "rows": rows, "failed": failed}
    show(console, [table], result)
    return rows


def _cells(found: Steps, moved: float) -> tuple[str, str, str, str]:
    if found.seconds is None:
        return "does not fit", "", f"{found.bytes / 1e9:.2f}", ""
    share = found.bytes / moved / found.seconds
    return (
        f"{1e3 * found.seconds:.2f}",
        f"{found.batch / found.seconds:,.0f}",
        f"{found.bytes / 1e9:.2f}",
        f"{share:.0%}",
    )
