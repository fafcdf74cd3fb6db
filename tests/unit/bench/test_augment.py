"""What augmentation adds is counted in pairs, over seeds and answers; its words are none that are asked; wrong runs fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import cli
from shoal.bench import augment
from shoal.bench.augment import AUGMENTED, PLAIN, TAUGHT, Job, compared, prepare, recipe_of
from shoal.data.chats.augment import Augmenter
from shoal.errors import DataError
from shoal.evaluate.intervals import UNKNOWN, crossed
from shoal.loop.suites import freeze
from shoal.recipes import law, medicine
from shoal.recipes.law.questions import ANSWER, questions
from shoal.recipes.law.words import ACTS, ASKED, ENDINGS, FRAMES, OPENINGS
from shoal.recipes.medicine.cases import cases
from shoal.recipes.medicine.words import RED_FLAGS, SYMPTOMS
from shoal.recipes.recipe import SUITES
from shoal.recipes.splits import DEV, LANGUAGES, SUITE, TRAIN, of_split

TABLES = {
    "medicine": [table[language] for table in (SYMPTOMS, RED_FLAGS) for language in LANGUAGES],
    "law": [
        *(table[language] for table in (ASKED, ACTS) for language in LANGUAGES),
        *({"": table[language]} for table in (FRAMES, OPENINGS, ENDINGS) for language in LANGUAGES),
    ],
}


@pytest.mark.parametrize("recipe", [medicine.RECIPE, law.RECIPE], ids=["medicine", "law"])
def test_synonyms_are_of_what_is_learned_from_and_of_nothing_that_is_asked(recipe: Any) -> None:
    split = {
        name: [one.lower() for table in TABLES[recipe.name] for some in table.values() for one in of_split(some, name)]
        for name in (TRAIN, DEV, SUITE)
    }
    for word, others in recipe.synonyms.items():
        assert any(word in wording for wording in split[TRAIN]), f"{word} is in no row"
        for other in map(str.lower, others):
            assert not any(other in wording or wording in other for wording in split[SUITE] + split[DEV]), other


def test_a_copy_of_a_law_row_quotes_what_stands_in_it() -> None:
    made = Augmenter(1.0, 0, dict(law.RECIPE.synonyms))
    copies = [copy for row in questions(TRAIN, TRAIN, 200) if (copy := made.copy(row)) is not None]
    quotes = [copy for copy in copies if copy["task"] == ANSWER]
    assert len(quotes) > 60
    for copy in quotes:
        asked, answer = (str(one["content"]) for one in copy["messages"][-2:])
        assert answer.partition(": ")[2] in asked.split("\n")


@pytest.mark.parametrize("recipe", [medicine.RECIPE, law.RECIPE], ids=["medicine", "law"])
def test_a_quarter_of_the_copies_are_in_other_words_in_each_language(recipe: Any) -> None:
    """And nearly every row gets one, in Chinese too, where a number stands within a sentence."""
    rows = {medicine.RECIPE: cases, law.RECIPE: questions}[recipe](TRAIN, TRAIN, 200)
    made, ways = Augmenter(1.0, 0, dict(recipe.synonyms)), {language: list[str]() for language in LANGUAGES}
    for row in rows:
        asked = str(row["messages"][-2]["content"]).rpartition("\n")[2]
        copy = made.copy({**row, "messages": [{"role": "user", "content": asked}, row["messages"][-1]]})
        language = "zh" if any("\u4e00" <= letter <= "\u9fff" for letter in asked) else "en"
        ways[language].append(copy["augmented"] if copy else "none")
    for language, some in ways.items():
        assert len(some) == 100 and some.count("none") < 15, language
        assert some.count("paraphrase") >= 25, language


def jobs() -> list[Job]:
    return [Job("", arm, seed, "", "", 1) for seed in range(5) for arm in augment.ARMS]


def told(plain: list[bool], augmented: list[bool], taught: list[bool]) -> dict[str, Any]:
    by = {PLAIN: plain, AUGMENTED: augmented, TAUGHT: taught}
    each = [*map(str, range(len(plain)))]
    found = compared(
        jobs(), [dict.fromkeys(("new", "old"), by[job.arm]) for job in jobs()], {"new": each, "old": each}, {"new"}
    )
    for arm in (AUGMENTED, TAUGHT):
        assert {**found["old"][arm], "shown": found["new"][arm]["shown"]} == found["new"][arm]
        assert found["old"][arm]["shown"] == augment.NO_CLAIM, "of wordings that were learned from nothing is claimed"
    return found["new"]


def test_what_an_arm_adds_is_a_difference_in_pairs_with_an_interval() -> None:
    half, all_, none = [True, False] * 50, [True] * 100, [False] * 100
    found = told(half, all_, half)
    assert (
        found[AUGMENTED]["right"] == 1.0 and found[AUGMENTED]["added"] == 0.5 and found[AUGMENTED]["each"] == [0.5] * 5
    )
    low, high = found[AUGMENTED]["interval"]
    assert 0.35 < low < 0.38 and 0.62 < high < 0.65, (
        "a share of a half of 100: 2.78 * 0.05, by Student's t of five seeds"
    )
    assert found[TAUGHT]["interval"] is None, "nothing differs"
    assert [found[arm]["shown"] for arm in (AUGMENTED, TAUGHT)] == ["adds", "not shown"]
    assert told(half, none, half)[AUGMENTED]["shown"] == "takes away"


def test_nothing_is_claimed_of_wordings_that_were_learned_from() -> None:
    """Half of the red flags are asked in these."""
    claimed = {recipe.name: {suite for suite, _ in recipe.headline} for recipe in (medicine.RECIPE, law.RECIPE)}
    assert "new-wordings" in claimed["medicine"] and not {"known-wordings", "red-flags"} & claimed["medicine"]
    assert claimed["law"] == {"known-licences", "new-licences"}


def test_seeds_that_disagree_widen_an_interval() -> None:
    """The same mean: once of the same answers in all seeds, once of seeds of which one gains all and four lose."""
    alike = np.tile(np.array([1.0] + [0.0] * 9), (5, 20))
    apart = np.stack([np.full(200, 0.9), *[np.full(200, -0.1)] * 4])
    each = [*map(str, range(200))]
    (low, high), (lower, higher) = crossed(alike, each), crossed(apart, each)
    assert low > 0 and lower < 0 and higher - lower > 4 * (high - low)
    assert crossed(alike[:4], each) == UNKNOWN, "four seeds say too little"


def test_answers_of_one_group_are_one_piece_of_evidence() -> None:
    """200 answers on 20 matters, of which a matter is gained or lost whole: as wide as of 20 answers."""
    few = np.tile(np.array([1.0, -1.0, 0.0, 1.0] * 5), (5, 1))
    many, groups = np.repeat(few, 10, axis=1), [str(at // 10) for at in range(200)]
    assert crossed(many, groups) == pytest.approx(crossed(few, [*map(str, range(20))]))
    (low, high), (lower, higher) = crossed(many, [*map(str, range(200))]), crossed(many, groups)
    assert higher - lower > 2.5 * (high - low) and lower < 0 < low


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of medicine as far as data go."""
    for name, count in (("LEARNED", 60), ("FITTED", 8), ("ASKED", 8), ("FLAGGED", 8), ("REFUSED", 4)):
        monkeypatch.setattr(f"shoal.recipes.medicine.assessments.{name}", count)
    medicine.RECIPE.write(tmp_path / "run", 0)
    freeze(tmp_path / "run" / SUITES)
    (tmp_path / "run" / "recipe.json").write_text(json.dumps({"recipe": "medicine", "model": ""}))
    (tmp_path / "run" / "model").mkdir()
    (tmp_path / "run" / "model" / "config.json").write_text("{}")
    return tmp_path / "run"


