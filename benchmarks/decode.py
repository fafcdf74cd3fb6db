"""`shoal bench decode`: what decoding takes, by precision, batch, depth, length and drafts, on random weights or on a model.

Parts: `speed` and `prefill` (tokens a second of answers and of prompts, beside the peers that were named), `split` (where a
step's time goes), `context` (a step at two lengths, dense attention beside it), `pool` (how many requests fit), `drafts`
(self-speculation where all drafts are right, and where few are, forced and with the switch; of a model, as many as are),
`adapters` (four in one batch).
"""

from __future__ import annotations

import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import peers
from benchmarks.drafts import drafts_of, need_exits
from benchmarks.speed import Bench, Rows, prefill, speed
from benchmarks.turns import in_turns, show
from shoal.config import GROUPS, ModelConfig
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.engine.front import settle
from shoal.engine.plan import Plan, Work
from shoal.engine.runner import Runner
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from shoal.errors import UsageError
from shoal.evaluate.answering import decode_speed
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import slots
from shoal.model.adapters import Adapter, kept
from shoal.model.linears import Int8Linear, Linear
from shoal.model.model import Model
from shoal.model.net import Net

SHAPES: dict[str, dict[str, Any]] = {  # our block in the peers' shapes (see docs/benchmarks)
    "82m": {"layers": 12, "width": 768, "heads": 12, "kv_heads": 4, "head_dim": 64, "ffn": 2048, "vocab": 8192},
    "5m": {"layers": 4, "width": 256, "heads": 8, "kv_heads": 4, "head_dim": 32, "ffn": 768, "vocab": 8192},
}
DRAFTS = 4
SWITCHED = 1000  # tokens of an answer whose drafts may be left: so many that what trying costs shows
ADAPTERS, RANK = 4, 16


def decode(
    console: Console, *, shape: str, batches: tuple[int, ...], tokens: int, rounds: int, parts: tuple[str, ...] | None,
    peer: dict[str, str], prompt: int = 512, model: Path | None = None, gguf: Path | None = None,
    threads: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """The tables of `parts` [all that there are], and all rows as JSON: of `shape`, or of the `model` in a directory, with each
    number of `threads` [as many as there are]. `peer` and `gguf` as `peers.running` takes them. Raises UsageError for what does
    not go together."""
    known = PARTS if model is None else OF_A_MODEL
    unknown = [part for part in parts or () if part not in known]
    if unknown or parts == ():
        raise UsageError("--parts", got=",".join(unknown), allowed=list(known))
    if not all(threads):
        raise UsageError("--threads", got=threads, allowed="1 or more")
    peers.need_gguf(peer, gguf)
    if prompt < 1:
        raise UsageError("--prompt", got=prompt, allowed="1 or more tokens")
    full = _model(_config(shape)) if model is None else _loaded(model)
    if parts is None:
        parts = tuple(part for part in known if part != "drafts" or len(full.config.exits) > 1)
    elif "drafts" in parts:
        need_exits(full)
    told = shape if model is None else full.name
    result: dict[str, Any] = {"bench": "decode", "shape": told, "tokens": tokens, "rounds": rounds}
    result |= {part: [] for part in parts}
    imported = model if model is not None and full.source is not None else None
    tables = []
    for count in threads or (torch.get_num_threads(),):
        torch.set_num_threads(count)
        with peers.running(peer if {"speed", "prefill"} & {*parts} else {}, full, imported, gguf) as others:
            bench = Bench(full, batches, tokens, prompt, rounds, tuple(others), trained=model is not None)
            for part in parts:
                table, rows = PARTS[part](bench)
                table.title = f"{table.title}, {told}, {count} thread{'s' * (count > 1)}"
                tables.append(table)
                result[part] += [{"threads": count, **row} for row in rows]
    show(console, tables, result)


def _split(bench: Bench) -> tuple[Table, Rows]:
    """Milliseconds of a step's stages; model is `runner.run` without the sampler, overhead all the others' share."""
    engine = Engine(bench.model)
    decode_speed(engine, 1, 8)
    settle()  # as a server does
    stages = ("plan", "model", "sample", "commit")
    table = Table("batch", *(f"{stage} ms" for stage in stages), "overhead", title="a step's time, fp32, full depth")
    rows = []
    for batch in bench.batches:
        spent = dict.fromkeys(stages, 0.0)
        engine.scheduler.plan = _timed(engine.scheduler.plan, spent, "plan")  # type: ignore[method-assign]
        engine.scheduler.commit = _timed(engine.scheduler.commit, spent, "commit")  # type: ignore[method-assign]
        engine.runner.run = _timed(engine.runner.run, spent, "model")  # type: ignore[method-assign]
        engine.runner.sampler.sample = _timed(engine.runner.sampler.sample, spent, "sample")  # type: ignore[method-assign]
        before = engine.scheduler.metrics.steps
        for _ in range(bench.rounds):
            decode_speed(engine, batch, bench.tokens)
        for owner in (engine.scheduler, engine.runner, engine.runner.sampler):
            for name in ("plan", "commit", "run", "sample"):
                vars(owner).pop(name, None)
        spent["model"] -= spent["sample"]
        steps, whole = engine.scheduler.metrics.steps - before, sum(spent.values())
        each = {stage: 1000 * seconds / steps for stage, seconds in spent.items()}
        overhead = 1 - spent["model"] / whole
        table.add_row(str(batch), *(f"{each[stage]:.3f}" for stage in stages), f"{overhead:.1%}")
        rows.append({"batch": batch, **{f"{stage}_ms": ms for stage, ms in each.items()}, "overhead": overhead})
    return table, rows


def _timed(function: Callable[..., Any], spent: dict[str, float], stage: str) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args)
        finally:
            spent[stage] += time.perf_counter() - start

    return call


