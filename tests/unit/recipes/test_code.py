"""What is asked of a model that writes code is nothing that it learned, and is judged by what its programs give."""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import re
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from recipes import measure
from recipes.code import RECIPE, baselines, score, words
from recipes.code.algorithms import ALGORITHMS
from recipes.code.coder import AGAIN as AGAIN_FILE
from recipes.code.coder import EXAMPLE, KNOWN, NEW, WHOLE, Code
from recipes.code.exercises import AGAIN, EXPLAIN, KINDS, REPAIR, WRITE, code_of, exercises, fenced, said_again
from recipes.code.mistakes import mistaken
from recipes.code.tasks import Chain, chain, name, parts, split_of
from recipes.code.words import DEV, SPLITS, SUITE, TRAIN, of_split
from recipes.recipe import DEV as DEV_FILE
from recipes.recipe import SUITES, Messages
from shoal.data.chats import forms
from shoal.data.chats.heldout import questions
from shoal.errors import ResourceError
from shoal.inputs.chat import DEFAULT_TEMPLATE, encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop.suites import freeze, read
from shoal.sandbox import Call, run, written

Rows = list[dict[str, Any]]
TABLES = (words.FILTERED, words.CHANGED, words.MADE)
SENTENCES = (words.WRITE, words.NAMED, words.AGAIN, words.EXPLAIN, words.REPAIR)


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Functions that nobody saw, in wordings that are learned from; each kind by turns."""
    return list(exercises(SUITE, TRAIN, 36, 0, (WRITE, EXPLAIN, REPAIR)))


def answers(rows: Rows) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def values(rows: Rows, said: Sequence[str]) -> dict[str, float]:
    return {name: figure.value for name, figure in score.scored(rows, said).items()}


# --- apart ----------------------------------------------------------------------------------------------------------


def test_no_wording_is_of_two_splits_whatever_it_is_for() -> None:
    """Of sentences and of parts of them; where numbers are left as they are there is nothing to say."""
    tables = [list(table.values()) for table in TABLES] + [[sentences] for sentences in SENTENCES]
    for table in tables:
        by_split = {split: {one for wordings in table for one in of_split(wordings, split) if one} for split in SPLITS}
        for one, other in combinations(SPLITS, 2):
            assert not by_split[one] & by_split[other]
        assert all(of_split(wordings, split) for wordings in table for split in SPLITS)


def test_parts_and_names_are_of_one_split_and_every_part_is_learned_with_others() -> None:
    """What is held out is how parts come together: each is known by itself."""
    of = {some: split_of(" ".join(some)) for some in parts()}
    assert set(of.values()) == set(SPLITS)
    for place in range(3):
        learned = {some[place] for some, split in of.items() if split == TRAIN}
        assert {some[place] for some in of} == learned
    draws = random.Random(0)
    for split in SPLITS:
        assert {split_of(name(split, draws)) for _ in range(50)} == {split}


def test_no_function_is_drawn_for_two_splits_whatever_its_parts_are_called() -> None:
    """A number that 2 divides is even: what is the same to a computer is on one side."""
    sources = {}
    for split, count in ((TRAIN, 4000), (DEV, 1000), (SUITE, 2000)):
        draws = random.Random(f"sources {split}")
        sources[split] = {dataclasses.replace(chain(split, draws), name="f").source for _ in range(count)}
    assert all(not sources[one] & sources[other] for one, other in combinations(SPLITS, 2))


def test_drawn_exercises_share_neither_function_nor_name_nor_wording_with_what_is_learned() -> None:
    learned, asked = list(exercises(TRAIN, TRAIN, 800)), list(exercises(SUITE, SUITE, 200))
    known = {one.name for one in ALGORITHMS}
    assert not ({row["function"] for row in learned} - known) & ({row["function"] for row in asked} - known)
    assert not ({row["group"] for row in learned} - known) & ({row["group"] for row in asked} - known)
    for some, split in ((learned, TRAIN), (asked, SUITE), (list(exercises(DEV, DEV, 60)), DEV)):
        for row in some:
            text = row["messages"][0]["content"]
            bare = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
            assert row["group"] in known or {split_of(row["function"]), split_of(row["group"])} == {split}
            assert not any(
                _fits(sentence, text)
                for sentences in SENTENCES
                for other in SPLITS
                if other != split
                for sentence in of_split(sentences, other)
            ), bare
    assert not {row["messages"][0]["content"] for row in learned} & {row["messages"][0]["content"] for row in asked}


def _fits(sentence: str, text: str) -> bool:
    """Is `text` that sentence, with its places filled?"""
    first, *inner = re.split(r"{\w+}", sentence)
    at = len(first) if text.startswith(first) and text.endswith(inner[-1]) else -1
    for piece in inner:
        at = text.find(piece, at) + len(piece) if at >= 0 and piece in text[at:] else -1
    return at >= 0


def test_exercises_follow_from_their_seed() -> None:
    one, same, other = (list(exercises(SUITE, SUITE, 40, seed)) for seed in (1, 1, 2))
    assert one == same and one != other
    assert {row["task"] for row in one} == set(KINDS)


def test_the_mission_s_example_is_asked_in_words_that_are_not_learned() -> None:
    assert EXAMPLE in [sentence.format(title="quicksort") for sentence in of_split(words.NAMED, SUITE)]
    assert [[one["content"] for one in each] for each in RECIPE.examples()] == [[EXAMPLE]]
    learned = {row["messages"][0]["content"] for row in exercises(TRAIN, TRAIN, 2000)}
    assert EXAMPLE not in learned and any("quicksort" in one for one in learned)


# --- what is right --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["sum", "product", "list", "last", "count", "any"])
def test_the_source_of_a_function_gives_what_its_definition_says(make: str) -> None:
    """All that can be put together to this end, in one program."""
    some = [Chain(f"f{at}", *three, 3, 4) for at, three in enumerate(parts()) if three[2] == make]
    calls = [Call(one.name, [given]) for one in some for given in one.given]
    ran = run("\n".join(one.source for one in some), calls)
    assert ran.values == tuple(written(one.right(given)) for one in some for given in one.given)
    for one in some:
        assert ast.unparse(ast.parse(one.source)) == one.source and one.given[-1] == []
        assert one.slots[-1] == f"it returns {written(one.right([]))}" and all(
            slot in one.explained for slot in one.slots
        )


@pytest.mark.parametrize("one", ALGORITHMS, ids=lambda one: one.name)
def test_a_named_function_gives_what_its_definition_says(one: Any) -> None:
    ran = run(one.source, [Call(one.name, given) for given in one.given])
    assert ran.values == tuple(written(one.right(*given)) for given in one.given)
    assert ast.unparse(ast.parse(one.source)) == one.source
    assert all(slot in one.explained for slot in one.slots)


@pytest.mark.drill
def test_a_mistake_changes_one_line_and_a_row_s_is_noticed_by_the_test_that_it_names() -> None:
    draws = random.Random(3)
    seen = set()
    for _ in range(200):
        one = chain(TRAIN, draws)
        wrong = mistaken(one.source, draws)
        assert score.differing(one.source, wrong) == 1
        (line,) = set(wrong.splitlines()) - set(one.source.splitlines())
        seen.add(re.sub(r"\w+", "x", line))
    assert len(seen) > 15
    for row in exercises(TRAIN, TRAIN, 40, 0, (REPAIR,)):
        test = re.search(
            r"assert \w+\((\[.*?\])\) == ([^,\n]*?|\[[^\]]*\])(?: |,|\.|\n|$)", row["messages"][0]["content"]
        )
        assert test, row["messages"][0]["content"]
        ((got,), right) = (run(row["wrong"], [Call(row["function"], [json.loads(test[1])])]).values, test[2])
        assert got != right


def test_the_reference_is_right_in_everything(rows: Rows) -> None:
    found = values(rows, answers(rows))
    assert found.pop("unchanged") == 0 and set(found.values()) == {1.0}
    assert {*found, "unchanged", "round trip"} == set(score.MEASURES)

    def right(asked: Sequence[Messages]) -> list[str]:
        """Explains as the reference, and writes as the rule does that knows all explanations."""
        table = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
        return [table.get(one[-1]["content"]) or baselines.rule([one])[0] for one in asked]

    assert score.round_trip(rows, right, 0)["round trip"].value == 1.0


@pytest.mark.parametrize(
    ("kind", "spoil", "measure"),
    [
        (WRITE, lambda text, row: text.replace("return ", "return not "), "pass@1"),
        (WRITE, lambda text, row: text.replace(f"def {row['function']}", "def other"), "pass@1"),
        (WRITE, lambda text, row: text.replace("(number", "((number").replace("return", "return ("), "runs"),
        pytest.param(WRITE, lambda text, row: text.replace("```python", "```python\nwhile True:\n    pass"), "runs",
                     marks=pytest.mark.drill),  # each waits for its end
        (WRITE, lambda text, row: text.replace("```python", "```python\nimport os\nprint('pass')\nos._exit(0)"), "pass@1"),
        (WRITE, lambda text, row: f"# def {row['function']}(numbers):\nprint(1)", "runs"),
        (WRITE, lambda text, row: fenced(f"class A:\n    def {row['function']}(numbers):\n        return 1"), "runs"),
        (WRITE, lambda text, row: "", "pass@1"),
        (WRITE, lambda text, row: text.rpartition("```")[0], "explained"),
        (EXPLAIN, lambda text, row: text.replace("returns", "gives"), "explained"),
        (REPAIR, lambda text, row: fenced(row["wrong"]), "repair rate"),
        (REPAIR, lambda text, row: text.replace("numbers", "given").replace("number ", "one "), "repair rate"),
        (REPAIR, lambda text, row: text.replace("```python", "```python\n# a\n# b\n# c"), "repair rate"),
    ],
)  # fmt: skip
def test_a_spoilt_answer_is_seen_in_its_measure(
    rows: Rows, kind: str, spoil: Callable[[str, dict[str, Any]], str], measure: str
) -> None:
    some = [row for row in rows if row["task"] == kind][:4]
    assert values(some, answers(some))[measure] == 1.0
    assert values(some, [spoil(text, row) for text, row in zip(answers(some), some, strict=True)])[measure] < 0.8


def test_how_sure_a_model_is_is_held_against_programs_that_pass(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no program is run again for it, nor for the figures of a workload."""
    sound = answers(rows)
    score.scored(rows, sound)
    monkeypatch.setattr(score, "run", lambda *given: pytest.fail("a program was run twice"))
    assert RECIPE.rights(rows, sound) == [True] * len(rows)
    some = [row for row in rows if row["task"] == WRITE]
    assert values(some, answers(some))["pass@1"] == 1.0
    assert RECIPE.rights(rows, ["?"] * len(rows)) == [False] * len(rows)


