"""`shoal bench train`: how near training comes to the rate of matrix products, what sharding costs, and what checkpoints cost.

All on real rows (the Python standard library's sources, packed as `shoal prepare` packs them), by the loop's own functions.
Workers are processes of their own, in turns. Of an update's time, `compute` is what the training thread computed by the CPU's
clock, `waiting` (for the other worker, and for what is exchanged with it) is the rest, `data` the time to get the rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.mfu import device_of, mfu
from benchmarks.plain import PlainGPT
from benchmarks.turns import environment, in_turns, show
from shoal import presets
from shoal.config import ModelConfig
from shoal.data import shards
from shoal.data.pack import Packer
from shoal.errors import UsageError
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import END_ID, Tokenizer
from shoal.model.net import Net
from shoal.train.checkpoint import CheckpointStore
from shoal.train.feed import Feed, open_feed, shard_tokenizer
from shoal.train.loss import LossModel
from shoal.train.meter import matmul_rate, training_flops
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks, shard_
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.state import TrainState
from shoal.train.step import update

PARTS, OF_GPU = ("rate", "workers", "checkpoint"), ("mfu",)
ROWS = 400  # of the corpus; more updates than that reads them again
SAMPLE = 10**6  # characters that the tokenizer is fitted to
WORKERS = {"1 worker x 2 threads": (1, 2), "2 workers x 1 thread": (2, 1)}
SECONDS = 300  # that one exchange between workers may take


def train(
    console: Console,
    *,
    preset: str,
    tokens: int,
    steps: int,
    rounds: int,
    parts: tuple[str, ...],
    device: str = "cpu",
    lengths: tuple[int, ...] = (),
) -> None:
    """The tables of `parts`; an update has `tokens` tokens in as many micro-batches as the preset's, which workers share, and
    `steps` of them are timed together for workers. `preset` and `lengths` may be several for "mfu", which alone runs on a
    `device` that is no CPU. Raises UsageError for one that is not there."""
    there, allowed = device_of(device), OF_GPU + (PARTS if device == "cpu" else ())
    if unknown := set(parts) - set(allowed):
        raise UsageError("--parts", got=sorted(unknown), allowed=allowed)
    result: dict[str, Any] = {"bench": "train", "preset": preset, "batch_tokens": tokens, "rounds": rounds}
    tables = []
    torch.set_num_threads(1)
    if "mfu" in parts:
        table, result["mfu"] = mfu(tuple(preset.split(",")), lengths, there, rounds)
        tables.append(table)
    if not set(parts) - set(OF_GPU):
        return show(console, tables, result)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "data")
        corpus(data, presets.get(preset).model)
        plan = pretrain_plan(preset, str(data), folder, steps=steps, batch_tokens=tokens, accumulate=2)
        if "rate" in parts:
            table, result["rate"] = _rate(plan, rounds)
            tables.append(table)
        if "workers" in parts:
            table, result["workers"] = _workers(plan, steps, rounds)
            tables.append(table)
        if "checkpoint" in parts:
            table, result["checkpoint"] = _checkpoint(plan, Path(folder, "run"), rounds)
            tables.append(table)
    show(console, tables, result)


def _rate(plan: FitPlan, rounds: int) -> tuple[Table, dict[str, Any]]:
    """Tokens a second of one worker with one thread, ours and a plain GPT's, and matrix products in the same turns."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    feed, model, optimizer = prepared(plan, ranks)
    c, rows = plan.model, plan.micro_rows(1)
    plain = PlainGPT(vocab=c.vocab, layers=c.layers, width=c.width, heads=c.heads, length=c.train_length)
    plain_optimizer = plain.optimizer(plan.train.learning_rate, plan.train.betas, plan.train.weight_decay)
    some = torch.randint(END_ID + 1, c.vocab, (plan.train.accumulate, rows, c.train_length + 1))
    step = iter(range(10**9))

    def ours() -> float:
        start = time.perf_counter()
        one_update(plan, feed, model, optimizer, ranks, next(step))
        return plan.train.batch_tokens / (time.perf_counter() - start)

    def theirs() -> float:
        start = time.perf_counter()
        plain_optimizer.zero_grad()
        for batch in some:
            (plain.loss(batch[:, :-1], batch[:, 1:]) / len(some)).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), plan.train.clip)
        plain_optimizer.step()
        return plan.train.batch_tokens / (time.perf_counter() - start)

    found = in_turns({"ours": ours, "plain": theirs, "matmul": lambda: matmul_rate(ranks.device)}, rounds)
    plain_count = sum(p.numel() for p in plain.parameters())
    work = {"ours": training_flops(c), "plain": 6 * plain_count + 6 * c.layers * c.width * c.train_length}
    table = Table(
        "model", "parameters", "tokens/s", "share of matmul rate",
        title=f"{plan.name}, one thread, {plan.train.batch_tokens} tokens an update in {plan.train.accumulate} micro-batches; "
        f"matmul {found['matmul'] / 1e9:.0f} GFLOP/s; ours / plain {found['ours'] / found['plain']:.2f}",
    )  # fmt: skip
    counts = {"ours": sum(p.numel() for p in model.parameters()), "plain": plain_count}
    share = {name: found[name] * work[name] / found["matmul"] for name in counts}
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", f"{found[name]:,.0f}", f"{share[name]:.0%}")
    speeds = {f"{name}_tokens_per_s": found[name] for name in counts}
    shares = {f"{name}_utilisation": value for name, value in share.items()}
    return table, {**speeds, **shares, "matmul_flops": found["matmul"], "ratio": found["ours"] / found["plain"]}


