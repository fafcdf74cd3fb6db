"""`shoal evaluate`: one model, or two side by side, on what neither was trained on; the dict that the report page shows.

Answers are made by the engine, as they are served. Two tables: quality by model (with the simple baselines beside each
number) and quality by depth on the last model given, the one that is served. Where a number is weak, `weak` says so in a
sentence. docs/figures.md says of each figure its formula, data, number of rows and rival.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shoal.config import FULL, ModelConfig
from shoal.data import batches
from shoal.data.chats.heldout import Question, questions
from shoal.data.chats.rows import HELDOUT
from shoal.data.models import here
from shoal.data.remote import local
from shoal.data.shards import open_index
from shoal.errors import DataError
from shoal.evaluate import baselines, compared, measures, pieces, tolerance
from shoal.evaluate.compared import Todo
from shoal.evaluate.frontier import frontier, sentence
from shoal.evaluate.halves import asked_groups
from shoal.evaluate.int8_cost import too_far
from shoal.evaluate.intervals import Figure
from shoal.evaluate.measures import Answer, row_of
from shoal.evaluate.pieces import Models, Run, wherever
from shoal.evaluate.prompts import Prompts
from shoal.evaluate.seen import rows_read
from shoal.evaluate.texts import modalities
from shoal.evaluate.weak import weaknesses
from shoal.machine import threads
from shoal.model import cost, described
from shoal.model.checkpoint import routers
from shoal.model.described import Described
from shoal.model.model import Model
from shoal.model.router import Router

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
    models: Mapping[str, str | Path],
    data: str | Path,
    *,
    runs: Sequence[str | Path] = (),
    sizes: Sizes | None = None,
    on_progress: Progress | None = None,
    run: Run = pieces.here,
) -> dict[str, Any]:
    """The report's ``quality``, ``depth``, ``tolerance`` and ``frontier`` (both empty without a router), ``gates``, ``int8``
    (empty unless an fp32 model comes first and an INT8 one last) and ``weak`` for the models (label -> directory, or s3://),
    measured on held-out shards and chat rows of `data`, or on a JSONL of texts and chats. All but ``quality`` are the last's.

    `runs`: folders of the runs that made the last model: baselines are fitted to the rows that these read [to all rows that
    are not held out]. `run` does the measuring; neither models nor rows of shards are held here. Raises DataError when `data`
    was made with another tokenizer than a model's.
    """
    sizes, tell = sizes or Sizes(), on_progress or (lambda what, done, total: None)
    places, at, corpus = {label: wherever(place) for label, place in models.items()}, wherever(data), local(data)
    known = {label: described.read(here(place, weights=False)) for label, place in places.items()}
    _same_tokenizer(known, corpus)
    todo, read, (served, last) = Todo(), rows_read(runs, corpus), list(known.items())[-1]
    of = {label: _Asked(todo, label, places[label], it, corpus, at, sizes) for label, it in known.items()}
    others = [name for name in last.config.exit_names if name != FULL] + ["auto"] * bool(of[served].questions)
    depths = {depth: of[served].answers(f"depth {depth} of {served}", depth) for depth in others}
    beside = todo.one("what is beside it", text_baselines, places[served], at, sizes, read)
    routed, after = routers(here(places[served], weights=False))
    heldout = _chats(corpus) if _chats(corpus).exists() else corpus
    prompts = todo.routing("what routing is worth", places[served], last, heldout, after) if routed else tuple
    first, it = next(iter(known.items()))
    pair = (it.config.quantization, last.config.quantization) == ("none", "w8a8")
    cost_of = (places[first], places[served], at, sizes.int8_rows)
    lost = todo.one("what INT8 costs", compared.int8, *cost_of) if pair else list
    todo.do(run, tell)
    alone = Todo()  # what others beside it would slow
    speeds = alone.one("tokens per second", compared.speeds, places, served, sizes.decode_tokens)
    alone.do(run, tell)
    results = {label: found.quality() for label, found in of.items()}
    at_depth = {name: of[served].scored(found()) for name, found in depths.items()} | {FULL: results[served]}
    by_exit, facts, names = of[served].bits(), of[served].facts(), dict.fromkeys([*last.config.exit_names, *others])
    by_depth = [_depth_row(last.config, name, at_depth[name], by_exit, speeds(), facts["router"]) for name in names]
    rivals, fitted = beside()
    rows = _quality_rows(results, speeds()["by_label"], rivals, fitted, of)
    policies, kept = _routing(last.config, facts["router"], prompts())
    weak = weaknesses(rows, by_depth) + too_far(lost()) + _not_asked(results[served], last.config.context)
    weak += (tolerance.too_much(kept) if kept else []) + (sentence(policies) if policies else [])
    return {
        "machine": speeds()["machine"],
        "quality": {"columns": list(known), "rows": rows},
        "depth": {"rows": by_depth, "router": facts["router"].calibration.report if facts["router"] else {}},
        "tolerance": kept,
        "frontier": policies,
        "gates": facts["gates"],
        "int8": lost(),
        "weak": weak,
    }


class _Asked:
    """What is to be measured of one model, and its figures once that is done."""

    def __init__(
        self, todo: Todo, label: str, place: str, model: Described, corpus: Path, at: str, sizes: Sizes
    ) -> None:
        self._todo, self._place, self._model, name = todo, place, model, f"quality of {label}"
        self.questions, self._too_long = heldout_questions(model, corpus, sizes)
        self.bits = todo.bits(name, place, model.config.exits, corpus, at, sizes.heldout_rows)
        self._answers = self.answers(name, FULL)
        self.patches = todo.patches(name, place, corpus, at, sizes.heldout_rows)
        self.facts = todo.one(name, compared.facts, place)

    def answers(self, name: str, depth: str) -> Callable[[], dict[str, list[Answer]]]:
        tokens = {task: TASKS.get(task, MOST_TOKENS) for task in self.questions}
        return self._todo.answers(name, self._place, self.questions, tokens, depth)

    def scored(self, answers: Mapping[str, list[Answer]]) -> Quality:
        """What the answers at one depth are worth; a task that is not held out is left out."""
        out = Quality(too_long=self._too_long)
        for task, some in answers.items():
            score(out, task, some, self.questions[task])
            out.answers += some
        return out

    def quality(self) -> Quality:
        """At full depth."""
        out = self.scored(self._answers())
        out.figures |= {f"bpb {m}": found[self._model.config.layers] for m, found in self.bits().items()}
        return out


def _routing(
    config: ModelConfig, router: Router | None, sides: tuple[Prompts, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report's ``frontier`` and ``tolerance``, on held-out prompts; empty without a router or without prompts."""
    if router is None or not sides:
        return {}, {}
    fit, test = sides
    return frontier(config, router, fit, test), tolerance.lost(config, router, test)


def _not_asked(quality: Quality, context: int) -> list[str]:
    """A sentence for each task of which questions did not fit the context."""
    return [
        f"{count} held-out question(s) of {task} were not asked: with an answer they do not fit {context} tokens."
        for task, count in quality.too_long.items()
    ]


def _same_tokenizer(models: Mapping[str, Described], data: Path) -> None:
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


def heldout_questions(
    model: Model | Described, data: Path, sizes: Sizes
) -> tuple[dict[str, list[Question]], dict[str, int]]:
    """Held-out chat rows by task; none where there are no chats. The router was fitted to others, of other documents and
    conversations (`evaluate.halves`). Beside them, by task, how many the model's context has no room for with an answer."""
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


def text_baselines(
    models: Models, place: str, at: str, sizes: Sizes, read: Mapping[str, Sequence[int]]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """`baselines` on the held-out text and code that the models are measured on, fitted to the training rows in `read` [all];
    and a sentence about what they were fitted to. The tokenizer is that of the model at `place`."""
    data, tokenizer = local(at), described.read(here(place, weights=False)).tokenizer
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
    config: ModelConfig,
    depth: str,
    found: Quality,
    by_exit: Mapping[str, Mapping[int, Figure]],
    speeds: Mapping[str, Any],
    router: Router | None,
) -> dict[str, Any]:
    """One row of the depth table: quality, FLOPs share and speed at one exit, or under the router. Shares of the FLOPs, and the
    router's of the layers, are by what ran: a long answer counts as much as it costs. Where nothing was asked, of one token."""
    layers = config.asked(depth)
    ran = found.answers or [Answer("", 1, layers or config.layers, prompt=1)]
    row: dict[str, Any] = {
        "exit": depth,
        "layers": layers or round(measures.mean_depth(found.answers), 2),
        "flops_share": flops_share(ran, config, router if layers is None else None),
        "tokens_per_s": speeds["by_exit"][layers] if layers else None,
        "answers": len(found.answers),
    }
    columns = {"vqa": found.figures.get("image question"), "bleu": found.figures.get("summarisation")}
    columns |= {f"bpb {m}": by_exit[m][layers] if layers and m in by_exit else None for m in ("text", "code")}
    for name, figure in columns.items():
        row[name] = figure.value if figure else None
        row[f"{name} interval"] = figure.ends if figure else None
    return row


def flops_share(answers: Sequence[Answer], config: ModelConfig, router: Router | None) -> float:
    """FLOPs of all `answers` with their prompts, each at its depth, over those at full depth; with what `router` took."""
    ran = sum(cost.request_flops(config, answer.prompt, answer.tokens, answer.depth) for answer in answers)
    if router:
        ran += sum(cost.routing_flops(config, answer.prompt, router.reads_nll) for answer in answers)
    return ran / max(1, sum(cost.request_flops(config, answer.prompt, answer.tokens) for answer in answers))


def _quality_rows(
    results: Mapping[str, Quality],
    speeds: Mapping[str, Mapping[int, Sequence[float]]],
    beside: Mapping[str, dict[str, float]],
    fitted: Mapping[str, str],
    of: Mapping[str, _Asked],
) -> list[dict[str, Any]]:
    first, patches = next(iter(results.values())), {label: found.patches() for label, found in of.items()}
    rows = []

    def add(metric: str, unit: str, key: str, each: str, *, rival: str = "", **more: Any) -> None:
        """A row of the figure `key` of each model; none when it was not measured."""
        if key in first.figures:
            if rival:
                more["beside"] = {rival: first.rivals[key]}
            figures = {label: found.figures[key] for label, found in results.items()}
            rows.append(row_of(metric, unit, figures, of=each, note=more.pop("note", first.notes.get(key, "")), **more))

    for modality, by_name in beside.items():
        each, note = "predicted tokens", fitted[modality]
        add(f"bpb {modality}", "bits/byte", f"bpb {modality}", each, beside=by_name, note=note)
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
    rows.append(row_of("weight file", "bytes", {label: found.facts()["bytes"] for label, found in of.items()}))
    return rows
