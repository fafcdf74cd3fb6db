"""Which tests reach which lines of a module: watched once for each test file, and kept."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.mutate.changes import Change
from tests.mutate.covers import Group
from tests.mutate.processes import KEPT, ROOT, apart, digest, file_of, play, source


def seconds() -> float:
    """Of a processor, that this process and those that it waited for have used."""
    return sum(os.times()[:4])


class Watch:
    """Lines of the `modules` that each test runs, and its seconds of a processor. What a fixture of several
    tests runs counts for all of the file."""

    def __init__(self, modules: list[str]) -> None:
        self.modules = {str(source(module)): module for module in modules}
        self.lines: set[tuple[str, int]] = set()  # of what runs now
        self.shared: set[tuple[str, int]] = set()
        self.together = 0.0  # seconds of these fixtures: whoever comes first pays them
        self.tests: dict[str, tuple[float, set[tuple[str, int]]]] = {}

    def trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        module = self.modules.get(frame.f_code.co_filename)
        if module is None:
            return None

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            self.lines.add((module, frame.f_lineno))
            return line

        return line(frame, event, arg)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.lines, begun, together = set(), seconds(), self.together
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.tests[item.nodeid] = (seconds() - begun - (self.together - together), self.lines)

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, self.lines, begun = self.lines, set(), seconds()
        try:
            return (yield)
        finally:
            if fixturedef.scope != "function":
                self.shared |= self.lines
                self.together += seconds() - begun
            self.lines |= before

    def found(self) -> dict[str, Any]:
        return {
            "together": self.together,
            "seconds": {name: taken for name, (taken, _) in self.tests.items()},
            "lines": {name: sorted(lines | self.shared) for name, (_, lines) in self.tests.items()},
        }


Watched = dict[str, Any]  # of a test file: `Watch.found`


def kept(group: Group, name: str) -> Path:
    """Where it is kept what the tests of the file `name` reach of a group."""
    return KEPT / "watched" / f"{name.replace('/', '.')}-{digest(file_of(name), *map(source, group.modules))}.json"


def watched(group: Group, name: str, items: Mapping[str, pytest.Item]) -> Watched:
    """Seconds and lines of each test of the file `name`, of those that are collected. Kept."""
    path = kept(group, name)
    if not path.exists():
        mine = [item for node, item in items.items() if node.startswith(f"{file_of(name).relative_to(ROOT)}::")]
        watch = Watch([] if group.compiled else group.modules)
        found = apart(lambda: {"by": play(mine, watch), **watch.found()}, 600)
        if found["by"]:
            raise SystemExit(f"{name} fails without any change: {found['by']}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def reaching(group: Group, module: str, change: Change, files: list[dict[str, Any]], most: float) -> dict[str, float]:
    """The tests that reach the change with the seconds of each, the quickest first, as many as take `most` together."""
    wanted = change.lines or change.body
    found = sorted(
        (file["together"] + taken, index, name, taken)
        for index, file in enumerate(files)
        for name, taken in file["seconds"].items()
        if group.compiled or any(of == module and (wanted is None or at in wanted) for of, at in file["lines"][name])
    )
    chosen: dict[str, float] = {}
    paid: set[int] = set()
    for _, index, name, taken in found:
        cost = taken + (0 if index in paid else files[index]["together"])
        if not chosen or sum(chosen.values()) + cost <= most:
            chosen[name] = cost
            paid.add(index)
    # a file's tests go together
    first = {name.partition("::")[0]: at for at, name in reversed(list(enumerate(chosen)))}
    return dict(sorted(chosen.items(), key=lambda pair: first[pair[0].partition("::")[0]]))
