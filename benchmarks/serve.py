"""`shoal bench serve`: what HTTP, Ray Serve and the gateway add to an engine, on random weights.

Parts: `start` (of `shoal serve` as its user types it, to the first answer), `latency` (time to the first token at one client,
beside the engine's own for the same request), `throughput` (streams at 16 clients beside an engine in this process, in turns),
`overload` (ten times as many clients as the service takes), `scale` (one replica to three and back; drawn in the page).
"""

from __future__ import annotations

import asyncio
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.turns import in_turns, show
from shoal import page
from shoal.api.drain import STREAM_SECONDS
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import ResourceError, UsageError
from shoal.evaluate.answering import machine
from shoal.machine import threads
from shoal.model.model import Model
from shoal.on_ray import serve
from shoal.on_ray.ending import STOP_SECONDS
from shoal.on_ray.engines import engine_options
from shoal.on_ray.resources import local_ray
from shoal.on_ray.serve_config import check_serve_config, serve_config

PARTS = ("start", "latency", "throughput", "overload", "scale")
PROMPT = 32  # tokens
CLIENTS = 16
REQUESTS = 3  # of each client in `throughput`, one after the other
SINGLE = 10  # requests of each round in `latency`
TIMES_OVER = 10
DOWN_SECONDS = 10.0  # before a replica is taken away, in `scale`
SAMPLE_SECONDS = 0.5
LIMIT_SECONDS = 120.0  # of one part's waiting


@dataclass(frozen=True)
class Bench:
    directory: Path  # of the model
    port: int
    tokens: int  # of an answer
    rounds: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def body(self, number: int, tokens: int | None = None) -> dict[str, Any]:
        """A streamed request that no other shares its beginning with."""
        return {
            "model": "bench", "prompt": _prompt(number), "max_tokens": tokens or self.tokens, "temperature": 0,
            "ignore_eos": True, "depth": "full", "stream": True, "stream_options": {"include_usage": True},
        }  # fmt: skip

    def stats(self) -> dict[str, float]:
        """The engines' own samples without labels, as /metrics shows them, added up."""
        lines = httpx.get(f"{self.url}/metrics", timeout=30).text.splitlines()
        samples = [line.rpartition(" ") for line in lines if line.startswith("shoal:") and "le=" not in line]
        found = defaultdict[str, float](float)
        for name, _, value in samples:
            found[name.removeprefix("shoal:").partition("{")[0]] += float(value)
        return dict(found)


@dataclass(frozen=True)
class Reply:
    status: int
    first: float  # seconds to the first token; to the status where it is not 200
    total: float
    tokens: int


