"""Mixed traffic on a service of its own for minutes, and whether memory and descriptors of its processes stay as they are.

    python -m tests.soak --minutes 10              # on Ray, two engine replicas and the pages; --no-ray: one process

Chats, completions, several choices, embeddings, guided answers, calls of tools, long prompts, and clients that leave, of two
keys. First the service is asked as fast as it answers, for a while; then at `LOAD` of that rate, at random times. The last line
is JSON. It ends with 1 when anything but 200 was answered, something is left in the engines, or a process grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from shoal import Model
from shoal.api.auth import ENVIRONMENT
from tests.on_ray.test_serve import free_port

LOAD = 0.8  # of the rate that is reached at first
CLIENTS = 12  # at once, while that is found out
FIND_SECONDS = 15.0
MOST = 96  # requests at once; what would be more is left out, and counted
LOOK_SECONDS = 2.0
REST_SECONDS = 5.0  # without a request, before descriptors are counted: connections are descriptors, too
START_SECONDS, END_SECONDS = 300.0, 120.0
ANSWER_SECONDS = 120.0
GROWTH_MIB, GROWTH_SHARE = 8.0, 0.05  # that a process may have grown, whichever is more, after the first third
DESCRIPTORS = 12
KEYS = ("sk-one", "sk-two")

SCHEMA = {
    "type": "object", "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"], "additionalProperties": False,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


@dataclass
class Soak:
    url: str
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)  # by kind
    wrong: Counter[str] = field(default_factory=Counter)  # kind and status of what was not answered with 200
    left_out: int = 0

    def asked(self) -> tuple[str, str, dict[str, Any]]:
        """Kind, path and body of the next request."""
        rng, number = self.rng, self.rng.randrange(10**6)
        kind = rng.choice(["chat", "chat", "text", "text", "choices", "vectors", "guided", "tools", "long", "leaves"])
        messages = [{"role": "user", "content": f"{number}: how deep is the sea?"}]
        base: dict[str, Any] = {"model": "soak", "max_tokens": rng.randint(1, 48), "stream": rng.random() < 0.5}
        chat, text = "/v1/chat/completions", "/v1/completions"
        bodies: dict[str, tuple[str, dict[str, Any]]] = {
            "chat": (chat, {**base, "messages": messages}),
            "text": (text, {**base, "prompt": f"{number}: abc", "logprobs": rng.choice([None, 2])}),
            "choices": (text, {**base, "prompt": f"{number % 50}: abc", "n": rng.randint(2, 6)}),
            "vectors": (
                "/v1/embeddings",
                {"model": "soak", "input": [f"{number} {i}" for i in range(rng.randint(1, 8))]},
            ),
            "guided": (
                chat,
                {**base, "messages": messages, "max_tokens": 64, "structured_outputs": {"json": SCHEMA}},
            ),
            "tools": (
                chat,
                {**base, "messages": messages, "max_tokens": 64, "tools": [TOOL], "tool_choice": "required"},
            ),
            "long": (text, {**base, "prompt": f"{number}: " + "abcdefgh " * rng.randint(15, 30)}),
            "leaves": (text, {**base, "prompt": f"{number}: abc", "max_tokens": 200, "stream": True}),
        }
        return kind, *bodies[kind]

    async def one(self, http: httpx.AsyncClient) -> None:
        """A request, to its end, or until its client leaves."""
        kind, path, body = self.asked()
        headers = {"Authorization": f"Bearer {self.rng.choice(KEYS)}"}
        leaves = self.rng.uniform(0.005, 0.3) if kind == "leaves" else ANSWER_SECONDS
        self.counts[kind] += 1
        try:
            async with asyncio.timeout(leaves), http.stream("POST", path, json=body, headers=headers) as reply:
                last = b""
                async for part in reply.aiter_bytes():
                    last = last[-4096:] + part
            if reply.status_code != 200 or (body.get("stream") and b"[DONE]" not in last):
                self.wrong[f"{kind} {reply.status_code} {last[-200:]!r}"] += 1
        except TimeoutError:
            if kind != "leaves":
                self.wrong[f"{kind} no answer"] += 1
        except httpx.HTTPError as error:
            self.wrong[f"{kind} {type(error).__name__}"] += 1

    async def as_fast_as_it_answers(self, http: httpx.AsyncClient, seconds: float) -> float:
        """Requests a second."""
        until, before = time.monotonic() + seconds, self.counts.total()

        async def client() -> None:
            while time.monotonic() < until:
                await self.one(http)

        began = time.monotonic()
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
        return (self.counts.total() - before) / (time.monotonic() - began)

    async def at(self, http: httpx.AsyncClient, rate: float, seconds: float) -> None:
        """So many requests a second, at random times."""
        until, running = time.monotonic() + seconds, set[asyncio.Task[None]]()
        due = time.monotonic()
        while (due := due + self.rng.expovariate(rate)) < until:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if len(running) >= MOST:
                self.left_out += 1
                continue
            task = asyncio.create_task(self.one(http))
            running.add(task)
            task.add_done_callback(running.discard)
        await asyncio.gather(*running)


@dataclass
class Watch:
    """What the processes of a service hold, over time."""

    root: psutil.Process
    held: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))  # seconds, MiB
    began: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.at_first, self.at_last = self._descriptors(), dict[str, int]()

    def end(self) -> None:
        self.at_last = self._descriptors()

    async def look(self) -> None:
        """Again and again."""
        while True:
            await asyncio.to_thread(self._look)
            await asyncio.sleep(LOOK_SECONDS)

    def _look(self) -> None:
        now = time.monotonic() - self.began
        for name, process in self._processes():
            with suppress(psutil.Error):
                self.held[name].append((now, process.memory_info().rss / 2**20))

    def _descriptors(self) -> dict[str, int]:
        found = {}
        for name, process in self._processes():
            with suppress(psutil.Error):
                found[name] = process.num_fds()
        return found

    def _processes(self) -> Iterator[tuple[str, psutil.Process]]:
        """Each with a name of its own, of what Ray calls it where it does."""
        for process in [self.root, *self.root.children(recursive=True)]:
            with suppress(psutil.Error):
                title = " ".join(process.cmdline())
                name = title if title.startswith("ray::") else Path(title.split(" ")[0]).name
                # what it does now stands behind
                yield f"{re.split('[.#]', name)[0].strip()[:60]} {process.pid}", process

    def told(self) -> dict[str, dict[str, float]]:
        """Of each process that was there to the end: MiB after a third of the time, and by how much more it was in the last
        sixth; descriptors before all, and how many more there were after it."""
        end, found = max((seen[-1][0] for seen in self.held.values()), default=0.0), {}
        for name, seen in self.held.items():
            early = [mib for at, mib in seen if end / 3 <= at < end / 2]
            late = [mib for at, mib in seen if at >= end * 5 / 6]
            if early and late:
                mib, fds = statistics.median(early), self.at_first.get(name, 0)
                found[name] = {
                    "mib": round(mib, 1), "grew_mib": round(statistics.median(late) - mib, 1), "fds": fds,
                    "grew_fds": self.at_last.get(name, fds) - fds,
                }  # fmt: skip
        return found

    def grew(self) -> list[str]:
        """Names of those that did, by more than is allowed."""
        return [
            name
            for name, row in self.told().items()
            if row["grew_mib"] > max(GROWTH_MIB, GROWTH_SHARE * row["mib"]) or row["grew_fds"] > DESCRIPTORS
        ]


async def soak(url: str, process: psutil.Process, minutes: float, seed: int) -> dict[str, Any]:
    """The traffic, and what was seen."""
    found, limits = Soak(url, random.Random(seed)), httpx.Limits(max_connections=None, max_keepalive_connections=32)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits) as http:
        rate = LOAD * await found.as_fast_as_it_answers(http, min(FIND_SECONDS, 15 * minutes))
    await asyncio.sleep(REST_SECONDS)
    watch = Watch(process)
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_SECONDS, limits=limits) as http:
        looking = asyncio.create_task(watch.look())
        await found.at(http, rate, 60 * minutes)
        looking.cancel()
        left = await _left(http)
    await asyncio.sleep(REST_SECONDS)
    watch.end()
    return {
        "soak": minutes, "seed": seed, "rate": round(rate, 2), "load": os.getloadavg()[0], "requests": dict(found.counts),
        "left_out": found.left_out, "wrong": dict(found.wrong), "left_in_engines": left, "processes": watch.told(),
        "grew": watch.grew(),
    }  # fmt: skip


async def _left(http: httpx.AsyncClient) -> dict[str, float]:
    """What the engines still hold half a minute after the last request; empty: nothing."""
    left: dict[str, float] = {}
    for _ in range(30):
        lines = (await http.get("/metrics")).text.splitlines()
        pairs = [line.removeprefix("shoal:").rpartition(" ") for line in lines if line.startswith("shoal:")]
        stats: dict[str, float] = {}
        for name, _, value in pairs:
            bare = name.partition("{")[0]  # of all replicas
            stats[bare] = stats.get(bare, 0.0) + float(value)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        left = {name: stats.get(name, -1.0) for name in names if stats.get(name, -1.0) != 0}
        if not left:
            return {}
        await asyncio.sleep(1)
    return left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--no-ray", dest="ray", action="store_false")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Model.from_preset("tiny", seed=0).save(Path(folder) / "model")
        port = free_port()
        command = [sys.executable, "-m", "shoal.cli", "serve", "--model", str(Path(folder) / "model"), "--name", "soak"]
        command += ["--port", str(port), *(["--replicas", str(given.replicas)] if given.ray else ["--no-ray"])]
        environment = {**os.environ, ENVIRONMENT: ",".join(KEYS)}
        environment.pop("RAY_ADDRESS", None)
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
        ) as service:
            try:
                url = f"http://127.0.0.1:{port}"
                _wait(url, service)
                result = asyncio.run(soak(url, psutil.Process(service.pid), given.minutes, given.seed))
            finally:
                service.send_signal(signal.SIGINT)
                try:
                    service.wait(END_SECONDS)
                except subprocess.TimeoutExpired:
                    service.kill()
    print(json.dumps(result))
    return int(bool(result["wrong"] or result["left_in_engines"] or result["grew"]))


def _wait(url: str, service: subprocess.Popen[bytes]) -> None:
    """Until it is ready."""
    until = time.monotonic() + START_SECONDS
    while True:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", timeout=10).status_code == 200:
                return
        if service.poll() is not None or time.monotonic() > until:
            raise SystemExit(f"the service did not start: {service.poll()}")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
