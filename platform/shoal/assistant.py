"""A small chat model of other people's on this machine: fetched, imported, rounded to INT8, served with the pages, and asked
three questions.

Each step leaves a result whose presence means complete, so a second call goes on where the first stopped. The steps are what
`shoal import`, `shoal quantize --no-train` and `shoal serve --no-ray` do; nothing here is a special path.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from shoal.api.access import no_lines
from shoal.api.serve_args import ServeArgs
from shoal.api.server import run_local
from shoal.clients import samples
from shoal.evaluate.rounding import rounded
from shoal.machine import need_disk, need_free_port
from shoal.model.model import Model
from shoal.open_weights.convert import import_model
from shoal.progress import duration

NAME = "smollm2-135m-instruct"  # of `open_weights.known`
QUESTIONS = (
    "What is the capital of France?",
    "Give me three tips for a good night's sleep.",
    "Why is the sky blue? Answer in one sentence.",
)
MOST_TOKENS = 96  # of an answer
DISK = 3 * 2**29  # bytes: the package, what is in it, the model in fp32 and in INT8, with room to spare
HOST = "127.0.0.1"


def run(root: Path, *, stay: bool, port: int, console: Console, source: str = NAME) -> None:
    """Do what is missing under `root`, serve the INT8 model and print its answers to `QUESTIONS`; with `stay`, serve until
    Ctrl-C. `source`: what is imported, as `shoal import --from` takes it. Raises ResourceError before work begins where the
    disk is full or the port taken, and what the import raises."""
    began = time.monotonic()
    need_disk(root, DISK)
    need_free_port(HOST, port)
    model, int8 = root / "model", root / "int8"
    steps: list[tuple[str, Path, Callable[[], object]]] = [
        ("import", model, lambda: import_model(source, model)),
        ("quantize", int8, lambda: rounded(Model.load(model)).save(int8)),
    ]
    for number, (name, result, step) in enumerate(steps, 1):
        head, start = f"[{number}/{len(steps) + 1}] {name:9s}", time.monotonic()
        if (result / "config.json").exists():
            _say(console, f"{head} done before -> {result}")
            continue
        _say(console, f"{head} {source if name == 'import' else 'to INT8'} ...")
        step()
        _say(console, f"{head} {duration(time.monotonic() - start)} -> {result}")
    _serve(int8, port, stay=stay, console=console, began=began, head=f"[{len(steps) + 1}/{len(steps) + 1}] serve    ")


def _serve(model: Path, port: int, *, stay: bool, console: Console, began: float, head: str) -> None:
    """Serve `model` from this process, print its answers, and stay or end. Raises what asking raised, once the service has
    ended."""
    failed: list[BaseException] = []

    def ask(url: str) -> None:
        try:
            with no_lines():  # between the answers they could not be read
                for answer in samples.questions(f"{url}/v1", QUESTIONS, MOST_TOKENS):
                    samples.show(answer, console, most=400)
                _say(console, f"{head} ready {duration(time.monotonic() - began)} after the start")
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