def _workers(plan: FitPlan, steps: int, rounds: int) -> tuple[Table, dict[str, Any]]:
    """One worker with two threads against two with one, sharded by FSDP2, the same updates."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WORKERS}
    for _ in range(rounds):
        for name, (world, threads) in WORKERS.items():
            runs[name].append(_group(plan, steps, world, threads))
    table = Table("", "tokens/s", "compute", "waiting", "data", title="shares of an update's time")
    found: dict[str, Any] = {}
    for name, rows in runs.items():
        found[name] = {key: median(row[key] for row in rows) for key in rows[0]}
        shares = (f"{found[name][key]:.1%}" for key in ("compute", "waiting", "data"))
        table.add_row(name, f"{found[name]['tokens_per_s']:,.0f}", *shares)
    one, two = (found[name]["tokens_per_s"] for name in WORKERS)
    found["ratio"] = two / one
    table.caption = f"2 workers / 1 worker: {two / one:.2f}"
    return table, found


def _checkpoint(plan: FitPlan, run: Path, rounds: int) -> tuple[Table, dict[str, Any]]:
    """Seconds that writing a checkpoint stops training for."""
    ranks = Ranks(0, 1, torch.device("cpu"))
    feed, model, optimizer = prepared(plan, ranks)
    one_update(plan, feed, model, optimizer, ranks, 0)  # so that there are moments
    store, took = CheckpointStore(run), []
    for step in range(rounds + 1):
        start = time.perf_counter()
        path = store.save(model, optimizer, TrainState(step=step), ranks)
        took.append(time.perf_counter() - start)
    size = sum(file.stat().st_size for file in path.iterdir())
    seconds = median(took[1:])
    table = Table("MiB", "seconds", "cost at one a minute", title="a checkpoint")
    table.add_row(f"{size / 2**20:.1f}", f"{seconds:.2f}", f"{seconds / 60:.1%}")
    return table, {"bytes": size, "seconds": seconds, "share": seconds / 60}


def prepared(plan: FitPlan, ranks: Ranks) -> tuple[Feed, LossModel, torch.optim.Optimizer]:
    feed = open_feed(plan, shard_tokenizer(plan.data), "", ranks)
    model = LossModel(Net(plan.model).init_(0))
    shard_(model, ranks)
    return feed, model, make_optimizer(model, plan.train)


def one_update(
    plan: FitPlan, feed: Feed, model: LossModel, optimizer: torch.optim.Optimizer, ranks: Ranks, step: int
) -> float:
    """Do update number `step`; seconds that its rows took."""
    start = time.perf_counter()
    batches = feed.at(step)
    took = time.perf_counter() - start
    total = sum(plan.train.exit_weights)
    weights = [weight / total for weight in plan.train.exit_weights]
    update(model, optimizer, batches, config=plan.train, weights=weights, rate=1e-4, ranks=ranks)
    return took


def corpus(folder: Path, config: ModelConfig) -> None:
    """Shards of the standard library's sources, `ROWS` rows to train on."""
    folder.mkdir()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    fitted, size = [], 0
    for text in texts:
        if size < SAMPLE:
            fitted.append(text)
            size += len(text)
    tokenizer = Tokenizer.train(fitted, config.vocab)
    tokenizer.save(folder / shards.TOKENIZER)
    writer = shards.ShardWriter(folder, "train", "code", shards.token_bytes(tokenizer), {"stdlib": "PSF-2.0"})
    packer, count = Packer(config.train_length), 0
    for group, text in enumerate(texts * (1 + ROWS * config.train_length // max(1, sum(map(len, texts)) // 4))):
        for row in packer.add(Encoded([*tokenizer.encode(text), END_ID]), "stdlib", group):
            writer.add(row)
            count += 1
        if count >= ROWS:
            break
    writer.close()
    shards.write_index(folder, shards.Index.made_for(config, tokenizer, {"code": 1.0}, writer.shards))


# ---- in processes of their own


def _group(plan: FitPlan, steps: int, world: int, threads: int) -> dict[str, float]:
    """What rank 0 of `world` processes with `threads` threads each measures."""
    with tempfile.TemporaryDirectory() as folder:
        values = {"preset": plan.name, "data": plan.data, "tokens": plan.train.batch_tokens, "steps": steps}
        values |= {"parts": plan.train.accumulate, "world": world, "threads": threads, "meet": f"file://{folder}/meet"}
        code = "from benchmarks.train import main; main()"
        started = [
            subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(values | {"rank": rank})],
                env=environment(OMP_NUM_THREADS=str(threads)),
                stdout=subprocess.PIPE,
            )
            for rank in range(world)
        ]
        try:
            told = [process.communicate(timeout=SECONDS * (steps + 1))[0] for process in started]
        finally:
            for process in started:
                process.kill()
        found: dict[str, float] = json.loads(told[0].splitlines()[-1])
        return found