def test_each_arm_has_the_recipes_rows_and_its_own(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def answers_of(teacher: Path, some: Any) -> list[dict[str, Any]]:
        asked.extend(some)
        return [{"messages": [*asked[0], {"role": "assistant", "content": "yes"}]}]

    monkeypatch.setattr(augment, "answers_of", answers_of)
    counts = prepare(recipe_of(run), run, run / "model", tmp_path, lambda line: None)
    rows = {arm: (tmp_path / f"{arm}.jsonl").read_text("utf-8").splitlines() for arm in augment.ARMS}
    assert rows[PLAIN] == (run / "learn.jsonl").read_text("utf-8").splitlines() and len(rows[PLAIN]) == 60
    assert set(rows[PLAIN]) < set(rows[AUGMENTED]) and len(rows[AUGMENTED]) == 60 + counts["copies"] > 90
    assert rows[TAUGHT][:60] == rows[PLAIN] and len(rows[TAUGHT]) == 61
    copies = [row for row in map(json.loads, rows[AUGMENTED]) if row.get("augmented")]
    others = [other for some in medicine.RECIPE.synonyms.values() for other in some]
    assert any(other in row["messages"][1]["content"] for row in copies for other in others)
    suites = [
        json.loads(line)
        for path in (run / SUITES).glob("[!us]*.jsonl")
        for line in path.read_text("utf-8").splitlines()
    ]
    known = {row["messages"][1]["content"] for row in suites}
    assert suites and not known & {messages[1]["content"] for messages in asked}
    wordings = [one for some in SYMPTOMS["en"].values() for one in of_split(some, SUITE)]
    assert asked and not any(one in messages[1]["content"] for messages in asked for one in wordings)


def test_what_cannot_be_measured_is_refused(run: Path, tmp_path: Path) -> None:
    assert recipe_of(run) is medicine.RECIPE
    with pytest.raises(DataError, match="no run of a recipe"):
        recipe_of(tmp_path)
    for told_, said in (
        ({"recipe": "code", "model": ""}, "medicine, law"),
        ({"recipe": "law", "model": "x"}, "from nothing"),
        ({"recipe": "mine", "model": ""}, "no run of a recipe of ours"),  # a user's own has no synonyms
    ):
        (run / "recipe.json").write_text(json.dumps(told_))
        with pytest.raises(DataError, match=said):
            recipe_of(run)
    assert cli.main(["bench", "augment", "--run", str(run), "--seeds", "1"]) == 2
    assert cli.main(["bench", "augment", "--run", str(run), "--teacher", "a", "--teacher", "b"]) == 2
