"""What a step with drafts costs, measured while the engine runs, for each batch size. Plain numbers.

    seconds = plain + fixed + each * (drafts of the request that drafts most) + row * (drafts of all requests)

`plain` is a step without drafts. `fixed`: drafting is set up; `each`: group 1 runs once more; `row`: a draft's row runs through
all groups, two heads and two draws. Requests that draft in one step share `each`, and pay `row` for every one of them, which is
what makes drafts dear in large batches.

The three follow from steps by a Kalman filter, since steps of a kind are few and rarely of another: with two drafts each it can
be told what two cost, and hardly what the first does; until that is seen, it counts as `fixed`. A step with drafts that is
faster than expected says that `plain` is less by now, the more so the longer none was seen: shorter texts make all cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

PLAIN = 2  # steps without drafts at a batch size, before there is anything to compare with
FASTER, SLOWER = 0.3, 0.1  # weight of a step without drafts that was, beside those before it
SPIKE = 4.0  # a step counts as at most so many times as long as was expected: the machine paused
SEEN, RARE = 8, 2.0  # after so many steps with drafts it counts as at most so many times as long
NOISE = 0.05  # deviation of a step from what it costs, in steps without drafts; thrice that where it was slower
DRIFT = 0.001  # as much of what is not known at first is forgotten with every step
# deviation of `fixed`, `each` and (a `batch`-th of it) `row` at first, in steps without drafts
UNKNOWN = 1.0, 0.15, 0.3
AGAIN = 128  # of so many steps one's time is lost by steps without drafts that pay
# deviation of what a step without drafts has come to cost, for each with drafts since: its texts are others by then
WANDERS = 0.05
ALIKE = 2  # times as many requests, up to which steps are thought to cost alike where one was not measured of late
ROW = 0.1  # what a draft's row is thought to cost, in shares of what a row of a step without drafts does


class Price:
    """Of one batch size."""

    def __init__(self, batch: int, cheap: float, like: Price | None = None) -> None:
        """`cheap`: what group 1 costs of a step without drafts, it is thought; `like`: a batch size whose drafts were seen."""
        self.batch, self._cheap = batch, cheap
        self._plain, self._steps = 0.0, 0
        self._like = like
        self._seen = 0  # steps with drafts
        self._drafted = 0  # steps with drafts since one without was due
        self._since = 0  # ... since one without was seen, `AGAIN` at most
        self._costs: list[float] = []  # fixed, each, row: seconds
        self._doubt: list[list[float]] = []  # their covariance

    @property
    def plain(self) -> float:
        """Seconds of a step without drafts; 0 while that is not known."""
        return self._plain if self._steps >= PLAIN else 0.0

    def learn_plain(self, seconds: float) -> None:
        """Take in a step without drafts. One that is slower than those before counts less: others' work on the machine takes
        time as well. Of the first ones the fastest counts: the very first may have been waiting for kernels."""
        self._steps, self._drafted, self._since = self._steps + 1, 0, 0
        if self._steps == 1:
            self._plain = seconds
        faster = 1.0 if self._steps <= PLAIN else FASTER
        weight = faster if seconds < self._plain else SLOWER
        self._plain += weight * (min(seconds, SPIKE * self._plain) - self._plain)

    def learn(self, most: int, rows: int, seconds: float) -> None:
        """Take in a step whose requests drafted `rows` tokens, one of them as many as `most`."""
        if not self.plain:
            return
        if seconds < self._plain:  # one without takes less still, so those that were measured were not alone
            self._plain += FASTER * (seconds - self._plain)
        costs, x = self._known(), (1.0, float(most), float(rows))
        expected = self.plain + sum(a * b for a, b in zip(costs, x, strict=True))
        self._seen += 1
        off = min(seconds, (SPIKE if self._seen <= SEEN else RARE) * max(expected, self.plain)) - expected
        noise = (NOISE * self.plain * (1 if off < 0 else 3)) ** 2
        doubt = self._doubt
        towards = [sum(a * b for a, b in zip(line, x, strict=True)) for line in doubt]
        shifted = (WANDERS * self.plain) ** 2 * self._since
        whole = sum(a * b for a, b in zip(towards, x, strict=True)) + noise + shifted
        # it never rises so: who thinks that steps without drafts are slow drafts, and sees none of them
        self._plain *= 1 - min(0.5, shifted * max(0.0, -off) / whole / self._plain)
        for i, unknown in enumerate(self._unknown()):
            costs[i] += towards[i] * off / whole
            for j in range(3):
                doubt[i][j] -= towards[i] * towards[j] / whole
            doubt[i][i] += DRIFT * unknown
        for i, unknown in enumerate(self._unknown()):
            # the whole line and column: of a bound on the deviation alone no covariance would be left where `plain` fell
            share = min(1.0, math.sqrt(unknown / doubt[i][i]))
            for j in range(3):
                doubt[i][j] *= share
                doubt[j][i] *= share

    def look(self, rate: float) -> bool:
        """Is it time for a step without drafts, since that is what all are compared with? Such steps are the rarer the more
        tokens a second are lost by one, `rate` of which come with drafts for one without."""
        self._drafted, self._since = self._drafted + 1, min(AGAIN, self._since + 1)
        due = self._drafted >= AGAIN * (1 - 1 / rate)
        if due:
            self._drafted = 0
        return due

    def extra(self, most: int, rows: int) -> float:
        """What a step costs that drafts so, beside one without, in steps without."""
        fixed, each, row = self.shares()
        return max(0.0, fixed + each * most + row * rows)

    def shares(self) -> tuple[float, float, float]:
        """`fixed`, `each` and `row`, in steps without drafts. One may be below 0 where it was only seen with others."""
        fixed, each, row = self._known()
        return fixed / self.plain, each / self.plain, row / self.plain

    def _unknown(self) -> list[float]:
        scales = (1.0, 1.0, 1 / self.batch)
        return [(self.plain * share * scale) ** 2 for share, scale in zip(UNKNOWN, scales, strict=True)]

    def _known(self) -> list[float]:
        if not self._costs:
            like = self._like
            guess = [0.0, self._cheap * self.plain, ROW * self.plain / self.batch]
            self._costs = guess if like is None else list(like._costs)
            self._doubt = [[x if i == j else 0.0 for j in range(3)] for i, x in enumerate(self._unknown())]
        return self._costs


class Prices:
    """Of all batch sizes."""

    def __init__(self, cheap: float) -> None:
        self._cheap = cheap
        self._sizes: dict[int, Price] = {}
        self._steps = 0  # with drafts, that were measured at any size ...
        self._seen: dict[int, int] = {}  # ... and the last of them at each
        self._known: dict[int, Price] = {}  # since the last of those

    def at(self, batch: int) -> Price:
        """Of steps with `batch` requests; begun with what the nearest batch size costs that has been measured."""
        if batch not in self._sizes:
            self._sizes[batch] = Price(batch, self._cheap, _nearest(self._sizes, batch))
        return self._sizes[batch]

    def learn(self, batch: int, most: int, rows: int, seconds: float) -> None:
        """Take in a step with `batch` requests, as `Price.learn`."""
        price = self.at(batch)
        if price.plain:
            self._steps += 1
            self._seen[batch] = self._steps
            self._known.clear()
        price.learn(most, rows, seconds)

    def known(self, batch: int) -> Price:
        """What a step with `batch` requests is thought to cost: as one of the nearest size that is `ALIKE`, where drafts were
        measured at that one since they last were at its own. What was known of its own is of other texts."""
        if batch not in self._known:
            last = self._seen.get(batch, 0)
            since = {size: seen for size, seen in self._seen.items() if seen > last and _alike(size, batch)}
            size = min(since, key=lambda size: (abs(size - batch), -since[size])) if since else batch
            self._known[batch] = self.at(size)
        return self._known[batch]


def _alike(one: int, other: int) -> bool:
    return max(one, other) <= ALIKE * min(one, other)


def _nearest(sizes: Mapping[int, Price], batch: int) -> Price | None:
    known = [size for size, price in sizes.items() if price._costs]
    return sizes[min(known, key=lambda size: abs(size - batch))] if known else None
