"""A process of its own for each try, and modules imported as changed there."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import ctypes
import faulthandler
import gc
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import json
import math
import os
import resource
import select
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import psutil
import pytest

from tests.mutate.changes import Change
from tests.mutate.covers import Group

ROOT = Path(__file__).parents[2]
SOURCES, TESTS, KEPT = ROOT / "platform" / "shoal", ROOT / "tests", ROOT / ".mutate"
# no seconds of a clock: what hangs is found by seconds of a processor, as others may leave us few
QUIET = ["-x", "-q", "--tb=no", "--timeout=0", "-p", "no:cacheprovider", "-p", "no:xdist"]
PATIENCE = 5.0  # seconds of a processor beyond three times what the tests took when they were watched
WAITING = 10  # times as many of a clock, of those in which we have a core
STILL = 20.0  # the same, without any of a processor: a deadlock
LATE = 20.0  # seconds that an event loop waits, at most, for what does not come; tests that fail would wait for minutes
LOOK = 2.0  # seconds between looks at a process
MEASURED = 0.02  # seconds of a processor
LOST = "a hang", "a crash"  # of a process that gives nothing
UNFIT = "it cannot be put in place"  # a change of what a function is made of, as a closure; no result


@cache
def text(path: Path) -> str:
    """Of a file as it was when it was first asked for: what is written while tests run was not run."""
    return path.read_text("utf-8")


@cache
def digest(*paths: Path) -> str:
    return hashlib.sha256("".join(map(text, paths)).encode()).hexdigest()[:16]


@cache
def _by_test(path: Path) -> tuple[str, dict[str, str]]:
    """What a test file holds beside its tests, and its tests by name; without what is but form."""
    beside, tests = "", defaultdict[str, str](str)
    for statement in ast.parse(text(path)).body:
        if (name := _name(statement)).startswith("test_"):
            tests[name] += ast.dump(statement)
        else:
            beside += ast.dump(statement)
    return beside, tests


@cache
def digest_of_test(test: str) -> str:
    """Of a test, by pytest's name of it, and of what its file holds beside other tests."""
    path, _, name = test.partition("::")
    beside, tests = _by_test(ROOT / path)
    return hashlib.sha256((beside + tests.get(name.partition("[")[0], "")).encode()).hexdigest()[:16]


def _name(statement: ast.stmt) -> str:
    return statement.name if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) else ""


def source(module: str) -> Path:
    return SOURCES / f"{module}.py"


def file_of(name: str) -> Path:
    return TESTS / f"{name}.py"


def apart(work: Callable[[], dict[str, Any]], patience: float) -> dict[str, Any]:
    """What `work` gives in a forked process of its own within `patience` seconds of a processor; {"by": "a hang"} or
    {"by": "a crash"} where it gives nothing. What it started is ended with it, and its temporary folder is removed."""
    with tempfile.TemporaryDirectory() as folder:
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            with contextlib.suppress(BaseException):
                resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(patience), math.ceil(patience) + 5))
                _child(work, folder, write)
            os._exit(1)
        os.close(write)
        given, waited, still, used, look = b"", 0.0, 0.0, 0.0, min(WAITING * patience, LOOK)
        try:
            while not given.endswith(b"\n") and waited < WAITING * patience and still < STILL:
                if select.select([read], [], [], look)[0]:
                    some = os.read(read, 1 << 20)
                    if not some:
                        break
                    given += some
                    continue
                passed = look * share()
                waited, still = waited + passed, still + passed
                if (more := _used(pid)) > used:
                    used, still = more, 0.0
        finally:
            late = waited >= WAITING * patience or still >= STILL
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            os.close(read)
        hung = late or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
    found: dict[str, Any] = json.loads(given) if given.endswith(b"\n") else {"by": "a hang" if hung else "a crash"}
    return found


