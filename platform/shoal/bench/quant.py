"""`shoal bench quant`: the article's table, FP32 -> INT8, measured: quality of trained pairs of models, tokens a second, bytes
on disk and in the memory of a process that answers. Speed and size are those of a preset's shape with random weights."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal import presets
from shoal.bench.turns import in_turns, show
from shoal.engine.engine import Engine
from shoal.errors import ShoalError, UsageError
from shoal.evaluate.answering import decode_speed, generate
from shoal.evaluate.evaluation import TASKS, Sizes, heldout_questions, leave_a_core
from shoal.evaluate.int8_cost import AGREEMENT, int8_cost
from shoal.evaluate.intervals import between
from shoal.evaluate.measures import bleu
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import files
from shoal.model.model import Model
from shoal.model.net import Net

BATCHES = (1, 8)
UNITS = 512  # of K/V in both engines, so that the difference is the weights'
# The article gives BLEU of 1, 0.85 and 0.83; here all BLEU is of 100. Its model, data and test set are others than ours.
ARTICLE = {"bleu": "85 > 83 (97.6 %)", "speed": "120 > 350 (2.92x)", "memory": "8.5 > 2.1 GB (4.05x)"}
Pair = tuple[Path, Path]
Rows = list[dict[str, Any]]

# Run in a process of its own: what it needed at most, in bytes, from its start to its first answer.
_SERVING = """
import sys
import torch
torch.set_num_threads(1)
from shoal import Engine, Model, Request, Sampling
engine = Engine(Model.load(sys.argv[1]), units=int(sys.argv[2]))
engine.generate([Request(list(range(20, 36)), Sampling(temperature=0, max_tokens=8, ignore_eos=True))])
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # getrusage also counts what the parent had
print(1024 * int(status["VmHWM"].split()[0]))
"""


def quant(console: Console, *, preset: str, tokens: int, rounds: int, pairs: list[Pair], data: Path | None) -> None:
    """The table, and all of it as JSON. `pairs`: model directories in FP32 and INT8, one a seed, measured on the held-out rows
    and chats of `data`."""
    if pairs and data is None:
        raise UsageError("what to measure the pairs on", do="give --data, a directory made by `shoal prepare`")
    leave_a_core()
    config = presets.get(preset).model
    exact = Model(config, Net(config).init_(0), Tokenizer.bytes_only(), name="bench")
    found = _quality(pairs, data) if data is not None else []
    size = _sizes({"fp32": exact, "int8": exact.quantized()})
    speed = _speed(exact, tokens, rounds)
    table = Table(
        "measure", "article", "FP32", "INT8", "ratio", "to reach", title=f"FP32 > INT8, speed and size of {preset}"
    )
    for row in found:
        name, scores = row["models"][1], [bleu["score"] for bleu in row["bleu"]]
        lost = f"{scores[1] / scores[0]:.1%}" if scores[0] else "-"
        cells = (f"{bleu['score']:.2f}{behind(bleu['interval'], '.2f')}" for bleu in row["bleu"])
        asked = f"{row['bleu'][0]['questions']} functions"
        table.add_row(f"BLEU (0-100), {asked}, {name}", ARTICLE["bleu"], *cells, lost, "99 %")
        for cost in row["bpb"]:
            low, rise = f"{cost['int8']:.4f}", f"{cost['int8_rise']:+.2%}{behind(cost['int8_rise_interval'], '+.2%')}"
            rise += f" (rounding alone {cost['rounded_rise']:+.2%})"
            table.add_row(
                f"bpb {cost['modality']}, {name}", "", f"{cost['fp32']:.4f}", low, rise, "+0.5 %, at most that"
            )
            said = f"{cost['int8_agreement']:.1%}{behind(cost['int8_agreement_interval'], '.1%')}"
            alone = f"rounding alone {cost['rounded_agreement']:.1%}"
            table.add_row(f"same token as FP32, {cost['places']:,} places", "", "", said, alone, f"{AGREEMENT:.0%}")
    for row, goal in zip(speed, ("3x", "4x"), strict=True):
        cells = (f"{value:.1f}" for value in row["tokens_per_s"])
        table.add_row(f"tokens/s, batch {row['batch']}", ARTICLE["speed"], *cells, f"{row['ratio']:.2f}x", goal)
    for row, goal in zip(size, ("3.6x", ""), strict=True):
        cells = (f"{value / 1e6:,.0f} MB" for value in row["bytes"])
        table.add_row(row["what"], ARTICLE["memory"], *cells, f"{row['ratio']:.2f}x", goal)
    told = {"bench": "quant", "preset": preset, "tokens": tokens, "rounds": rounds}
    show(console, [table], {**told, "quality": found, "speed": speed, "size": size})


def behind(interval: list[float] | None, form: str) -> str:
    """A 95 % interval as it stands behind its value."""
    return f" [{between(interval, form)}]"


def parse_pair(text: str) -> Pair:
    """``FP32=INT8`` as two model directories. Raises UsageError."""
    first, equals, second = text.partition("=")
    if not equals or not (Path(first) / "config.json").is_file() or not (Path(second) / "config.json").is_file():
        raise UsageError("--pair", got=text, allowed="FP32=INT8, two model directories")
    return Path(first), Path(second)


def _quality(pairs: list[Pair], data: Path) -> Rows:
    found = []
    for paths in pairs:
        models = [Model.load(path) for path in paths]
        kinds = [model.config.quantization for model in models]
        if kinds != ["none", "w8a8"]:
            raise UsageError("--pair", got=kinds, allowed="a model in fp32, then one in INT8 (w8a8)")
        scores = []
        for model in models:
            asked = heldout_questions(model, data, Sizes())[0].get("summarisation", [])
            answers = generate(Engine(model), [q.prompt for q in asked], TASKS["summarisation"], "full")
            score = bleu([answer.text for answer in answers], asked)[0]
            scores.append({"score": score.value, "interval": score.ends, "questions": score.rows})
        cost = int8_cost(models[0], models[1], data, rows=Sizes().int8_rows)
        found.append({"models": [str(path) for path in paths], "bleu": scores, "bpb": cost})
    return found


def _speed(exact: Model, tokens: int, rounds: int) -> Rows:
    """Tokens a second at full depth, both models in turns."""
    engines = [Engine(model, units=UNITS) for model in (exact, exact.quantized())]
    runs: dict[tuple[int, int], Callable[[], float]] = {
        (i, batch): partial(decode_speed, engine, batch, tokens)
        for i, engine in enumerate(engines)
        for batch in BATCHES
    }
    medians = in_turns(runs, rounds)
    pairs = [(batch, medians[0, batch], medians[1, batch]) for batch in BATCHES]
    return [{"batch": batch, "tokens_per_s": [a, b], "ratio": b / a} for batch, a, b in pairs]


def _sizes(models: dict[str, Model]) -> Rows:
    """Bytes of the weight file, and the peak of a process that loads it and answers once."""
    weights, peaks = [], []
    with tempfile.TemporaryDirectory() as folder:
        for label, model in models.items():
            path = Path(folder) / label
            model.save(path)
            weights.append(files.weight_bytes(path))
            peaks.append(peak_memory(path))
    sizes = {"weight file": weights, "peak memory of a process that answers": peaks}
    return [{"what": what, "bytes": both, "ratio": both[0] / both[1]} for what, both in sizes.items()]


def peak_memory(directory: Path) -> int:
    """Most bytes that a process had in memory from its start to its first answer from the model in `directory`."""
    args = [sys.executable, "-c", _SERVING, str(directory), str(UNITS)]
    done = subprocess.run(args, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ShoalError(f"a process with {directory} failed", got="".join(done.stderr.strip().splitlines()[-1:]))
    return int(done.stdout)
