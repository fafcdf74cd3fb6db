"""A candidate's way through shadow, canary and promotion, and back, under traffic without a pause; and canaries that are bad.

The bad ones are beyond the gate by force: one answers NaN, one takes half a second more for each step, one dies in its fifth
answer. Each begins at half of the traffic, so that clients meet it at once.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from shoal.bench.loop_service import Crashing, Service, Slow, running
from shoal.bench.loop_teach import shuffled
from shoal.engine.front import AsyncEngine
from shoal.loop.release import Release
from shoal.model.model import Model

Say = Callable[[str], None]

LEAST, MOST = 5_000, 40_000  # requests of the whole way, and until it is given up
ENOUGH = 40  # people of the canary a step: each asks eight times, and of a step counts with the first
MOST_BAD = 2_000  # until a bad canary is given up
BACK = 64  # answers of the version of before, after a rollback
TIMED = 64  # requests by which it is known what the stable version takes
BAD: Mapping[str, type[AsyncEngine]] = {"NaN": AsyncEngine, "slow": Slow, "crash": Crashing}
BAD_WEIGHTS: Mapping[str, type[AsyncEngine]] = {"NaN": AsyncEngine}  # what another process serves as well
PASSED = {"passed": True, "checks": []}


async def serve(
    release: Release,
    work: Path,
    say: Say,
    *,
    enough: int = ENOUGH,
    bad: Mapping[str, type[AsyncEngine]] = BAD,
    by: Callable[[Release, Path], AbstractAsyncContextManager[Service]] = running,
) -> dict[str, Any]:
    """Of the candidate of `release`, or of a copy of the stable version where it has none that passed: through to promotion and
    back, with `enough` people of its own a step. Then the `bad` ones, by name, of such engines. `by`: what serves."""
    if release.state().candidate is None or not release.version(release.state().candidate or 0).passed:
        release.add(release.stable().served, verdict=PASSED, why="of equal weights, for the way that a candidate goes")
    asked = [one for pair in zip(shuffled("old"), shuffled("catalogue"), strict=False) for one in pair]
    began = time.monotonic()
    first, second = release.stable(), release.version(release.state().candidate or 0)
    async with by(release, work / "capture") as service:
        await service.ask_all(asked[:TIMED])
        release.begin(second.number, why="the benchmark")
        canary = release.state().canary
        assert canary is not None
        release.step(replace(canary, shadows=min(enough, canary.shadows), people=enough), why="the benchmark")
        release.set_auto("promote", why="the benchmark")
        count = TIMED + await service.ask_until(lambda: release.state().stable == second.number, asked, MOST)
        say(f"{count:,} requests to the promotion")
        release.set_auto("candidate", why="the benchmark")
        count += await service.ask_until(lambda: False, asked, max(LEAST - count, 256))
        promoted = release.state().stable == second.number
        if promoted:
            release.rollback(why="the benchmark")
        service.versions.clear()
        count += await service.ask_until(lambda: service.versions[first.label] >= BACK, asked, 2_000)
        steps = [entry["what"] for entry in release.audit.entries()]
        found = {
            "requests": count, "promoted": promoted, "rolled_back": service.versions[first.label] > 0,
            "steps": steps.count("step"), "whole": service.seen["whole"], "faults": service.faults(),
            "seconds": round(time.monotonic() - began), "audit_lines": release.check(),
        }  # fmt: skip
        gone = {}
        for name, kind in bad.items():
            gone[name] = await _taken_back(service, name, kind, work)
            say(f"bad canary, {name}: {gone[name]}")
    return {**found, "bad": gone}


async def _taken_back(service: Service, name: str, kind: type[AsyncEngine], work: Path) -> dict[str, Any]:
    """What a bad canary cost."""
    release, asked = service.release, shuffled("old", 1)
    model = work / f"bad-{name}"
    shutil.copytree(release.stable().served, model, copy_function=shutil.copyfile)
    if name == "NaN":
        broken = Model.load(model)
        for norm in broken.net.exit_norms.values():
            next(norm.parameters()).fill_(float("nan"))
        broken.save(model)
    version = release.add(model, why=f"bad: {name}")
    service.kinds[str(version.served)] = kind
    before = sum(service.faults().values())
    await service.ask_all(asked[:TIMED])  # what the stable version takes now
    release.begin(version.number, why="try", force=True)
    canary = release.state().canary
    assert canary is not None
    release.step(replace(canary, step=3), why="half of the traffic at once")
    began = time.monotonic()
    count = await service.ask_until(lambda: release.state().canary is None, asked, MOST_BAD)
    last = release.audit.entries()[-1]
    gone = release.state().canary is None
    if not gone:
        release.rollback(why="the benchmark gives up")
    figures = last["figures"].get("canary", {}) if gone else {}
    return {
        "taken_back": gone, "why": last["why"], "canary_people": figures["failures"]["of"] if figures else None,
        "seconds": round(time.monotonic() - began, 1), "requests": count,
        "not_whole": sum(service.faults().values()) - before,
    }  # fmt: skip


def shown(found: dict[str, Any], what: str = "one engine") -> Table:
    table = Table("what", "found", "wanted", title=f"shadow, canary, promotion, rollback, under traffic, with {what}")
    table.add_row("requests", f"{found['requests']:,}", f"{LEAST:,} or more")
    table.add_row("not whole", str(sum(found["faults"].values())), "0")
    table.add_row("promoted, rolled back", f"{found['promoted']}, {found['rolled_back']}", "True, True")
    for name, one in found["bad"].items():
        told = f"{one['canary_people']} people, {one['seconds']} s, {one['not_whole']} not whole"
        table.add_row(f"bad canary, {name}: taken back after", told, "20 people or 30 s, 0")
    return table
