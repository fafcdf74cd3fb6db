"""Which tests reach which lines of a module: watched once for each test file, and kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType, MappingProxyType
from typing import Any

import pytest

from tests.mutate.changes import Change
from tests.mutate.covers import Group
from tests.mutate.processes import KEPT, ROOT, apart, digest, digest_of_test, file_of, play, source


def seconds() -> float:
    """Of a processor, that this process and those that it waited for have used."""
    return sum(os.times()[:4])


class Watch:
    """Lines of the `modules` that each test runs, and its seconds of a processor. What a fixture of several tests runs counts
    for all of the file. A test that takes more than `slow` seconds is left out, as one that is skipped or fails."""

    def __init__(self, modules: Iterable[str], slow: float = math.inf) -> None:
        self.slow, self.late = slow, False
        self.left: set[str] = set()
        self.modules = {str(source(module)): module for module in modules}
        self.lines: set[tuple[str, int]] = set()  # of what runs now
        self.unseen: dict[int, set[int]] = {}  # by code: lines that were not run since `lines` was empty
        self.thread = threading.get_ident()
        self.shared: set[tuple[str, int]] = set()
        self.together = 0.0  # seconds of these fixtures: whoever comes first pays them
        self.tests: dict[str, tuple[float, set[tuple[str, int]]]] = {}

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        mine = frame.f_code.co_filename in self.modules and self._unseen(frame.f_code)
        return self.line(frame, event, arg) if mine else None

    def line(self, frame: FrameType, event: str, arg: Any) -> Any:
        code, at = frame.f_code, frame.f_lineno
        self.lines.add((self.modules[code.co_filename], at))
        unseen = self._unseen(code)
        unseen.discard(at)
        if not unseen and threading.get_ident() == self.thread:  # others outlast a test
            frame.f_trace_lines = False  # a loop is not looked at for ever
        return self.line

    def _unseen(self, code: CodeType) -> set[int]:
        found = self.unseen.get(id(code))
        if found is None:
            found = self.unseen[id(code)] = {line for _, _, line in code.co_lines() if line is not None}
        return found

    def _begin(self) -> None:
        self.lines, self.unseen = set(), {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._begin()
        begun, together, self.late = seconds(), self.together, False
        if self.slow < math.inf:
            signal.signal(signal.SIGPROF, self._ends)
            signal.setitimer(signal.ITIMER_PROF, self.slow)
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            signal.setitimer(signal.ITIMER_PROF, 0)
            if self.late:
                self.left.add(item.nodeid)
            if item.nodeid not in self.left:
                self.tests[item.nodeid] = (seconds() - begun - (self.together - together), self.lines)

    def _ends(self, *_: object) -> None:
        self.late = True
        raise pytest.skip.Exception("too slow to be watched")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.failed:  # of itself, or since it was ended: what fails without a change notices none
            report.outcome = "skipped"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped:
            self.left.add(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, begun = self.lines, seconds()
        self._begin()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared |= self.lines
                self.together += seconds() - begun
            self.lines |= before

    def found(self) -> dict[str, Any]:
        return {
            "left": sorted(self.left),
            "together": self.together,
            "seconds": {name: taken for name, (taken, _) in self.tests.items()},
            "lines": {name: sorted(lines | self.shared) for name, (_, lines) in self.tests.items()},
        }


Watched = dict[str, Any]  # of a test file: `Watch.found`, and digests of the modules and the tests
QUICK = 1.0  # seconds
CHUNK = 5.0  # seconds of a processor, after which it is kept what was seen


def kept(group: Group, name: str) -> Path:
    """Where it is kept what the tests of the file `name` reach."""
    way = hashlib.sha256(repr((group.environment, group.without, group.warm, group.compiled)).encode()).hexdigest()[:8]
    return KEPT / "watched" / f"{name.replace('/', '.')}-{way}.json"


def known(group: Group, name: str, slow: float) -> Watched:
    """What is kept of a test file and the `group`'s modules as they are, and of tests that are as they were."""
    path = kept(group, name)
    found: Watched = json.loads(path.read_text()) if path.exists() else {}
    modules = {module: kept for module, kept in found.get("modules", {}).items() if kept == digest(source(module))}
    if not found or not modules.keys() >= set(group.modules):
        return {"modules": {}, "together": 0.0, "seconds": {}, "lines": {}, "digests": {}, "left": [], "unseen": []}
    same = {node for node, kept in found["digests"].items() if kept == digest_of_test(node)}
    for part in ("seconds", "lines", "digests"):
        found[part] = {node: each for node, each in found[part].items() if node in same}
    again = {node for node in found["left"] if node not in same or found["slow"] < slow}
    found["left"] = [node for node in found["left"] if node not in again]
    return {**found, "modules": modules}


