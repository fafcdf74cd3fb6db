"""A service in a thread of its own: a real engine behind the API, on a real socket, while the test does something else."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
import traceback
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import Signature
from types import CodeType
from typing import Any, TypeVar, get_args

import pytest
from fastapi import FastAPI, routing
from fastapi._compat import v2
from fastapi.dependencies import utils
from pydantic import TypeAdapter

from shoal.api.server import serving
from shoal.engine.front import AsyncEngine

T = TypeVar("T")

START_SECONDS = 180.0  # on a machine that does five other things
STOP_SECONDS = 120.0


@dataclass(frozen=True)
class Thread:
    """The server as it runs."""

    url: str
    loop: asyncio.AbstractEventLoop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of `work` in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(START_SECONDS)


@contextmanager
def in_a_thread(app: FastAPI, engines: Sequence[AsyncEngine], port: int = 0) -> Iterator[Thread]:
    """Serves `app` until the end of the block, and then closes its `engines`. Port 0: a free one."""
    started: list[Thread] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        try:
            async with serving(app, port=port) as running:
                started.append(Thread(running.url, asyncio.get_running_loop()))
                ready.set()
                await asyncio.to_thread(stop.wait)
        finally:
            ready.set()  # also when it could not start
            for engine in engines:
                await engine.close()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(START_SECONDS) and started
        yield started[0]
    finally:
        stop.set()
        thread.join(STOP_SECONDS)
    assert not thread.is_alive(), f"the server does not end\n{_where(started[0].loop)}"


def _where(loop: asyncio.AbstractEventLoop) -> str:
    """What each task of `loop` waits for, and where each thread is."""
    said = io.StringIO()
    for task in asyncio.all_tasks(loop):
        task.print_stack(file=said)
    for number, frame in sys._current_frames().items():
        print(f"thread {number}", *traceback.format_stack(frame), sep="\n", file=said)
    return said.getvalue()


@pytest.fixture(scope="session", autouse=True)
def one_validator_of_a_kind() -> Iterator[None]:
    """FastAPI makes the validators of an app's routes for each app anew, 290 of 37 kinds, which takes nine tenths of the time
    of making one; and what describes each of its answers, which takes two thirds of the rest. The hundreds of apps that tests
    make share theirs."""
    make, known = v2.TypeAdapter, dict[object, TypeAdapter[Any]]()
    describe, described = routing.create_model_field, dict[object, v2.ModelField]()

    def kept(kind: Any, *, config: Any = None) -> TypeAdapter[Any]:
        of, *more = get_args(kind)
        key = of, repr(more), repr(config)
        if key not in known:
            known[key] = make(kind, config=config)
        return known[key]

    def answer(*, name: str, type_: Any, mode: Any) -> v2.ModelField:
        key = name, type_, repr(type_), mode
        if key not in described:
            described[key] = describe(name=name, type_=type_, mode=mode)
        return described[key]

    read, signatures = utils._get_signature, dict[tuple[CodeType, str], Signature]()

    def signature(call: Any) -> Signature:
        """Of an endpoint that every app makes anew, from the same lines."""
        lines = getattr(call, "__code__", None)
        texts = all(isinstance(each, str) for each in getattr(call, "__annotations__", {}).values())
        if lines is None or call.__defaults__ or call.__kwdefaults__ or vars(call) or not texts:
            return read(call)
        key = lines, lines.co_filename
        if key not in signatures:
            signatures[key] = read(call)
        return signatures[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "TypeAdapter", kept)
        patch.setattr(routing, "create_model_field", answer)
        patch.setattr(utils, "_get_signature", signature)
        yield
