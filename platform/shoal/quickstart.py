"""The whole main job on one machine: corpus -> shards -> pretraining -> fine-tuning -> INT8 -> report -> a chat that answers.
A short control run after pretraining tells what the early exits cost.

Each stage leaves a result whose presence means complete, so a second call goes on where the first stopped. The stages
are the functions that the subcommands and the jobs call; nothing here is a special path.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from shoal import presets
from shoal.api.serve_args import ServeArgs
from shoal.clients import samples
from shoal.data.chats.rows import HELDOUT
from shoal.evaluate import routing
from shoal.evaluate.control import control_plan, exit_tax, too_high
from shoal.evaluate.evaluation import compare, leave_a_core
from shoal.evaluate.report import write_report
from shoal.evaluate.tables import print_tables
from shoal.machine import need_disk, need_free_port, need_memory
from shoal.on_ray import serve
from shoal.on_ray.prepare import prepare
from shoal.on_ray.resources import local_ray
from shoal.on_ray.serve_config import serve_config
from shoal.on_ray.train import train
from shoal.progress import Tell, duration, progress
from shoal.train import log
from shoal.train.plan import FitPlan, finetune_plan, pretrain_plan, quantize_plan

PRESET = "tiny"
MIX = {"text": 0.6, "image": 0.2, "code": 0.2}
MINUTES = {"pretrain": 4.5, "finetune": 3.5, "quantize": 0.75}
CONTROL = 1 / 3  # of pretraining's updates: how long the control trains, with which the exit tax is measured
EVAL_EVERY = 50  # updates of pretraining between held-out evaluations, so that one is near the control's end
WORKERS = 2
SERVED = ServeArgs(min_replicas=1, max_replicas=2, cpus=1, ui=True)  # as serve_configs/local.yaml, which a wheel lacks
DISK = 2 * 2**30  # bytes: shards, checkpoints and two models of this size, with room to spare
MEMORY = 4 * 2**30  # bytes: what Ray, its helpers and two training workers took together


@dataclass(frozen=True)
class Run:
    """Where everything of one run lies, and how long its training stages may take (`scale` of `MINUTES`)."""

    root: Path
    scale: float = 1.0

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def int8(self) -> Path:
        return self.root / "model-int8"

    @property
    def chats(self) -> Path:
        """What is fine-tuned on."""
        return self.data / "sft-train.jsonl"

    @property
    def asked(self) -> Path:
        """Held-out chats: what the router is fitted on and the models are asked."""
        return self.data / HELDOUT

    @property
    def report(self) -> Path:
        return self.root / "report.json"

    def metrics(self, stage: str) -> Path:
        return self.root / stage


def run(root: Path, *, stay: bool, port: int, scale: float, console: Console) -> None:
    """Do what is missing under `root`, print the tables, ask three sample questions; with `stay`, serve until Ctrl-C."""
    place, began = Run(root, scale), time.monotonic()
    need_disk(root, DISK)
    need_memory(MEMORY)
    need_free_port("127.0.0.1", port)
    root.mkdir(parents=True, exist_ok=True)
    leave_a_core()
    stages: list[tuple[str, Path, Callable[[Run, Tell], None]]] = [
        ("prepare", place.data / "index.json", _prepare),
        ("pretrain", root / "pretrain" / "model" / "router.json", _pretrain),
        ("control", root / "control" / "model" / "config.json", _control),
        ("finetune", place.model / "router.json", _finetune),
        ("quantize", place.int8 / "router.json", _quantize),
        ("evaluate", place.report, _evaluate),
    ]
    with local_ray():
        for number, (name, result, stage) in enumerate(stages, 1):
            head, start = f"[{number}/{len(stages) + 1}] {name:9s}", time.monotonic()
            if result.exists():
                _say(console, f"{head} done before -> {result.parent}")
                continue
            _say(console, f"{head} ...")
            with progress(name, console) as tell:
                stage(place, tell)
            _say(console, f"{head} {duration(time.monotonic() - start)} -> {result.parent}")
        print_tables(json.loads(place.report.read_text(encoding="utf-8")), console)
        head = f"[{len(stages) + 1}/{len(stages) + 1}] serve    "
        _serve(place, port, stay=stay, console=console, began=began, head=head)


def _prepare(place: Run, tell: Tell) -> None:
    preset = presets.get(PRESET)
    prepare(place.data, sources=None, mix=MIX, preset=preset, seed=preset.train.seed, on_progress=tell)


def _pretrain(place: Run, tell: Tell) -> None:
    plan = _main_plan(place)
    if not (plan.model_dir / "config.json").exists():
        _fit(plan, tell)
    tell("router", 0, 0)
    routing.refit(plan.model_dir, place.data)


def _main_plan(place: Run) -> FitPlan:
    budget = _budget(place, "pretrain")
    return pretrain_plan(PRESET, str(place.data), str(place.metrics("pretrain")), eval_every=EVAL_EVERY, **budget)


def _control(place: Run, tell: Tell) -> None:
    _fit(control_plan(_main_plan(place), place.metrics("control"), CONTROL), tell)


def _finetune(place: Run, tell: Tell) -> None:
    if not (place.model / "config.json").exists():
        base, run_dir, out = str(place.metrics("pretrain") / "model"), str(place.metrics("finetune")), str(place.model)
        budget = _budget(place, "finetune")
        _fit(finetune_plan(base, str(place.chats), run_dir, out=out, **_chats(place), **budget), tell)
    tell("router", 0, 0)
    routing.refit(place.model, place.asked)


def _quantize(place: Run, tell: Tell) -> None:
    if not (place.int8 / "config.json").exists():
        base, run_dir, out = str(place.model), str(place.metrics("quantize")), str(place.int8)
        budget = _budget(place, "quantize")
        _fit(quantize_plan(base, str(place.chats), out, run=run_dir, **_chats(place), **budget), tell)
    tell("router", 0, 0)
    routing.refit(place.int8, place.asked)


def _evaluate(place: Run, tell: Tell) -> None:
    runs = [place.metrics(name) for name in MINUTES]
    report = compare({"fp32": place.model, "int8": place.int8}, place.data, runs=runs, on_progress=tell)
    stages = [stage_history(place.metrics(name), name) for name in MINUTES]
    tax = exit_tax(place.metrics("pretrain"), place.metrics("control"))
    report["exit_tax"] = {**tax, "heldout_rows": _main_plan(place).eval_rows}
    report["weak"] += still_learning(stages[0]) + too_high(report["exit_tax"])
    corpus = json.loads((place.data / "report.json").read_text(encoding="utf-8"))
    write_report(place.report, {"title": f"Quickstart, preset {PRESET}", "corpus": corpus, "stages": stages, **report})


def _chats(place: Run) -> dict[str, str]:
    """What both runs on chats measure themselves on and go back to."""
    return {"heldout": str(place.asked), "replay": str(place.data)}


def _budget(place: Run, stage: str) -> dict[str, float]:
    return {"minutes": MINUTES[stage] * place.scale}


def _fit(plan: FitPlan, tell: Tell) -> None:
    """Train on Ray, half a logical CPU a worker so that whatever else runs on this machine is never starved."""

    def show(record: log.Record) -> None:
        if record["kind"] == "step":
            bpb = f"bpb {record['bpb']:.3f}  " if record["bpb"] is not None else ""
            what = f"train: loss {record['loss']:.3f}  {bpb}{record['tokens_per_second']:,.0f} tok/s"
            tell(what, record["progress"], 1.0)

    train(plan, workers=WORKERS, cpus_per_worker=0.5, on_progress=show)


def stage_history(run_dir: Path, name: str) -> dict[str, Any]:
    """A training run for the report: its curve, at most 200 points, its held-out bits per byte at full depth by modality,
    and what it came to."""
    records = log.read(run_dir)
    steps = [r for r in records if r["kind"] == "step"]
    last = next((r for r in reversed(records) if r["kind"] == "end"), {})
    curve = [
        {"step": r["step"], "loss": r["loss"], "bpb": r["bpb"], "lr": r["rate"], "tokens_per_s": r["tokens_per_second"]}
        for r in steps[:: max(1, len(steps) // 200)]
    ]
    heldout = [
        {"step": r["step"], **{modality: by_exit["full"] for modality, by_exit in r["bpb"].items()}}
        for r in records
        if r["kind"] == "eval"
    ]
    seconds, tokens = last.get("seconds", 0.0), last.get("tokens", 0)
    return {"name": name, "seconds": seconds, "tokens": tokens, "metrics": curve, "heldout": heldout}


def still_learning(stage: dict[str, Any]) -> list[str]:
    """A sentence for each of text and code whose held-out bits per byte no longer fell at the end of `stage`."""
    said = []
    for modality in ("text", "code"):
        values = [measured[modality] for measured in stage["heldout"] if modality in measured]
        if len(values) > 1 and values[-1] >= values[-2]:
            said.append(
                f"Held-out {modality} stopped falling in {stage['name']}: {values[-2]:.3f}, then {values[-1]:.3f}."
            )
    return said


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _serve(place: Run, port: int, *, stay: bool, console: Console, began: float, head: str) -> None:
    """Deploy the INT8 model as `SERVED` says, ask the samples, and with `stay` serve until Ctrl-C."""

    def ready(url: str) -> None:
        answers = samples.ask(f"{url}/v1", place.data)
        for answer in answers:
            samples.show(answer, console)
        report = json.loads(place.report.read_text(encoding="utf-8"))
        write_report(place.report, {**report, "samples": [answer.as_row() for answer in answers]})
        took = duration(time.monotonic() - began)
        _say(console, f"{head} ready {took} after the start; report: {place.report.with_suffix('.html')}")
        if stay:
            _say(console, f"{head} API {url}/v1   chat page {url}/ui   (Ctrl-C ends it)")

    deploy = serve_config(replace(SERVED, model=str(place.int8)), port=port)
    try:
        serve.run(deploy, blocking=stay, on_ready=ready)
    finally:
        serve.stop()
