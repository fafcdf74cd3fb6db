"""How many small mistakes in the core its tests notice: `python -m tests.mutate [GROUP or MODULE ...]`.

Each change of `changes` is tried in a process of its own, forked from one that has imported everything and collected the tests
of `covers`: there the function is given the changed code, and the tests that reach it are run, quickest first, until one fails.
What is read at import is tried by importing the module again. What hangs or dies is noticed. Changes are drawn at random, by a
hash of their names: a larger sample holds the smaller one. Results lie in .mutate; one stands as long as the module is the
same, and the test that noticed it, or all test files where none did; what survived is tried again with more `--seconds` or
`--slow`, as far as tests were left out for want of them. A run that is ended goes on where it was.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
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
    UNFIT,
    Collected,
    anew,
    apart,
    begin,
    digest,
    digest_of_test,
    ends_with_its_parent,
    file_of,
    functions,
    in_place,
    source,
    text,
)
from tests.mutate.reached import Watched, known, reaching, watched

HEAVY = ("torch", "hypothesis", "numba", "pyarrow", "tokenizers", "fastapi", "httpx", "torch.distributed.fsdp")
IMPORTS = 30.0  # seconds of a processor, at most, until a test begins where everything of ours is imported


class Results:
    """What is known: by module, name of the change, and digests, on lines that are appended."""

    def __init__(self) -> None:
        self.path = KEPT / "results.jsonl"
        self.known: dict[tuple[str, str], dict[str, Any]] = {}
        self.first: dict[tuple[str, str], dict[str, Any]] = {}  # what came of a change when it was tried at first
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        key = entry["module"], entry["change"]
        self.known[key] = entry
        if entry["by"] != UNFIT:
            self.first.setdefault(key, entry)

    def of(self, group: Group, module: str, change: str) -> dict[str, Any] | None:
        entry = self.known.get((module, change))
        if not entry or entry["by"] == UNFIT:
            return None
        return entry if entry["digests"] == self.digests(group, module, entry["by"]) else None

    def digests(self, group: Group, module: str, by: str | None) -> list[str]:
        if by:
            return [digest(source(module)), digest_of_test(by) if (ROOT / by.partition("::")[0]).is_file() else ""]
        return [digest(source(module)), digest(*map(file_of, group.tests))]

    def add(self, group: Group, module: str, change: str, by: str | None, **more: Any) -> None:
        entry = {"module": module, "change": change, "by": by, **more}
        entry["digests"] = self.digests(group, module, by)
        self._take(entry)
        KEPT.mkdir(exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def noticing(self, module: str) -> Counter[str]:
        """How many changes of a module each test noticed."""
        return Counter(entry["by"] for (of, _), entry in self.known.items() if of == module and entry["by"])


def sampled(module: str, most: int) -> tuple[ast.Module, list[Change], int]:
    """The module, `most` of its changes (the first of one order, so that more of them are those and others), and how many
    there are."""
    tree = ast.parse(text(source(module)))
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
    slow: float  # of a processor, for one test: a slower one is left out
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

        def work(items: dict[str, pytest.Item]) -> None:
            import torch

            torch.set_num_threads(1)
            if trials[0].group.warm:
                warm()
            imported = functions([module for trial in trials for module in trial.modules])
            for trial in trials:
                trial._with(items, imported)

        Collected.of(list(names), trials[0].group.without, work)

    def _take_digests(self) -> None:
        for path in (*map(source, self.modules), *map(file_of, self.group.tests)):
            text(path)

    def _with(self, items: dict[str, pytest.Item], imported: Mapping[str, Sequence[FunctionType]]) -> None:
        alike = [
            g for g in GROUPS.values() if (g.environment, g.compiled) == (self.group.environment, self.group.compiled)
        ]
        modules = [module for group in alike for module in group.modules]
        files = [watched(self.group, name, items, modules, self.slow) for name in self.group.tests]
        for module, tree, change in self._open():
            if change.lines is not None and not self.group.compiled:

                def tried(tests: dict[str, float], m: str = module, t: ast.Module = tree, c: Change = change) -> Any:
                    chosen = [items[name] for name in tests]
                    return apart(lambda: in_place(m, t, c, chosen, imported[m]), self._patience(tests))

                self._try(module, change, files, tried)

    @staticmethod
    def afresh(trials: Sequence[Trial]) -> None:
        """Try what is read at import, or cannot be put in place, by importing the module again; of compiled code all."""
        ends_with_its_parent()
        os.environ |= trials[0].group.environment
        for name in HEAVY:
            importlib.import_module(name)
        for trial in trials:
            trial._take_digests()
            files = [known(trial.group, name, trial.slow) for name in trial.group.tests]
            trial._anew([file for file in files if file])

    def _anew(self, files: Sequence[Watched]) -> None:
        results = Results()
        for module, tree, change in self._open():
            unfit = results.known.get((module, change.name), {}).get("by") == UNFIT
            if change.lines is None or self.group.compiled or unfit:

                def tried(tests: dict[str, float], m: str = module, t: ast.Module = tree, c: Change = change) -> Any:
                    return apart(lambda: anew(self.group, m, t, c, list(tests)), IMPORTS + self._patience(tests))

                self._try(module, change, files, tried)

    def _open(self) -> Iterator[tuple[str, ast.Module, Change]]:
        """What is neither known nor argued, module by module, while there is time."""
        results, argued = Results(), equivalent()
        for module in self.modules:
            tree, chosen, _ = sampled(module, self.most)
            for change in chosen:
                entry = results.of(self.group, module, change.name)
                enough = (
                    entry and (not entry["left"] or entry["seconds"] >= self.seconds) and entry["slow"] >= self.slow
                )
                stands = entry and (entry["by"] or enough)
                if not stands and change.name not in argued.get(module, {}) and time.monotonic() < self.end:
                    yield module, tree, change

    def _try(
        self, module: str, change: Change, files: Sequence[Watched], tried: Callable[[dict[str, float]], Any]
    ) -> None:
        results = Results()
        every = reaching(self.group, module, change, files, math.inf)
        tests = reaching(self.group, module, change, files, self.seconds, results.noticing(module))
        begun = time.monotonic()
        by = tried(tests)["by"] if tests else None
        more = {"tests": len(tests), "left": len(every) - len(tests), "seconds": self.seconds, "slow": self.slow}
        results.add(self.group, module, change.name, by, **more, took=round(time.monotonic() - begun, 2))
        if not by:
            print(f"{module} survived {len(tests)} tests of {len(every)}: {change.name}", flush=True)

    def _patience(self, tests: dict[str, float]) -> float:
        return PATIENCE + 3 * sum(tests.values()) + (60 if self.group.compiled else 10 if self.group.warm else 0)


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
    """By module and together: how many changes of a sample are held, which is noticed or argued equivalent, and how many
    survived when they were tried at first, before the tests that they asked for."""
    from shoal.evaluate.intervals import wilson  # what is tried is imported in processes of their own, not here

    results, argued = Results(), equivalent()
    print(
        f"{'module':24} {'changes':>7} {'tried':>6} {'noticed':>8} {'argued':>7} {'survived':>9} {'at first':>9} {'held':>6}"
    )
    sums, weighed = Counter[str](), [0.0, 0.0]
    for name, modules in groups.items():
        for module in modules:
            _, chosen, count = sampled(module, most)
            names = [change.name for change in chosen]
            equal = [name for name in names if name in argued.get(module, {})]
            found = [entry for each in names if each not in equal and (entry := results.of(GROUPS[name], module, each))]
            noticed, tried = sum(bool(entry["by"]) for entry in found), len(found) + len(equal)
            first = sum((module, each) in results.first and not results.first[module, each]["by"] for each in names)
            held = noticed + len(equal)
            share = f"{100 * held / tried:.0f} %" if tried else "-"
            lost = len(found) - noticed
            print(f"{module:24} {count:7} {tried:6} {noticed:8} {len(equal):7} {lost:9} {first:9} {share:>6}")
            sums += Counter(changes=count, tried=tried, held=held, first=first)
            weighed = [weighed[0] + count * held / tried, weighed[1] + count] if tried else weighed
            for stale in set(argued.get(module, {})) - {change.name for change in sampled(module, count)[1]}:
                print(f"    is argued equivalent, but is no change any more: {stale}")
    tried = sums["tried"]
    if tried:
        for when, held in (("at first", tried - sums["first"]), ("now", sums["held"])):
            low, high = wilson(held, tried)
            print(f"{when}: {held} of {tried} held, {100 * held / tried:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
        print(f"now, each module weighed by its {sums['changes']} changes: {100 * weighed[0] / weighed[1]:.1f} %")


def named(module: str) -> set[str]:
    """What it may be asked for by: itself, and the folders that it lies in."""
    parts = module.split("/")
    return {module, *("/".join(parts[:at]) + "/" for at in range(1, len(parts)))}


def main() -> None:
    ask = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    ask.add_argument("names", nargs="*", help="groups, modules, or folders of them as model/ [all]")
    ask.add_argument("--sample", type=int, default=20, help="changes of a module, at most [20]")
    ask.add_argument("--seconds", type=float, default=20, help="of tests for one change, at most [20]")
    ask.add_argument("--slow", type=float, default=30, help="seconds of one test, while it is watched, at most [30]")
    ask.add_argument("--minutes", type=float, default=60, help="begin no change after them [60]")
    ask.add_argument("--report", action="store_true", help="only say what is known")
    asked = ask.parse_args()
    asked.names = set(asked.names)
    chosen = {
        name: [module for module in group.modules if not asked.names or asked.names & {name, *named(module)}]
        for name, group in GROUPS.items()
    }
    if unknown := asked.names.difference(GROUPS, *(named(module) for modules in chosen.values() for module in modules)):
        ask.error(f"unknown: {', '.join(sorted(unknown))}")
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that what was begun is ended, too
    end = time.monotonic() + 60 * asked.minutes
    alike: defaultdict[str, list[Trial]] = defaultdict(list)
    for name, modules in chosen.items():
        group = GROUPS[name]
        if modules and not asked.report:
            trial = Trial(group, modules, asked.sample, asked.seconds, asked.slow, end)
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
