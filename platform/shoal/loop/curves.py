"""How far each watched signal was from its reference over time: means of buckets of requests, to be drawn and never to ring.

Letters: n requests, F streams, S signals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from shoal.loop.detector import Stream
from shoal.loop.reference import EVERY

BUCKET = 25  # requests of the first buckets; twice as many each time that there are more than MOST
MOST = 120

# {"size", "signals": [S], "ends": [seen], "at": [seconds], "sums": [[S]...], "counts": [[S]...]}
Saved = dict[str, Any]


def followed(saved: Saved, streams: Sequence[Stream], values: np.ndarray, at: np.ndarray, seen: int) -> Saved:
    """`saved` ({} at the beginning) with n more requests, `values` [F, n] and `at` [n] as a detector takes them; `seen`: those
    before. Of each signal the mean stream of all requests is followed."""
    rows = [place for place, one in enumerate(streams) if one.slice == EVERY and not one.tail]
    found: Saved = saved or {
        "size": BUCKET, "signals": [streams[row].signal for row in rows], "ends": [], "at": [], "sums": [], "counts": [],
    }  # fmt: skip
    mine, start = values[rows], 0
    while start < len(at):
        ends = found["ends"]
        if not ends or ends[-1] % found["size"] == 0:
            ends.append(seen + start)
            for name in ("sums", "counts"):
                found[name].append([0.0] * len(rows))
            found["at"].append(float(at[start]))
        room = found["size"] - ends[-1] % found["size"]
        part = mine[:, start : start + room]
        known = ~np.isnan(part)
        found["sums"][-1] = (np.array(found["sums"][-1]) + np.where(known, part, 0.0).sum(axis=1)).tolist()
        found["counts"][-1] = (np.array(found["counts"][-1]) + known.sum(axis=1)).tolist()
        start += part.shape[1]
        ends[-1] = seen + start
        found["at"][-1] = float(at[start - 1])
        if len(ends) > MOST and ends[-1] % found["size"] == 0:
            _halve(found)
    return found


def shifts(saved: Saved, streams: Sequence[Stream]) -> dict[str, list[tuple[int, float]]]:
    """Of each signal (requests seen, standard deviations of a request from the reference), a point for each bucket."""
    of = {one.signal: one for one in streams if one.slice == EVERY and not one.tail}
    found: dict[str, list[tuple[int, float]]] = {}
    for place, name in enumerate(saved.get("signals", ())):
        points = zip(saved["ends"], saved["sums"], saved["counts"], strict=True)
        found[name] = [
            (int(end), of[name].shift(sums[place] / counts[place])) for end, sums, counts in points if counts[place]
        ]
    return found


def _halve(found: Saved) -> None:
    """Neighbours become one bucket; of an odd number the last stays as it is, and is filled."""
    found["size"] *= 2
    whole = len(found["ends"]) // 2 * 2
    for name in ("ends", "at"):
        found[name] = found[name][1:whole:2] + found[name][whole:]
    for name in ("sums", "counts"):
        pairs = zip(found[name][:whole:2], found[name][1:whole:2], strict=True)
        found[name] = [np.add(*pair).tolist() for pair in pairs] + found[name][whole:]
