"""From the first request of a new catalogue to a verdict, beside the service: notice, correct, curate, retrain, judge.

    2,300 old questions  ─>  quiet  ─>  new ones, of which customers correct the wrong answers  ─>  alarm  ─>  shoal curate
      ─>  shoal retrain with suites, corpus and replay, while the service is asked both  ─>  the gate's verdict, a candidate

All that is learned comes from corrections. Scores are of depth "auto", before and after, on questions of other customers.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from shoal.bench.loop_service import PEOPLE, Service, running
from shoal.bench.loop_shop import Asked, known
from shoal.data.chats.heldout import questions
from shoal.engine.engine import Engine
from shoal.errors import ShoalError, UsageError
from shoal.evaluate.answering import generate
from shoal.evaluate.intervals import of_share
from shoal.loop import suites
from shoal.loop.gate import scores
from shoal.loop.reference import LEARNED
from shoal.loop.release import Release
from shoal.loop.watch import Watch
from shoal.model.model import Model

Say = Callable[[str], None]

QUIET = 300  # old questions after the reference
# new questions that are corrected: of these some 600 are no near copies of others, and of them 200 are held out
CORRECTED = 1_800
EVERY = 40  # questions between two looks
FROZEN, HELD = 1_000, 300  # questions of the frozen suite, and of each domain that is scored
ANSWER = 48  # tokens
SHOP = "shop.jsonl"


def write(path: Path, some: Sequence[Asked], task: str = "customer service") -> None:
    """Chats with answers; those of one phrasing are of one group."""
    rows = [
        {
            "messages": [{"role": "user", "content": one.text}, {"role": "assistant", "content": one.answer}],
            "task": task,
            "group": one.phrasing,
        }
        for one in some
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def shuffled(domain: str, seed: int = 0) -> list[Asked]:
    """All questions of a domain, in an order of the seed's."""
    some = known(domain)
    random.Random(seed).shuffle(some)
    return some


def score(model: Model, path: Path) -> dict[str, Any]:
    """The share that is answered exactly right at depth "auto", with its 95 % interval."""
    found: list[bool] = []
    groups: list[int] = []
    for task, rows in questions(path, model.tokenizer, model.config, model.chat_template).items():
        answers = generate(Engine(model), [row.prompt for row in rows], ANSWER, "auto")
        found += [value == 1.0 for value in scores(task, answers, rows)]
        groups += [row.group for row in rows]
    figure = of_share(found, groups)
    return {"exact": figure.value, "interval": figure.ends, "questions": figure.rows}


