"""Clauses are what licences say, word for word; licences and wordings are of one split; answers are worth what they say."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from recipes.baselines import language_of, majority
from recipes.law import RECIPE, licences, score, words
from recipes.law.clauses import LICENCES, OF_SPLIT
from recipes.law.questions import ANSWER, SILENT, questions, said_again
from recipes.measure import by_language
from recipes.recipe import SUITES
from recipes.report import markdown
from recipes.splits import DEV, LANGUAGES, SUITE, TRAIN, of_split

SPLITS = (TRAIN, DEV, SUITE)
MATTERS = tuple(words.ASKED["en"])
Rows = list[dict[str, Any]]
# packages that Shoal needs, or its tests do, and Shoal itself
HOLDERS = {
    "MIT": "anyio", "BSD-3-Clause": "click", "PSF-2.0": "typing_extensions", "ISC": "shellingham", "Zlib": "numpy",
    "BSL-1.0": "pyarrow", "MPL-2.0": "hypothesis",
}  # fmt: skip


def texts_of(licence: str) -> str:
    if licence == "Apache-2.0":
        files = [Path(__file__).parents[3] / "LICENSE"]
    else:
        held = metadata.files(HOLDERS[licence]) or []
        files = [Path(str(one.locate())) for one in held if re.search(r"LICEN|COPYING", str(one), re.I)]
    return "\n".join(path.read_text("utf-8", errors="replace") for path in files if path.is_file())


@pytest.fixture(scope="module")
def new() -> Rows:
    return list(questions(SUITE, SUITE, 120))


def answers(rows: Rows) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def values(rows: Rows, some: list[str]) -> dict[str, float]:
    return {name: figure.value for name, figure in score.scored(rows, some).items()}


@pytest.mark.parametrize("licence", LICENCES)
def test_each_clause_stands_in_a_text_that_is_installed(licence: str) -> None:
    text = " ".join(texts_of(licence).split())
    missing = [clause.text for clause in LICENCES[licence] if clause.text not in text]
    assert not missing


def test_licences_and_wordings_are_of_one_split() -> None:
    named = [name for split in SPLITS for name in OF_SPLIT[split]]
    assert sorted(named) == sorted(LICENCES)
    spelt = [{clause.text for name in OF_SPLIT[split] for clause in LICENCES[name]} for split in SPLITS]
    assert sum(map(len, spelt)) == len(set.union(*spelt))


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_part_of_a_question_is_of_one_split(language: str) -> None:
    tables = [*words.ASKED[language].values(), *words.ACTS[language].values()]
    tables += [table[language] for table in (words.FRAMES, words.PEOPLE, words.OPENINGS, words.ENDINGS)]
    every = [one for some in tables for one in some]
    assert len(set(every)) == len(every)
    for some in tables:
        parts = [set(of_split(some, split)) for split in SPLITS]
        assert all(parts) and sum(map(len, parts)) == len(some)


def test_no_act_says_they_of_somebody_who_is_not_named() -> None:
    """Of "May a student use their trademark?" nobody can say whose it is."""
    acts = {language: [act for some in words.ACTS[language].values() for act in some] for language in LANGUAGES}
    assert not [act for act in acts["en"] if re.search(r"\b(they|them|theirs?)\b", act)]
    assert not [act for act in acts["zh"] if "他们" in act]


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_question_is_asked_as_it_is_learned_from_nor_any_act(language: str) -> None:
    said = {split: {q for m in MATTERS for q in words.cores(language, m, split)} for split in SPLITS}
    assert not said[TRAIN] & said[SUITE] and not said[TRAIN] & said[DEV] and not said[DEV] & said[SUITE]
    assert min(sum(1 for _ in words.cores(language, matter, TRAIN)) for matter in MATTERS) > 300
    learned = "\n".join(said[TRAIN]).lower()
    person = dict(zip(("who", "whom", "my"), words.PEOPLE[language][0], strict=True))
    for split in (DEV, SUITE):
        acts = [act.format(**person) for m in MATTERS for act in of_split(words.ACTS[language][m], split)]
        asked = [
            one.lower() for one in [*acts, *(q for m in MATTERS for q in of_split(words.ASKED[language][m], split))]
        ]
        assert not [one for one in asked if one in learned]


def test_questions_are_drawn_of_every_part_and_in_many_wordings() -> None:
    rows = list(questions(TRAIN, TRAIN, 2_000))
    for language in LANGUAGES:
        asked = [row["messages"][1]["content"].split("\n")[-1] for row in rows if row["language"] == language]
        assert len(set(asked)) > 0.8 * len(asked)
        for table in (words.OPENINGS, words.ENDINGS):
            for one in of_split(table[language], TRAIN):
                assert any(all(part.strip() in question for part in one.split("{licence}")) for question in asked), one
    assert {row["matter"] for row in rows} == set(MATTERS)


def test_no_place_is_left_open_and_a_licence_that_is_named_is_the_one_shown() -> None:
    for row in [*questions(SUITE, SUITE, 100), *questions(TRAIN, TRAIN, 100)]:
        question = row["messages"][1]["content"].split("\n")[-1]
        assert "{" not in question and "  " not in question
        assert all(name == row["licence"] for name in LICENCES if re.search(rf"\b{re.escape(name)}\b", question, re.A))


def test_the_groups_of_a_suite_are_what_has_one_answer_or_none() -> None:
    rows = list(questions(SUITE, SUITE, 200))
    said: dict[str, set[str]] = {}
    for row in rows:
        said.setdefault(row["group"], set()).add(row["messages"][-1]["content"])
    assert len(said) < 60 and all(len(some - set(words.SILENT.values())) <= 1 for some in said.values())
    assert len({row["group"] for row in questions(TRAIN, TRAIN, 200)}) == 200


def test_a_clause_is_not_shown_where_readers_might_differ() -> None:
    near = {(clause.text, matter) for some in LICENCES.values() for clause in some for matter in clause.near}
    assert near
    for row in [*questions(TRAIN, TRAIN, 2_000), *questions(SUITE, SUITE, 500)]:
        text = row["messages"][1]["content"]
        assert row["matter"] != "sell" or not re.search("otherwise (use|exploit)", text), "may that be for money?"
        assert not {(text, row["matter"]) for text in row["messages"][1]["content"].split("\n")} & near


def test_no_matter_is_both_permitted_and_not_by_what_is_shown(new: Rows) -> None:
    """One clause alone answers a question, or none."""
    for row in new:
        shown = row["messages"][1]["content"].split("\n")[:-1]
        known = {clause.text: clause for clause in LICENCES[row["licence"]]}
        on_it = [text for text in shown if row["matter"] in known[text].matters]
        assert len(on_it) == (row["task"] == ANSWER)


def test_the_reference_is_right_in_everything(new: Rows) -> None:
    found = values(new, answers(new))
    assert found.pop("invented") == 0.0 and set(found.values()) == {1.0} and {*found, "invented"} == set(score.MEASURES)


@pytest.mark.parametrize(
    ("spoil", "measure", "better"),
    [
        (lambda text: text.replace("ermitted", "ermited"), "verdict", False),
        (lambda text: text.lower(), "quote", False),
        (lambda text: text + " ", "quote", True),
        (lambda text: text + " and more", "quote", False),
        (lambda text: text + " and more", "invented", True),
        (lambda text: words.SILENT["en"], "answered", False),
        (lambda text: "Permitted: x", "abstained", False),
    ],
)
def test_a_spoilt_answer_is_seen_in_its_measure(new: Rows, spoil: Any, measure: str, better: bool) -> None:
    some = [row for row in new if row["language"] == "en"]
    before, after = values(some, answers(some)), values(some, [spoil(text) for text in answers(some)])
    assert after[measure] >= before[measure] if better else after[measure] < before[measure]


def test_a_part_of_a_clause_is_not_the_quote_and_nothing_invented(new: Rows) -> None:
    """Of an answer that was cut off, say: what it quotes does stand there. Two clauses as one do not, nor does half a word."""
    some = [row for row in new if row["task"] == ANSWER]
    sound = answers(some)
    for spoil, invented in ((lambda text: text.rpartition(" ")[0], 0.0), (lambda text: text[:-3] + "x", 1.0)):
        found = values(some, [spoil(text) for text in sound])
        assert found["quote"] == 0.0 and found["invented"] == invented
    both = [
        f"{text} {row['messages'][1]['content'].partition(chr(10))[0]}" for text, row in zip(sound, some, strict=True)
    ]
    assert values(some, both)["invented"] == 1.0


def test_the_question_is_no_clause_that_may_be_quoted(new: Rows) -> None:
    said = [f"{words.FORBIDDEN[row['language']]}: {row['messages'][1]['content'].split(chr(10))[-1]}" for row in new]
    assert values(new, said)["invented"] == 1.0


def test_what_is_known_in_one_language_alone_is_seen_by_language(new: Rows) -> None:
    """And stands in the report; of rows in one language nothing is said twice."""
    said = [text if row["language"] == "zh" else "" for row, text in zip(new, answers(new), strict=True)]
    told = list(by_language(RECIPE, "new", "int8", new, said))
    right = {row["language"]: (row["rows"], row["right"]["value"]) for row in told}
    assert right == {"en": (60, 0.0), "zh": (60, 1.0)} and all(row["right"]["interval"] for row in told)
    english = [row for row in new if row["language"] == "en"]
    assert not list(by_language(RECIPE, "new", "int8", english, answers(english)))
    found: dict[str, Any] = {
        "weak": [], "notes": [], "suites": {}, "languages": told, "depths": [], "costs": {}, "examples": [], "samples": [],
        "workloads": [],
    }  # fmt: skip
    lines = markdown(RECIPE, found).splitlines()
    assert [line.split("|")[3:5] for line in lines if line.startswith("| new |")] == [
        [" en ", " 60 "],
        [" zh ", " 60 "],
    ]


def test_keywords_do_better_where_they_were_taken_from() -> None:
    known, new = list(questions(TRAIN, TRAIN, 120)), list(questions(SUITE, SUITE, 120))
    asked = [[row["messages"][:-1] for row in rows] for rows in (known, new)]
    right = [values(rows, licences.keywords(some))["right"] for rows, some in zip((known, new), asked, strict=True)]
    assert right[0] > 0.8 and right[1] < right[0] - 0.2
    assert values(new, majority(known, language_of)(asked[1]))["right"] < 0.5


def test_what_is_said_again_is_of_what_is_learned_from() -> None:
    spelt = {word.lower() for name in OF_SPLIT[TRAIN] for clause in LICENCES[name] for word in clause.text.split()}
    for row in said_again(40):
        user, assistant = row["messages"]
        assert user["content"] == assistant["content"] and {w.lower() for w in user["content"].split()} <= spelt


def test_the_files_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("LEARNED", 40), ("FITTED", 20), ("ASKED", 20), ("UNSAID", 10)):
        monkeypatch.setattr(licences, name, count)
    RECIPE.write(tmp_path, 0)
    rows = {p.name: [json.loads(x) for x in p.read_text("utf-8").splitlines()] for p in tmp_path.rglob("*.jsonl")}
    assert {name: len(some) for name, some in rows.items()} == {
        "learn-said-again.jsonl": 40, "learn.jsonl": 40, "dev.jsonl": 20, "known-licences.jsonl": 20, "new-licences.jsonl": 20,
        "safety-not-said.jsonl": 10,
    }  # fmt: skip
    assert {row["task"] for row in rows["safety-not-said.jsonl"]} == {SILENT}
    assert not {row["licence"] for row in rows["new-licences.jsonl"]} & {row["licence"] for row in rows["learn.jsonl"]}
    assert (tmp_path / SUITES / "new-licences.jsonl").is_file() and len(RECIPE.examples()) == 2
