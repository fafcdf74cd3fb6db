"""Which rows come next, and what a step costs, in numbers."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.engine.events import Request, Sampling
from shoal.engine.plan import Plan, Work, next_work
from shoal.engine.running import Running
from shoal.engine.text import TextStream
from shoal.inputs.tokenizer import Tokenizer


def running(
    answered: int = 0, at: int = 0, states_from: int | None = None, scored: bool = False, **more: Any
) -> Running:
    """A prompt of eight tokens, and some of an answer."""
    prompt = list(range(50, 58))
    sampling = Sampling(prompt_logprobs=0 if scored else None)
    one = Running(
        Request(prompt, sampling), [*prompt, *[60] * answered], prompt_len=8, page=4,
        text=TextStream(Tokenizer.bytes_only(), ()), seed=0, order=(0, 0, 0), arrival=0.0, **more,
    )  # fmt: skip
    one.holding.at, one.holding.states_from = at, states_from
    return one


@pytest.mark.parametrize(
    ("asked", "room", "work"),
    [
        # not decided yet: group 1 alone, and the router decides with the last row
        ({}, 3, {"start": 0, "count": 3, "first": 0, "last": 1, "hold": True}),
        ({"at": 3}, 5, {"start": 3, "count": 5, "first": 0, "last": 1, "hold": True, "decide": True}),
        ({"at": 3}, 9, {"start": 3, "count": 5, "first": 0, "last": 1, "hold": True, "decide": True}),
        # a prompt of known depth, in chunks: the last gives a token
        ({"groups": 2}, 3, {"start": 0, "count": 3, "first": 0, "last": 2}),
        ({"groups": 2, "at": 3}, 9, {"start": 3, "count": 5, "first": 0, "last": 2, "sample": True}),
        # states after group 1 are kept from 5 on: before them all groups run, from them on the deeper ones
        ({"groups": 4, "at": 2, "states_from": 5}, 9, {"start": 2, "count": 3, "first": 0, "last": 4}),
        ({"groups": 4, "at": 5, "states_from": 5}, 9, {"start": 5, "count": 3, "first": 1, "last": 4, "sample": True}),
        ({"groups": 1, "at": 7, "states_from": 5}, 9, {"start": 7, "count": 1, "first": 1, "last": 1, "sample": True,
                                                       "drafts": 2}),
        # an answer goes on, and drafts
        ({"groups": 4, "at": 9, "answered": 2}, 1, {"start": 9, "count": 1, "first": 0, "last": 4, "sample": True,
                                                    "drafts": 2}),
        # logprobs of the prompt: of rows that a token of the prompt follows
        ({"groups": 1, "scored": True}, 3, {"start": 0, "count": 3, "first": 0, "last": 1, "score": True}),
        ({"groups": 1, "scored": True, "at": 6}, 9, {"start": 6, "count": 2, "first": 0, "last": 1, "score": True,
                                                     "sample": True}),
        ({"groups": 1, "scored": True, "at": 7}, 9, {"start": 7, "count": 1, "first": 0, "last": 1, "sample": True,
                                                     "drafts": 2}),
    ],
)  # fmt: skip
def test_the_next_rows_of_a_request(asked: dict[str, Any], room: int, work: dict[str, Any]) -> None:
    one = running(**asked)
    nothing: dict[str, Any] = {
        "hold": False,
        "decide": False,
        "sample": False,
        "score": False,
        "drafts": 0,
        "verify": False,
    }
    nothing |= {"audit": False, "spans": ()}
    assert vars(next_work(one, room, 2)) == {"running": one, **nothing, **work}


def test_a_work_ends_after_its_rows_reaches_over_its_drafts_and_scores_all_but_the_prompts_last() -> None:
    one = running(answered=3)
    work = Work(one, 8, 1, 0, 4, drafts=3)
    assert (work.end, work.reach) == (9, 12)
    assert [Work(one, start, 3, 0, 1).scored for start in (0, 4, 5, 6, 7)] == [3, 3, 2, 1, 0]


@pytest.mark.parametrize(
    ("works", "cost"),
    [  # each: rows, first and last group, drafts
        ([(1, 0, 4, 0)], (4, 4)),
        ([(3, 0, 4, 0), (2, 0, 2, 0)], (4, 16)),
        ([(5, 1, 4, 0)], (3, 15)),
        ([(5, 1, 4, 0), (2, 0, 1, 0)], (4, 17)),
        ([(1, 1, 1, 0)], (1, 0)),  # a head alone is a step, too
        ([(1, 0, 4, 2), (1, 0, 4, 0)], (6, 16)),  # group 1 runs once more for each draft, and all groups over them
    ],
)
def test_a_step_costs_the_groups_that_run_and_the_rows_in_each(
    works: list[tuple[int, int, int, int]], cost: tuple[int, int]
) -> None:
    one = running()
    made = [Work(one, 0, rows, first, last, drafts=drafts) for rows, first, last, drafts in works]
    assert Plan(made).cost == cost


def test_a_plan_says_who_samples_who_decides_and_whose_prompt_is_scored() -> None:
    one = running()
    works = [Work(one, 0, 1, 0, 1, **flags) for flags in ({}, {"sample": True}, {"decide": True}, {"score": True})]
    plan = Plan(works)
    assert plan.audit is None and Plan([*works, last := Work(one, 0, 1, 0, 1, audit=True)]).audit is last
    assert (plan.samples, plan.decisions, plan.scores, plan.shallow) == ([works[1]], [works[2]], [works[3]], False)
