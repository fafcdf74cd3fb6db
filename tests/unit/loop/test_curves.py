"""Signals over time: what is drawn is the mean of what came, however it came, in a bounded number of points."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.loop.curves import BUCKET, MOST, followed, shifts
from shoal.loop.detector import Stream

STREAMS = (
    Stream("layers", "all", 10),
    Stream("layers", "all", 10, share=0.01, tail="above"),
    Stream("cut", "all", 10, share=0.2),
    Stream("layers", "orders", 10),
)


def values(count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    found = rng.normal(size=(len(STREAMS), count))
    found[2] = rng.random(count) < 0.4
    found[0, rng.random(count) < 0.3] = np.nan
    return found


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=12))
def test_it_is_the_same_whether_requests_come_at_once_or_by_and_by(sizes: list[int]) -> None:
    count = sum(sizes)
    every, at = values(count), np.arange(count, dtype=float)
    saved, seen = {}, 0
    for size in sizes:
        saved = json.loads(
            json.dumps(followed(saved, STREAMS, every[:, seen : seen + size], at[seen : seen + size], seen))
        )
        seen += size
    whole = followed({}, STREAMS, every, at, 0)
    assert saved["ends"] == whole["ends"] and saved["at"] == whole["at"]
    np.testing.assert_allclose(saved["sums"], whole["sums"], rtol=0, atol=1e-9)
    points = shifts(saved, STREAMS)
    assert set(points) == {"layers", "cut"}
    for number, (end, _) in enumerate(points["cut"]):
        assert end == min((number + 1) * BUCKET, count)


def test_a_point_is_the_mean_of_its_bucket_in_standard_deviations_of_a_request() -> None:
    count = 2 * BUCKET
    every = values(count)
    points = shifts(followed({}, STREAMS, every, np.arange(count), 0), STREAMS)
    assert points["layers"][1] == (count, pytest.approx(np.nanmean(every[0, BUCKET:])))
    assert points["cut"][0] == (BUCKET, pytest.approx((every[2, :BUCKET].mean() - 0.2) / np.sqrt(0.2 * 0.8)))


def test_there_are_never_many_and_none_is_lost() -> None:
    count, saved = 40_000, {}
    every = values(count)
    for seen in range(0, count, 100):
        saved = followed(saved, STREAMS, every[:, seen : seen + 100], np.arange(seen, seen + 100), seen)
        assert len(saved["ends"]) <= MOST + 1
    assert np.sum(saved["counts"], axis=0).tolist() == [np.isfinite(every[0]).sum(), count]
    assert np.sum(saved["sums"], axis=0) == pytest.approx([np.nansum(every[0]), every[2].sum()])
    assert saved["ends"][-1] == count and np.diff(saved["ends"]).max() == saved["size"]
