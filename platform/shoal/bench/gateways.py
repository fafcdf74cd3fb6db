"""`shoal bench gateways`: what one gateway carries, and what two do, before a replica that costs nothing.

The replica has a token whenever it is asked for one, so that what limits the streams is what passes them on: the proxy, the
gateways, and on few cores the clients, which are a process of their own. Beside streams and tokens a second it says what each
kind of process took of the cores for 1,000 tokens: where these are too few for two gateways and a proxy, what a gateway would
carry follows from that. With `limited` the same once more for a key whose limits are counted for all gateways together.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.bench.turns import show
from shoal.errors import ResourceError, UsageError
from shoal.model.model import Model
from shoal.on_ray import keys, serve
from shoal.on_ray.costless import IMPORT_PATH, wait_for
from shoal.on_ray.resources import local_ray
from shoal.on_ray.serve_config import GATEWAY, check_serve_config, serve_config

KEY = "sk-bench"
WAIT_SECONDS = 120.0  # for all gateways to be there
WARM_SECONDS = 2.0
KINDS = {"gateway": f":{GATEWAY}", "proxy": "ProxyActor", "replica": f":{ENGINE}", "count": "ray::Count"}


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
    given["import_path"] = IMPORT_PATH
    given["args"] |= {"name": "bench", "metrics": False} | ({"api_keys": keys.referred(key_file)} if key_file else {})
    serve.run(check_serve_config(values, "bench"), blocking=False)
    try:
        wait_for(args.min_gateways, WAIT_SECONDS)
        yield
    finally:
        serve.stop()


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
