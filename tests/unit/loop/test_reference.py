"""A reference holds what requests were like, and nothing that comes later."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shoal.errors import DataError
from shoal.loop.detector import Detector
from shoal.loop.reference import EVERY, QUANTILES, Reference, explained, measured

DAY = 86_400


def rows(
    requests: int,
    *,
    seed: int = 0,
    cycle: float = 0.0,
    hours: float = 1.0,
    follow: float = 0.0,
    start: float = 1e9,
    up: float = 0.0,
) -> pa.Table:
    """Requests in `hours`; their surprisal has a rhythm of `cycle` in a day, and each follows the one before by `follow`."""
    rng = np.random.default_rng(seed)
    at = start // DAY * DAY + np.arange(requests) * hours * 3600 / requests
    noise = rng.normal(size=requests)
    for place in range(1, requests):
        noise[place] = follow * noise[place - 1] + np.sqrt(1 - follow**2) * noise[place]
    surprisal = 3 + up + noise + cycle * np.sin(2 * np.pi * at / DAY)
    return pa.table(
        {
            "at": (at * 1000).astype(np.int64),
            "slice": ["shop" if place % 2 else "desk" for place in range(requests)],
            "prompt_surprisal": surprisal,
            "prompt_tokens": rng.integers(5, 40, requests),
            "status": np.where(rng.random(requests) < 0.005, 500, 200),
            "layers": np.full(requests, 8),
        }
    )


def detected(reference: Reference, *tables: pa.Table) -> Detector:
    detector = Detector(reference.streams)
    for table in tables:
        detector.update(reference.standardised(table), np.zeros(len(table)))
    return detector


def test_values_of_the_reference_have_mean_0_and_spread_1() -> None:
    table = rows(2_000)
    reference = measured(table, "w")
    assert {(one.signal, one.slice) for one in reference.standards} >= {("prompt_surprisal", EVERY), ("layers", "desk")}
    for standard, values in zip(reference.standards, reference.standardised(table), strict=True):
        own = values[~np.isnan(values)]
        assert len(own) == (2_000 if standard.slice == EVERY else 1_000)
        if standard.tail:
            assert own.mean() <= 0.011
        if standard.share is None:
            assert own.mean() == pytest.approx(0, abs=1e-9) and own.std() == pytest.approx(1, abs=1e-9)
        else:
            assert standard.share == pytest.approx((own.sum() + 1) / (len(own) + 2))


def test_new_requests_of_the_same_kind_are_quiet_and_others_ring() -> None:
    reference = measured(rows(2_000), "w")
    assert detected(reference, rows(4_000, seed=1)).state == "quiet"
    found = detected(reference, rows(600, seed=2, up=1.0))
    assert found.state == "alarm" and found.moved()[0].signal == "prompt_surprisal"


def test_a_signal_that_never_varied_rings_when_it_does() -> None:
    reference = measured(rows(2_000), "w")
    other = rows(400, seed=1)
    place = other.column_names.index("layers")
    found = detected(reference, other.set_column(place, "layers", pa.array([2] * 400)))
    assert found.state == "alarm" and found.moved()[0].signal == "layers"


def test_a_few_new_requests_among_many_old_ones_ring(tmp_path: Path) -> None:
    """One in ten is 4 standard deviations up: 0.24 of them in the mean, clipped, which the band nearly allows."""
    reference = measured(rows(2_000), "w")
    other = rows(1_500, seed=1)
    up = np.where(np.random.default_rng(0).random(1_500) < 0.1, 4.0, 0.0) + other["prompt_surprisal"].to_numpy()
    found = detected(
        reference, other.set_column(other.column_names.index("prompt_surprisal"), "prompt_surprisal", pa.array(up))
    )
    first = found.moved()[0]
    assert found.state == "alarm" and (first.signal, first.tail) == ("prompt_surprisal", "above") and first.shift > 0.5


def test_one_slice_of_many_rings() -> None:
    reference = measured(rows(2_000), "w")
    other = rows(1_600, seed=1)
    moved = np.where(np.array(other["slice"].to_pylist()) == "desk", 0.9, 0.0) + other["prompt_surprisal"].to_numpy()
    place = other.column_names.index("prompt_surprisal")
    found = detected(reference, other.set_column(place, "prompt_surprisal", pa.array(moved)))
    assert found.state == "alarm" and found.moved()[0].slice == "desk"


def test_a_rhythm_of_the_day_is_no_drift_where_the_reference_has_a_day() -> None:
    day = measured(rows(4_800, cycle=1.0, hours=24), "w")
    assert len(day.standards[0].mean) > 1
    tomorrow = rows(9_600, seed=1, cycle=1.0, hours=48, start=1e9 + DAY)
    assert detected(day, tomorrow).state == "quiet"
    # A reference of its first hours alone takes the afternoon for a drift.
    morning = measured(rows(2_000, cycle=1.0, hours=3), "w")
    assert len(morning.standards[0].mean) == 1
    assert detected(morning, tomorrow).state == "alarm"


@pytest.mark.parametrize("days", [2, 15])
@pytest.mark.parametrize("off", [0.0, 1e-9])
def test_what_is_the_same_in_each_part_of_the_day_makes_a_reference_that_one_request_does_not_ring(
    days: int, off: float
) -> None:
    """A program by day and another by night: without a spread in any part this never ended."""

    def asked(count: int, odd: float = 0.0) -> pa.Table:
        table = rows(count, hours=24 * days)
        night = table["at"].to_numpy() / 1000 % DAY < DAY / 2
        values = np.where(night, 1.0, 2.0) + off * np.random.default_rng(0).normal(size=count)
        values[count // 2] += odd
        return table.set_column(table.column_names.index("prompt_surprisal"), "prompt_surprisal", pa.array(values))

    reference = measured(asked(8_000), "w")
    assert np.isfinite(reference.standardised(asked(8_000))).any()
    assert detected(reference, asked(8_000, odd=1.0)).state == "quiet"


def cut_by_hour(rng: np.random.Generator, start: float, *, more: float = 0.0) -> pa.Table:
    """5,000 requests of one day; the share that is cut swings between 2 and 48 %, as one slice takes another's place."""
    at = start + np.sort(rng.random(5_000)) * DAY
    share = 0.25 + 0.23 * np.sin(2 * np.pi * at / DAY) + more
    ends = np.where(rng.random(5_000) < share, "length", "stop").tolist()
    return pa.table(
        {
            "at": (at * 1000).astype(np.int64),
            "slice": [""] * 5_000,
            "finish": ends,
            "prompt_tokens": rng.integers(5, 40, 5_000),
        }
    )


