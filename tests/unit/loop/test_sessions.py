"""One session counts once, whoever asks and however rows are cut."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.loop.rows import RERUN
from shoal.loop.sessions import LONGEST_S, MOST_REQUESTS, Sessions

MINUTE = 60


def rows(*given: tuple[float, str | None, str | None], down: float | None = None, role: str | None = None) -> pa.Table:
    """(when in seconds, subject, conversation) of each."""
    at, subject, conversation = zip(*given, strict=True)
    return pa.table(
        {
            "at": [round(1000 * when) for when in at],
            "subject": pa.array(subject, pa.string()),
            "conversation": pa.array(conversation, pa.string()),
            "role": pa.array([role] * len(at), pa.string()),
            "down": pa.array([down] * len(at), pa.float64()),
        }
    )


def begins(table: pa.Table, sessions: Sessions | None = None) -> list[float]:
    return [when / 1000 for when in (sessions or Sessions()).first_requests(table)["at"].to_pylist()]


def test_a_session_ends_with_half_an_hour_of_silence() -> None:
    talks = [(20 * MINUTE * place, "ann", f"talk-{place}") for place in range(3)]
    assert begins(rows(*talks)) == [0]
    assert begins(rows(*talks, (71 * MINUTE, "ann", "talk-3"))) == [0, 71 * MINUTE]
    assert begins(rows((0, "ann", "a"), (1, "bob", "b"), (2, "ann", "c"))) == [0, 1], "of each person"
    assert begins(rows((0, None, "a"), (1, None, "b"), (2, None, None), (3, None, None))) == [0, 1, 2, 3]


def test_turns_of_a_conversation_are_one_session_though_days_lie_between() -> None:
    assert begins(rows((0, "ann", "a"), (86_400, "ann", "a"), (2 * 86_400, None, "a"))) == [0]


def test_who_asks_all_day_counts_once_an_hour_and_a_program_more_often() -> None:
    """A service whose one key sends no `user` would have no session else."""
    slow = rows(*((10 * MINUTE * place, "shop", f"talk-{place}") for place in range(24)))
    assert begins(slow) == [0, LONGEST_S, 2 * LONGEST_S, 3 * LONGEST_S]
    quick = rows(*((float(place), "shop", f"talk-{place}") for place in range(3 * MOST_REQUESTS)))
    assert begins(quick) == [0, MOST_REQUESTS, 2 * MOST_REQUESTS]


def test_one_person_has_one_thumb_a_day_and_it_ends_no_session() -> None:
    sessions = Sessions()
    assert begins(rows((0, "ann", "a")), sessions) == [0]
    assert begins(rows((1, "ann", None), (2, "ann", None), (3, "bob", None), down=1.0), sessions) == [1, 3]
    assert begins(rows((86_402, "ann", None), down=1.0), sessions) == [86_402]
    assert begins(rows((4, "ann", None), (5, "ann", None), role=RERUN), sessions) == [4]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1_000), cuts=st.lists(st.integers(0, 60), max_size=4))
def test_it_goes_on_where_it_was_however_rows_are_cut(seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    at = np.sort(rng.random(60)) * 8 * 3600
    table = rows(*((when, str(rng.integers(3)), str(rng.integers(20))) for when in at.tolist()))
    whole, sessions, found = begins(table), Sessions(), []
    for first, last in zip([0, *sorted(cuts)], [*sorted(cuts), 60], strict=True):
        found += begins(table.slice(first, last - first), sessions)
        sessions = Sessions(**json.loads(json.dumps(asdict(sessions), allow_nan=False)))
    assert found == whole
