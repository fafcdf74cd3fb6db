"""`shoal bench gateways`: what one gateway carries, and what two do, before a replica that costs nothing.

The replica has a token whenever it is asked for one, so that what limits the streams is what passes them on: the proxy, the
gateways, and on few cores the clients, which are a process of their own. Beside streams and tokens a second it says what each
kind of process took of the cores for 1,000 tokens: where these are too few for two gateways and a proxy, what a gateway would
carry follows from that. With `limited` the same once more for a key whose limits are counted for all gateways together.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from ray import serve as ray_serve
from ray.serve._private.common import ReplicaState
from rich.console import Console
from rich.table import Table

from shoal import config
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.bench.turns import show
from shoal.engine.events import Event, Finished, Request, Token
from shoal.engine.metrics import Samples
from shoal.errors import ResourceError, UsageError
from shoal.model.model import Model
from shoal.on_ray import keys, serve
from shoal.on_ray.calls import Begun, Wanted, reads
from shoal.on_ray.engines import HELD, LOGGING
from shoal.on_ray.gateways import gateway_options
from shoal.on_ray.resources import local_ray
from shoal.on_ray.routing import router_config
from shoal.on_ray.serve_config import GATEWAY, check_serve_config, serve_config

KEY = "sk-bench"
WORD = 65  # the token of all answers
WAIT_SECONDS = 120.0  # for all gateways to be there
WARM_SECONDS = 2.0
KINDS = {"gateway": f":{GATEWAY}", "proxy": "ProxyActor", "replica": f":{ENGINE}", "count": "ray::Count"}


class Costless:
    """In the place of an engine: a token whenever it is asked for one, in a list of its own."""

    def __init__(self, args: ServeArgs, model: str) -> None:
        self._reads = reads(args.served(model), model)

    async def generate(self, request: Request, wanted: Wanted) -> AsyncGenerator[list[Event | Begun], None]:
        """As `EngineReplica.generate`."""
        most = request.sampling.max_tokens or 1
        yield [Begun("costless", "none"), Token(request.id, WORD, "a", depth=1)]
        for _ in range(most - 1):
            await asyncio.sleep(0)  # others, and the end of a client that left
            yield [Token(request.id, WORD, "a", depth=1)]
        yield [Finished(request.id, "length", depth=1, prompt_tokens=4, completion_tokens=most)]

    async def reads(self) -> str:
        return self._reads

    async def check_reads(self, reads: str) -> None:
        """It reads all."""

    async def stats(self) -> Samples:
        return {}

    async def info(self) -> dict[str, str]:
        return {"quantization": "none", "weights": "none"}


def app(args: dict[str, Any]) -> ray_serve.Application:
    """The service of `on_ray.serve.app`, with `Costless` in the place of its engines."""
    given = config.load(ServeArgs, args, "args")
    directory = str(given.model)
    page = given.served(directory).config.page
    options: dict[str, Any] = {
        "max_ongoing_requests": HELD,
        "num_replicas": given.max_replicas,
        "request_router_config": router_config(page, HELD, may_be_none=False),
        "logging_config": LOGGING,
        "ray_actor_options": {"num_cpus": 0},
    }
    engine = ray_serve.deployment(name=ENGINE, **options)(Costless).bind(given, directory)
    ingress = ray_serve.ingress()(serve.Gateway)
    return ray_serve.deployment(name=GATEWAY, **gateway_options(given))(ingress).bind({ENGINE: engine}, given)


def gateways_bench(
    console: Console, *, numbers: Sequence[int], clients: int, tokens: int, seconds: float, rounds: int, port: int,
    limited: bool,
) -> None:  # fmt: skip
    """The table, and all as JSON. `numbers`: of gateways, each measured `rounds` times in turns."""
    if not numbers or min(*numbers, clients, tokens, rounds, 1) < 1:
        raise UsageError("bench gateways", allowed="numbers of gateways, clients, tokens and rounds of 1 or more")
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder:
        Model.from_preset("test", seed=0).save(Path(folder) / "model")
        file = Path(folder) / "keys"
        file.write_text(f"{KEY} requests=100000000 tokens=1000000000 at_once=100000\n", encoding="utf-8")
        with local_ray():
            for _ in range(rounds):
                for number in numbers:
                    args = ServeArgs(model=str(Path(folder) / "model"), min_gateways=number, max_gateways=number)
                    for name, held in ((str(number), None), (f"{number}, limited", str(file)))[: 1 + limited]:
                        with _service(args, held, port):
                            _measure(port, clients, tokens, WARM_SECONDS, held)
                            found.setdefault(name, []).append(_measure(port, clients, tokens, seconds, held))
    rows = {name: _median(each) for name, each in found.items()}
    table = Table("gateways", "streams/s", "tokens/s", *KINDS, "clients")
    for name, row in rows.items():
        cpu = (f"{row['cpu'].get(kind, 0.0):.3f}" for kind in (*KINDS, "clients"))
        table.add_row(name, f"{row['streams_per_s']:.1f}", f"{row['tokens_per_s']:,.0f}", *cpu)
    table.title = f"{clients} clients, answers of {tokens} tokens; CPU seconds of each for 1,000 tokens"
    given = {"clients": clients, "tokens": tokens, "seconds": seconds, "rounds": rounds}
    show(console, [table], {"bench": "gateways", **given, "gateways": rows})


@contextmanager
def _service(args: ServeArgs, key_file: str | None, port: int) -> Iterator[None]:
    values = serve_config(args, port=port).model_dump(mode="json", exclude_unset=True)
    given = values["applications"][0]
    given["import_path"] = "shoal.bench.gateways:app"
    given["args"] |= {"name": "bench", "metrics": False} | ({"api_keys": keys.referred(key_file)} if key_file else {})
    serve.run(check_serve_config(values, "bench"), blocking=False)
    try:
        _wait_for(args.min_gateways)
        yield
    finally:
        serve.stop()


def _wait_for(number: int) -> None:
    """All gateways are there."""
    until = time.monotonic() + WAIT_SECONDS
    while True:
        deployments = ray_serve.status().applications["shoal"].deployments
        if deployments[GATEWAY].replica_states.get(ReplicaState.RUNNING, 0) >= number:
            return
        if time.monotonic() > until:
            raise ResourceError(f"{number} gateways did not start", got=f"silence for {WAIT_SECONDS:g} s")
        time.sleep(0.25)


def _measure(port: int, clients: int, tokens: int, seconds: float, key_file: str | None) -> dict[str, Any]:
    """Streams and tokens a second, and what each kind of process took of the cores for 1,000 tokens."""
    command = [sys.executable, "-m", "shoal.bench.streams", "--port", str(port), "--clients", str(clients)]
    command += ["--tokens", str(tokens), "--seconds", str(seconds), *(["--key", KEY] if key_file else [])]
    before = _cpu()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + WAIT_SECONDS, check=False)
    after = _cpu()
    if done.returncode:
        raise ResourceError("the clients failed", got=done.stderr.strip().splitlines()[-1][:200])
    found = json.loads(done.stdout.splitlines()[-1])
    if found["wrong"] or not found["tokens"]:
        raise ResourceError("the streams that are measured", got=found["wrong"], allowed="none that fails")
    spent = {kind: after[kind] - before[kind] for kind in KINDS} | {"clients": found["cpu"]}
    return {
        "streams_per_s": found["streams"] / found["seconds"],
        "tokens_per_s": found["tokens"] / found["seconds"],
        "cpu": {kind: 1000 * each / found["tokens"] for kind, each in spent.items()},
    }


def _cpu() -> dict[str, float]:
    """Seconds of processor time that each kind of process has taken."""
    found = dict.fromkeys(KINDS, 0.0)
    for process in psutil.Process().children(recursive=True):
        try:
            name = " ".join(process.cmdline())
            times = process.cpu_times()
        except psutil.Error:  # it has just ended
            continue
        for kind, part in KINDS.items():
            if part in name:
                found[kind] += times.user + times.system
    return found


def _median(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Number by number."""

    def middle(values: list[Any]) -> Any:
        if isinstance(values[0], Mapping):
            return {key: middle([value[key] for value in values]) for key in values[0]}
        return statistics.median(values)

    return dict(middle(rows))
