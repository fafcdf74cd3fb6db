"""Notice that requests are no longer like a reference: Shiryaev-Roberts sums of e-values on block means.

    values, standardised  ─>  blocks of b  ─>  e-values, 2 signs x 3 bets  ─>  R = (R + b) e  ─>  alarm where the mean of R >= N

An e-value is at most 1 in the mean as long as nothing has moved by more than the band, so R grows by no more than the requests
that it saw, and the mean of all R, being such a sum itself, is N after N requests at the soonest, in the mean: N is the mean
number of requests to a false alarm, whatever the number of signals and slices and however often one looks (E-detectors, arXiv
2203.03532). Detectors are averaged and never e-values: averaging these in each step loses most of the power.

Two kinds of streams. A mean's e-value is exp(l z - l^2 / 2) of its standardised block mean z (Gaussian, three bets l). A
share's, of values 0 and 1, is the likelihood ratio against three shares further away, which holds for the rarest as well; where
the reference has another share in each part of the week, each value is held against that of its own.

Letters: F streams, n requests, B blocks, b values in a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from shoal.errors import DataError

BAND = 0.2  # standard deviations of a request that a signal may move at least: too small to matter, or the reference's error
BETS = np.array([0.5, 1.0, 2.0])  # standard deviations of a block's mean that a shift is bet to have
AWAY = np.array([0.05, 0.2, 0.5])  # how far towards 1, or towards 0, a share is bet to have gone
REQUESTS = 50_000  # mean requests to a false alarm
SUSPECT = 0.02  # of that: worth watching
_SIGNS = np.array([1.0, -1.0])
_MOST, _MOST_LOG = 1e150, 300.0  # sums stay numbers that JSON can hold
_LEAST_SHARE = 1e-9


@dataclass(frozen=True)
class Stream:
    """One signal of one slice, and what its reference says of it."""

    signal: str
    slice: str
    block: int  # values in a block
    scatter: float = 1.0  # of a mean: standard deviation of a block's mean of standardised values
    share: float | None = None  # of values 0 and 1: how often the reference has 1; None for a mean
    tail: str = ""  # above or below: its values say whether the signal is so far out as 1 % of the reference
    # whether each value is (x - share) / spread, of x 0 or 1, by the share of its part of the week: `share` is the whole day's
    by_part: bool = False
    band: float = BAND  # standard deviations of a request that it may move

    def e_values(self, blocks: np.ndarray) -> np.ndarray:
        """[B, 2 signs, 3 bets] of `blocks` [B, b]."""
        if self.share is None:
            z = (blocks.mean(axis=1)[:, None] * _SIGNS - self.band) / self.scatter
            return np.exp(np.minimum(z[:, :, None] * BETS - BETS**2 / 2, _MOST_LOG))
        ones = blocks[:, :, None] > 0
        share = (_share_of(blocks) if self.by_part else np.full(blocks.shape, self.share))[:, :, None]
        found = []
        for sign in _SIGNS:
            limit = share + sign * self.band * _spread(share)
            known = (limit > _LEAST_SHARE) & (limit < 1 - _LEAST_SHARE)  # of others nothing is further away than it
            limit = np.where(known, limit, 0.5)
            other = limit + AWAY * (1 - limit) if sign > 0 else limit * (1 - AWAY)
            logs = np.where(ones, np.log(other / limit), np.log((1 - other) / (1 - limit))) * known
            found.append(np.exp(np.minimum(logs.sum(axis=1), _MOST_LOG)) * known.any(axis=1))
        return np.stack(found, axis=1)

    def shift(self, mean: float) -> float:
        """How far a mean of values is from the reference, in standard deviations of a request."""
        if self.share is None or self.by_part:
            return mean
        return float((mean - self.share) / _spread(np.array(self.share)))


def _spread(share: np.ndarray) -> np.ndarray:
    return np.maximum(np.sqrt(share * (1 - share)), 1e-6)


def _share_of(values: np.ndarray) -> np.ndarray:
    """Of (x - share) / spread, with x 0 or 1, the share: what is above 0 is sqrt((1 - share) / share)."""
    squares = values**2
    return np.where(values > 0, 1.0, squares) / (1 + squares)


@dataclass(frozen=True)
class Moved:
    """What a detector has seen of one stream."""

    signal: str
    slice: str
    tail: str
    evidence: float  # mean of R over its signs and bets; alone an alarm from `Detector.requests` on
    shift: float  # standard deviations of a request, since `since`; + is more
    since: float | None  # epoch seconds of the first request that is likely to have been different; None: nothing moved
    number: int  # of that request, from 1
    values: int  # seen since then


class Detector:
    """All streams of one reference. `update` it with what came; `evidence` says how much it has, `alarm` when it had enough."""

    def __init__(self, streams: Sequence[Stream], *, requests: int = REQUESTS) -> None:
        """Raises DataError without a stream."""
        if not streams:
            raise DataError("nothing to watch", do="capture requests until some signal has values")
        self.streams, self.requests = tuple(streams), requests
        self.seen = 0  # requests
        self.alarm: dict[str, float] | None = None  # `at`, epoch seconds; `number` of the request; `evidence` then
        count = len(self.streams)
        self._sums = np.zeros((count, 2, 3))
        # of the middle bet, the likeliest time of a change: log of the largest product of e-values up to now, where it began
        self._likely, self._since, self._number = np.zeros((count, 2)), np.zeros((count, 2)), np.zeros((count, 2), int)
        self._total, self._values = np.zeros((count, 2)), np.zeros((count, 2), int)
        self._pending: list[list[tuple[float, float, int]]] = [[] for _ in self.streams]  # value, when, which request

    @property
    def evidence(self) -> float:
        """In requests: the mean of all sums, an alarm from `requests` on."""
        return float(self._sums.mean())

    @property
    def state(self) -> str:
        """ "alarm" (stays until there is another reference), "watching" or "quiet"."""
        if self.alarm is not None:
            return "alarm"
        return "watching" if self.evidence >= SUSPECT * self.requests else "quiet"

    def update(self, values: np.ndarray, at: np.ndarray) -> None:
        """Look at n more requests, in their order: `values` [F, n], NaN where a request has none, and `at` [n], epoch seconds.
        The same whether they come at once or one at a time. Raises DataError for another number of streams."""
        if values.shape != (len(self.streams), len(at)):
            wanted = f"{len(self.streams)} streams of {len(at)} requests"
            raise DataError("values to look at", got=" x ".join(map(str, values.shape)), allowed=wanted)
        blocks, ends, starts = zip(
            *(self._blocks(stream, values[stream], at) for stream in range(len(self.streams))), strict=True
        )
        deep, count = max(map(len, ends)), len(self.streams)
        e_values, there = np.ones((deep, count, 2, 3)), np.zeros((deep, count), dtype=bool)
        began, totals = np.zeros((deep, count, 2)), np.zeros((deep, count))
        sizes = np.array([stream.block for stream in self.streams])
        for index, (stream, some) in enumerate(zip(self.streams, blocks, strict=True)):
            e_values[: len(some), index], there[: len(some), index] = stream.e_values(some), True
            began[: len(some), index], totals[: len(some), index] = starts[index], some.sum(axis=1)
        history = [self._sums.sum(axis=(1, 2))]
        for depth, on in enumerate(there):
            grown = np.minimum((self._sums + sizes[:, None, None]) * e_values[depth], _MOST)
            self._sums = np.where(on[:, None, None], grown, self._sums)
            self._follow(on[:, None], e_values[depth, :, :, 1], began[depth], totals[depth], sizes)
            history.append(self._sums.sum(axis=(1, 2)))
        self._ring(np.stack(history), ends, at)
        self.seen += len(at)

    def moved(self) -> list[Moved]:
        """Of each stream what was seen, that with the most evidence first."""
        found = []
        for index, stream in enumerate(self.streams):
            side = int(self._sums[index].sum(axis=1).argmax())
            count, began = int(self._values[index, side]), self._likely[index, side] > 0
            mean = self._total[index, side] / count if count else float("nan")
            found.append(
                Moved(
                    stream.signal, stream.slice, stream.tail, float(self._sums[index].mean()),
                    stream.shift(float(mean)) if began else 0.0,
                    float(self._since[index, side]) if began else None, int(self._number[index, side]), count,
                )
            )  # fmt: skip
        return sorted(found, key=lambda one: -one.evidence)

    def saved(self) -> dict[str, Any]:
        """All of it as JSON can hold it; `restored` goes on exactly where it was."""
        arrays = ("_sums", "_likely", "_since", "_number", "_total", "_values")
        return {
            "streams": [asdict(stream) for stream in self.streams],
            "requests": self.requests, "seen": self.seen, "alarm": self.alarm, "pending": self._pending,
            **{name.strip("_"): getattr(self, name).tolist() for name in arrays},
        }  # fmt: skip

    @classmethod
    def restored(cls, saved: Mapping[str, Any]) -> Detector:
        """Raises DataError for what is no detector's."""
        try:
            self = cls([Stream(**stream) for stream in saved["streams"]], requests=saved["requests"])
            self.seen, self.alarm = int(saved["seen"]), saved["alarm"]
            for name in ("_sums", "_likely", "_since", "_number", "_total", "_values"):
                array = getattr(self, name)
                array[...] = np.array(saved[name.strip("_")], dtype=array.dtype)
            self._pending = [[(float(x), float(t), int(k)) for x, t, k in some] for some in saved["pending"]]
            if len(self._pending) != len(self.streams):
                raise ValueError("as many as streams")
        except (KeyError, TypeError, ValueError) as error:
            raise DataError("the state of a detector", got=str(error), do="remove it, and it learns anew") from error
        return self

    def _blocks(self, index: int, values: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of one stream: full blocks [B, b], the request of this update in which each ended [B], and when and with which
        request each began [B, 2]. What is over waits for the next update."""
        size, waiting = self.streams[index].block, self._pending[index]
        here = np.flatnonzero(~np.isnan(values))
        came = zip(values[here].tolist(), at[here].tolist(), (self.seen + 1 + here).tolist(), strict=True)
        every = [*waiting, *came]
        full = len(every) // size * size
        self._pending[index] = every[full:]
        ends = here[np.arange(size, full + 1, size) - len(waiting) - 1]
        starts = np.array([(when, number) for _, when, number in every[:full:size]]).reshape(-1, 2)
        return np.array([value for value, _, _ in every[:full]]).reshape(-1, size), ends, starts

    def _follow(
        self, on: np.ndarray, e_values: np.ndarray, began: np.ndarray, totals: np.ndarray, sizes: np.ndarray
    ) -> None:
        """Move the likeliest beginning of a change on by one block of the streams that are `on` [F, 1]: `e_values` [F, 2], when
        and with which request it `began` [F, 2], sum and number of its values [F]."""
        anew = on & (self._likely <= 0)
        self._since = np.where(anew, began[:, :1], self._since)
        self._number = np.where(anew, began[:, 1:].astype(int), self._number)
        with np.errstate(divide="ignore"):
            grown = np.maximum(self._likely + np.log(e_values), 0.0)
        self._likely = np.where(on, grown, self._likely)
        self._total = np.where(on, np.where(anew, 0.0, self._total) + totals[:, None], self._total)
        self._values = np.where(on, np.where(anew, 0, self._values) + sizes[:, None], self._values)

    def _ring(self, history: np.ndarray, ends: Sequence[np.ndarray], at: np.ndarray) -> None:
        """Set the alarm where the mean first is enough: `history` [B + 1, F], the sums before and after each block."""
        if self.alarm is not None:
            return
        places = np.unique(np.concatenate(ends)).astype(int)
        after = np.stack([np.searchsorted(end, places, side="right") for end in ends])
        evidence = history[after, np.arange(len(ends))[:, None]].sum(axis=0) / self._sums.size
        enough = np.flatnonzero(evidence >= self.requests)
        if len(enough):
            place = int(places[enough[0]])
            number = self.seen + place + 1
            self.alarm = {"at": float(at[place]), "number": number, "evidence": float(evidence[enough[0]])}
