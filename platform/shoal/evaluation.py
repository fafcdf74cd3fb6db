"""`shoal evaluate`: one model, or two side by side, on what neither was trained on; the dict that the report page shows.

Answers are made by the engine, as they are served. Two tables: quality by model (with the simple baselines beside each
number) and quality by depth on the first model given. Where a number is weak, `weak` says so in a sentence.
"""

from __future__ import annotations

import functools
import itertools
import operator
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoal.data import batches as shards
from shoal.data.shards import open_index
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from shoal.int8_cost import int8_cost, too_far
from shoal.model import cost, files
from shoal.model.depth import Router
from shoal.model.model import Model
from shoal.train import baselines
from shoal.train import evaluate as measure
from shoal.train.evaluate import Answer, Question
from shoal.train.frontier import frontier, sentence
from shoal.train.routing import heldout_prompts

TASKS = {"image question": 4, "summarisation": 40, "code": 110, "customer service": 48}  # task -> most answer tokens
BASELINE_BYTES = 4_000_000  # of the training text that the n-gram baselines are fitted to
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Sizes:
    """How much is measured; more is slower and steadier."""

    vqa: int = 400
    bleu: int = 120
    code: int = 40
    service: int = 60
    heldout_rows: int = 96  # packed rows a modality for bits per byte
    decode_tokens: int = 64


def compare(
    models: dict[str, Path], data: Path, *, sizes: Sizes | None = None, on_progress: Progress | None = None
) -> dict[str, Any]:
    """The report's ``quality``, ``depth``, ``frontier`` (empty without a router), ``gates``, ``int8`` (empty unless an fp32
    model comes first and an INT8 one last) and ``weak`` for the models (label -> directory), measured on the held-out shards
    and chat rows of `data`. The depth table and the frontier are the last model's, the one that is served."""
    sizes, tell = sizes or Sizes(), on_progress or (lambda what, done, total: None)
    loaded = {label: Model.load(directory) for label, directory in models.items()}
    served = list(loaded)[-1]
    steps, total = 0, 2 * len(loaded) + len(loaded[served].config.exits) + 2
    results: dict[str, dict[str, Any]] = {}
    for label, model in loaded.items():
        tell(f"quality of {label}", steps, total)
        results[label] = quality(model, data, "full", sizes)
        results[label]["weights"] = files.weight_bytes(models[label])
        steps += 2
    by_depth = []
    auto = ["auto"] if results[served]["answers"] else []  # a document alone has no router to ask
    for depth in [*loaded[served].config.exit_names, *auto]:
        tell(f"depth {depth} of {served}", steps, total)
        known = results[served] if depth == "full" else None
        by_depth.append(_depth_row(loaded[served], data, depth, sizes, known))
        steps += 1
    tell("tokens per second", steps, total)
    speeds = interleaved_speed(loaded, tokens=sizes.decode_tokens)
    beside = text_baselines(data, loaded[served].tokenizer, sizes)
    tell("done", total, total)
    rows = _quality_rows(results, speeds, beside)
    first = next(iter(loaded.values()))
    pair = (first.config.quantization, loaded[served].config.quantization) == ("none", "w8a8")
    router = loaded[served].router
    tell("what routing is worth", total, total)
    asked = _chats(data) if _chats(data).exists() else data
    prompts = heldout_prompts(loaded[served], asked) if router is not None else None
    policies = frontier(loaded[served].config, router, *prompts) if router is not None and prompts else {}
    lost = int8_cost(first, loaded[served], data, rows=sizes.heldout_rows) if pair else []
    return {
        "machine": machine(),
        "quality": {"columns": list(loaded), "rows": rows},
        "depth": {"rows": by_depth, **_routing(router)},
        "frontier": policies,
        "gates": gates(loaded[served]),
        "int8": lost,
        "weak": weaknesses(rows, by_depth) + too_far(lost) + (sentence(policies) if policies else []),
    }


def _routing(router: Router | None) -> dict[str, Any]:
    """What the router's decisions came to on prompts that it was not fitted to: at its default, and by knob."""
    if router is None:
        return {"router": {}}
    table = router.calibration
    by_tolerance = [
        dict(zip(("tolerance", "depth_share", "regret", "violations"), row, strict=True)) for row in table.by_tolerance
    ]
    by_budget = [dict(zip(("budget", "depth_share", "regret"), row, strict=True)) for row in table.by_budget]
    return {"router": table.report, "by_tolerance": by_tolerance, "by_budget": by_budget}


