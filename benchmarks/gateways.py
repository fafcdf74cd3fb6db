"""`shoal bench gateways`: what one gateway carries, and what two do, before a replica that costs nothing.

The replica has a token whenever it is asked for one, so that what limits the streams is what passes them on: the proxy, the
gateways, and on few cores the clients, which are a process of their own. Beside streams and tokens a second it says what each
kind of process took of the cores for 1,000 tokens. Where these are too few for two gateways, a proxy and the clients, the ratio
of what was carried says how many cores there are, and no more; so it stands beside two others (`compared`): what these cores
permit, and how often one gateway's tokens several carry where each has a core. With `limited` the same once more for a key
whose limits are counted for all gateways together.
"""

from __future__ import annotations

import json
import math
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

from benchmarks.turns import environment, show
from shoal import machine
from shoal.api.serve_args import ENGINE, ServeArgs
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
    times = compared(rows, machine.cores())
    table.caption = "\n".join(
        f"{number} gateways carry {row['carried']:.2f} times what one does; {machine.cores()} cores permit "
        f"{row['permitted']:.2f}; by processor time {row['by_cpu']:.2f}, which takes {row['cores']:.1f} cores"
        for number, row in times.items()
    )
    given = {"clients": clients, "tokens": tokens, "seconds": seconds, "rounds": rounds}
    show(console, [table], {"bench": "gateways", **given, "gateways": rows, "times_one": times})


def compared(rows: Mapping[str, Mapping[str, Any]], cores: int) -> dict[str, dict[str, float]]:
    """Of each number of gateways in `rows` above one how many times what one carries: ``carried``, as measured;
    ``permitted``, on so many `cores` with nothing beside; ``by_cpu``, where each process has a core, for which ``cores`` are
    needed. A gateway and the proxy are a thread each, so neither has more than a core."""
    if "1" not in rows:
        return {}

    def most(number: int, cpu: Mapping[str, float], cores: float) -> float:
        """Tokens a second, in thousands."""
        return min(number / cpu["gateway"], 1 / cpu["proxy"], cores / sum(cpu.values()))

    one, found = rows["1"], {}
    alone = most(1, one["cpu"], math.inf)
    for name, row in rows.items():
        if name.isdecimal() and int(name) > 1:
            cpu, free = row["cpu"], most(int(name), row["cpu"], math.inf)
            found[name] = {
                "carried": row["tokens_per_s"] / one["tokens_per_s"],
                "permitted": most(int(name), cpu, cores) / most(1, one["cpu"], cores),
                "by_cpu": free / alone,
                "cores": free * sum(cpu.values()),
            }
    return found


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
    command = [sys.executable, "-m", "benchmarks.streams", "--port", str(port), "--clients", str(clients)]
    command += ["--tokens", str(tokens), "--seconds", str(seconds), *(["--key", KEY] if key_file else [])]
    before = _cpu()
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=seconds + WAIT_SECONDS, check=False
    )
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