def share() -> float:
    """Of a core, what a process such as this one gets: whoever stops or starves us does so to what we wait for, too, which is
    no hang of it."""
    began, used = time.monotonic(), time.process_time()
    while (mine := time.process_time() - used) < MEASURED:
        pass
    return min(1.0, mine / max(time.monotonic() - began, MEASURED))


def _used(pid: int) -> float:
    """Seconds of a processor that a process and those that it started have used."""
    try:
        process = psutil.Process(pid)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
    except psutil.Error:
        return 0.0
    return sum(each.user + each.system for each in times)


def ends_with_its_parent() -> None:
    """On Linux, whatever ends that one."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _child(work: Callable[[], dict[str, Any]], folder: str, write: int) -> None:
    os.setsid()
    ends_with_its_parent()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    faulthandler.disable()  # pytest's writes to the terminal by a stream of its own
    os.environ |= {"HYPOTHESIS_STORAGE_DIRECTORY": folder, "TMPDIR": folder}
    tempfile.tempdir = folder
    given = json.dumps(work()).encode() + b"\n"
    while given:
        given = given[os.write(write, given) :]
    signal.pause()  # the parent ends it, and with it whatever it has started


class Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Imports one module as `tree` says, wherever it is asked for in this process."""

    def __init__(self, module: str, tree: ast.Module) -> None:
        super().__init__("shoal." + module.replace("/", "."), str(source(module)))
        self.tree = tree

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> CodeType:
        return compile(self.tree, self.path, "exec", dont_inherit=True)


def begin(group: Group) -> None:
    """What a process does before anything of ours is imported."""
    os.environ |= group.environment
    if group.compiled:
        # numba keeps what it compiled by what lies on the disk, which has no change: who calls what is changed would run it as
        # it was. It reads where when it is imported, which the parent may have done
        os.environ["NUMBA_CACHE_DIR"] = tempfile.gettempdir()
        importlib.import_module("numba").config.reload_config()
    if group.environment:
        from tests.mutate.loops import in_python

        in_python()


class Seeded:
    """Has hypothesis draw the same in each try, and look for no smaller example of what failed."""

    def pytest_sessionstart(self) -> None:
        from hypothesis import Phase, settings

        now = settings.get_profile("shoal")  # of tests/conftest.py
        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutants", parent=now, derandomize=True, database=None, phases=phases)
        settings.load_profile("mutants")


class First:
    """Which test failed first."""

    by: str | None = None

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.by:
            self.by = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.by:
            self.by = "its import"


class Collected:
    """Gives the tests of some files to `work`, by name, in place of running them."""

    def __init__(self, work: Callable[[dict[str, pytest.Item]], object]) -> None:
        self.work = work

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.work({item.nodeid: item for item in session.items})
        return True

    @classmethod
    def of(cls, files: Sequence[str], without: str, work: Callable[[dict[str, pytest.Item]], object]) -> None:
        chosen = ["-k", f"not ({without})"] if without else []
        status = pytest.main(
            [*(str(file_of(name)) for name in files), *QUIET, *chosen, "-s"], plugins=[cls(work), Seeded()]
        )
        if status:
            raise SystemExit(f"cannot collect {', '.join(files)}")


def play(items: Sequence[pytest.Item], *plugins: object, enough: Callable[[], bool] = lambda: False) -> str | None:
    """Run tests until one fails, which is returned, or it is `enough`: who says so leaves what they share as it is."""
    first = First()
    manager = items[0].config.pluginmanager
    for plugin in (first, *plugins):
        manager.register(plugin)
    try:
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if first.by or enough():
                break
    finally:
        for plugin in (first, *plugins):
            manager.unregister(plugin)
    return first.by


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing is written to the terminal, by whomever."""
    sys.stdout.flush()
    kept, nothing = [os.dup(stream) for stream in (1, 2)], os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nothing, stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, there in zip((1, 2), kept, strict=True):
            os.dup2(there, stream)
            os.close(there)
        os.close(nothing)


def as_new(items: Sequence[pytest.Item]) -> None:
    """Forget what tests that were played in the parent have left: what ours keeps of its calls, which the change may be in, and
    pytest's folder, which would outlast this process."""
    kind = type(cache(as_new))
    for module in list(sys.modules.values()):
        path = Path(getattr(module, "__file__", None) or "/")
        if path.is_relative_to(SOURCES) or (path.is_relative_to(TESTS) and not path.is_relative_to(TESTS / "mutate")):
            for value in list(vars(module).values()):
                for each in list(vars(value).values()) if isinstance(value, type) else [value]:
                    kept = each.__func__ if isinstance(each, classmethod | staticmethod) else each
                    if isinstance(kept, kind):
                        kept.cache_clear()
    items[0].config._tmp_path_factory._basetemp = None  # type: ignore[attr-defined]


