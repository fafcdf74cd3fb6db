"""What the process of the tests changes in modules, whoever imports them and when: who needs none of them does not wait for it,
and processes that tests start are as a user's are."""

from __future__ import annotations

import asyncio
import gc
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

LOOK_SECONDS = 0.02


class AtImport(importlib.abc.MetaPathFinder):
    """At the head of `sys.meta_path`: what follows the import of the module `name`."""

    def __init__(self, name: str, change: Callable[[ModuleType], object]) -> None:
        self._name, self._change = name, change

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        found = importlib.util.find_spec(name)
        if found is not None and found.loader is not None:
            run = found.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                self._change(module)

            found.loader.exec_module = exec_module  # type: ignore[method-assign]
        return found


def changed(changes: Mapping[str, Callable[[ModuleType], object]]) -> None:
    """Each of the modules that are named, from its import on, or from now where something imported it before."""
    for name, change in changes.items():
        if name in sys.modules:
            change(sys.modules[name])
        else:
            sys.meta_path.insert(0, AtImport(name, change))


def one_thread(torch: ModuleType) -> None:
    """Two on two cores stall each other as soon as anything else runs."""
    torch.set_num_threads(1)


def measured_once(meter: ModuleType) -> None:
    """The rate of matrix products, for which each run of training would compute for a tenth of a second."""
    meter.matmul_rate = cache(meter.matmul_rate)


def kept_frozen(front: ModuleType) -> None:
    """What a replica has loaded it hides from Python's collector, which first looks through all that is hidden: here, each
    time, through what all test files have imported (tests/conftest.py)."""
    front.gc = SimpleNamespace(collect=gc.collect, freeze=lambda: None, unfreeze=lambda: None)


def read_once(run: ModuleType) -> None:
    """What the package's sources add up to, for which each run of training would read all five hundred of them."""
    run.code_version = cache(run.code_version)


def compiled_once(runner: ModuleType) -> None:
    """What an engine runs when it is made, so that no request waits for a compiler: once for engines of a kind, of which tests
    make thousands. That all is compiled by then is held in a process of its own (tests/unit/engine/test_runner.py)."""
    compile_, known = runner.Runner._compile, set[tuple[object, ...]]()

    def once(self: Any) -> None:
        kind = (self.config, self.net.dtype, self.cache.kv.dtype, self.device)
        if kind not in known:
            compile_(self)
            known.add(kind)

    runner.Runner._compile = once


def soon_stopped(serving: ModuleType) -> None:
    """How often a server of Python's looks whether it is to stop: each one that a test ends is waited for that long, in half a
    second's steps by default."""
    serving.BaseWSGIServer.serve_forever.__defaults__ = (LOOK_SECONDS,)


def soon_left(server: ModuleType) -> None:
    """So for uvicorn, which looks ten times a second, and waits for one such step more before it looks who is still there."""

    class Soon:
        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        @staticmethod
        async def sleep(seconds: float) -> None:
            await asyncio.sleep(min(seconds, LOOK_SECONDS))

    server.asyncio = Soon()


def not_waited_for(descriptor: int) -> None:
    """In place of `os.fsync`, for which a disk takes some milliseconds, and a run of training calls it dozens of times: the
    tests' machine loses no power, and those of what outlives that look at the calls (tests/unit/loop/test_power_cut.py). Raises
    OSError for what is not open, as it does."""
    os.fstat(descriptor)


def soon_taken(alone: ModuleType) -> None:
    """How often who waits for a lock of ours looks whether it is free: a fifth of a second otherwise."""
    alone.PAUSE = LOOK_SECONDS


def started_late(serve: ModuleType) -> None:
    """How long a service may take until it answers: three minutes otherwise, which on a machine with as much else to do were
    too few. What hangs ends by the time that its test may take."""
    serve.run.__kwdefaults__["seconds"] = 540.0


def without_stubs(meta: ModuleType) -> None:
    """gradio writes what editors want to know of each component beside its own files: half of what its import takes."""
    meta.create_or_modify_pyi = lambda *_: None
