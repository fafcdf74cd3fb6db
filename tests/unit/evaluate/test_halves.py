"""What is asked and what a router is fitted to: two halves of the groups of each task."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from shoal import presets
from shoal.clients.samples import _first_rows
from shoal.data.chats.rows import HELDOUT
from shoal.data.shards import Rows, group_number, open_index
from shoal.errors import DataError
from shoal.evaluate.halves import asked_groups, dealt
from tests.corpus import write_corpus

TASKS = ("code", "summarisation", "image question", "customer service")


def deck(seed: int, groups: int, tasks: int = 4) -> list[tuple[str, int]]:
    """Rows of documents of a few tasks each, some of many rows."""
    rng = random.Random(seed)
    rows = []
    for number in range(groups):
        for task in rng.sample(TASKS[:tasks], rng.randint(1, min(2, tasks))):
            rows += [(task, group_number(f"{seed}/{number}"))] * rng.choice((1, 1, 2, 9))
    return rows


def shares(rows: list[tuple[str, int]], asked: frozenset[int]) -> dict[str, tuple[int, int]]:
    """Groups of each task on the asked side and on the other."""
    of = {task: {group for name, group in rows if name == task} for task, _ in rows}
    return {task: (len(groups & asked), len(groups - asked)) for task, groups in of.items()}


@pytest.mark.parametrize("groups", [2, 3, 4, 7, 10, 101])
def test_each_task_has_as_many_groups_on_one_side_as_on_the_other(groups: int) -> None:
    """By a hash alone 2 of 10 documents of code fell on the asked side."""
    for seed in range(50):
        rows = deck(seed, groups, tasks=1)
        ((mine, others),) = shares(rows, dealt(rows)).values()
        assert mine + others == groups and abs(mine - others) <= 1


def test_documents_of_two_tasks_are_shared_out_fairly_for_both() -> None:
    for seed in range(50):
        rows = deck(seed, 40)
        for mine, others in shares(rows, dealt(rows)).values():
            assert mine >= 0.35 * (mine + others) <= others, (seed, shares(rows, dealt(rows)))
    both = [(task, group_number(str(n))) for n in range(11) for task in ("code", "summarisation") for _ in range(n + 1)]
    assert {abs(mine - others) for mine, others in shares(both, dealt(both)).values()} == {1}


def test_rows_are_about_as_many_on_both_sides_and_tasks_of_one_document_on_either() -> None:
    rows = [("code", group_number(str(n))) for n in range(60) for _ in range(1 + n % 7)]
    asked = dealt(rows)
    held = Counter(group in asked for _, group in rows)
    assert abs(held[True] - held[False]) <= 7, "no further apart than the largest document"
    single = [(f"task {n}", group_number(str(n))) for n in range(10)]
    assert len(dealt(single)) == 5


def test_the_order_of_rows_changes_nothing_and_a_later_deck_nothing_of_an_earlier() -> None:
    for seed in range(20):
        rows, more = deck(seed, 30), deck(seed + 100, 30) + deck(seed, 30)
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert dealt(shuffled) == dealt(rows)
        every = {group for _, group in rows}
        assert dealt(rows, more) & every == dealt(rows)


def test_chats_have_the_sides_that_their_corpus_gives_them(tmp_path: Path) -> None:
    """A router fitted to the documents of a corpus is measured on its chats."""
    data = write_corpus(tmp_path / "data", presets.get("test"), documents=10, heldout=14)
    alone = asked_groups(data)
    index = open_index(data)
    for kind in ("text", "code", "image"):
        rows = Rows(data, index, "heldout", kind)
        groups = {group for place in range(len(rows)) for group in rows.groups(place)}
        assert len(groups) == 14 and len(groups & alone) == 7
    tasks = [("code", n) for n in range(6)] + [("summarisation", n) for n in range(9)]
    rows = [
        {"task": task, "group": f"code/{10 + n}", "messages": [{"role": "user", "content": task}]} for task, n in tasks
    ]
    (data / HELDOUT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked, whole = asked_groups(data / HELDOUT), asked_groups(data)
    of_chats = {group_number(row["group"]) for row in rows}
    assert whole & of_chats == asked and whole - of_chats and 3 <= len(asked & of_chats) <= 5


def test_a_sample_is_of_the_asked_half(tmp_path: Path) -> None:
    rows = [{"task": "code", "group": n, "messages": [{"role": "user", "content": "f"}]} for n in range(9)]
    path = tmp_path / HELDOUT
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = next(row for row in rows if group_number(str(row["group"])) in asked_groups(path))
    assert _first_rows(path) == {"code": first}


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        asked_groups(tmp_path / "none.jsonl")


def test_groups_are_dealt_as_it_is_told() -> None:
    """Those of most rows first, to the side of fewer groups, then of fewer rows, then of fewer groups of other tasks."""
    rows = [("code", group) for group, count in ((5, 3), (7, 2), (9, 1), (11, 1)) for _ in range(count)]
    assert dealt(rows) == {5, 11}, "7 to the other side, 9 to it as well: it has fewer rows"
    assert dealt([("code", 1), ("text", 2)]) == {1}, "2 goes where nothing is yet"
    assert dealt([("code", 1), ("code", 2), ("text", 3)]) == {2, 3}, "the task of one group comes first"
    # of code one group is here and two are there: 20 goes here, 21 there, and 22 where fewer rows of text are
    first = [("code", group) for group, count in ((1, 5), (2, 4), (3, 1)) for _ in range(count)]
    second = [("text", group) for group, count in ((20, 3), (21, 2), (22, 1), (23, 1)) for _ in range(count)]
    assert dealt(first, second) == {1, 20, 23}
