"""What is known of changes, by module, and what it comes to."""

from __future__ import annotations

import ast
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from tests.mutate.changes import Change, changes
from tests.mutate.covers import GROUPS, Group
from tests.mutate.processes import KEPT, ROOT, TESTS, UNFIT, digest, digest_of_test, file_of, source, text


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
        if entry["by"] != UNFIT and (entry["by"] or not entry.get("unseen")):
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

    def passed(self, module: str, change: str) -> dict[str, str]:
        """Tests that did not notice the change, and their digests, if the module is as it was."""
        entry = self.known.get((module, change), {})
        same = "passed" in entry and entry["digests"][0] == digest(source(module))
        return dict(entry["passed"]) if same else {}

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


def equivalent() -> dict[str, dict[str, str]]:
    """By module and name of the change: why no test can tell it from what is there."""
    return yaml.safe_load((TESTS / "mutate" / "equivalent.yaml").read_text("utf-8")) or {}


def report(groups: dict[str, list[str]], most: int) -> None:
    """By module and together: how many changes of a sample are held, which is noticed or argued equivalent, and how many
    survived when they were tried at first, before the tests that they asked for."""
    from shoal.evaluate.intervals import exact  # what is tried is imported in processes of their own, not here

    results, argued = Results(), equivalent()
    print(
        f"{'module':24} {'changes':>7} {'tried':>6} {'noticed':>8} {'argued':>7} {'survived':>9} {'at first':>9} {'held':>6}"
    )
    sums, strata = Counter[str](), list[tuple[int, int, int]]()
    for name, modules in groups.items():
        for module in modules:
            _, chosen, count = sampled(module, most)
            names = [change.name for change in chosen]
            equal = [name for name in names if name in argued.get(module, {})]
            found = [entry for each in names if each not in equal and (entry := results.of(GROUPS[name], module, each))]
            open_ = sum(not entry["by"] and bool(entry.get("unseen")) for entry in found)
            if open_:  # those that were noticed by now are the ones that quick tests notice, which is no sample
                print(f"{module:24} {count:7} {open_:6} are open: their tests are not all watched")
                continue
            noticed, tried = sum(bool(entry["by"]) for entry in found), len(found) + len(equal)
            first = sum((module, each) in results.first and not results.first[module, each]["by"] for each in names)
            held = noticed + len(equal)
            share = f"{100 * held / tried:.0f} %" if tried else "-"
            lost = len(found) - noticed
            print(f"{module:24} {count:7} {tried:6} {noticed:8} {len(equal):7} {lost:9} {first:9} {share:>6}")
            sums += Counter(changes=count, tried=tried, held=held, first=first)
            strata += [(count, tried, held)] if tried else []
            for stale in set(argued.get(module, {})) - {change.name for change in sampled(module, count)[1]}:
                print(f"    is argued equivalent, but is no change any more: {stale}")
    tried = sums["tried"]
    if tried:
        for when, held in (("at first", tried - sums["first"]), ("now", sums["held"])):
            low, high = exact(held, tried)
            print(f"{when}: {held} of {tried} held, {100 * held / tried:.1f} % ({100 * low:.1f} to {100 * high:.1f})")
        share, low, high = weighed(strata)
        of = f"{sum(count for count, _, _ in strata)} changes of modules that were tried, of {sums['changes']}"
        print(
            f"now, each module weighed by its changes: {100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f}) of {of}"
        )


def weighed(strata: Sequence[tuple[int, int, int]]) -> tuple[float, float, float]:
    """The share that is held of all changes, and its interval. `strata`: of each module its changes, how many were tried, and
    held. The exact interval for as many tries as would be as sure in a plain sample (Kish): few, where of a large module few
    were tried."""
    from shoal.evaluate.intervals import exact

    every = sum(count for count, _, _ in strata)
    share = sum(count * held / tried for count, tried, held in strata) / every
    tries = 1 / sum((count / every) ** 2 / tried for count, tried, _ in strata)
    return share, *exact(share * tries, tries)
