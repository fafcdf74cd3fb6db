"""`shoal evaluate`: one model, or two side by side, on what neither was trained on; the dict that the report page shows.

Answers are made by the engine, as they are served. Two tables: quality by model (with the simple baselines beside each
number) and quality by depth on the last model given, the one that is served. Where a number is weak, `weak` says so in a
sentence. docs/figures.md says of each figure its formula, data, number of rows and rival.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.data import batches
from shoal.data.chats.heldout import Question, questions
from shoal.data.chats.rows import HELDOUT
from shoal.data.shards import open_index, token_bytes
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import DataError
from shoal.evaluate import baselines, measures, tolerance
from shoal.evaluate.frontier import frontier, sentence
from shoal.evaluate.halves import asked_groups
from shoal.evaluate.int8_cost import int8_cost, too_far
from shoal.evaluate.intervals import Figure
from shoal.evaluate.measures import Answer, HeldoutRows, row_of
from shoal.evaluate.routing import heldout_prompts
from shoal.evaluate.seen import rows_read
from shoal.evaluate.texts import modalities, rows_of
from shoal.evaluate.weak import weaknesses
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import threads
from shoal.model import cost, files
from shoal.model.model import Model

TASKS = {"image question": 4, "summarisation": 40, "code": 110, "customer service": 48}  # task -> most answer tokens
MOST_TOKENS = 64  # of an answer of any other
BASELINE_BYTES = 16_000_000  # of the training text that the baselines are fitted to, at most
Progress = Callable[[str, int, int], None]  # what, done, total


@dataclass(frozen=True)
class Sizes:
    """How much is measured, at most; more is slower and steadier."""

    vqa: int = 400
    bleu: int = 120
    code: int = 80
    service: int = 120
    heldout_rows: int = 2_000  # packed rows a modality for bits per byte; the quickstart holds out fewer
    int8_rows: int = 96  # of text and of code, on which INT8 is held beside fp32
    decode_tokens: int = 64


@dataclass
class Quality:
    """What one model came to at one depth: figures by name, such as "bpb text" or a task, and the answers it gave."""

    figures: dict[str, Figure] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    rivals: dict[str, float] = field(default_factory=dict)  # of a task: what is given beside its figure
    notes: dict[str, str] = field(default_factory=dict)
    too_long: dict[str, int] = field(default_factory=dict)  # of a task: questions that were not asked


def compare(
    models: dict[str, Path],
    data: Path,
    *,
    runs: Sequence[str | Path] = (),
    sizes: Sizes | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """The report's ``quality``, ``depth``, ``tolerance`` and ``frontier`` (both empty without a router), ``gates``, ``int8``
    (empty unless an fp32 model comes first and an INT8 one last) and ``weak`` for the models (label -> directory), measured on
    held-out shards and chat rows of `data`, or on a JSONL of texts and chats. All but ``quality`` are the last model's.

    `runs`: folders of the runs that made the last model: baselines are fitted to the rows that these read [to all rows that
    are not held out]. Raises DataError when `data` was made with another tokenizer than a model's.
    """
    sizes, tell = sizes or Sizes(), on_progress or (lambda what, done, total: None)
    loaded = {label: Model.load(directory) for label, directory in models.items()}
    _same_tokenizer(loaded, data)
    served, last = list(loaded.items())[-1]
    read = rows_read(runs, data)
    steps, total = 0, 2 * len(loaded) + len(last.config.exits) + 2
    results: dict[str, Quality] = {}
    by_exit: dict[str, dict[int, Figure]] = {}
    for label, model in loaded.items():
        tell(f"quality of {label}", steps, total)
        by_exit = bits(model, data, sizes)
        results[label] = _answered(model, data, "full", sizes)
        results[label].figures |= {f"bpb {m}": found[model.config.layers] for m, found in by_exit.items()}
        steps += 2
    by_depth = []
    auto = ["auto"] if results[served].answers else []  # a document alone has no router to ask
    for depth in [*last.config.exit_names, *auto]:
        tell(f"depth {depth} of {served}", steps, total)
        known = results[served] if depth == "full" else _answered(last, data, depth, sizes)
        by_depth.append(_depth_row(last, depth, known, by_exit, sizes))
        steps += 1
    tell("tokens per second", steps, total)
    speeds = interleaved_speed(loaded, tokens=sizes.decode_tokens)
    tell("what is beside it", total - 1, total)
    beside, fitted = text_baselines(data, last.tokenizer, sizes, read)
    patches = {label: _patches(model, data, sizes) for label, model in loaded.items()}
    weights = {label: float(files.weight_bytes(path)) for label, path in models.items()}
    rows = _quality_rows(results, speeds, beside, fitted, patches, weights)
    first = next(iter(loaded.values()))
    pair = (first.config.quantization, last.config.quantization) == ("none", "w8a8")
    tell("what routing is worth", total, total)
    policies, kept = _routing(last, data)
    lost = int8_cost(first, last, data, rows=sizes.int8_rows) if pair else []
    weak = weaknesses(rows, by_depth) + too_far(lost) + _not_asked(results[served], last.config.context)
    weak += (tolerance.too_much(kept) if kept else []) + (sentence(policies) if policies else [])
    return {
        "machine": machine(),
        "quality": {"columns": list(loaded), "rows": rows},
        "depth": {"rows": by_depth, "router": last.router.calibration.report if last.router is not None else {}},
        "tolerance": kept,
        "frontier": policies,
        "gates": gates(last),
        "int8": lost,
        "weak": weak,
    }


def _routing(model: Model, data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's ``frontier`` and ``tolerance``, on held-out prompts of `data`; empty without a router or without prompts."""
    router = model.router
    prompts = heldout_prompts(model, _chats(data) if _chats(data).exists() else data) if router else None
    if router is None or not prompts:
        return {}, {}
    return frontier(model.config, router, *prompts), tolerance.lost(model.config, router, prompts[1])