def test_what_is_to_be_said_counts_only_outside_of_code(rows: Rows) -> None:
    one = next(row for row in rows if row["task"] == WRITE)
    assert score.explained(one, fenced("\n".join(f"# {slot}" for slot in one["slots"]))) == 0
    assert score.explained(one, " ".join(one["slots"])) == 1

    assert score.explained(one, fenced("x") + "\n" + fenced("\n".join(f"# {slot}" for slot in one["slots"]))) == 0
    bare = "\n".join(["def f(numbers):", *(f"    # {slot}" for slot in one["slots"])])
    assert score.explained(one, bare) == 0


def test_a_round_trip_is_made_by_words_alone(rows: Rows) -> None:
    """Who gives the function back in place of an explanation has explained nothing."""
    some = [row for row in rows if row["task"] == EXPLAIN]
    sources = {row["messages"][0]["content"]: code_of(row["messages"][0]["content"]) for row in some}
    for someso in (fenced, str):

        def echo(asked: Sequence[Messages], spelt: Callable[[str], str] = someso) -> list[str]:
            """Says the code again, of whatever it is asked."""
            texts = [str(one[-1]["content"]) for one in asked]
            return [spelt(sources[text]) if text in sources else text[text.find("def ") :] for text in texts]

        assert score.round_trip(some, echo, 0)["round trip"].value == 0.0


