"""The parts of a request, from what an engine says of its end."""

from __future__ import annotations

from shoal.api.spans import Stage, stages
from shoal.engine.events import Finished


def test_parts_follow_each_other_from_the_request_s_coming_to_its_last_token() -> None:
    end = Finished("x", "stop", depth=4, queue_seconds=0.5, first_token_seconds=2.0, total_seconds=6.0)
    assert stages(100.0, 101.0, [(0, 107.5, end)]) == [
        Stage("prepare", 100.0, 101.0),
        Stage("queue", 101.5, 102.0, 0),
        Stage("prefill", 102.0, 103.5, 0),
        Stage("decode", 103.5, 107.5, 0),
    ]


def test_what_never_ran_has_waited_and_what_was_not_accepted_has_no_parts() -> None:
    late = Finished("x", "deadline", queue_seconds=3.0, total_seconds=3.0)
    assert stages(0.0, 1.0, [(1, 4.0, late)]) == [Stage("prepare", 0.0, 1.0), Stage("queue", 1.0, 4.0, 1)]
    assert stages(0.0, None, []) == []


def test_what_ended_before_its_first_token_was_in_the_prompt_until_then() -> None:
    left = Finished("x", "cancelled", depth=4, queue_seconds=1.0, total_seconds=3.0)
    assert stages(0.0, 1.0, [(0, 4.0, left)])[1:] == [Stage("queue", 1.0, 2.0, 0), Stage("prefill", 2.0, 4.0, 0)]


def test_the_clocks_of_two_processes_never_make_a_part_that_ends_before_it_began() -> None:
    """An answer that another engine went on with is told by that one alone, whose time began elsewhere."""
    for seconds in (0.0, 0.5, 100.0):
        end = Finished(
            "x", "stop", depth=4, queue_seconds=seconds, first_token_seconds=2 * seconds, total_seconds=seconds
        )
        for part in stages(10.0, 11.0, [(0, 12.0, end)]):
            assert 10.0 <= part.began <= part.ended <= 12.0