def impatient() -> None:
    """From here on an event loop of this process waits for LATE seconds at most, in `asyncio.timeout` and `wait_for`."""
    timeout, wait_for = asyncio.timeout, asyncio.wait_for

    def soon(delay: float | None) -> float | None:
        return None if delay is None else min(delay, LATE)

    asyncio.timeout = lambda delay: timeout(soon(delay))  # type: ignore[assignment]
    asyncio.wait_for = lambda awaited, timeout: wait_for(awaited, soon(timeout))  # type: ignore[assignment]


def anew(group: Group, module: str, tree: ast.Module, change: Change | None, tests: Sequence[str]) -> dict[str, Any]:
    """Import the module with the change, or as it is, and run tests. In a process that has imported nothing of ours."""
    begin(group)
    impatient()
    if change:
        change.apply()
        sys.meta_path.insert(0, Changed(module, tree))
    first = First()
    status = pytest.main([*tests, *QUIET], plugins=[first, Seeded()])
    return {"by": first.by or (None if status in (0, 5) else "its import")}


def functions(modules: Iterable[str]) -> dict[str, list[FunctionType]]:
    """Those of each of `modules`, which are imported. What is there stays as it is from here on: no process that is forked
    copies it to count its references."""
    paths = {str(source(module)): module for module in modules}
    found: dict[str, list[FunctionType]] = {module: [] for module in paths.values()}
    for module in found:
        importlib.import_module("shoal." + module.replace("/", "."))
    gc.unfreeze()  # what was imported before tests were collected (tests/conftest.py)
    gc.collect()
    for each in gc.get_objects():
        if type(each) is FunctionType and each.__code__.co_filename in paths:
            found[paths[each.__code__.co_filename]].append(each)
    gc.freeze()
    return found


def in_place(
    items: Sequence[pytest.Item],
    changed: tuple[str, ast.Module, Change] | None = None,
    imported: Sequence[FunctionType] = (),
) -> dict[str, Any]:
    """Put a change of a module into its function, of `imported`, or none, and run tests. In a forked process that has collected
    them. UNFIT where it cannot be put there."""
    if changed and not _put(*changed, imported):
        return {"by": UNFIT}
    as_new(items)
    impatient()
    return {"by": play(items)}


def _put(module: str, tree: ast.Module, change: Change, imported: Sequence[FunctionType]) -> bool:
    """Whether the change was put into one of `imported`."""
    before = _functions(compile(tree, str(source(module)), "exec", dont_inherit=True))
    change.apply()
    after = _functions(compile(tree, str(source(module)), "exec", dont_inherit=True))
    pairs = [pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
    mine = [each for each in imported if len(pairs) == 1 and each.__code__ == pairs[0][0]]
    if len(before) != len(after) or any(each.__code__.co_freevars != pairs[0][1].co_freevars for each in mine):
        return False
    for function in mine:
        function.__code__ = pairs[0][1]
    return bool(mine)


def _functions(code: CodeType) -> list[CodeType]:
    """Of a module and its classes, but not what stands in functions."""
    found: list[CodeType] = []
    for const in code.co_consts:
        if isinstance(const, CodeType):
            found += [const] if const.co_flags & inspect.CO_OPTIMIZED else _functions(const)
    return found
