"""How many small mistakes in the core its tests notice: `python -m tests.mutate [GROUP or MODULE ...]`.

Each change of `changes` is tried in a process of its own, forked from one that has imported everything and collected the tests
of `covers`: there the function is given the changed code, and the tests that reach it are run, quickest first, until one fails.
What is read at import is tried by importing the module again. What hangs or dies is noticed. Results lie in .mutate; one stands
as long as the module is the same, and the file of the test that noticed it, or all test files where none did. A run that is
ended goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from tests.mutate.changes import Change, changes
from tests.mutate.covers import GROUPS, Group
from tests.mutate.processes import (
    KEPT,
    PATIENCE,
    ROOT,
    TESTS,
    Collected,
    anew,
    apart,
    begin,
    digest,
    ends_with_its_parent,
    file_of,
    in_place,
    source,
)
from tests.mutate.reached import Watched, kept, reaching, watched

HEAVY = ("torch", "hypothesis", "numba", "pyarrow", "tokenizers", "fastapi", "httpx", "torch.distributed.fsdp")


class Results:
    """What is known: by module, name of the change, and digests, on lines that are appended."""

    def __init__(self) -> None:
        self.path = KEPT / "results.jsonl"
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            entry = json.loads(line)
            self.known[entry["module"], entry["change"]] = entry

    def of(self, group: Group, module: str, change: str) -> dict[str, Any] | None:
        entry = self.known.get((module, change))
        return entry if entry and entry["digests"] == self.digests(group, module, entry["by"]) else None

    def digests(self, group: Group, module: str, by: str | None) -> list[str]:
        file = ROOT / (by or "").partition("::")[0]
        seen = [file] if by and file.is_file() else [] if by else list(map(file_of, group.tests))
        return [digest(source(module)), digest(*(path for path in seen if path.exists()))]

    def add(self, group: Group, module: str, change: str, by: str | None, tests: int) -> None:
        entry = {"module": module, "change": change, "by": by, "tests": tests}
        entry["digests"] = self.digests(group, module, by)
        self.known[module, change] = entry
        KEPT.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def sampled(module: str, most: int) -> tuple[ast.Module, list[Change], int]:
    """The module, `most` of its changes (the first of one order, so that more of them are those and others), and how many
    there are."""
    tree = ast.parse(source(module).read_text("utf-8"))
    every = changes(tree)
    chosen = sorted(every, key=lambda change: hashlib.sha256(f"{module} {change.name}".encode()).digest())[:most]
    return tree, chosen, len(every)


@dataclass
class Trial:
    """What is to be tried of one group."""

    group: Group
    modules: list[str]
    most: int  # changes of a module
    seconds: float  # of a processor, for the tests of a change
    end: float  # of a monotonic clock: no change is begun later

    @staticmethod
    def inside(trials: Sequence[Trial]) -> None:
        """Try changes in functions, with everything imported. Run in a process of its own, as `afresh`; all `trials` are of
        groups that want the same of it."""
        ends_with_its_parent()
        begin(trials[0].group)
        for trial in trials:
            trial._take_digests()
        names = dict.fromkeys(name for trial in trials for name in trial.group.tests)
        Collected.of(list(names), trials[0].group.without, lambda items: [trial._with(items) for trial in trials])

    def _take_digests(self) -> None:
        for module in self.modules:
            Results().digests(self.group, module, None)
        for name in self.group.tests:
            digest(file_of(name))

    def _with(self, items: dict[str, pytest.Item]) -> None:
        import torch

        torch.set_num_threads(1)
        if self.group.warm:
            warm()
        files = [watched(self.group, name, items) for name in self.group.tests]
        for module, tree, change in self._open():
            if change.lines is not None and not self.group.compiled:

                def tried(tests: dict[str, float], m: str = module, t: ast.Module = tree, c: Change = change) -> Any:
                    return apart(lambda: in_place(m, t, c, [items[name] for name in tests]), self._patience(tests))

                self._try(module, change, files, tried)

    @staticmethod
    def afresh(trials: Sequence[Trial]) -> None:
        """Try what is read at import, by importing the module again; of compiled code all."""
        ends_with_its_parent()
        os.environ |= trials[0].group.environment
        for name in HEAVY:
            importlib.import_module(name)
        for trial in trials:
            if all(kept(trial.group, name).exists() for name in trial.group.tests):
                trial._anew()

    def _anew(self) -> None:
        files = [json.loads(kept(self.group, name).read_text()) for name in self.group.tests]
        todo = [each for each in self._open() if each[2].lines is None or self.group.compiled]
        for module, tree, change in todo:

            def tried(tests: dict[str, float], m: str = module, t: ast.Module = tree, c: Change = change) -> Any:
                return apart(lambda: anew(self.group, m, t, c, list(tests)), self._patience(tests))

            self._try(module, change, files, tried)

    def _open(self) -> Iterator[tuple[str, ast.Module, Change]]:
        """What is neither known nor argued, module by module, while there is time."""
        results, argued = Results(), equivalent()
        for module in self.modules:
            tree, chosen, _ = sampled(module, self.most)
            for change in chosen:
                known = results.of(self.group, module, change.name) or change.name in argued.get(module, {})
                if not known and time.monotonic() < self.end:
                    yield module, tree, change

    def _try(self, module: str, change: Change, files: list[Watched], tried: Callable[[dict[str, float]], Any]) -> None:
        tests = reaching(self.group, module, change, files, self.seconds)
        by = tried(tests)["by"] if tests else None
        Results().add(self.group, module, change.name, by, len(tests))
        if not by:
            print(f"{module} survived {len(tests)} tests: {change.name}", flush=True)

    def _patience(self, tests: dict[str, float]) -> float:
        return PATIENCE + 3 * sum(tests.values()) + (60 if self.group.compiled else 0)


def warm() -> None:
    """Load the compiled kernels once, for all that is forked from here."""
    from shoal import Engine, Model, Request, Sampling
    from tests import golden

    model = Model.load(golden.HERE / "model")
    for each in (model, model.quantized()):
        Engine(each, units=50).generate([Request(golden.prompts(each)["image"], Sampling(max_tokens=2))])


def equivalent() -> dict[str, dict[str, str]]:
    """By module and name of the change: why no test can tell it from what is there."""
    return yaml.safe_load((TESTS / "mutate" / "equivalent.yaml").read_text("utf-8")) or {}


def report(groups: dict[str, list[str]], most: int) -> None:
    results, argued = Results(), equivalent()
    print(f"{'module':24} {'changes':>7} {'tried':>6} {'noticed':>8} {'argued':>7} {'survived':>9} {'held':>6}")
    for name, modules in groups.items():
        for module in modules:
            _, chosen, count = sampled(module, most)
            names = [change.name for change in chosen]
            equal = [name for name in names if name in argued.get(module, {})]
            known = [entry for each in names if each not in equal and (entry := results.of(GROUPS[name], module, each))]
            noticed, tried = sum(bool(entry["by"]) for entry in known), len(known) + len(equal)
            held = f"{100 * (noticed + len(equal)) / tried:.0f} %" if tried else "-"
            print(f"{module:24} {count:7} {tried:6} {noticed:8} {len(equal):7} {len(known) - noticed:9} {held:>6}")
            for stale in set(argued.get(module, {})) - {change.name for change in sampled(module, count)[1]}:
                print(f"    is argued equivalent, but is no change any more: {stale}")


def main() -> None:
    ask = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    ask.add_argument("names", nargs="*", help="groups or modules [all]")
    ask.add_argument("--sample", type=int, default=20, help="changes of a module, at most [20]")
    ask.add_argument("--seconds", type=float, default=20, help="of tests for one change, at most [20]")
    ask.add_argument("--minutes", type=float, default=60, help="begin no change after them [60]")
    ask.add_argument("--report", action="store_true", help="only say what is known")
    asked = ask.parse_args()
    unknown = set(asked.names) - set(GROUPS) - {module for group in GROUPS.values() for module in group.modules}
    if unknown:
        ask.error(f"unknown: {', '.join(sorted(unknown))}")
    chosen = {
        name: [module for module in group.modules if not asked.names or name in asked.names or module in asked.names]
        for name, group in GROUPS.items()
    }
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that what was begun is ended, too
    end = time.monotonic() + 60 * asked.minutes
    alike: defaultdict[str, list[Trial]] = defaultdict(list)
    for name, modules in chosen.items():
        group = GROUPS[name]
        if modules and not asked.report:
            trial = Trial(group, modules, asked.sample, asked.seconds, end)
            alike[repr((group.environment, group.without, group.warm, group.compiled))].append(trial)
    for part in (Trial.inside, Trial.afresh):
        for trials in alike.values():
            there = multiprocessing.get_context("fork").Process(target=part, args=(trials,))
            there.start()
            try:
                there.join()
            finally:
                there.terminate()
            if there.exitcode:
                sys.exit(there.exitcode)
    report({name: modules for name, modules in chosen.items() if modules}, asked.sample)


if __name__ == "__main__":
    main()