def _context(bench: Bench) -> tuple[Table, Rows]:
    """One request's step at two lengths, over a memory of random keys (a prefill of 32k tokens would take minutes). Dense: a
    window over everything, in one pass."""
    config, lengths = bench.config, (1024, 32768)
    runs: dict[tuple[str, int], Callable[[], float]] = {}
    for length in lengths:
        longer = length + config.page
        dense = replace(config, window=longer, top_k=-(-longer // config.block), train_length=2 * longer)
        kinds = {"hybrid": (config, None), "hybrid, K/V in int8": (config, torch.int8), "dense": (dense, None)}
        for kind, (shaped, kv_dtype) in kinds.items():
            runs[kind, length] = _step(_model(replace(shaped, max_length=longer)), length, bench.tokens, kv_dtype)
    medians = in_turns(runs, bench.rounds)
    table = Table("attention", *(f"{n} tokens" for n in lengths), "ratio", title="ms a decoded token, fp32, batch 1")
    rows = []
    for kind in kinds:
        short, long = (medians[kind, length] for length in lengths)
        table.add_row(kind, f"{short:.2f}", f"{long:.2f}", f"{long / short:.2f}")
        rows.append({"attention": kind, "lengths": lengths, "ms": [short, long], "ratio": long / short})
    return table, rows


def _step(model: Model, length: int, tokens: int, kv_dtype: torch.dtype | None) -> Callable[[], float]:
    """A function that takes one decoding step at `length` tokens several times, and gives the milliseconds of one."""
    config = model.config
    pages = -(-(length + 1) // config.page)
    runner = Runner(model, 1 + GROUPS * pages, kv_dtype=kv_dtype)
    kv, generator = runner.cache.kv, torch.Generator().manual_seed(0)
    k, v = torch.randn(2, *kv.shape[:-1], config.head_dim, generator=generator)
    kv.copy_(slots.encode(k, v, kv.dtype))
    runner.cache.summaries.normal_(generator=generator)
    request = Request([20 + i % 200 for i in range(length)], Sampling(temperature=0, max_tokens=1), depth="full")
    running = Running(
        request=request, tokens=list(request.prompt), prompt_len=length, page=config.page, order=(0, 0), arrival=0.0,  # type: ignore[arg-type]
        text=TextStream(model.tokenizer), seed=0, groups=GROUPS, layers=config.layers,
    )  # fmt: skip
    for group in range(GROUPS):
        running.holding.give(group, list(range(1 + group * pages, 1 + group * pages + pages)))
        running.holding.computed[group] = length - 1
    plan = Plan([Work(running, length - 1, 1, 0, GROUPS, sample=True)])
    runner.run(plan)

    def milliseconds() -> float:
        start = time.perf_counter()
        for _ in range(tokens):
            runner.run(plan)
        return 1000 * (time.perf_counter() - start) / tokens

    return milliseconds


def _pool(bench: Bench) -> tuple[Table, Rows]:
    """Requests that run at once in a pool of eight full-depth requests' units."""
    config = bench.config
    model = bench.model
    length, fit = 4 * config.page, 8
    table = Table("depth", "requests at once", "units each", title=f"requests of {length} tokens in one pool")
    rows = []
    for depth in config.exit_names:
        engine = Engine(model, units=1 + fit * GROUPS * 4, max_batch=fit * GROUPS + 1, max_queue=fit * GROUPS + 1)
        sampling = Sampling(temperature=0, max_tokens=8, ignore_eos=True)
        for number in range(fit * GROUPS + 1):
            prompt = [20 + (number + i) % 200 for i in range(length - 8)]
            engine.submit(Request(prompt, sampling, depth=depth))
        most, owned = 0, 0
        while not engine.idle:
            engine.step()
            running = engine.scheduler.running
            most = max(most, len(running))
            owned = max([owned, *(sum(request.holding.owned) for request in running)])
        table.add_row(depth, str(most), str(owned))
        rows.append({"depth": depth, "at_once": most, "units_each": owned})
    return table, rows


def _drafts(bench: Bench) -> tuple[Table, Rows]:
    """Drafting on and off at batch 1, sampled, on weights that bound what a trained model can gain: groups 2.. that add
    nothing, so that every draft is right, and groups that add far too much, so that few are. There also with the switch, which
    is to leave what does not pay: by an engine that has measured nothing yet, whose trying costs something."""
    if bench.trained:
        return drafts_of(bench)
    runs: dict[tuple[str, bool], DraftRun] = {}
    kinds = (("all right", 0.0, False), ("few right", 64.0, False), ("few right, switch", 64.0, True))
    for label, share, switch in kinds:
        model, tokens = _adding(bench.config, share), max(bench.tokens, SWITCHED) if switch else bench.tokens
        for on in (False, True):
            runs[label, on] = DraftRun(model, DRAFTS if on else 0, tokens, switch)
    medians = in_turns(runs, bench.rounds)
    columns = ("drafts", "tokens", "off tokens/s", "on tokens/s", "ratio", "turns", "drafted", "accepted")
    table = Table(*columns, title=f"at most {DRAFTS} drafts, fp32, batch 1")
    rows = []
    for label in dict.fromkeys(label for label, _ in runs):
        off, on_, plain, run = medians[label, False], medians[label, True], runs[label, False], runs[label, True]
        turns = [b / a for a, b in zip(plain.rates, run.rates, strict=True)][1:]  # without the one that is not counted
        drafted, accepted = run.drafted / len(run.rates), run.accepted / max(1, run.drafted)
        spread = f"{min(turns):.3f} to {max(turns):.3f}"
        numbers = (f"{off:.1f}", f"{on_:.1f}", f"{on_ / off:.3f}", spread, f"{drafted:.0f}", f"{accepted:.0%}")
        table.add_row(label, str(run.tokens), *numbers)
        row = {"drafts": label, "tokens": run.tokens, "off": off, "on": on_, "ratio": on_ / off, "turns": turns}
        rows.append({**row, "drafted": drafted, "accepted": accepted})  # drafts of an answer, and the share that stood
    return table, rows


@dataclass
class DraftRun:
    """Answers that draft `most` tokens ahead; called, the tokens a second of one. With the `switch` they draft where it pays,
    each as the first of its engine; without, they are forced to, all in one engine."""

    model: Model
    most: int
    tokens: int
    switch: bool
    engine: Engine | None = None
    rates: list[float] = field(default_factory=list)
    drafted: int = 0  # by all answers
    accepted: int = 0

    def __call__(self) -> float:
        if self.engine is None or self.switch:
            most = None if self.switch else 1
            self.engine = Engine(self.model, max_batch=1, speculative=self.most, speculative_max_batch=most)
        metrics = self.engine.scheduler.metrics
        drafted, accepted = metrics.drafts, metrics.drafts_accepted
        # random logits are flat
        sampling = Sampling(temperature=0.1, seed=0, max_tokens=self.tokens, ignore_eos=True)
        self.rates.append(decode_speed(self.engine, 1, self.tokens, sampling=sampling))
        self.drafted += metrics.drafts - drafted
        self.accepted += metrics.drafts_accepted - accepted
        return self.rates[-1]


def _adding(config: ModelConfig, share: float) -> Model:
    """A random model whose groups after the first add `share` times what they would."""
    model = _model(config)
    for group in list(model.net.groups)[1:]:
        for block in group.blocks:  # type: ignore[union-attr]
            block.attention.out.weight.mul_(share)
            block.mlp.down.weight.mul_(share)
    return model


def _adapters(bench: Bench) -> tuple[Table, Rows]:
    """`ADAPTERS` of rank `RANK` beside all linears, in one batch, beside the same batch without any."""
    runs: dict[tuple[str, int, bool], Callable[[], float]] = {}
    for label, model in bench.both.items():
        engine = Engine(model)
        names = [engine.load_adapter(_adapter(model.net, number)) for number in range(ADAPTERS)]
        for batch in [batch for batch in bench.batches if batch >= ADAPTERS]:
            for on in (False, True):
                held = names if on else [""]
                runs[label, batch, on] = partial(decode_speed, engine, batch, bench.tokens, adapters=held)
    if not runs:
        raise UsageError("--batches", got=list(bench.batches), allowed=f"one of {ADAPTERS} or more, for adapters")
    settle()
    medians = in_turns(runs, bench.rounds)
    title = f"{ADAPTERS} adapters of rank {RANK} in one batch"
    table = Table("", "batch", "none tokens/s", f"{ADAPTERS} tokens/s", "ratio", title=title)
    rows = []
    for label, batch in dict.fromkeys((label, batch) for label, batch, _ in runs):
        off, on_ = medians[label, batch, False], medians[label, batch, True]
        table.add_row(label, str(batch), f"{off:.1f}", f"{on_:.1f}", f"{on_ / off:.2f}")
        rows.append({"what": label, "batch": batch, "none": off, "adapters": on_, "ratio": on_ / off})
    return table, rows


def _adapter(net: Net, seed: int) -> Adapter:
    draw, pairs = torch.Generator().manual_seed(seed), {}
    for name, linear in net.named_modules():
        if name.startswith("groups.") and isinstance(linear, (Linear, Int8Linear)):
            outputs, inputs = linear.weight.shape
            a, b = torch.randn(RANK, inputs, generator=draw), torch.randn(RANK, outputs, generator=draw)
            pairs[name] = kept(linear, a / inputs**0.5, b / (10 * RANK))
    return Adapter(f"adapter {seed}", pairs)


PARTS: dict[str, Callable[[Bench], tuple[Table, Rows]]] = {
    "speed": speed,
    "prefill": prefill,
    "split": _split,
    "context": _context,
    "pool": _pool,
    "drafts": _drafts,
    "adapters": _adapters,
}
OF_A_MODEL = ("speed", "prefill", "split", "drafts")  # the others need weights that are made for them


def _config(shape: str) -> ModelConfig:
    if shape not in SHAPES:
        raise UsageError("--shape", got=shape, allowed=sorted(SHAPES))
    return ModelConfig(**SHAPES[shape], train_length=2048, window=256, block=16, page=16, top_k=16)


def _loaded(directory: Path) -> Model:
    """The model of a directory, in fp32. Raises UsageError for one in INT8."""
    model = Model.load(directory)
    if model.config.quantization != "none":
        raise UsageError("--model", got=f"{directory}, which is in INT8", allowed="the model that it was made from")
    model.net.float()
    return model


def _model(config: ModelConfig) -> Model:
    return Model(config, Net(config).init_(0), _tokenizer(config.vocab), name="bench")


@cache
def _tokenizer(vocab: int) -> Tokenizer:
    """Fitted to Python's own library, so that it fills the vocabulary as a trained model's does: the sampler closes every id
    that has no token, and text is made of every one that has."""
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return Tokenizer.train((file.read_text(encoding="utf-8", errors="replace") for file in library[:40]), vocab)
