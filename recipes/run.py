"""The frame of every recipe: data, a model that learns it, INT8, and what both are worth, from an empty folder by one command.

    DIR/  recipe.json       what was asked for
          learned.json      the SHA-256 of each file that the model learned from
          *.jsonl suites/   what is learned from, fitted to, and asked; the suites are frozen
          fresh/ learn-N/   a model that knows nothing, and what it was after each lesson
          model/ int8/      the fp32 model and the INT8 one, with their routers: what is served
          policy.yaml       what to serve them with: depths by workload, and what the recipe adds to answers
          seconds.json      what each step took, and begun.json how often it was begun
          report.json .md   what they are worth, written last

Each step leaves a result whose presence means complete, so a second call goes on where the first stopped. One whose result was
taken away is done anew, and so is what follows from it: new data alone leave the models, and have a new report.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recipes import own, report
from recipes.recipe import DEV, POLICY, SUITES, Recipe
from shoal.data.chats import forms
from shoal.errors import DataError, ResourceError, UsageError
from shoal.inputs import tools
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import need_disk, need_memory, sha256_of, write_aside
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.progress import Tell

SETTINGS, REPORT, TOOK, BEGUN = "recipe.json", "report.json", "seconds.json", "begun.json"
LEARNED = "learned.json"
LEARN, QUANTIZE = GO_ON = ("learn", "quantize")  # steps that go on where they were broken off; others begin anew
# By a step: what was of another model.
SPOILT = {"data": (REPORT,), LEARN: ("int8.run", "int8", REPORT), QUANTIZE: (REPORT,)}
FORMAT, VERSION = "shoal.recipe", 1
TOKENIZER_ROWS = 2_000  # that a tokenizer is fitted to
INT8_SHARE = 0.1  # of the minutes
# of an imported model: thin matrices, and many small updates, of which minutes hold a hundred
OPEN_HOW = {"lora_rank": 16, "learning_rate": 1e-3, "batch_tokens": 1024, "accumulate": 1}
FP32, INT8 = "fp32", "int8"  # columns of the report; of imported models `OPEN` stands before them
OPEN = "open"
DISK, MEMORY = 2**30, 2 * 2**30  # bytes
AT_ONCE = 2  # models that are asked, in a process each


@dataclass(frozen=True)
class Asked:
    """`minutes` of learning in all, on so many `workers`; `model`: an imported model directory to begin with, "" for fresh
    weights; `beside`: folder of a run from fresh weights, whose models are measured beside an imported one."""

    minutes: float
    seed: int = 0
    workers: int = 2
    model: str = ""
    beside: str = ""


def run(recipe: Recipe, folder: Path, asked: Asked, tell: Tell, say: Callable[[str], None]) -> dict[str, Any]:
    """Do what is missing in `folder` and return the report. Raises UsageError, also for a folder of something else, DataError
    for one of another recipe or of other settings, ResourceError where another command is at work there."""
    from shoal.data.alone import alone
    from shoal.on_ray.resources import local_ray

    if not 0 < asked.minutes <= 10_000:
        raise UsageError("--minutes", got=asked.minutes, allowed="above 0, at most 10,000")
    if asked.workers < 1:
        raise UsageError("--workers", got=asked.workers, allowed="1 or more")
    if not 0 <= asked.seed < 2**63:
        raise UsageError("--seed", got=asked.seed, allowed="0 to 2^63 - 1")
    _check_folder(folder)
    need_disk(folder, DISK)
    need_memory(MEMORY)
    _check_open(recipe, asked)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder / ".recipe.lock", ResourceError(f"another command is at work in {folder}", do="wait for it")):
        _same(recipe, folder, asked)
        known = _reported(folder)
        if (known.get("asked", {}).get("beside", ""), known.get("beside_sha256", {})) != (asked.beside, _beside(asked)):
            _take_away(folder / REPORT)  # it has another column, or one of other models
        steps: list[tuple[str, Path, Callable[[], None]]] = [
            ("data", folder / SUITES / "suites.json", lambda: _data(recipe, folder, asked.seed)),
            (LEARN, folder / "model" / "config.json", lambda: _learn(recipe, folder, asked, tell, say)),
            (QUANTIZE, folder / "int8" / "config.json", lambda: _quantize(recipe, folder, asked, tell, say)),
            ("evaluate", folder / REPORT, lambda: _evaluate(recipe, folder, asked, tell)),
        ]
        began = time.monotonic()  # Ray's start is the first step's
        with local_ray():
            for name, result, step in steps:
                if result.exists():
                    say(f"{name}: done before -> {result.parent}")
                    continue
                for spoilt in SPOILT.get(name, ()):
                    _take_away(folder / spoilt)
                known = _read(folder / BEGUN)
                write_aside(folder / BEGUN, json.dumps(known | {name: known.get(name, 0) + 1}) + "\n")
                step()
                took, began = time.monotonic() - began, time.monotonic()
                write_aside(folder / TOOK, json.dumps(_read(folder / TOOK) | {name: took}) + "\n")
                say(f"{name}: {took:.0f} s -> {result.parent}")
    return _reported(folder)


def _took(folder: Path, evaluate: float) -> dict[str, Any]:
    """Of the report ``seconds`` of each step, and the steps that were ``broken_off``: what they took before is not known."""
    begun = _read(folder / BEGUN)
    return {
        "seconds": _read(folder / TOOK) | {"evaluate": evaluate},
        "broken_off": [name for name in GO_ON if begun.get(name, 0) > 1],
    }


def _take_away(path: Path) -> None:
    """A file, or a folder with all that is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _reported(folder: Path) -> dict[str, Any]:
    """The report of a run; nothing where there is none yet."""
    return _read(folder / REPORT)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of our own; empty where there is none yet."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def _check_folder(folder: Path) -> None:
    """Raises UsageError where something lies that is of no run: files of these names would be written over, and a model among
    them taken for what was learned."""
    if (folder / own.SETTINGS).exists():
        raise UsageError("--out", got=str(folder), allowed="another folder: in this one a recipe's own data lie")
    there = sorted(one.name for one in folder.iterdir() if one.name[0] != ".") if folder.is_dir() else []
    if there and SETTINGS not in there:
        got = f"{folder}, in which {there[0]} lies"
        raise UsageError("--out", got=got, allowed="an empty folder, or one of the same recipe")