def _not_asked(quality: Quality, context: int) -> list[str]:
    """A sentence for each task of which questions did not fit the context."""
    return [
        f"{count} held-out question(s) of {task} were not asked: with an answer they do not fit {context} tokens."
        for task, count in quality.too_long.items()
    ]


def _same_tokenizer(models: Mapping[str, Model], data: Path) -> None:
    """Bits a byte of ids that mean something else to a model would be a figure of nothing."""
    if data.is_file():  # which each model reads by its own
        return
    made = open_index(data).tokenizer_sha256
    for label, model in models.items():
        if model.tokenizer.sha256 != made:
            raise DataError(f"{data} was made with another tokenizer than {label}'s", do="prepare it with the model's")


def leave_a_core() -> None:
    """Compute with all cores but one in this process: two threads on two cores wait for each other, up to 8 ms an
    operation, as soon as anything else runs. What OMP_NUM_THREADS allows is never exceeded."""
    torch.set_num_threads(min(torch.get_num_threads(), threads()))


def _chats(data: Path) -> Path:
    """The held-out chats of a prepared corpus, if it has some."""
    return data / HELDOUT


def bits(model: Model, data: Path, sizes: Sizes) -> dict[str, dict[int, Figure]]:
    """Bits per byte of what `data` holds out, by modality and exit."""
    lengths, exits = token_bytes(model.tokenizer), model.config.exits
    found = {
        modality: measures.bits_per_byte(model.net, rows_of(data, modality, model, sizes.heldout_rows), exits, lengths)
        for modality in modalities(data)
    }
    return {modality: by_exit for modality, by_exit in found.items() if by_exit}


def _patches(model: Model, data: Path, sizes: Sizes) -> dict[str, Figure]:
    """The next-patch error of a model and of always saying zero; nothing without images of more than a patch."""
    if "image" not in modalities(data):
        return {}
    return measures.patch_error(model.net, HeldoutRows(data, "image", sizes.heldout_rows))


def _answered(model: Model, data: Path, depth: str, sizes: Sizes) -> Quality:
    """What a model's answers at a depth, or under its router, are worth; a task that `data` does not hold out is left out."""
    asked_of, too_long = heldout_questions(model, data, sizes)
    out, engine = Quality(too_long=too_long), Engine(model)
    for task, asked in asked_of.items():
        answers = generate(engine, [q.prompt for q in asked], TASKS.get(task, MOST_TOKENS), depth)
        score(out, task, answers, asked)
        out.answers += answers
    return out