def serve_bench(
    console: Console, *, model: Path | None, preset: str, port: int, tokens: int, rounds: int, parts: tuple[str, ...],
    out: Path,
) -> None:  # fmt: skip
    """The tables of `parts`, the page at `out`, and all as JSON. `model`: a directory, else random weights of `preset`."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown or not parts:
        raise UsageError("--parts", got=",".join(unknown), allowed=list(PARTS))
    result: dict[str, Any] = {"bench": "serve", "model": str(model or preset), "tokens": tokens, "rounds": rounds}
    torch.set_num_threads(threads())  # as a replica does
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        directory = model or Path(folder) / "model"
        if model is None:
            Model.from_preset(preset, seed=0).save(directory)
        bench = Bench(directory, port, tokens, rounds)
        if "start" in parts:
            result["start"] = _start(bench)
        with local_ray():
            if measured := [part for part in MEASURES if part in parts]:
                with _service(bench, ServeArgs(max_batch=CLIENTS, max_queue=CLIENTS)):
                    asyncio.run(_load(bench, [bench.body(0, 1)]))
                    for part in measured:
                        result[part] = MEASURES[part](bench)
            if "scale" in parts:
                result["scale"] = _scale(bench)
    facts = _facts(result)
    table = Table("what", "measured", "wanted", title=f"service of {model or preset}, answers of {tokens} tokens")
    for value, what, wanted in facts:
        table.add_row(what, value, wanted)
    charts = _charts(result.get("scale"))
    shown = [(value, f"{what} (wanted: {wanted})" if wanted else what) for value, what, wanted in facts]
    values = {"title": "shoal bench serve", "machine": machine(), **result}
    page.write(Path(__file__).with_suffix(".html"), out, r=values, facts=shown, charts=charts)
    console.print(f"page: {out}", highlight=False)
    show(console, [table], result)


def _prompt(number: int) -> list[int]:
    return [20 + (number // 200**place) % 200 if place < 3 else 20 + place for place in range(PROMPT)]


@contextmanager
def _service(bench: Bench, args: ServeArgs, **deployment: Any) -> Iterator[None]:
    values = serve_config(args, port=bench.port).model_dump(mode="json", exclude_unset=True)
    values["applications"][0]["args"] |= {"model": str(bench.directory), "name": "bench"}
    if deployment:
        values["applications"][0]["deployments"] = [{"name": ENGINE, **deployment}]
    serve.run(check_serve_config(values, "bench"), blocking=False)
    try:
        yield
    finally:
        serve.stop()


async def _ask(client: httpx.AsyncClient, bench: Bench, body: dict[str, Any]) -> Reply:
    began = time.perf_counter()
    first, last = 0.0, ""
    async with client.stream("POST", f"{bench.url}/v1/completions", json=body) as reply:
        if reply.status_code != 200:
            await reply.aread()
            now = time.perf_counter() - began
            return Reply(reply.status_code, now, now, 0)
        async for line in reply.aiter_lines():
            if line and not first:
                first = time.perf_counter() - began
            if '"usage":{' in line:
                last = line
    usage = json.loads(last.removeprefix("data: "))["usage"]
    return Reply(200, first, time.perf_counter() - began, usage["completion_tokens"])


async def _load(bench: Bench, bodies: Sequence[dict[str, Any]]) -> list[Reply]:
    """The replies to `bodies`, all sent at once."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=LIMIT_SECONDS, limits=limits) as client:
        return await asyncio.gather(*(_ask(client, bench, body) for body in bodies))


def _start(bench: Bench) -> dict[str, Any]:
    """From the command in the shell to the answer of one token, pages included."""
    model = ["--model", str(bench.directory), "--name", "bench", "--port", str(bench.port)]
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, "-m", "shoal.cli", "serve", *model], stdout=subprocess.PIPE) as service:
        try:
            body = {**bench.body(0, 1), "stream": False, "stream_options": None}
            while service.poll() is None:
                with suppress(httpx.TransportError):  # nothing listens yet
                    if httpx.post(f"{bench.url}/v1/completions", json=body, timeout=LIMIT_SECONDS).status_code == 200:
                        return {"seconds": time.perf_counter() - began}
                time.sleep(0.05)
            raise ResourceError("the service that is measured ended", got=f"status {service.returncode}")
        finally:
            service.send_signal(signal.SIGINT)
            service.wait(STREAM_SECONDS + STOP_SECONDS)


def _latency(bench: Bench) -> dict[str, Any]:
    """Medians over single requests on one connection, as clients keep it; the engine's own time of a request is what its
    histogram's sum grew by."""

    async def pairs_of() -> list[tuple[float, float]]:
        found = []
        async with httpx.AsyncClient(timeout=LIMIT_SECONDS) as client:
            before = await _counted(bench, 0)
            for number in range(SINGLE * bench.rounds + 1):
                reply = await _ask(client, bench, bench.body(number + 1, 4))
                after = await _counted(bench, before[0] + 1)
                found.append((reply.first, after[1] - before[1]))
                before = after
        return found

    pairs = asyncio.run(pairs_of())
    http, engine = ([1000 * pair[i] for pair in pairs[1:]] for i in (0, 1))
    added = [a - b for a, b in zip(http, engine, strict=True)]
    return {
        "requests": len(added), "http_ms": statistics.median(http), "engine_ms": statistics.median(engine),
        "added_ms": statistics.median(added), "added_p90_ms": statistics.quantiles(added, n=10)[-1],
    }  # fmt: skip


