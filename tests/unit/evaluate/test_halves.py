"""What is asked and what a router is fitted to: two halves of the groups of each task."""

import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from shoal import presets
from shoal.clients.samples import _first_rows
from shoal.data.batches import PretrainBatches
from shoal.data.chats.rows import HELDOUT
from shoal.data.shards import Rows, group_number, open_index
from shoal.errors import DataError
from shoal.evaluate import halves, seen
from shoal.evaluate.halves import asked_groups, dealt
from shoal.train.plan import fingerprint
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


def test_of_a_large_corpus_groups_draw_their_sides_and_no_row_is_read_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 TB hold out a hundred million documents: their groups were looked up in every row, and held by the command."""

    def read(*given: object) -> None:
        raise AssertionError("a row is read")

    data = write_corpus(tmp_path / "data", presets.get("test"), documents=10, heldout=14)
    rows = [{"task": "code", "group": f"code/{n}", "messages": [{"role": "user", "content": "f"}]} for n in range(9)]
    (data / HELDOUT).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(halves, "DEALT", 2)
    monkeypatch.setattr(halves, "heldout_groups", read)
    asked, of_chats = asked_groups(data), {group_number(str(row["group"])) for row in rows}
    assert {group for group in of_chats if group in asked} == asked_groups(data / HELDOUT), (
        "the sides of the chats alone"
    )
    assert "code/1" not in asked, "a group is a number"
    drawn = [group for group in map(group_number, map(str, range(1000))) if group in asked]
    assert 440 < len(drawn) < 560 and drawn == [group for group in drawn if group in asked_groups(data)]


@pytest.mark.parametrize(("held_out", "draws"), [(2**17, False), (2**17 + 1, True)])
def test_groups_are_dealt_up_to_131072_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: int, draws: bool
) -> None:
    """Of more, those of chats are dealt, and of the others the even ones are asked."""
    documents = {"heldout": {"a": held_out - 2, "b": 2}, "train": {"a": 9}}
    index = SimpleNamespace(total=lambda what, split, kind: 3, documents=documents)
    monkeypatch.setattr(halves, "open_index", lambda place: index)
    monkeypatch.setattr(halves, "heldout_groups", lambda place, kind: [[2, 3], [4]] if kind == "text" else [])
    asked = asked_groups(tmp_path)
    assert isinstance(asked, halves.Drawn) == draws
    assert [group in asked for group in (2, 3, 4, 5)] == [True, False, True, False]
    assert halves._held_out(SimpleNamespace(total=lambda *of: 7, documents={})) == 7 * 3  # type: ignore[arg-type]
    sides = halves.Drawn({8: 1, 9: 0})
    assert [group in sides for group in (8, 9, 10, 11, 12)] == [False, True, True, False, True]


def test_of_a_long_run_baselines_know_the_rows_of_some_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of all rows that it read were held, a hundred bytes each, of which 16 MB of text were taken."""
    data, length, asked = write_corpus(tmp_path / "data", presets.get("test"), documents=40, heldout=4), 8, []
    trained = {"data_sha256": fingerprint(str(data)), "model": {"train_length": length}}
    trained["train"] = {"batch_tokens": 4 * length, "seed": 3}
    store = SimpleNamespace(steps=lambda: [None], state=lambda _: SimpleNamespace(step=1000, trained=trained))
    rows = PretrainBatches.rows
    monkeypatch.setattr(seen, "store_of", lambda run: store)
    monkeypatch.setattr(seen, "MOST_ROWS", 64)
    monkeypatch.setattr(PretrainBatches, "rows", lambda feed, step: asked.append(step) or rows(feed, step))
    found = seen.rows_read(["run"], data)
    assert asked == list(range(0, 1000, 63)) and 0 < sum(map(len, found.values())) <= 64


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