def heldout_questions(model: Model, data: Path, sizes: Sizes) -> tuple[dict[str, list[Question]], dict[str, int]]:
    """Held-out chat rows by task; none where there are no chats. The router was fitted to others, of other documents and
    conversations (`train.halves`). Beside them, by task, how many the model's context has no room for with an answer."""
    limits = {
        "image question": sizes.vqa,
        "summarisation": sizes.bleu,
        "code": sizes.code,
        "customer service": sizes.service,
    }
    if not _chats(data).exists():
        return {}, {}
    found = questions(_chats(data), model.tokenizer, model.config, model.chat_template)
    half = asked_groups(_chats(data))
    asked: dict[str, list[Question]] = {}
    too_long: dict[str, int] = {}
    for task, every in found.items():
        rows = [q for q in every if q.group in half]
        asked[task] = [q for q in rows if len(q.prompt.ids) + TASKS.get(task, MOST_TOKENS) <= model.config.context]
        too_long |= {task: len(rows) - len(asked[task])} if len(asked[task]) < len(rows) else {}
    fitting = {
        task: [rows[place] for place in batches.spaced(len(rows), limits.get(task, 50))]
        for task, rows in asked.items()
        if rows
    }
    return fitting, too_long


def generate(engine: Engine, prompts: Sequence[Encoded], max_tokens: int, depth: str) -> list[Answer]:
    """Greedy answers by the engine, in the prompts' order."""
    sampling = Sampling(temperature=0.0, max_tokens=max_tokens)
    done = engine.generate([Request(prompt, sampling, depth=depth) for prompt in prompts])
    return [Answer(c.text, len(c.tokens), c.depth, len(p.ids)) for c, p in zip(done, prompts, strict=True)]


def interleaved_speed(models: dict[str, Model], *, tokens: int, rounds: int = 3) -> dict[str, dict[int, list[float]]]:
    """Decoded tokens per second at batch 1 and 8 in each of `rounds`, rising (the models in turns so that drift hits all)."""
    engines = {label: Engine(model) for label, model in models.items()}
    found: dict[str, dict[int, list[float]]] = {label: {1: [], 8: []} for label in models}
    for _ in range(rounds):
        for label, engine in engines.items():
            for batch in (1, 8):
                found[label][batch].append(decode_speed(engine, batch, tokens))
    return {label: {b: sorted(v) for b, v in by.items()} for label, by in found.items()}


