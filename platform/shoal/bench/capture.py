"""`shoal bench capture`: what it costs a service to capture its requests, signals of the engine included.

Two apps over one engine in this process, one that captures and one that does not, asked in turns by the same clients, which are
a process of their own (`bench.asking`). Beside tokens a second stand the service's own seconds of processor time, which a busy
machine disturbs less; with what the scribe took since the last turn that was captured, begun or ended in it or not.

Notable: answers have half to one and a half times the tokens that are asked for, the same in each turn. Of equal ones all
clients' end in one step, and the engine is idle while their rows are made, one after the other: no service is asked like that.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shoal.api.app import build_app
from shoal.api.capture import CaptureArgs
from shoal.api.served import ServedModel
from shoal.api.server import serving
from shoal.api.service import Hosted
from shoal.bench.asking import CLIENTS, REQUESTS, length
from shoal.bench.turns import show
from shoal.engine.engine import Engine
from shoal.engine.front import AsyncEngine
from shoal.errors import GenerationError
from shoal.loop.capture import Capture
from shoal.loop.outbox import Outbox
from shoal.machine import threads
from shoal.model.model import Model

OFF, ON = "off", "on"


def capture_bench(console: Console, *, model: Path, tokens: int, rounds: int) -> None:
    """Prints a table, and the result as JSON in the last line."""
    torch.set_num_threads(threads())
    served = ServedModel.load(model)
    with tempfile.TemporaryDirectory() as kept:
        found = asyncio.run(_measured(model, served, Path(kept) / "capture", tokens, rounds))
    table = Table(
        "capture",
        "tokens/s",
        "ms of processor time a token",
        title=f"{CLIENTS} clients, {tokens} tokens an answer in the mean",
    )
    for name in (OFF, ON):
        table.add_row(name, f"{found['tokens_per_second'][name]:.0f}", f"{found['cpu_ms_per_token'][name]:.4f}")
    result = {**found, "model": served.name, "tokens": tokens, "rounds": rounds}
    show(console, [table], result)


async def _measured(model: Path, served: ServedModel, kept: Path, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians of both, and the median over pairs of turns of captured over not."""
    engine = AsyncEngine(Engine(Model.load(model), max_batch=CLIENTS))
    turns: dict[str, list[tuple[float, float]]] = {OFF: [], ON: []}
    apps = {OFF: _app(engine, served, None), ON: _app(engine, served, kept)}
    scribe = _Scribe(apps[ON].state.recorder.outbox)
    try:
        async with serving(apps[OFF]) as off, serving(apps[ON]) as on, _clients(served.name, tokens) as asked:
            urls = {OFF: off.url, ON: on.url}
            for each in (OFF, ON):  # what is made once
                await _turn(asked, urls[each], tokens, scribe if each == ON else None)
            for number in range(rounds):
                for each in (OFF, ON) if number % 2 else (ON, OFF):
                    turns[each].append(await _turn(asked, urls[each], tokens, scribe if each == ON else None))
    finally:
        await engine.close()
    rows = Capture(kept).rows().num_rows
    speed, cpu = (
        _ratio([one for one, _ in turns[ON]], [one for one, _ in turns[OFF]]),
        _ratio([one for _, one in turns[ON]], [one for _, one in turns[OFF]]),
    )
    return {
        "tokens_per_second": {name: statistics.median(one for one, _ in some) for name, some in turns.items()},
        "cpu_ms_per_token": {name: 1000 * statistics.median(one for _, one in some) for name, some in turns.items()},
        "throughput_ratio": speed,
        "cpu_ratio": cpu,
        "scribe_ms_per_row": 1000 * scribe.all / max(1, rows),
        "rows": rows,
        "lost": (rounds + 1) * CLIENTS * REQUESTS - rows,
    }


class _Scribe:
    """The processor time of an outbox's scribe."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox, self._told, self.all = outbox, 0.0, 0.0

    async def seconds(self) -> float:
        """Since they were last asked for, all rows that were handed over being in a journal; at first none, of its start."""
        while self._outbox.lag:
            await asyncio.sleep(0.01)
        now = time.clock_gettime((~self._outbox.scribe << 3) | 2)  # Linux's clock of another process
        spent, self._told = now - self._told if self._told else 0.0, now
        self.all += spent
        return spent


def _app(engine: AsyncEngine, served: ServedModel, kept: Path | None) -> Any:
    return build_app([Hosted(served, engine)], capture=None if kept is None else CaptureArgs(str(kept)))


@asynccontextmanager
async def _clients(name: str, tokens: int) -> AsyncIterator[Callable[[str], Awaitable[float]]]:
    """What takes a turn at a URL, and gives the seconds that it took."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "shoal.bench.asking", name, str(tokens),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    write, read = process.stdin, process.stdout

    async def asked(url: str) -> float:
        write.write(f"{url}\n".encode())
        line = await read.readline()
        if not line:
            raise GenerationError("the clients ended in the middle of a turn; their last words are above")
        return float(line)

    try:
        yield asked
    finally:
        write.close()  # they read on until there is no more
        await process.wait()


async def _turn(
    asked: Callable[[str], Awaitable[float]], url: str, tokens: int, scribe: _Scribe | None
) -> tuple[float, float]:
    """Tokens a second, and seconds of processor time a token: this process's, and the scribe's where the turn is captured."""
    worked = time.process_time()
    seconds = await asked(url)
    worked = time.process_time() - worked + (await scribe.seconds() if scribe is not None else 0.0)
    made = sum(length(place, tokens) for place in range(CLIENTS * REQUESTS))
    return made / seconds, worked / made


def _ratio(on: Sequence[float], off: Sequence[float]) -> dict[str, float]:
    """Of pairs of turns: the median, and the quartiles."""
    low, middle, high = statistics.quantiles([one / other for one, other in zip(on, off, strict=True)], n=4)
    return {"median": middle, "low": low, "high": high}