def _check_open(recipe: Recipe, asked: Asked) -> None:
    """Raises CheckpointError for a model to begin with that is none, UsageError for one that was not imported, and for a run
    beside it that is not of the same recipe, seed and data from fresh weights, or is not done."""
    from shoal.model import described

    if asked.model:
        described.read_config(asked.model)
        if not (Path(asked.model) / described.SOURCE).exists():
            raise UsageError("--model", got=asked.model, allowed="an imported model", do="import one: shoal import")
    if not asked.beside:
        return
    if not asked.model:
        raise UsageError("--beside", do="give --model as well: it stands beside a run of imported weights")
    began = Path(asked.beside) / SETTINGS
    known = json.loads(began.read_text(encoding="utf-8")) if began.exists() else {}
    wanted = {"recipe": recipe.name, "data": recipe.source(), "seed": asked.seed, "model": ""}
    got = {name: known.get(name, "") for name in wanted}
    models = (Path(asked.beside) / name / "config.json" for name in ("model", "int8"))
    if got != wanted or not _reported(Path(asked.beside)) or not all(path.exists() for path in models):
        allowed = f"a run of {recipe.name} from fresh weights with seed {asked.seed} and these data that is done"
        raise UsageError("--beside", got=asked.beside, allowed=allowed)


def _same(recipe: Recipe, folder: Path, asked: Asked) -> None:
    """Note what is asked for. Raises DataError where the folder was begun for something else."""
    told = {"format": FORMAT, "version": VERSION, "recipe": recipe.name, "data": recipe.source(), **asdict(asked)}
    path = folder / SETTINGS
    if not path.exists():
        write_aside(path, json.dumps(told, indent=1) + "\n")
        return
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is no JSON", do="choose another --out") from error
    differs = [key for key in told if key not in ("workers", "beside") and known.get(key, "") != told[key]]
    if differs:
        got = ", ".join(f"{key} {told[key]}" for key in differs)
        was = ", ".join(f"{key} {known.get(key, 'of which nothing is noted')}" for key in differs)
        raise DataError(f"{folder} was begun with other settings", got=got, allowed=was, do="choose another --out")