@pytest.mark.drill
def test_a_share_that_has_a_rhythm_is_no_drift_either_and_rings_where_it_moves_in_it() -> None:
    """20 x 5,000 requests at one false alarm in 50,000: 2 at most. By one share of the whole day all 20 rang."""
    ends = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference = measured(cut_by_hour(rng, 1e9 // DAY * DAY), "w")
        assert next(len(one.mean) for one in reference.standards if one.signal == "cut") > 1
        ends.append(detected(reference, cut_by_hour(rng, 1e9 // DAY * DAY + DAY)).alarm is not None)
        if seed < 3:
            found = detected(reference, cut_by_hour(rng, 1e9 // DAY * DAY + DAY, more=0.2))
            first = found.moved()[0]
            assert found.state == "alarm" and first.signal == "cut" and 0.3 < first.shift < 0.7
    assert sum(ends) <= 2


def by_day(rng: np.random.Generator, start: float, *, more: float = 0.0) -> pa.Table:
    """5,000 requests of one day, of which 3 % at night: the share that is cut, and how hard prompts are, swing by day."""
    night = rng.choice([0, 1, 2, 3, 4, 5, 6, 20, 21, 22, 23], 5_000) + rng.random(5_000)
    at = start + np.sort(np.where(rng.random(5_000) < 0.03, night, 7 + 12 * rng.random(5_000))) * 3600
    swing = np.sin(4 * np.pi * at / DAY)
    return pa.table(
        {
            "at": (at * 1000).astype(np.int64),
            "slice": [""] * 5_000,
            "finish": np.where(rng.random(5_000) < 0.25 + 0.2 * swing + more, "length", "stop").tolist(),
            "prompt_nll": rng.normal(3 + 0.5 * swing),
        }
    )


def test_a_quiet_night_hides_no_rhythm_of_the_day() -> None:
    """20 x 5,000 requests: where each quarter of the day had to have 100, one mean was of all, and all of them rang."""
    ends = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        reference = measured(by_day(rng, 1e9 // DAY * DAY), "w")
        assert {len(one.mean) for one in reference.standards if not one.tail} == {24}
        ends.append(detected(reference, by_day(rng, 1e9 // DAY * DAY + DAY)).alarm is not None)
        if seed < 3:
            found = detected(reference, by_day(rng, 1e9 // DAY * DAY + DAY, more=0.2))
            assert found.state == "alarm" and found.moved()[0].signal == "cut"
    assert sum(ends) <= 2


def test_a_share_without_a_rhythm_and_that_of_failures_have_none() -> None:
    """4,800 requests in a day: of chance alone one in 10,000 would have one."""
    reference = measured(rows(4_800, hours=24), "w")
    shares = [one for one in reference.standards if one.share is not None]
    assert len(shares) > 5 and all(one.mean == [0.0] and not one.stream.by_part for one in shares)
    table = rows(4_800, hours=24)
    noon = np.where(np.arange(4_800) // 200 == 12, 500, 200)  # an outage of an hour
    failed = table.set_column(table.column_names.index("status"), "status", pa.array(noon))
    assert next(one for one in measured(failed, "w").standards if one.signal == "failed").mean == [0.0]


def test_requests_that_follow_each_other_come_in_larger_blocks() -> None:
    assert measured(rows(4_000), "w").standards[0].block == 10
    close = measured(rows(4_000, follow=0.9), "w")
    assert close.standards[0].block == 50
    assert detected(close, rows(6_000, seed=5, follow=0.9)).state == "quiet"


def test_a_file_of_it_is_the_same_and_no_longer_for_more_requests(tmp_path: Path) -> None:
    small, large = measured(rows(2_000), "w", why="sale"), measured(rows(20_000), "w")
    small.write(tmp_path / "small.json")
    large.write(tmp_path / "large.json")
    assert Reference.read(tmp_path / "small.json") == small
    assert (tmp_path / "large.json").stat().st_size < 1.2 * (tmp_path / "small.json").stat().st_size
    assert all(len(one.quantiles) == (0 if one.tail else QUANTILES) for one in large.standards)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large.json", "small.json"]


def test_another_version_of_the_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "reference.json"
    measured(rows(2_000), "w").write(path)
    told = json.loads(path.read_text())
    path.write_text(json.dumps({**told, "version": 9}))
    with pytest.raises(DataError, match=r"shoal.reference 9.*shoal.reference 1"):
        Reference.read(path)
    for wrong in ("", "[]", "{}", json.dumps({**told, "streams": []})):
        path.write_text(wrong)
        with pytest.raises(DataError, match="is no reference"):
            Reference.read(path)


def test_too_few_requests_make_none() -> None:
    for table in (rows(0), rows(199), rows(2_000).select(["at", "slice"])):
        with pytest.raises(DataError, match="a reference"):
            measured(table, "w")


@pytest.mark.parametrize("count", [50, 200, 1_000])
def test_what_chance_does_to_psi_and_ks_is_said(count: int) -> None:
    """Without drift 1 % are beyond it; with 1 SD both are, even of 50."""
    rng = np.random.default_rng(1)
    table = rows(2_000)
    standard = measured(table, "w").standards[0]
    same = [explained(standard, 3 + rng.normal(size=count)) for _ in range(300)]
    for what in ("psi", "ks"):
        assert np.mean([one[what] > one[f"{what}_chance"] for one in same]) <= 0.05
        moved = explained(standard, 4 + rng.normal(size=count))
        assert moved[what] > moved[f"{what}_chance"]
    assert explained(standard, np.array([np.nan])) == {}