async def _counted(bench: Bench, least: float) -> tuple[float, float]:
    """How many first tokens the engines have told of, and their seconds together. /metrics says what engines said up to a
    second ago, so it is read until they are `least`. Raises ResourceError where they are more, which others asked for, or
    stay fewer."""
    name, limit = "time_to_first_token_seconds", time.monotonic() + LIMIT_SECONDS
    while True:
        stats = await asyncio.to_thread(bench.stats)
        count = stats[f"{name}_count"]
        if (least and count > least) or time.monotonic() > limit:
            raise ResourceError(
                "the first tokens of the service", got=count, allowed=least, do="let nobody else ask it"
            )
        if count >= least:
            return count, stats[f"{name}_sum"]
        await asyncio.sleep(SAMPLE_SECONDS / 10)


def _throughput(bench: Bench) -> dict[str, Any]:
    """Tokens a second over HTTP and in an engine of this process, in turns: the same requests, `CLIENTS` of them at a time."""
    engine = Engine(Model.load(bench.directory), max_batch=CLIENTS)
    sampling = Sampling(temperature=0, max_tokens=bench.tokens, ignore_eos=True)
    count = REQUESTS * CLIENTS
    counter = iter(range(100_000, 1_000_000, count))

    async def ask_all(start: int) -> int:
        """Each client sends its requests one after the other, on its connection; the tokens of all."""
        async with httpx.AsyncClient(timeout=LIMIT_SECONDS, limits=httpx.Limits(max_connections=None)) as client:

            async def one(first: int) -> int:
                numbers = range(first, start + count, CLIENTS)
                return sum([(await _ask(client, bench, bench.body(number))).tokens for number in numbers])

            return sum(await asyncio.gather(*(one(start + i) for i in range(CLIENTS))))

    def http() -> float:
        began = time.perf_counter()
        return asyncio.run(ask_all(next(counter))) / (time.perf_counter() - began)

    def alone() -> float:
        start = next(counter)
        requests = [Request(_prompt(start + i), sampling, depth="full") for i in range(count)]
        began = time.perf_counter()
        done = engine.generate(requests)
        return sum(len(answer.tokens) for answer in done) / (time.perf_counter() - began)

    speeds = in_turns({"http": http, "engine": alone}, bench.rounds)
    return {
        "clients": CLIENTS, "http_tokens_per_s": speeds["http"], "engine_tokens_per_s": speeds["engine"],
        "ratio": speeds["http"] / speeds["engine"],
    }  # fmt: skip


def _overload(bench: Bench) -> dict[str, Any]:
    """As many clients as the service takes at once, and ten times as many, each with one short request."""
    capacity = 3 * CLIENTS  # two batches in the replica, and the queue
    found: dict[str, Any] = {"capacity": capacity}
    for times in (1, TIMES_OVER):
        bodies = [bench.body(2_000_000 + times * 10_000 + i, 16) for i in range(times * capacity)]
        replies = asyncio.run(_load(bench, bodies))
        good, refused = ([r.total for r in replies if (r.status == 200) == ok] for ok in (True, False))
        found[f"{times}x"] = {
            "clients": len(replies),
            "statuses": {str(status): count for status, count in sorted(Counter(r.status for r in replies).items())},
            "p50_s": statistics.median(good),
            "p99_s": statistics.quantiles(good, n=100)[-1],
            "refused_p99_s": statistics.quantiles(refused, n=100)[-1] if len(refused) > 1 else None,
        }
    return found