def watched(
    group: Group, name: str, items: Mapping[str, pytest.Item], modules: Sequence[str], slow: float, until: float
) -> Watched:
    """Seconds and lines of each test of the file `name`, of those that are collected and take at most `slow` seconds. Kept, of
    all `modules` at once, as far as it came `until` then, of a monotonic clock: what was not watched yet is "unseen"."""
    found = known(group, name, slow)
    found["modules"] = found["modules"] or {module: digest(source(module)) for module in modules}
    found["slow"] = slow
    mine = [node for node in items if node.startswith(f"{file_of(name).relative_to(ROOT)}::")]
    path, most = kept(group, name), len(mine)
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        found["unseen"] = [node for node in mine if node not in found["seconds"] and node not in found["left"]]
        path.write_text(json.dumps(found))
        if not found["unseen"] or time.monotonic() >= until:
            return found
        some = found["unseen"][:most]
        watch = Watch([] if group.compiled else found["modules"], slow)

        def look(watch: Watch = watch, some: Sequence[str] = some) -> dict[str, Any]:
            begun = seconds()
            by = play(
                [items[node] for node in some],
                watch,
                enough=lambda: seconds() - begun > CHUNK or time.monotonic() > until,
            )
            return {"by": by, **watch.found()}

        new = apart(look, 600)
        if new["by"] and len(some) == 1:
            print(f"{some[0]} is left out: without any change it ends with {new['by']}", flush=True)
            _take(found, {**Watch([]).found(), "left": some})
        elif new["by"]:
            most = len(some) // 2
        else:
            _take(found, new)
            most = len(mine)


def _take(found: Watched, new: Mapping[str, Any]) -> None:
    """Add what more tests of a file have shown."""
    found["left"] += new["left"]
    found["together"] = max(found["together"], new["together"])
    for part in ("seconds", "lines"):
        found[part] |= new[part]
    found["digests"] |= {node: digest_of_test(node) for node in (*new["seconds"], *new["left"])}


def reaching(
    group: Group,
    module: str,
    change: Change,
    files: Sequence[Watched],
    most: float,
    noticed: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, float]:
    """The tests that reach the change with the seconds of each, as many as take `most` together: the quickest first, and what
    has `noticed` other changes of the module sooner. What is read at import is reached by all tests that run a line of the
    module, and by those of the file that is named for it: they may read no more than a constant."""
    wanted, own = change.lines or change.body, f"/test_{module.rpartition('/')[2]}.py::"
    found = sorted(
        ((file["together"] + taken) / (1 + noticed.get(name, 0)), index, name, taken)
        for index, file in enumerate(files)
        for name, taken in file["seconds"].items()
        if group.compiled
        or (wanted is None and own in name)
        or any(of == module and (wanted is None or at in wanted) for of, at in file["lines"][name])
    )
    chosen: dict[str, float] = {}
    slow: dict[str, bool] = {}
    paid: set[int] = set()
    for _, index, name, taken in found:
        cost = taken + (0 if index in paid else files[index]["together"])
        if not chosen or sum(chosen.values()) + cost <= most:
            chosen[name] = cost
            slow[name] = files[index]["together"] + taken > QUICK
            paid.add(index)
    # a file's tests go together, for what they share; but no slow one before another file's quick ones
    first = {name.partition("::")[0]: at for at, name in reversed(list(enumerate(chosen)))}
    return dict(sorted(chosen.items(), key=lambda pair: (slow[pair[0]], first[pair[0].partition("::")[0]])))