def decode_speed(
    engine: Engine,
    batch: int,
    tokens: int,
    depth: str | int = "full",
    sampling: Sampling | None = None,
    adapters: Sequence[str] = ("",),
) -> float:
    """Tokens per second over a run of `tokens` tokens for each of `batch` requests, prefill of 16 tokens included; greedy
    unless `sampling` is given, with `adapters` by turns."""
    sampling = sampling or Sampling(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    prompts = [[20 + (7 * i + j) % 200 for j in range(16)] for i in range(batch)]
    start = time.perf_counter()
    done = engine.generate(
        [
            Request(prompt, sampling, depth=depth, adapter=adapters[i % len(adapters)])
            for i, prompt in enumerate(prompts)
        ]
    )
    return sum(len(c.tokens) for c in done) / (time.perf_counter() - start)


def text_baselines(
    data: Path, tokenizer: Tokenizer, sizes: Sizes, read: Mapping[str, Sequence[int]]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """`baselines` on the held-out text and code that the models are measured on, fitted to the training rows in `read` [all];
    and a sentence about what they were fitted to."""
    if data.is_file():
        return {"text": {}}, {"text": f"texts, and answers of chats, in {data.name}; beside it nothing was fitted"}
    found, fitted = {}, {}
    for modality in [modality for modality in modalities(data) if modality != "image"]:
        only = read.get(modality, []) if read else None
        train = batches.text_of(data, modality, "train", tokenizer, limit_bytes=BASELINE_BYTES, only=only)
        heldout = batches.text_of(data, modality, "heldout", tokenizer, limit_rows=sizes.heldout_rows)
        found[modality] = baselines.bits_per_byte(train, heldout)
        what = "that the model read" if read else "of the training split: which of it the model read is not known here"
        fitted[modality] = f"baselines fitted to {len(train) / 1e6:.2f} MB {what}"
    return found, fitted


def gates(model: Model) -> list[dict[str, Any]]:
    """The local branch's share gamma a head, by layer."""
    rows = []
    for layer in range(model.config.layers):
        group = next(group for group, end in enumerate(model.config.ends) if layer < end)
        inside = layer - model.config.ends[group]  # from the group's end
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


def score(out: Quality, task: str, answers: list[Answer], asked: list[Question]) -> None:
    """Count the answers of one task into `out`."""
    if task == "summarisation":
        out.figures[task], out.notes[task] = measures.bleu([a.text for a in answers], asked)
        out.rivals[task] = measures.bleu(measures.another(asked), asked)[0].value
    elif task == "code":
        out.figures[task] = measures.parse_rate(answers, asked)
    else:
        commonest, out.rivals[task] = measures.majority(q.reference for q in asked)
        out.figures[task], out.notes[task] = measures.exact_match(answers, asked), f"majority answer: {commonest}"


def _depth_row(
    model: Model, depth: str, found: Quality, by_exit: Mapping[str, Mapping[int, Figure]], sizes: Sizes
) -> dict[str, Any]:
    """One row of the depth table: quality, FLOPs share and speed at one exit, or under the router. The router's share of the
    layers and of the FLOPs is by the tokens that ran: a long answer counts as much as it costs."""
    config = model.config
    layers = config.asked(depth)
    row: dict[str, Any] = {
        "exit": depth,
        "layers": layers or round(measures.mean_depth(found.answers), 2),
        "flops_share": flops_share(found.answers, model) if layers is None else _flops_share(model, layers),
        "tokens_per_s": decode_speed(Engine(model), 8, sizes.decode_tokens, layers) if layers else None,
        "answers": len(found.answers),
    }
    columns = {"vqa": found.figures.get("image question"), "bleu": found.figures.get("summarisation")}
    columns |= {f"bpb {m}": by_exit[m][layers] if layers and m in by_exit else None for m in ("text", "code")}
    for name, figure in columns.items():
        row[name] = figure.value if figure else None
        row[f"{name} interval"] = figure.ends if figure else None
    return row


def _flops_share(model: Model, layers: int) -> float:
    """FLOPs of a token at an exit over those at full depth, at the context of the training length."""
    length = model.config.train_length
    return cost.flops_per_token(model.config, length, layers) / cost.flops_per_token(model.config, length)


def flops_share(answers: Sequence[Answer], model: Model) -> float:
    """FLOPs of all tokens that ran, each at its answer's depth, over those at full depth; with what routing took."""
    config = model.config
    ran = sum(answer.run * _flops_share(model, answer.depth) for answer in answers)
    routing = sum(cost.routing_flops(config, answer.prompt) for answer in answers)
    ran += routing / cost.flops_per_token(config, config.train_length)
    return ran / max(1, sum(answer.run for answer in answers))


def _quality_rows(
    results: Mapping[str, Quality],
    speeds: Mapping[str, Mapping[int, Sequence[float]]],
    beside: Mapping[str, dict[str, float]],
    fitted: Mapping[str, str],
    patches: Mapping[str, Mapping[str, Figure]],
    weights: Mapping[str, float],
) -> list[dict[str, Any]]:
    first = next(iter(results.values()))
    rows = []

    def add(metric: str, unit: str, key: str, of: str, *, rival: str = "", **more: Any) -> None:
        """A row of the figure `key` of each model; none when it was not measured."""
        if key in first.figures:
            if rival:
                more["beside"] = {rival: first.rivals[key]}
            figures = {label: found.figures[key] for label, found in results.items()}
            rows.append(row_of(metric, unit, figures, of=of, note=more.pop("note", first.notes.get(key, "")), **more))

    for modality, by_name in beside.items():
        of, note = "predicted tokens", fitted[modality]
        add(f"bpb {modality}", "bits/byte", f"bpb {modality}", of, beside=by_name, note=note)
    add("bpb image text", "bits/byte", "bpb image", "predicted tokens")
    if all(patches.values()):
        errors = {label: found["model"] for label, found in patches.items()}
        zero = next(iter(patches.values()))["zero"].value
        rows.append(row_of("next-patch error", "MSE", errors, of="patches", beside={"always zero": zero}))
    add("easy-vqa exact match", "share", "image question", "questions", rival="majority answer")
    add("BLEU summarisation", "0-100", "summarisation", "functions", rival="another function's summary")
    add("code that parses", "share", "code", "answers")
    note = f"synthetic set; {first.notes.get('customer service', '')}"
    add("customer service exact", "share", "customer service", "questions", rival="majority answer", note=note)
    for batch in (1, 8):
        rounds = {label: by[batch] for label, by in speeds.items()}
        row = row_of(f"decode, batch {batch}", "tokens/s", {n: v[len(v) // 2] for n, v in rounds.items()})
        row |= {"intervals": {n: [v[0], v[-1]] for n, v in rounds.items()}}
        rows.append(row | {"note": f"median, least and most of {len(next(iter(rounds.values())))} rounds"})
    rows.append(row_of("weight file", "bytes", weights))
    return rows
