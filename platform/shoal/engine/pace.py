"""How fast this engine goes, measured while it runs: what a step costs, and how fast the queue moves. Plain numbers.

    seconds of a step = a * (layer groups run) + b * (rows, summed over the groups)

`a` is what a group costs whatever the number of rows (its weights are read, its operations start), `b` what a row adds. Both
are least squares over past steps, of which older ones count less. With steps of one shape only, all is put on `a`.
"""

from __future__ import annotations

from collections.abc import Sequence

KEEP = 0.98  # weight of a step after the next one
SHALLOW_SHARE = 0.25  # time that shallow-only steps may take, of that of full steps
WARM_UP = 16  # steps, or admissions, before there is an estimate
SPIKE = 4.0  # a step counts as at most so many times what was expected of it: the machine paused, not the engine


class Pace:
    def __init__(self) -> None:
        self._steps = self._entries = 0
        self._gg = self._gr = self._rr = self._gt = self._rt = 0.0  # sums of products: groups, rows, time
        self._owed = 0.0  # seconds that shallow-only steps may take now
        self._between = 0.0  # mean seconds between two admissions while requests wait
        self._since: float | None = None  # the last admission, or since when requests wait

    def step(self, groups: int, rows: int, seconds: float, *, shallow: bool = False) -> None:
        """Learn from a step that ran `groups` groups, and `rows` rows summed over them."""
        self._owed += -seconds if shallow else SHALLOW_SHARE * seconds
        expected = self.seconds(groups, rows)
        if expected:
            seconds = min(seconds, SPIKE * expected)
        self._steps += 1
        pairs = (groups * groups, groups * rows, rows * rows, groups * seconds, rows * seconds)
        sums = (self._gg, self._gr, self._rr, self._gt, self._rt)
        self._gg, self._gr, self._rr, self._gt, self._rt = (
            KEEP * old + new for old, new in zip(sums, pairs, strict=True)
        )

    def seconds(self, groups: int, rows: int) -> float | None:
        """Expected time of such a step; None before `WARM_UP` steps."""
        if self._steps < WARM_UP:
            return None
        whole = self._gg * self._rr - self._gr * self._gr
        each = (self._gg * self._rt - self._gr * self._gt) / whole if whole > 1e-6 * self._gg * self._rr else 0.0
        fixed = (self._gt - max(each, 0.0) * self._gr) / self._gg
        if fixed < 0:
            fixed, each = 0.0, self._rt / self._rr
        return fixed * groups + max(each, 0.0) * rows

    def alone(self, shallow: Sequence[int], all_of_them: Sequence[int]) -> bool:
        """Should the next step run the shallow requests alone? Both arguments say through how many groups each request runs.
        Yes if one such step after each full one lowers the mean time of a token over all requests (it is halved for the shallow
        ones, and for all longer by that step), and if shallow-only steps have not had their share of the time."""
        part, full = self.seconds(max(shallow), sum(shallow)), self.seconds(max(all_of_them), sum(all_of_them))
        if part is None or full is None:
            return False
        self._owed = min(self._owed, full)  # after a long prefill too, the deep ones wait for one step's time at most
        s, n = len(shallow), len(all_of_them)
        return part <= self._owed and (full + part) * (n - s / 2) < full * n

    def waits(self, now: float) -> None:
        """A request waits, where none waited before."""
        self._since = now

    def enters(self, now: float, waiting: int) -> None:
        """A request was admitted, and `waiting` still wait."""
        if self._since is not None:
            self._entries += 1
            share = max(1 / self._entries, 1 - KEEP)  # a plain mean at first
            self._between += share * (now - self._since - self._between)
        self._since = now if waiting else None

    def wait(self, ahead: int) -> float | None:
        """Seconds until `ahead` waiting requests have been admitted; None before `WARM_UP` admissions."""
        return ahead * self._between if self._entries >= WARM_UP else None
