"""`shoal bench neighbours`: how long one key's small requests take alone, and beside each neighbour of `unkind`.

A real service, as its user starts it (`shoal serve`, on Ray Serve with one replica and with `--no-ray`), with two keys. One
client of the first asks for a few tokens again and again; the neighbour, with the second, is a process of its own.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from shoal.api.auth import ENVIRONMENT
from shoal.api.drain import STREAM_SECONDS
from shoal.bench.turns import show
from shoal.bench.unkind import KINDS
from shoal.errors import ResourceError, UsageError
from shoal.model.model import Model
from shoal.on_ray.ending import STOP_SECONDS

SERVICES = {"no-ray": ["--no-ray"], "ray": []}
SMALL, UNKIND = "sk-bench-small", "sk-bench-unkind"
TOKENS = 8  # of a small answer
LONG = 512  # tokens of a neighbour's
PAUSE_SECONDS = 0.02  # between two small requests
START_SECONDS = 120.0
ANSWER_SECONDS = 30.0  # that a small request may take
SETTLE_SECONDS = 3.0  # after a neighbour has gone
WARM_UP = 10  # requests that are not counted
TIMES = {"median": 2.0, "p99": 3.0}  # of what it is alone: wanted


@dataclass
class Seen:
    """The small requests of one part."""

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)

    def median(self) -> float:
        return statistics.median(self.seconds)

    def p99(self) -> float:
        return sorted(self.seconds)[-(-99 * len(self.seconds) // 100) - 1]

    def told(self) -> dict[str, Any]:
        return {
            "requests": len(self.seconds), "median_s": self.median(), "p99_s": self.p99(), "most_s": max(self.seconds),
            "statuses": dict(self.statuses),
        }  # fmt: skip


def neighbours_bench(
    console: Console, *, model: Path | None, preset: str, port: int, seconds: float, services: tuple[str, ...],
    kinds: tuple[str, ...],
) -> None:  # fmt: skip
    """The table, and all as JSON. `seconds`: of each part; `model`: a directory, else random weights of `preset`."""
    for given, known, option in ((services, SERVICES, "--services"), (kinds, KINDS, "--kinds")):
        if not given or set(given) - set(known):
            raise UsageError(option, got=",".join(given), allowed=list(known))
    result: dict[str, Any] = {
        "bench": "neighbours",
        "model": str(model or preset),
        "seconds": seconds,
        "tokens": TOKENS,
    }
    result |= {"load_before": os.getloadavg()[0], "services": {}}
    table = Table("service", "beside", "median", "times alone", "p99", "times alone", "requests", "not 200")
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        directory = model or Path(folder) / "model"
        if model is None:
            Model.from_preset(preset, seed=0).save(directory)
        for name in services:
            with _service(directory, port, SERVICES[name]):
                parts = _measured(port, seconds, kinds)
            result["services"][name] = parts
            for beside, told in parts.items():
                times = [
                    f"{told[f'{what}_times']:.1f} (wanted {most:g})" if f"{what}_times" in told else ""
                    for what, most in TIMES.items()
                ]
                wrong = sum(count for status, count in told["statuses"].items() if status != "200")
                table.add_row(
                    name, beside, f"{1000 * told['median_s']:.0f} ms", times[0], f"{1000 * told['p99_s']:.0f} ms",
                    times[1], str(told["requests"]), str(wrong),
                )  # fmt: skip
    show(console, [table], result)


@contextmanager
def _service(directory: Path, port: int, options: list[str]) -> Iterator[None]:
    command = [sys.executable, "-m", "shoal.cli", "serve", "--model", str(directory), "--name", "bench", "--no-ui"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment[ENVIRONMENT] = f"{SMALL} name=small,{UNKIND} name=unkind"
    with subprocess.Popen(
        [*command, "--port", str(port), *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as service:
        try:
            until = time.monotonic() + START_SECONDS
            while not _ready(port):
                if service.poll() is not None or time.monotonic() > until:
                    raise ResourceError("the service that is measured is not there", got=f"status {service.poll()}")
                time.sleep(0.1)
            yield
        finally:
            service.send_signal(signal.SIGINT)
            try:
                service.wait(STREAM_SECONDS + STOP_SECONDS)
            except subprocess.TimeoutExpired:
                service.kill()


def _ready(port: int) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}/ready", timeout=10).status_code == 200
    return False


def _measured(port: int, seconds: float, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What was seen alone, before the neighbours and after them, and beside each."""
    headers = {"Authorization": f"Bearer {SMALL}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=ANSWER_SECONDS) as http:
        alone, found, number = Seen(), dict[str, Seen](), iter(range(10**9))
        for _ in range(WARM_UP):
            _ask(http, next(number), Seen())
        _for(seconds, http, number, alone)
        for kind in kinds:
            found[kind] = Seen()
            command = [sys.executable, "-m", "shoal.bench.unkind", kind, str(port), UNKIND, str(LONG), "3600"]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as neighbour:
                try:
                    assert neighbour.stdout is not None
                    if neighbour.stdout.readline().strip() != b"begun":
                        raise ResourceError("the neighbour did not begin", got=kind)
                    _for(seconds, http, number, found[kind])
                finally:
                    neighbour.kill()
            time.sleep(SETTLE_SECONDS)
        _for(seconds, http, number, alone)
    parts = {"alone": alone.told()}
    for kind, seen in found.items():
        times = {"median_times": seen.median() / alone.median(), "p99_times": seen.p99() / alone.p99()}
        parts[kind] = {**seen.told(), **times}
    return parts


def _for(seconds: float, http: httpx.Client, number: Iterator[int], seen: Seen) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        _ask(http, next(number), seen)
        time.sleep(PAUSE_SECONDS)


def _ask(http: httpx.Client, number: int, seen: Seen) -> None:
    """One small request. That there was no answer in time counts as a status, with the time that was waited."""
    prompt = [30 + (number // 200**place) % 200 for place in range(3)] * 8
    body = {"model": "bench", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, "depth": "full"}
    began = time.perf_counter()
    try:
        status = str(http.post("/v1/completions", json=body).status_code)
    except httpx.HTTPError as error:
        status = type(error).__name__
    seen.seconds.append(time.perf_counter() - began)
    seen.statuses[status] += 1