@pytest.mark.drill
def test_a_round_trip_is_of_every_explanation_and_not_of_one_a_group() -> None:
    """Of fifty explanations the last of each function's parts was written anew, 26 and 29 of them."""
    rows = list(exercises(SUITE, SUITE, 40, kinds=(EXPLAIN,)))
    assert len({row["group"] for row in rows}) < 40
    came, *_ = measure._came(RECIPE, "new-wordings", "rule", rows, baselines.rule, 0)
    assert came.figures["round trip"].rows == 40 and came.figures["round trip"].groups < 40


def test_code_is_the_first_block_whole_or_cut_or_all() -> None:
    assert (
        code_of("Here:\n```python\nx = 1\n```\nand\n```\ny\n```")
        == "x = 1"
        == code_of("```\nx = 1")
        == code_of("x = 1\n")
    )


def test_a_rule_does_well_where_it_was_taken_from_and_badly_elsewhere(rows: Rows) -> None:
    known = values(rows, baselines.rule([row["messages"][:-1] for row in rows]))
    new = list(exercises(SUITE, SUITE, 36, 0, (WRITE, EXPLAIN, REPAIR)))
    there = values(new, baselines.rule([row["messages"][:-1] for row in new]))
    assert known["pass@1"] > 0.9 and known["explained"] > 0.9 and known["repair rate"] < 0.7
    assert there["pass@1"] < 0.6


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as patch:
        for what, count in (("LEARNED", 400), ("FITTED", 30), ("ASKED", 12)):
            patch.setattr(f"recipes.code.coder.{what}", count)
        Code().write(folder, 0)
        freeze(folder / SUITES)
    return folder


