"""What is slow to start, and one start of it for neighbouring files: it lives as long as the next test asks for it too.

pytest itself ends a fixture with its file, or with the whole session; a Ray or a browser that idles behind a thousand tests of
something else would take their memory, and be found by those that look for what was left behind.
"""

from __future__ import annotations

import atexit
import importlib
import os
from contextlib import AbstractContextManager, suppress
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
ON_RAY, RAY = "tests/on_ray/", "shared_ray"
SHARING = ("tests/browser/", ON_RAY)
# A fresh checkout compiles the loops of a CPU once, and whoever makes an engine meanwhile waits for it: these files, whose
# engines compile all of them (fp32 and INT8, then fp64), come first and in one process, beside what needs none.
COMPILING = ("tests/unit/engine/test_runner.py", "tests/unit/engine/test_naive.py")
BESIDE = ("tests/unit/data/", "tests/unit/sandbox/", "tests/unit/inputs/", "tests/contracts/", "tests/mutate/")
EXAMPLES = "tests/contracts/test_examples_in_docstrings.py"  # of them one makes an engine, which would compile as well
_LENT = pytest.StashKey[dict[str, tuple[AbstractContextManager[object], object]]]()


def lend(request: pytest.FixtureRequest, made: AbstractContextManager[T]) -> T:
    """What the fixture of this name was given in the files just before, else what `made` gives now. No other fixture may have
    the name."""
    lent = request.config.stash.setdefault(_LENT, {})
    name = request.fixturename
    assert name is not None
    if name not in lent:
        lent[name] = (made, made.__enter__())
    return lent[name][1]  # type: ignore[return-value]


def end_what_is_not_asked_for(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Called when the fixtures of `item` are torn down; ends the newest first."""
    lent = item.config.stash.get(_LENT, {})
    if nextitem is not None and nextitem.path == item.path:
        return
    wanted = getattr(nextitem, "fixturenames", ())
    for name in [name for name in reversed(lent) if name not in wanted]:
        made, _ = lent.pop(name)
        made.__exit__(None, None, None)


def in_turn(items: list[pytest.Item], *, together: bool) -> list[pytest.Item]:
    """`items` in the order in which two processes that run them `together` wait for each other least."""
    last = len(COMPILING) + len(BESIDE)
    turns = {EXAMPLES: last} | {file: turn for turn, file in enumerate((*COMPILING, *BESIDE))}
    asking = {item.path for item in items if RAY in getattr(item, "fixturenames", ())}

    def turn(item: pytest.Item) -> tuple[int, bool]:
        # one that does not would end the Ray of those before it, and those after it start another
        apart = item.nodeid.startswith(ON_RAY) and item.path not in asking
        return next((at for file, at in turns.items() if item.nodeid.startswith(file)), last), apart

    return sorted(items, key=turn) if together else items


def end_at_once(config: pytest.Config) -> None:
    """A process of xdist's, once all is done that is to be done at exit: to free whatever tests imported, object by object,
    takes it ten seconds, in which all wait for it."""
    here = os.getpid()
    if hasattr(config, "workerinput"):
        atexit.register(lambda: os._exit(0) if os.getpid() == here else None)


def tell_results_alone(config: pytest.Config) -> None:
    """Of each test a process of xdist's sends six messages, two of which say how it went, and that the next may begin. The
    others, a fortieth of what all tests take, say when each began and ended, and that nothing failed before and after it."""
    if not hasattr(config, "workerinput") or config.getoption("durations") or config.getoption("xmlpath", None):
        return
    (interactor,) = [each for each in config.pluginmanager.get_plugins() if type(each).__name__ == "WorkerInteractor"]
    send = interactor.sendevent

    def sendevent(name: str, **told: Any) -> None:
        report = told.get("data", {})
        by_the_way = name == "testreport" and report["when"] != "call" and report["outcome"] == "passed"
        if name not in ("logstart", "logfinish") and not by_the_way:
            send(name, **told)

    interactor.sendevent = sendevent


def read_in_turn(config: pytest.Config) -> None:
    """Each of xdist's processes imports all test files, which pytest rewrites and compiles in a fresh checkout, for ten
    seconds each. So each begins with some of them, and finds what the others wrote of theirs."""
    worker = getattr(config, "workerinput", None)
    if worker is None:
        return
    number, of = int(worker["workerid"].removeprefix("gw")), worker["workercount"]
    ignored = [config.invocation_params.dir / path for path in config.getoption("ignore") or ()]
    asked = [config.invocation_params.dir / path.partition("::")[0] for path in config.args]
    files = {
        file
        for path in asked
        for file in (path.rglob("test_*.py") if path.is_dir() else [path])
        if not any(file.is_relative_to(each) for each in ignored)
    }
    for file in sorted(files)[number::of]:
        with suppress(Exception, pytest.skip.Exception):  # who collects it will say so
            importlib.import_module(".".join(file.relative_to(config.rootpath).with_suffix("").parts))


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Of pytest-xdist with ``--dist loadgroup``, as `make test` asks for: a file's tests go to one process, and so do all of a
    folder whose files share what is slow to start. In their order: few of those that take long come last."""
    if config.getoption("dist") != "loadgroup":
        return None  # xdist's own
    from xdist.scheduler import LoadScopeScheduling

    class Neighbours(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if file in COMPILING:
                return "compiling"
            return next((folder for folder in SHARING if file.startswith(folder)), file)

    config.option.loadscopereorder = False
    return Neighbours(config, log)