def leave_a_core() -> None:
    """Compute with all cores but one in this process: two threads on two cores wait for each other, up to 8 ms an
    operation, as soon as anything else runs."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))


def _chats(data: Path) -> Path:
    """The held-out chats of a prepared corpus, if it has some."""
    return data / "sft-heldout.jsonl"


def _modalities(data: Path) -> list[str]:
    """What rows the corpus holds out."""
    index = open_index(data)
    return [modality for modality in ("text", "code", "image") if index.total("rows", "heldout", modality)]


def quality(model: Model, data: Path, depth: str, sizes: Sizes) -> dict[str, Any]:
    """Every quality number of one model at one depth ("auto" has no bits per byte: a document has no router), of what `data`
    holds out: a modality or task that it lacks is left out."""
    out: dict[str, Any] = {"answers": []}
    exits, modalities = model.config.exits, _modalities(data)
    if depth != "auto":
        for modality in modalities:
            rows = shards.heldout_batches(data, modality, batch_rows=8, limit=sizes.heldout_rows)
            out[f"bpb {modality}"] = measure.bits_per_byte(model.net, rows, exits)[model.config.depth(depth)]
    if depth == "full" and "image" in modalities:
        rows = shards.heldout_batches(data, "image", batch_rows=8, limit=sizes.heldout_rows)
        out["patch"] = measure.patch_error(model.net, rows)
    asked = heldout_questions(model, data, sizes)
    engine = Engine(model)
    for task, questions in asked.items():
        answers = generate(engine, [q.prompt for q in questions], TASKS.get(task, 64), depth)
        out[task] = _score(task, answers, questions)
        out["answers"] += answers
    return out


def heldout_questions(model: Model, data: Path, sizes: Sizes) -> dict[str, list[Question]]:
    """Held-out chat rows by task; none where there are no chats. The router was fitted on others (`train.routing` takes the
    second half)."""
    limits = {
        "image question": sizes.vqa,
        "summarisation": sizes.bleu,
        "code": sizes.code,
        "customer service": sizes.service,
    }
    if not _chats(data).exists():
        return {}
    found = measure.questions(_chats(data), model.tokenizer, model.config, model.chat_template)
    return {task: rows[: min(limits.get(task, 50), len(rows))] for task, rows in found.items()}


def generate(engine: Engine, prompts: Sequence[Encoded], max_tokens: int, depth: str) -> list[Answer]:
    """Greedy answers by the engine, in the prompts' order."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    done = engine.generate([Request(prompt, sampling, depth=depth) for prompt in prompts])
    return [Answer(c.text, len(c.tokens), c.depth) for c in done]


