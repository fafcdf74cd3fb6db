"""How many small mistakes in the core its tests notice: `python -m tests.mutate [GROUP or MODULE ...]`.

Each change of `changes` is tried in a process of its own, forked from one that has imported everything, collected the tests of
`covers` and played some once: there the function is given the changed code, and tests that reach it are run, quickest first,
until one fails. What is read at import is tried by importing the module again. A test that fails without a change, too, notices
nothing; what hangs or dies is noticed if it does so twice, and not without the change. Changes are drawn at random, by a hash
of their names: a larger sample holds the smaller one.

Which tests reach what is watched once and kept, by test; half of a run is for that, and changes are tried on what was watched.
Results lie in .mutate; one stands as long as the module is the same, and the test that noticed it, or all test files where none
did; what survived is tried again on tests that are new, or were left out for want of `--seconds` or `--slow`. A run that is
ended goes on where it was: one of five minutes (`--minutes 4`) gets on anywhere.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import pytest

from tests.mutate.changes import Change
from tests.mutate.covers import GROUPS, Group
from tests.mutate.processes import (
    LOST,
    PATIENCE,
    ROOT,
    UNFIT,
    Collected,
    anew,
    apart,
    begin,
    digest_of_test,
    ends_with_its_parent,
    file_of,
    functions,
    in_place,
    play,
    share,
    silent,
    source,
    text,
)
from tests.mutate.reached import Watched, known, reaching, watched
from tests.mutate.results import Results, equivalent, report, sampled

HEAVY = ("torch", "hypothesis", "numba", "pyarrow", "tokenizers", "fastapi", "httpx", "torch.distributed.fsdp")
RAY = ("ray", "ray.serve")
FEW = 4  # changes: for fewer nothing is loaded for all
UNSURE = "what also fails without the change"
IMPORTS = 30.0  # seconds of a processor, at most, until a test begins where everything of ours is imported


@dataclass
class Trial:
    """What is to be tried of one group."""

    group: Group
    modules: list[str]
    most: int  # changes of a module
    seconds: float  # of a processor, for the tests of a change
    slow: float  # of a processor, for one test: a slower one is left out
    end: float  # of a monotonic clock: no change is begun later
    clean: dict[str, bool] = field(default_factory=dict)  # whether a test passes without a change

    @staticmethod
    def inside(trials: Sequence[Trial]) -> None:
        """Watch tests, and try changes in functions, with everything imported. Run in a process of its own, as `afresh`; all
        `trials` are of groups that want the same of it."""
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

        with tempfile.TemporaryDirectory() as folder:
            os.environ["TMPDIR"] = tempfile.tempdir = folder
            Collected.of(list(names), trials[0].group.without, work)

    def _take_digests(self) -> None:
        for path in (*map(source, self.modules), *map(file_of, self.group.tests)):
            text(path)

    def _with(self, items: dict[str, pytest.Item], imported: Mapping[str, Sequence[FunctionType]]) -> None:
        alike = [
            g for g in GROUPS.values() if (g.environment, g.compiled) == (self.group.environment, self.group.compiled)
        ]
        modules = [module for group in alike for module in group.modules]
        now = time.monotonic()
        until = now + (self.end - now) / 2  # what is left is for changes, on the tests that were watched by then
        files = [watched(self.group, name, items, modules, self.slow, until) for name in self.group.tests]
        if self.group.compiled:
            return
        waiting = [each for each in self._open() if each[2].lines is not None]
        if len(waiting) >= FEW:
            self._play_here(waiting, files, items)

        def unchanged(tests: Iterable[str]) -> Any:
            chosen = [items[name] for name in tests]
            return apart(lambda: in_place(chosen), PATIENCE + self._patience(dict.fromkeys(tests, self.slow)))

        for module, tree, change in waiting:

            def tried(tests: Mapping[str, float], m: str = module, t: ast.Module = tree, c: Change = change) -> Any:
                chosen = [items[name] for name in tests]
                return apart(lambda: in_place(chosen, (m, t, c), imported[m]), self._patience(tests))

            self._try(module, change, files, tried, unchanged)

    def _play_here(
        self,
        waiting: Sequence[tuple[str, ast.Module, Change]],
        files: Sequence[Watched],
        items: Mapping[str, pytest.Item],
    ) -> None:
        """Play tests once, quickest first, so that what they load at first, as compiled code, is there in all that is forked
        from here."""
        wanted: dict[str, float] = {}
        for module, _, change in waiting:
            wanted |= reaching(self.group, module, change, files, self.seconds)
        budget, chosen = min(self.seconds, (self.end - time.monotonic()) / 4 * share()), list[pytest.Item]()
        for name in sorted(wanted, key=lambda name: wanted[name]):
            if (budget := budget - wanted[name]) < 0:
                break
            chosen.append(items[name])
        if chosen:
            with silent():
                play(sorted(chosen, key=list(items.values()).index))
            gc.collect()
            gc.freeze()

    @staticmethod
    def afresh(trials: Sequence[Trial]) -> None:
        """Try what is read at import, or cannot be put in place, by importing the module again; of compiled code all."""
        ends_with_its_parent()
        waiting = [(trial, each) for trial in trials for each in trial._open() if trial._wants_import(*each)]
        if not waiting:
            return
        os.environ |= trials[0].group.environment
        for name in HEAVY + RAY * any(module.startswith("on_ray") for _, (module, _, _) in waiting):
            importlib.import_module(name)
        for trial in trials:
            trial._take_digests()
        for trial, (module, tree, change) in waiting:
            group = trial.group
            files = [known(group, name, trial.slow) for name in group.tests]

            def unchanged(tests: Iterable[str], g: Group = group, m: str = module, t: ast.Module = tree) -> Any:
                return apart(lambda: anew(g, m, t, None, list(tests)), IMPORTS + 600)

            def tried(
                tests: Mapping[str, float],
                trial: Trial = trial,
                m: str = module,
                t: ast.Module = tree,
                c: Change = change,
            ) -> Any:
                patience = IMPORTS + trial._patience(tests)
                return apart(lambda: anew(trial.group, m, t, c, list(tests)), patience)

            trial._try(module, change, files, tried, unchanged)

    def _wants_import(self, module: str, tree: ast.Module, change: Change) -> bool:
        unfit = Results().known.get((module, change.name), {}).get("by") == UNFIT
        return change.lines is None or self.group.compiled or unfit

    def _open(self) -> Iterator[tuple[str, ast.Module, Change]]:
        """What is neither known nor argued, module by module."""
        results, argued = Results(), equivalent()
        for module in self.modules:
            tree, chosen, _ = sampled(module, self.most)
            for change in chosen:
                entry = results.of(self.group, module, change.name)
                enough = entry and not entry.get("unseen") and entry["slow"] >= self.slow
                enough = enough and (not entry["left"] or entry["seconds"] >= self.seconds)
                if not (entry and (entry["by"] or enough)) and change.name not in argued.get(module, {}):
                    yield module, tree, change

    def _try(
        self,
        module: str,
        change: Change,
        files: Sequence[Watched],
        tried: Callable[[Mapping[str, float]], Any],
        unchanged: Callable[[Iterable[str]], Any],
    ) -> None:
        """What comes of a change, if there is time: on the tests that it was not tried on before."""
        if time.monotonic() >= self.end:
            return
        results = Results()
        every = reaching(self.group, module, change, files, math.inf)
        tests = reaching(self.group, module, change, files, self.seconds, results.noticing(module))
        passed = results.passed(module, change.name)
        begun = time.monotonic()
        new = {name: taken for name, taken in tests.items() if passed.get(name) != digest_of_test(name)}
        unseen = sum(len(file["unseen"]) for file in files)
        by = noticing(new, tried, unchanged, self.clean)
        if by == UNSURE or (unseen and not new):
            return
        more: dict[str, Any] = {"tests": len(tests), "left": len(every) - len(tests), "unseen": unseen}
        more |= {"seconds": self.seconds, "slow": self.slow}
        if not by:
            more["passed"] = passed | {name: digest_of_test(name) for name in new}
        if not by and not unseen:
            slow = sum(len(file["left"]) for file in files)
            told = f"{len(tests)} tests of {len(every)}, beside {slow} that were too slow to be watched"
            print(f"{module} survived {told}: {change.name}", flush=True)
        results.add(self.group, module, change.name, by, **more, took=round(time.monotonic() - begun, 2))

    def _patience(self, tests: Mapping[str, float]) -> float:
        return PATIENCE + 3 * sum(tests.values()) + (300 if self.group.compiled else 10 if self.group.warm else 0)


def noticing(
    tests: Mapping[str, float],
    tried: Callable[[Mapping[str, float]], Any],
    unchanged: Callable[[Iterable[str]], Any],
    clean: dict[str, bool],
) -> str | None:
    """Which of `tests` notices the change, or that it hangs or dies; none, or UNSURE. No accident: what hangs or dies does so
    twice, and not without the change; a test that fails without it, here and now, is left out, as `clean` says."""
    tests = dict(tests)
    while tests:
        by: str | None = tried(tests)["by"]
        if by in LOST:
            again = tried(tests)["by"]
            if again in LOST:
                return UNSURE if unchanged(tests)["by"] else by
            by = again
        if by not in tests:
            return by
        if by not in clean:
            clean[by] = not unchanged([by])["by"]
        if clean[by]:
            return by
        print(f"{by} is left out: it fails without any change", flush=True)
        del tests[by]
    return None


def warm() -> None:
    """Load the compiled kernels once, for all that is forked from here."""
    from shoal import Engine, Model, Request, Sampling
    from tests import golden

    model = Model.load(golden.HERE / "model")
    for each in (model, model.quantized()):
        Engine(each, units=50).generate([Request(golden.prompts(each)["image"], Sampling(max_tokens=2))])


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
        trial = Trial(group, modules, asked.sample, asked.seconds, asked.slow, end)
        if not asked.report and any(True for _ in trial._open()):
            alike[repr((group.environment, group.without, group.warm, group.compiled))].append(trial)
    for part in (Trial.inside, Trial.afresh):
        for trials in alike.values() if time.monotonic() < end else ():
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
