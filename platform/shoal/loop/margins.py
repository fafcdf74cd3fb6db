"""What a line of versions gives away together: of each check one margin, and not one a release.

Each check that lets a candidate be a little worse than the stable version says which share of its margin that took
(`Check.used`). What the stable version's own verdict says to be taken already is added: of releases with 9 % more layers each
the second is refused. What a version gains is not saved for later: the best of a line is what the next are held to.

A line begins with a version that the gate did not let pass (the first, or one that a person promoted by force), with other
frozen suites, and for a check that was passed by a promise and not by comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from shoal.loop import versions
from shoal.loop.paired import FAIL, PASS, Check
from shoal.loop.suites import RECENT, Suite


def of_ratio(ratio: float, most: float) -> float | None:
    """The share of a margin of `most` times the stable version's that `ratio` times takes: two in a row that take a half each
    take all of it. None for what is no number."""
    return math.log(max(ratio, 1e-9)) / math.log(most) if math.isfinite(ratio) else None


def of_difference(lost: float, most: float) -> float | None:
    """The share that `lost` takes of `most` that may be lost; None for what is no number."""
    return lost / most if math.isfinite(lost) else None


def taken(stable: Path, weights: str, suites: Sequence[Suite]) -> dict[str, float]:
    """By check, what is taken already by the version of a release whose model is served from `stable` and has these `weights`
    (sha256); nothing where a line begins. Raises DataError for a version that cannot be read."""
    folder = stable.resolve().parent
    if stable.resolve().name != versions.SERVED or not (folder / versions.MANIFEST).exists():
        return {}
    verdict = versions.read(folder).verdict or {}
    asked = {(suite.get("name"), suite.get("sha256")) for suite in verdict.get("suites", ())}
    kept = {(suite.name, suite.sha256) for suite in suites if suite.kind != RECENT}
    known = kept and kept <= asked and verdict.get("candidate", {}).get("weights_sha256") == weights
    if not known or not verdict.get("passed"):
        return {}
    checks = verdict.get("checks", ())
    return {check["name"]: float(check["used"]) for check in checks if check.get("used") is not None}


def together(checks: Sequence[Check], before: Mapping[str, float]) -> list[Check]:
    """The checks with what was taken `before`: who passes alone, and takes more than is left, fails."""
    found = []
    for check in checks:
        already = max(0.0, before.get(check.name, 0.0))
        if check.used is None or not already:
            found.append(check)
            continue
        used = already + check.used
        told = f"{check.told}; {already:.0%} of what may be given away was taken before, {used:.0%} with it"
        # a hair's breadth is left to sums of logarithms
        over = check.status == PASS and used > 1 + 1e-9
        found.append(replace(check, used=used, told=told, status=FAIL if over else check.status))
    return found