def _data(recipe: Recipe, folder: Path, seed: int) -> None:
    from shoal.loop.suites import freeze

    recipe.write(folder, seed)
    freeze(folder / SUITES, recipe.most_tokens)


def _learn(recipe: Recipe, folder: Path, asked: Asked, tell: Tell, say: Callable[[str], None]) -> None:
    from shoal.evaluate import routing

    if asked.beside:
        _same_suites(folder, Path(asked.beside))  # before minutes of learning, and not after
    minutes = asked.minutes * (1 - INT8_SHARE)
    if asked.model:
        lessons, base, how = recipe.lessons[-1:], Path(asked.model), OPEN_HOW
    else:
        lessons, base, how = recipe.lessons, _fresh(recipe, folder, asked.seed), _how(recipe)
    whole = sum(lesson.share for lesson in lessons)
    for number, lesson in enumerate(lessons, 1):
        out = folder / f"learn-{number}"
        if not (out / "model" / "config.json").exists():
            known = _read(folder / LEARNED) | {lesson.file: sha256_of(folder / lesson.file)}
            write_aside(folder / LEARNED, json.dumps(known, indent=1) + "\n")
            _fit(
                _plan(base, folder / lesson.file, out, minutes * lesson.share / whole, asked.seed, **how),
                asked.workers,
                tell,
            )
        base = out / "model"
    beside = folder / "model.making"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(base, beside)
    routing.finish(beside, folder / DEV, say)
    beside.rename(folder / "model")


def _plan(base: Path, data: Path, out: Path, minutes: float, seed: int, **how: Any) -> Any:
    from shoal.train.plan import finetune_plan

    return finetune_plan(str(base), str(data), str(out), minutes=minutes, seed=seed, eval_every=0, **how)


def _how(recipe: Recipe) -> dict[str, Any]:
    """How fresh weights learn: as the preset says, and not as a model that knows something is tuned."""
    train = recipe.preset.train
    names = ("learning_rate", "optimizer", "batch_tokens", "accumulate", "weight_decay", "exit_warmup")
    return {name: getattr(train, name) for name in names}


def _fresh(recipe: Recipe, folder: Path, seed: int) -> Path:
    """A model of the recipe's shape that knows nothing, with a tokenizer fitted to what it will learn."""
    import dataclasses

    out = folder / "fresh"
    if not (out / "config.json").exists():
        tokenizer = Tokenizer.train(_texts(folder / recipe.lessons[-1].file), recipe.preset.model.vocab)
        config = dataclasses.replace(recipe.preset.model, vocab=len(tokenizer))
        Model(config, Net(config).init_(seed), tokenizer, name=recipe.name).save(out)
    return out


def _texts(path: Path) -> Iterator[str]:
    """What a model reads of the first rows of a file of chats."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number == TOKENIZER_ROWS:
                return
            for message in forms.canonical(json.loads(line))["messages"]:
                yield "".join(part["text"] for part in tools.parts(message["content"]))


def _quantize(recipe: Recipe, folder: Path, asked: Asked, tell: Tell, say: Callable[[str], None]) -> None:
    """INT8 of what was learned: by a short training from nothing's model, by rounding of an imported one."""
    from shoal.evaluate import routing
    from shoal.evaluate.rounding import rounded
    from shoal.train.plan import quantize_plan

    out, made = folder / "int8", folder / "int8.making"
    shutil.rmtree(made, ignore_errors=True)
    if asked.model:
        rounded(Model.load(folder / "model")).save(made)
    else:
        data, spent = str(folder / recipe.lessons[-1].file), asked.minutes * INT8_SHARE
        plan = quantize_plan(
            str(folder / "model"), data, str(made), run=str(folder / "int8.run"), minutes=spent, seed=asked.seed, eval_every=0,
            batch_tokens=recipe.preset.train.batch_tokens, accumulate=recipe.preset.train.accumulate,
        )  # fmt: skip
        _fit(plan, asked.workers, tell)
    routing.finish(made, folder / DEV, say)
    made.rename(out)


