"""A small chat model of other people's on this machine: fetched, imported, given early exits, rounded to INT8, served with the
pages, and asked three questions.

Each step leaves a result whose presence means complete, so a second call goes on where the first stopped. The steps are what
`shoal import`, `shoal adapt`, `shoal quantize --no-train` and `shoal serve --no-ray` do; nothing here is a special path. The
exits learn from chats of the model with itself, since nothing else is at hand.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from shoal.api.access import no_lines
from shoal.api.serve_args import ServeArgs
from shoal.api.server import run_local
from shoal.clients import samples
from shoal.data.alone import alone
from shoal.errors import ResourceError, UsageError
from shoal.evaluate import own_words
from shoal.evaluate.rounding import rounded
from shoal.machine import need_disk, need_free_port, write_aside
from shoal.model.described import ADAPTED, adapted
from shoal.model.model import Model
from shoal.open_weights.convert import import_model
from shoal.progress import duration
from shoal.train.loop import fit
from shoal.train.plan import adapt_plan

LOCK = ".assistant.lock"  # under the root: held by the one that makes the models
NAME = "smollm2-135m-instruct"  # of `open_weights.known`
QUESTIONS = (
    "What is the capital of France?",
    "Give me three tips for a good night's sleep.",
    "Why is the sky blue? Answer in one sentence.",
)
MOST_TOKENS = 96  # of an answer
DISK = 2**31  # bytes: the package, what is in it, the model in fp32, with exits and in INT8, with room to spare
HOST = "127.0.0.1"
ADAPT = 2.0  # minutes that the exits learn
CHATS = 12  # for each minute of learning; 24 are some 5,000 tokens, which the exits' start is solved on (`train.exits`)
ASIDE = 4  # of so many chats one is not learned from, and the exits are measured on it
UPDATE = 512  # tokens: minutes are better spent on many small updates
HOUR = 60
REPORT = "report.txt"
BEFORE = "exits.before"  # under the root: exits that learn on


def run(root: Path, *, stay: bool, port: int, console: Console, source: str = NAME, adapt: float = ADAPT) -> None:
    """Do what is missing under `root`, serve the INT8 model and print its answers to `QUESTIONS`; with `stay`, serve until
    Ctrl-C. `source`: what is imported, as `shoal import --from` takes it; `adapt`: minutes that early exits learn, 0 for none.
    Raises UsageError for another number, ResourceError before work begins where the disk is full, the port taken, or another
    one at work under `root`, and what the import raises."""
    began, console.record = time.monotonic(), True
    if not 0 <= adapt <= 10_000:
        raise UsageError("--adapt", got=adapt, allowed="minutes, 0 for no early exits")
    need_disk(root, DISK)
    need_free_port(HOST, port)
    busy = ResourceError(f"another shoal assistant is at work in {root}", do="wait for it, or give another --root")
    with alone(root / LOCK, busy):
        int8 = _made(root, console, source, adapt)
    count = 4 if adapt else 3
    _serve(
        int8, port, stay=stay, console=console, began=began, head=f"[{count}/{count}] serve    ", report=root / REPORT
    )


def _made(root: Path, console: Console, source: str, adapt: float) -> Path:
    """Do what is missing under `root` before the service, and return where its model lies."""
    model, exits, int8 = root / "model", root / "exits", root / "int8"
    whole = exits if adapt else model
    steps: list[tuple[str, str, Path, Callable[[], bool], Callable[[], object]]] = [
        ("import", source, model, lambda: _complete(model), lambda: import_model(source, model)),
        ("quantize", "to INT8", int8, lambda: _is_of(int8, whole), lambda: rounded(Model.load(whole)).save(int8)),
    ]
    if adapt:
        told = f"early exits learn for {adapt:g} minutes, from what the model says to itself (ADAPT=0 leaves them out)"
        steps.insert(1, ("adapt", told, exits, lambda: _learned(exits) >= adapt, lambda: _adapt(root, exits, adapt)))
    count = len(steps) + 1
    for number, (name, what, result, is_done, step) in enumerate(steps, 1):
        head, start = f"[{number}/{count}] {name:9s}", time.monotonic()
        if is_done():
            _say(console, f"{head} done before -> {result}")
        else:
            _say(console, f"{head} {what} ...")
            step()
            _say(console, f"{head} {duration(time.monotonic() - start)} -> {result}")
        if name == "adapt":
            _say(console, worth(exits, root))
    return int8


def worth(exits: Path, root: Path) -> str:
    """What the adapted exits in `exits` are worth, and the command that teaches them for an hour, in two lines."""
    told = _known(exits) or {"minutes": 0.0, "agreement": {}}
    shares = ", ".join(f"{name} {share:.0%}" for name, share in told["agreement"].items())
    return (
        f"  after {told['minutes']:g} minutes an exit's likeliest word is full depth's at so many places of answers that it "
        f"did not learn from: {shares}.\n  Answers of theirs are bad, and drafts, which full depth checks, save time only "
        f"where most stand. "
        f"An hour of it: shoal assistant --root {root} --adapt {HOUR}"
    )


def _complete(directory: Path) -> bool:
    return (directory / "config.json").exists()


def _known(directory: Path) -> dict[str, Any] | None:
    """What is known of the exits of a model; None where there are none, or no model."""
    return adapted(directory) if _complete(directory) else None


def _learned(exits: Path) -> float:
    """Minutes that the exits in `exits` have learned."""
    return float((_known(exits) or {}).get("minutes", 0.0))


def _is_of(int8: Path, whole: Path) -> bool:
    """Was `int8` rounded from what lies in `whole`?"""
    return _complete(int8) and _known(int8) == _known(whole)


def _adapt(root: Path, out: Path, minutes: float) -> None:
    """Let the model under `root` talk to itself, teach its exits by three quarters of that, and write it to `out` with their
    `agreement` on the rest. What `shoal adapt --data ROOT/own.jsonl` would do. Exits that have learned for some of the
    `minutes` go on, for what is left of them."""
    before = root / BEFORE
    if _learned(out):
        shutil.rmtree(before, ignore_errors=True)
        out.rename(before)
    if _learned(before) >= minutes:  # one that went on from there was killed, before or after it had written
        shutil.rmtree(out, ignore_errors=True)
        before.rename(out)
        return
    begun = before if _learned(before) else root / "model"
    said = own_words.chats(Model.load(root / "model"), max(2 * CHATS, round(CHATS * minutes)))
    learned = [chat for number, chat in enumerate(said) if number % ASIDE]
    _own(root).write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in learned), encoding="utf-8")
    plan = adapt_plan(
        str(begun), str(_own(root)), str(out), run=str(root / "exits.run"), minutes=minutes - _learned(begun),
        batch_tokens=UPDATE, eval_every=0, resume="never",
    )  # fmt: skip
    fit(plan)
    given = Model.load(out)
    aside = own_words.ids(given, said[::ASIDE])
    given.source = {
        **(given.source or {}),
        ADAPTED: {"minutes": minutes, "agreement": own_words.agreement(given, aside)},
    }
    given.save(out)
    shutil.rmtree(before, ignore_errors=True)


def _own(root: Path) -> Path:
    """The chats that exits learn from."""
    return root / "own.jsonl"


def _serve(model: Path, port: int, *, stay: bool, console: Console, began: float, head: str, report: Path) -> None:
    """Serve `model` from this process, print its answers, write what was printed to `report`, and stay or end. Raises what
    asking raised, once the service has ended."""
    failed: list[BaseException] = []

    def ask(url: str) -> None:
        try:
            with no_lines():  # between the answers they could not be read
                for answer in samples.questions(f"{url}/v1", QUESTIONS, MOST_TOKENS):
                    samples.show(answer, console, most=400)
                _say(console, f"{head} ready {duration(time.monotonic() - began)} after the start; report: {report}")
            write_aside(report, console.export_text(clear=False))
            if stay:
                _say(console, f"{head} API {url}/v1   chat page {url}/ui   (Ctrl-C ends it)")
        except BaseException as error:  # this thread's end is nobody's: who waits for the service must hear of it
            failed.append(error)
        if failed or not stay:
            os.kill(os.getpid(), signal.SIGTERM)  # ends the service as Ctrl-C does

    def ready(url: str) -> None:  # runs where the service does, which could not answer meanwhile
        threading.Thread(target=ask, args=(url,), name="ask", daemon=True).start()

    run_local(ServeArgs(model=str(model), ui=True), host=HOST, port=port, on_ready=ready)
    if failed:
        raise failed[0]
    _say(console, "The service has stopped.")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
