"""`shoal bench batch`: tokens a second of `shoal batch` beside an engine's own in this process, the same requests in turns.

What both need for the first and the last of a file (a worker that starts, a batch that empties) is taken out: of each a file of
so many lines is run, and one of `TIMES` as many, and the speed is that of the lines that the longer one has more.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.turns import in_turns, show
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import ResourceError
from shoal.machine import threads
from shoal.model.model import Model
from shoal.on_ray.batch import batch
from shoal.on_ray.resources import local_ray

TIMES = 3
PROMPT = 32  # tokens
MAX_BATCH = 32


def batch_bench(console: Console, *, model: Path | None, preset: str, requests: int, tokens: int, rounds: int) -> None:
    """The table, and all as JSON. `model`: a directory, else random weights of `preset`; `requests` in the shorter file."""
    torch.set_num_threads(threads())  # as the one worker does
    numbers = itertools.count()  # no prompt comes twice: the prefix cache would know it
    with tempfile.TemporaryDirectory(prefix="shoal-bench-") as folder, local_ray():
        directory = model or Path(folder) / "model"
        if model is None:
            Model.from_preset(preset, seed=0).save(directory)
        engine = Engine(Model.load(directory), max_batch=MAX_BATCH)
        sampling = Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)

        def prompts(count: int) -> list[list[int]]:
            return [_prompt(number) for number in itertools.islice(numbers, count)]

        def over_ray(count: int) -> float:
            source, out = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
            out.unlink(missing_ok=True)
            more = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "depth": "full"}
            source.write_text("".join(_line(number, prompt, more) for number, prompt in enumerate(prompts(count))))
            began = time.perf_counter()
            counts = batch(source, out, directory, name="bench", max_batch=MAX_BATCH)
            seconds = time.perf_counter() - began
            if counts["answered"] != count:
                raise ResourceError("shoal batch", got=counts, allowed=f"{count} answers")
            return seconds

        def alone(count: int) -> float:
            asked = [Request(prompt, sampling, depth="full") for prompt in prompts(count)]
            began = time.perf_counter()
            engine.generate(asked)
            return time.perf_counter() - began

        ways = {"batch": over_ray, "engine": alone}
        counts = (requests, TIMES * requests)
        runs: dict[tuple[str, int], Callable[[], float]] = {
            (name, count): partial(way, count) for count in counts for name, way in ways.items()
        }
        seconds = in_turns(runs, rounds)
    more_tokens = (TIMES - 1) * requests * tokens
    speeds = {name: more_tokens / (seconds[name, TIMES * requests] - seconds[name, requests]) for name in ways}
    result: dict[str, Any] = {
        "bench": "batch", "model": str(model or preset), "requests": [requests, TIMES * requests], "tokens": tokens,
        "rounds": rounds, "seconds": {f"{name} {count}": value for (name, count), value in seconds.items()},
        "batch_tokens_per_s": speeds["batch"], "engine_tokens_per_s": speeds["engine"],
        "ratio": speeds["batch"] / speeds["engine"],
    }  # fmt: skip
    table = Table(
        "what", "measured", "wanted", title=f"{model or preset}, prompts of {PROMPT} and answers of {tokens} tokens"
    )
    what = f"of an engine's {speeds['engine']:,.0f} tokens/s by shoal batch, one worker, {MAX_BATCH} at once"
    table.add_row(what, f"{result['ratio']:.3f}", "0.95")
    start = seconds["batch", requests] - requests * tokens / speeds["batch"]
    table.add_row("seconds of a run that no line takes (workers that start, and end)", f"{start:.1f} s", "")
    show(console, [table], result)


def _prompt(number: int) -> list[int]:
    return [20 + (number // 200**place) % 200 if place < 3 else 20 + place for place in range(PROMPT)]


def _line(number: int, prompt: list[int], more: dict[str, Any]) -> str:
    body = {"model": "bench", "prompt": prompt, **more}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
