"""Ten candidates that must not be released: does the gate refuse each, and for which of its checks?

Four are badly trained, from the fp32 parent: without anything old, with the labels of other questions, with half of them
wrong, and a few rows learned by heart. These have a router, as `shoal retrain` would give them: else they would be refused for
the want of one alone. Six are bad as they lie there: of another tokenizer, shape or chat template, weights that are broken or
noisy, and the stable version itself, which is no better at anything.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from shoal.bench.loop_shop import Asked
from shoal.bench.loop_teach import shuffled, write
from shoal.data.chats.rows import HELDOUT
from shoal.evaluate import routing
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop import suites
from shoal.loop.gate import gate
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.train.loop import fit
from shoal.train.plan import finetune_plan

Say = Callable[[str], None]

STEPS = 40  # updates of each that is trained
NEW, OLD, FROZEN, RECENT = 150, 600, 400, 230  # rows
NOISE = 0.3  # standard deviations of each weight


def refuse(parent: Path, data: Path, work: Path, say: Say, *, steps: int = STEPS) -> dict[str, dict[str, Any]]:
    """Of each candidate the verdict beside the fp32 model in `parent`, and the checks that it did not pass. `data`: the corpus
    that it was trained on."""
    folder, found = work / "suites", dict[str, dict[str, Any]]()
    old, new = shuffled("old"), shuffled("catalogue")
    write(folder / "shop.jsonl", old[:FROZEN])
    write(folder / "recent-shop.jsonl", new[:RECENT], "recent")
    if not (folder / suites.MANIFEST).exists():
        suites.freeze(folder)
    made = {
        **_as_they_lie(Model.load(parent), work),
        **_trained(parent, data, work, old[FROZEN:], new[RECENT:], steps, say),
    }
    for name, make in made.items():
        verdict = gate(make(), parent, folder, data=data)
        names = [check.name for check in verdict.checks if check.status not in ("pass", "skipped")]
        found[name] = {"verdict": verdict.verdict, "passed": verdict.passed, "not_passed": names}
        say(f"{name}: {verdict.verdict} ({', '.join(names)})")
    return found


def _as_they_lie(parent: Model, work: Path) -> dict[str, Callable[[], Path]]:
    def saved(name: str, change: Callable[[Model], Model | None]) -> Callable[[], Path]:
        def make() -> Path:
            model = _copied(parent)
            model = change(model) or model
            model.save(work / name)
            return work / name

        return make

    def noisy(model: Model) -> None:
        draws = torch.Generator().manual_seed(1)
        for weight in model.net.parameters():
            spread = weight.std().nan_to_num()
            weight.add_(NOISE * spread * torch.randn(weight.shape, generator=draws))

    def broken(model: Model) -> None:
        for norm in model.net.exit_norms.values():
            next(norm.parameters()).fill_(float("nan"))

    def tokens(model: Model) -> None:
        model.tokenizer = Tokenizer.train(["where is the lamp that I bought"] * 50, model.config.vocab)

    def shape(model: Model) -> Model:
        config = dataclasses.replace(model.config, layers=model.config.layers + 1)
        return Model(config, Net(config).init_(0), model.tokenizer)

    def template(model: Model) -> None:
        model.chat_template += "\n{# another #}"

    return {
        "another tokenizer": saved("tokenizer", tokens),
        "another shape": saved("shape", shape),
        "another chat template": saved("template", template),
        "broken weights": saved("broken", broken),
        "noisy weights": saved("noisy", noisy),
        "no better at anything": saved("same", lambda model: None),
    }


def _copied(model: Model) -> Model:
    """`model` with weights of its own."""
    net = Net(model.config)
    net.load_state_dict(model.net.state_dict())
    return Model(
        model.config, net, model.tokenizer, name=model.name, chat_template=model.chat_template, router=model.router
    )


def _trained(
    parent: Path, data: Path, work: Path, old: list[Asked], new: list[Asked], steps: int, say: Say
) -> dict[str, Callable[[], Path]]:
    """From rows that are wrong, at the rate of a first fine-tuning."""

    def trained(name: str, rows: list[Asked], **more: Any) -> Callable[[], Path]:
        def make() -> Path:
            path, run = work / f"{name}.jsonl", work / f"{name}-run"
            write(path, rows)
            shutil.rmtree(run, ignore_errors=True)
            plan = finetune_plan(str(parent), str(path), str(run), epochs=None, steps=steps, eval_every=0, **more)
            model = Path(fit(plan).out)
            held = data / HELDOUT
            if routing.finish(model, held if held.is_file() else "", say) is None:
                routing.take_over(model, parent, say)
            return model

        return make

    mix = [*new[:NEW], *old[:OLD]]
    return {
        "nothing old": trained("alone", new[:NEW]),
        "labels of other questions": trained("shuffled", _wrong(mix, 1.0), replay=str(data)),
        "half of the labels wrong": trained("half", _wrong(mix, 0.5), replay=str(data)),
        "a few rows by heart": trained("heart", new[:16], learning_rate=1e-2),
    }


def _wrong(rows: list[Asked], share: float) -> list[Asked]:
    """`rows` of which a share has the answers of others among them."""
    draws = random.Random(0)
    places = [place for place in range(len(rows)) if draws.random() < share]
    others = places[:]
    draws.shuffle(others)
    found = list(rows)
    for place, other in zip(places, others, strict=True):
        found[place] = dataclasses.replace(rows[place], answer=rows[other].answer)
    return found


def shown(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "candidate", "verdict", "not passed", title=f"the gate and {len(found)} bad candidates; all must be refused"
    )
    for name, one in found.items():
        table.add_row(name, one["verdict"], ", ".join(one["not_passed"]))
    return table