def main() -> None:
    """One worker, as `_group` asks for it."""
    asked = json.loads(sys.argv[1])
    world, steps = asked["world"], asked["steps"]
    if world > 1:
        limit = timedelta(seconds=SECONDS)
        dist.init_process_group("gloo", init_method=asked["meet"], rank=asked["rank"], world_size=world, timeout=limit)
    torch.set_num_threads(asked["threads"])
    plan = pretrain_plan(
        asked["preset"],
        asked["data"],
        "",
        steps=steps,
        batch_tokens=asked["tokens"],
        accumulate=asked["parts"] // world,
    )
    ranks = Ranks(asked["rank"], world, torch.device("cpu"))
    feed, model, optimizer = prepared(plan, ranks)
    one_update(plan, feed, model, optimizer, ranks, 0)  # warm-up
    ranks.wait()
    clocks: tuple[Callable[[], float], ...] = (time.perf_counter, time.thread_time)
    before = [clock() for clock in clocks]
    data = sum(one_update(plan, feed, model, optimizer, ranks, step) for step in range(1, steps + 1))
    wall, busy = (clock() - start for clock, start in zip(clocks, before, strict=True))
    shares = {"compute": (busy - data) / wall, "data": data / wall, "waiting": (wall - busy) / wall}
    print(json.dumps({"tokens_per_s": steps * plan.train.batch_tokens / wall, **shares}))
    if world > 1:
        dist.destroy_process_group()