def test_the_files_are_what_training_the_router_and_the_gate_read(folder: Path) -> None:
    """No exercise is longer than a training row, and what rows are judged by is in none that is learned from."""
    model = RECIPE.preset.model
    learned = [json.loads(line) for line in (folder / WHOLE).read_text("utf-8").splitlines()]
    again = [json.loads(line) for line in (folder / AGAIN_FILE).read_text("utf-8").splitlines()]
    assert {row["task"] for row in learned} == set(KINDS) and AGAIN in KINDS
    assert all({"cases", "slots", "function"}.isdisjoint(row) for row in learned)
    tokenizer = Tokenizer.train([str(m["content"]) for row in learned for m in row["messages"]], model.vocab)
    for row in [*learned, *again]:
        plain = forms.canonical(row)["messages"]
        assert len(encode_chat(plain, tokenizer, model, add_generation_prompt=False).ids) <= model.train_length
    for path in (folder / DEV_FILE, folder / SUITES / KNOWN, folder / SUITES / NEW):
        assert set(questions(path, tokenizer, model, DEFAULT_TEMPLATE)) == {WRITE, EXPLAIN, REPAIR}
    assert {suite.file: suite.kind for suite in read(folder / SUITES)} == {KNOWN: "frozen", NEW: "frozen"}


def test_what_is_said_again_is_of_one_split() -> None:
    for row in said_again(SUITE, 60):
        first, second = row["messages"]
        assert first["content"] == second["content"]


def test_the_rivals_answer_from_what_is_learned(folder: Path) -> None:
    asked = [row["messages"][:-1] for row in exercises(SUITE, SUITE, 12, 0, (WRITE, EXPLAIN, REPAIR))]
    said = {json.loads(line)["messages"][-1]["content"] for line in (folder / WHOLE).read_text("utf-8").splitlines()}
    rivals = RECIPE.rivals(folder)
    assert list(rivals) == ["majority", "keyword rule", "nearest"]
    assert {*rivals["majority"](asked), *rivals["nearest"](asked)} <= said
    commonest = rivals["majority"](asked)
    assert [len({*commonest[at::3]}) for at in range(3)] == [1, 1, 1], "of each kind one"
    assert "```" in commonest[0] and "```" not in commonest[1] and commonest[2].endswith("```")


def test_without_a_sandbox_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.code.coder.refused", lambda: "programs are not run without a sandbox: got 'x'")
    with pytest.raises(ResourceError, match="without a sandbox"):
        Code().write(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_the_mission_s_quicksort_is_shown_with_what_became_of_it() -> None:
    (messages,) = RECIPE.examples()
    right = next(one for one in ALGORITHMS if one.name == "quicksort")
    cases = len(right.given)
    good = f"{fenced(right.source)}\n{right.explained}"
    assert (
        RECIPE.shown(messages, lambda asked: [good])
        == f"{good}\n(run in the sandbox: {cases} of {cases} cases come out)"
    )
    wrong = fenced("def quicksort(numbers):\n    return []")
    empty = sum(one.right(*given) == [] for one in [right] for given in right.given)
    assert f"{empty} of {cases} cases" in RECIPE.shown(messages, lambda asked: [wrong])
    assert f"0 of {cases} cases" in RECIPE.shown(messages, lambda asked: ["I cannot."])