def _scale(bench: Bench) -> dict[str, Any]:
    """Replicas and requests over time: clients for three replicas until there are three, then none until one is left."""
    args = ServeArgs(model=str(bench.directory), max_batch=4, max_queue=64, max_replicas=3, cpus=0.5)
    scaling = engine_options(args, str(bench.directory), 1)["autoscaling_config"].model_dump(mode="json")
    scaling = {**scaling, "downscale_delay_s": DOWN_SECONDS}
    clients = 3 * int(scaling["target_ongoing_requests"])
    points: list[tuple[float, float, float]] = []  # seconds, replicas, requests there

    async def work() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=LIMIT_SECONDS, limits=limits) as client:
            began, running = time.monotonic(), True

            async def one(number: int) -> None:
                while running:
                    await _ask(client, bench, bench.body(3_000_000 + number))
                    number += clients

            async def until(enough: Callable[[float], bool]) -> float:
                limit = time.monotonic() - began + LIMIT_SECONDS
                while (now := time.monotonic() - began) < limit:
                    stats = await asyncio.to_thread(bench.stats)
                    there = stats["num_requests_running"] + stats["num_requests_waiting"]
                    points.append((now, stats["num_replicas"], there))
                    if enough(stats["num_replicas"]):
                        break
                    await asyncio.sleep(SAMPLE_SECONDS)
                return time.monotonic() - began

            await until(lambda replicas: replicas == 1)
            loads = [asyncio.create_task(one(number)) for number in range(clients)]
            marks["load_s"] = time.monotonic() - began
            marks["up_s"] = await until(lambda replicas: replicas == 3)
            running = False
            await asyncio.gather(*loads)
            marks["idle_s"] = time.monotonic() - began
            marks["down_s"] = await until(lambda replicas: replicas == 1)

    marks: dict[str, float] = {}
    with _service(bench, args, autoscaling_config=scaling):
        asyncio.run(work())
    return {"clients": clients, "downscale_delay_s": DOWN_SECONDS, **marks, "points": points}


MEASURES: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "latency": _latency,
    "throughput": _throughput,
    "overload": _overload,
}


def _facts(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(value, what, wanted) of all that was measured."""
    facts = []
    if start := result.get("start"):
        facts.append((f"{start['seconds']:.1f} s", "from `shoal serve` in the shell to the first answer", "25 s"))
    if latency := result.get("latency"):
        what = f"to the first token beside the engine's {latency['engine_ms']:.1f} ms, one client"
        facts.append((f"+{latency['added_ms']:.1f} ms", what, "15 ms"))
    if speed := result.get("throughput"):
        what = f"of an engine's {speed['engine_tokens_per_s']:,.0f} tokens/s over HTTP, {speed['clients']} clients"
        facts.append((f"{speed['ratio']:.2f}", what, "0.85"))
    if overload := result.get("overload"):
        for times in ("1x", f"{TIMES_OVER}x"):
            row = overload[times]
            statuses = ", ".join(f"{count} of {status}" for status, count in row["statuses"].items())
            facts.append((f"{row['p99_s']:.2f} s", f"p99 of the answers to {row['clients']} clients: {statuses}", ""))
    if scale := result.get("scale"):
        up, down = scale["up_s"] - scale["load_s"], scale["down_s"] - scale["idle_s"]
        facts.append((f"{up:.0f} s", f"from one replica to three under {scale['clients']} clients", ""))
        facts.append((f"{down:.0f} s", "back to one when they are gone", ""))
    return facts


def _charts(scale: dict[str, Any] | None) -> list[page.Chart]:
    if scale is None:
        return []
    draw = partial(page.chart, x_label="seconds")
    replicas = [(at, count) for at, count, _ in scale["points"]]
    requests = [(at, there) for at, _, there in scale["points"]]
    return [
        draw("replicas", curves={"replicas": ("line", replicas)}),
        draw("requests in the replicas", curves={"requests": ("line", requests)}),
    ]