def _fit(plan: Any, workers: int, tell: Tell) -> None:
    """Train on Ray, half a logical CPU a worker, as the quickstart does."""
    from shoal.on_ray.train import train

    def show(record: dict[str, Any]) -> None:
        if record["kind"] == "step":
            tell(f"train: loss {record['loss']:.3f}  {record['tokens_per_second']:,.0f} tok/s", record["progress"], 1.0)

    train(plan, workers=workers, cpus_per_worker=0.5, on_progress=show)


def _evaluate(recipe: Recipe, folder: Path, asked: Asked, tell: Tell) -> None:
    from recipes.measure import measured
    from shoal.evaluate import pieces
    from shoal.evaluate.evaluation import leave_a_core

    began = time.monotonic()
    leave_a_core()
    models = {FP32: folder / "model", INT8: folder / "int8"}
    if asked.model:
        models = {f"{OPEN} {label}": path for label, path in models.items()}
    if asked.beside:
        _same_suites(folder, Path(asked.beside))
        beside = Path(asked.beside)
        models = {FP32: beside / "model", INT8: beside / "int8", **models}
    most_rows = recipe.open_rows if asked.model else 0
    found = measured(recipe, models, folder, asked.seed, tell, most_rows=most_rows, run=pieces.beside(AT_ONCE))
    # Last: whoever is the first to run a model on a machine compiles its loops, and no service is slow to start for that.
    tell("a service of each model alone", len(models) + 1, len(models) + 2)
    served = {label: _footprint(path) for label, path in models.items()}
    found["asked"], found["beside_sha256"] = asdict(asked), _beside(asked)
    found["costs"] = {label: {**cost, "served": served[label]} for label, cost in found["costs"].items()}
    found["data_sha256"] = _read(folder / LEARNED)
    found |= _took(folder, time.monotonic() - began)
    _write_policy(recipe, folder, found["workloads"])
    write_aside(folder / "report.md", report.markdown(recipe, found))
    write_aside(folder / REPORT, json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _footprint(model: Path) -> dict[str, Any]:
    """What serving a model alone takes, or why that is not known: of a machine, and no reason to lose the answers' figures."""
    from recipes.footprint import footprint

    try:
        return footprint(model)
    except ResourceError as error:
        return {"failed": str(error)}


def _beside(asked: Asked) -> dict[str, str]:
    """The SHA-256 of the models that stand beside, by their column: a run in that folder may be another one by now."""
    from shoal.model import files

    if not asked.beside:
        return {}
    return {label: files.weights_sha256(Path(asked.beside) / name) for label, name in ((FP32, "model"), (INT8, "int8"))}


def _same_suites(folder: Path, beside: Path) -> None:
    """Raises DataError where two runs ask different things."""
    from shoal.loop import suites

    mine, others = ({one.name: one.sha256 for one in suites.read(some / SUITES)} for some in (folder, beside))
    if mine != others:
        raise DataError(f"{beside} asks other suites", do="run it anew with this version, or leave --beside out")


def _write_policy(recipe: Recipe, folder: Path, picked: list[dict[str, Any]]) -> None:
    import yaml

    policy = recipe.policy()
    picks = {row["workload"]: row["pick"] for row in picked if row["pick"] is not None}
    told = asdict(policy) | {"workloads": {**policy.workloads, **picks}}
    plain = json.loads(json.dumps({key: value for key, value in told.items() if value}))
    write_aside(folder / POLICY, yaml.safe_dump(plain, allow_unicode=True, sort_keys=False))