def interleaved_speed(models: dict[str, Model], *, tokens: int, rounds: int = 3) -> dict[str, dict[int, float]]:
    """Decoded tokens per second at batch 1 and 8 (median of `rounds`, the models in turns so that drift hits all)."""
    engines = {label: Engine(model) for label, model in models.items()}
    found: dict[str, dict[int, list[float]]] = {label: {1: [], 8: []} for label in models}
    for _ in range(rounds):
        for label, engine in engines.items():
            for batch in (1, 8):
                found[label][batch].append(decode_speed(engine, batch, tokens))
    return {label: {b: sorted(v)[len(v) // 2] for b, v in by.items()} for label, by in found.items()}


def decode_speed(
    engine: Engine, batch: int, tokens: int, depth: str | int = "full", sampling: Sampling | None = None
) -> float:
    """Tokens per second over a run of `tokens` tokens for each of `batch` requests, prefill of 16 tokens included; greedy
    unless `sampling` is given."""
    sampling = sampling or Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompts = [[20 + (7 * i + j) % 200 for j in range(16)] for i in range(batch)]
    start = time.perf_counter()
    done = engine.generate([Request(prompt, sampling, depth=depth) for prompt in prompts])
    return sum(len(c.tokens) for c in done) / (time.perf_counter() - start)


def text_baselines(data: Path, tokenizer: Tokenizer, sizes: Sizes) -> dict[str, dict[str, float]]:
    """Unigram, 5-gram and gzip bits per byte of the same held-out text and code."""
    found = {}
    for modality in [modality for modality in _modalities(data) if modality != "image"]:
        train = shards.text_of(data, modality, "train", tokenizer, limit_bytes=BASELINE_BYTES)
        heldout = shards.text_of(data, modality, "heldout", tokenizer, limit_rows=sizes.heldout_rows)
        found[modality] = baselines.bits_per_byte(train, heldout)
    return found


def gates(model: Model) -> list[dict[str, Any]]:
    """The local branch's share gamma a head, by layer."""
    rows = []
    for layer in range(model.config.layers):
        group, inside = divmod(layer, model.config.group_layers)
        gamma = model.net.groups[group].blocks[inside].attention.gamma()  # type: ignore[index, union-attr]
        rows.append({"layer": layer, "gamma": [1.0] if gamma is None else [round(g, 4) for g in gamma.tolist()]})
    return rows


def machine() -> dict[str, Any]:
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def weaknesses(rows: list[dict[str, Any]], by_depth: list[dict[str, Any]]) -> list[str]:
    """Plain sentences about numbers that are weak, so that nobody has to find out for themselves."""
    said = []
    for row in rows:
        values = row["values"]
        label, value = next(iter(values.items()))
        if row["metric"].startswith("bpb "):
            worse = [name for name, other in row["beside"].items() if other < value]
            if worse:
                said.append(f"{row['metric']}: {label} reads {value:.2f}, worse than {' and '.join(worse)}.")
        if row["metric"] == "BLEU summarisation" and value < 10:
            said.append(f"BLEU of summarisation is {value:.1f}: minutes of training do not make a summariser.")
        if row["metric"] == "code that parses" and value < 0.9:
            said.append(f"{value:.0%} of the generated functions parse; none is claimed to be right.")
        if row["metric"] == "easy-vqa exact match" and value < row["beside"]["majority answer"] + 0.1:
            said.append(f"easy-vqa exact match {value:.1%} is not well above the majority answer.")
        if (
            row["unit"] == "tokens/s"
            and len(values) > 1
            and (last := list(values)[-1]) != label
            and values[last] < value
        ):
            said.append(
                f"{row['metric']}: {last} is slower than {label} ({values[last]:.0f} and {value:.0f} tokens/s): "
                "on matrices this small there is little for INT8 to save."
            )
    exits = [row for row in by_depth if row["exit"] != "auto"]
    if exits[0]["bpb text"] is not None and exits[0]["bpb text"] - exits[-1]["bpb text"] < 0.02:
        said.append("Depth hardly matters yet: the shallow exit is within 0.02 bits per byte of full depth on text.")
    for modality in ("bpb text", "bpb code"):
        for near, deep in itertools.pairwise(exits):
            if deep[modality] is not None and deep[modality] > near[modality]:
                said.append(
                    f"{modality} rises with depth: {near['exit']} reads {near[modality]:.3f}, "
                    f"{deep['exit']} {deep[modality]:.3f}."
                )
    return said


def _score(task: str, answers: list[Answer], asked: list[Question]) -> dict[str, Any]:
    if task == "summarisation":
        score, signature = measure.bleu(answers, asked)
        return {"bleu": score, "signature": signature, "rows": len(asked)}
    if task == "code":
        return {"parses": measure.parse_rate(answers), "rows": len(asked)}
    answer, share = measure.majority(q.reference for q in asked)
    return {"exact": measure.exact_match(answers, asked), "majority": share, "answer": answer, "rows": len(asked)}


def _depth_row(model: Model, data: Path, depth: str, sizes: Sizes, known: dict[str, Any] | None) -> dict[str, Any]:
    """One row of the depth table: quality, FLOPs share and speed at one exit, or under the router."""
    config = model.config
    found = known or quality(model, data, depth, sizes)
    answers = found.pop("answers")
    layers, length = config.depth(depth) if depth != "auto" else None, config.train_length
    run = [layers] if layers else [answer.depth for answer in answers]
    flops = sum(cost.flops_per_token(config, length, e) for e in run) / len(run)
    routing = 0.0 if layers else cost.routing_flops(config, length) / length  # a prompt is routed once
    return {
        "exit": depth,
        "layers": layers or round(measure.mean_depth(answers, config) * config.layers, 2),
        "flops_share": (flops + routing) / cost.flops_per_token(config, length),
        "bpb text": found.get("bpb text"),
        "bpb code": found.get("bpb code"),
        "vqa": found.get("image question", {}).get("exact"),
        "bleu": found.get("summarisation", {}).get("bleu"),
        "tokens_per_s": decode_speed(Engine(model), 8, sizes.decode_tokens, layers) if layers else None,
    }


def _quality_rows(
    results: dict[str, Any], speeds: dict[str, dict[int, float]], beside: dict[str, dict[str, float]]
) -> list[dict[str, Any]]:
    first = next(iter(results.values()))
    rows = []

    def add(metric: str, unit: str, *keys: str, **more: Any) -> None:
        """A row of what lies under `keys` in each model's results; none when it was not measured."""
        if keys[0] in first:
            values: dict[str, float] = {n: functools.reduce(operator.getitem, keys, r) for n, r in results.items()}
            rows.append(measure.row_of(metric, unit, values, **more))

    for modality, bits in beside.items():
        add(f"bpb {modality}", "bits/byte", f"bpb {modality}", beside=bits)
    add("bpb image text", "bits/byte", "bpb image")
    if patch := first.get("patch"):
        add("next-patch error", "MSE", "patch", "model", beside={"always zero": patch["zero"]})
    if vqa := first.get("image question"):
        note = f"{vqa['rows']} held-out questions; majority answer: {vqa['answer']}"
        beside_vqa = {"majority answer": vqa["majority"]}
        add("easy-vqa exact match", "share", "image question", "exact", beside=beside_vqa, note=note)
    if summary := first.get("summarisation"):
        note = f"{summary['rows']} held-out functions; {summary['signature']}"
        add("BLEU summarisation", "0-100", "summarisation", "bleu", note=note)
    add("code that parses", "share", "code", "parses")
    add("customer service exact", "share", "customer service", "exact", note="synthetic set")
    for batch in (1, 8):
        values = {label: by[batch] for label, by in speeds.items()}
        rows.append(measure.row_of(f"decode, batch {batch}", "tokens/s", values))
    add("weight file", "bytes", "weights")
    return rows