async def command(*words: str) -> dict[str, Any]:
    """What a command of `shoal` says with --json, run in a process of its own. Raises ShoalError where it fails."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "shoal.cli",
        *words,
        "--json",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        raise ShoalError(f"shoal {words[0]}", got=err.decode(errors="replace").strip()[-2000:])
    told: dict[str, Any] = json.loads(out.decode().splitlines()[-1])
    return told


async def teach(release: Release, data: Path, work: Path, minutes: float, say: Say, *, seed: int = 0) -> dict[str, Any]:
    """The figures; the candidate is in `release` then. `data`: the corpus that the model was trained on, with its chats;
    `seed`: of the order in which the questions are asked, and so of who asks which, and what is held out."""
    old, new = shuffled("old", seed), shuffled("catalogue", seed)
    write(work / "suites" / SHOP, old[-FROZEN:])
    write(work / "held" / "old.jsonl", old[-FROZEN - HELD : -FROZEN])
    write(work / "held" / "new.jsonl", new[-HELD:])
    if not (work / "suites" / suites.MANIFEST).exists():
        suites.freeze(work / "suites")
    async with running(release, work / "capture") as service:
        alarm = await _noticed(service, old, new, say)
        began = time.monotonic()
        cut, beside = work / "cut", asyncio.Event()
        traffic = asyncio.create_task(_asked_beside(service, [*old[:400], *new[:400]], beside))
        try:
            made = await command(
                "curate", "--capture", str(work / "capture"), "--out", str(cut), "--replay", str(data / "sft-train.jsonl"),
                "--suites", str(work / "suites"), "--never", str(work / "held" / "old.jsonl"),
                "--never", str(work / "held" / "new.jsonl"),
            )  # fmt: skip
            say(f"cut: {made['train']} new rows, {made['replay']} old ones, {made['recent']} held out")
            candidate = await command(
                "retrain", "--release", str(release.directory), "--cut", str(cut), "--kind", "finetune",
                "--minutes", f"{minutes:g}", "--replay", str(data), "--data", str(data), "--suites", str(work / "suites"),
            )  # fmt: skip
        finally:
            beside.set()
            asked = await traffic
        seconds = time.monotonic() - began
    version = release.version(candidate["version"])
    verdict = version.verdict or {}
    say(f"verdict after {seconds / 60:.1f} min: {verdict.get('sentence')}")
    models = {"before": release.stable().served, "after": version.served}
    found = {
        domain: {when: score(Model.load(path), work / "held" / f"{domain}.jsonl") for when, path in models.items()}
        for domain in ("old", "new")
    }
    return {
        **alarm, "seed": seed, "cut": {name: made[name] for name in ("train", "replay", "recent", "people")},
        "minutes": candidate["minutes"],
        "alarm_to_verdict_seconds": round(seconds, 1), "passed": version.passed, "sentence": verdict.get("sentence"),
        "checks": verdict.get("checks"), "scores": found, "asked_beside": asked, "faults": service.faults(),
    }  # fmt: skip


async def _noticed(service: Service, old: list[Asked], new: list[Asked], say: Say) -> dict[str, Any]:
    """The old shop's questions, then the catalogue's, whose wrong answers are corrected, beyond the alarm; how soon it came."""
    watch = Watch(service.capture, learn=LEARNED)  # its day is minutes
    await service.ask_all(old[: LEARNED + QUIET])
    quiet = await asyncio.to_thread(watch.look)
    say(f"after {LEARNED + QUIET:,} requests: {quiet.sentence}")
    alarm, report = None, quiet
    for start in range(0, CORRECTED, EVERY):
        await service.ask_all(new[start : start + EVERY], correct=True)
        if alarm is None:
            report = await asyncio.to_thread(watch.look)
            alarm = start + EVERY if report.state == "alarm" else None
    say(f"after {CORRECTED:,} of the new catalogue: {report.sentence}")
    if alarm is None:
        raise UsageError(
            "the new catalogue was not noticed", got=report.sentence, do="give a model that knows the old shop"
        )
    return {
        "quiet": quiet.state, "alarm_after": alarm, "found_after": report.found_after, "meaning": report.meaning,
        "corrected": service.seen["corrected"], "customers": CORRECTED // PEOPLE,
    }  # fmt: skip


async def _asked_beside(service: Service, some: Sequence[Asked], end: asyncio.Event) -> int:
    return await service.ask_until(end.is_set, some, sys.maxsize)


def shown(found: dict[str, Any]) -> Table:
    table = Table("what", "found", "wanted", title="taught from customers' corrections, beside the service")
    table.add_row("alarm after requests of the new catalogue", f"{found['alarm_after']}", "200")
    minutes = found["alarm_to_verdict_seconds"] / 60
    table.add_row("alarm to verdict, minutes", f"{minutes:.1f}", "at most 8")
    table.add_row("the gate", "pass" if found["passed"] else str(found["sentence"]), "pass")
    level = found["scores"]["old"]["before"]["exact"] - 0.1
    for domain in ("new", "old"):
        before, after = (found["scores"][domain][when]["exact"] for when in ("before", "after"))
        wanted = f"{level:.0%} or more" if domain == "new" else "no worse by 3 points"
        table.add_row(f"{domain} domain right, before and after", f"{before:.1%}, {after:.1%}", wanted)
    for check in found["checks"] or ():
        if check["name"].startswith("bits"):
            table.add_row(check["name"], check["told"], "at most +1 %")
    table.add_row(
        "requests beside it, not whole", f"{found['asked_beside']:,}, {sum(found['faults'].values())}", "0 not whole"
    )
    return table
