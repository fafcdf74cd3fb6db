"""Cases drawn by seed: who asks, with which symptoms, since when; and what the rules say of it, as JSON or in words.

    assess   two or three symptoms of a pattern, a third of them with one of another pattern beside; some with a red flag
    little   one symptom: too little to tell
    out      what is out of scope: doses, babies under one, animals, all else

Which symptoms of a pattern come together says which split a case is of (`combinations_of`), so that none is on two sides; and
each wording is of one split (`words.py`), or a name of the open vocabulary that is only asked (`words.OPEN`: in English, of
cases that are in scope, without a red flag's name).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from recipes.medicine import rules, words
from recipes.medicine.rules import Assessment, Case, assessed
from recipes.splits import DEV, LANGUAGES, SUITE, TRAIN, of_split

ASSESS, LITTLE, OUT = KINDS = ("assess", "little", "out")
JSON, WORDS = FORMS = ("json", "words")
URGENCY_SAID = {
    "en": {level: level for level in rules.LEVELS},
    "zh": {
        rules.SELF_CARE: "自我护理", rules.APPOINTMENT: "预约门诊", rules.TODAY: "今天就医", rules.EMERGENCY: "立即急救",
    },
}  # fmt: skip
CAUSES_SAID = {"en": "Possible causes: {}. ", "zh": "可能的原因：{}。"}
EXAMINATIONS_SAID = {"en": "Next examinations: {}. ", "zh": "建议检查：{}。"}
LEVEL_SAID = {"en": "Urgency: {}.", "zh": "紧急程度：{}。"}
NOTHING_SAID = {"en": "I cannot assess that. Please ask a doctor.", "zh": "我无法判断，请咨询医生。"}


def combinations_of(split: str) -> list[tuple[int, tuple[str, ...]]]:
    """Numbers of patterns with two or three of their symptoms, each in one split: of every ten six are learned from."""
    kinds = (TRAIN, TRAIN, SUITE, TRAIN, DEV)
    return [
        (number, some)
        for number, pattern in enumerate(rules.PATTERNS)
        for at, some in enumerate([*combinations(pattern.symptoms, 2), *combinations(pattern.symptoms, 3)])
        if kinds[at % len(kinds)] == split
    ]


def cases(split: str, wordings: str, count: int, seed: int = 0, *, flags: float = 0.2) -> Iterator[dict[str, Any]]:
    """So many different rows with the combinations of a split in the wordings of a split, in both languages and both forms by
    turns; `flags`: the share of cases with a red flag, 1 for nothing else."""
    draws = random.Random(f"cases {split} {wordings} {seed} {flags}")
    languages = LANGUAGES[:1] if wordings == words.OPEN else LANGUAGES
    weights = (7, 1, 0) if wordings == words.OPEN else (7, 1, 2)
    known: set[str] = set()
    tries = 0
    while len(known) < count:
        tries += 1
        language, form = languages[len(known) % len(languages)], FORMS[len(known) // len(languages) % 2]
        kind = ASSESS if flags == 1 else draws.choices(KINDS, weights)[0]
        text, case, of = _drawn(kind, split, wordings, language, draws, flags)
        if (key := f"{form} {text}") in known:
            if tries > 100 * count:
                raise ValueError(f"there are no {count} different cases")
            continue
        known.add(key)
        name = f"{language}-{split}-{wordings}-{seed}-{len(known)}"
        yield _row(text, case, kind, language, form, f"{language}: {of}") | {"conversation": name}


def asked(text: str, form: str) -> list[dict[str, str]]:
    """The conversation in which that is asked for."""
    system = words.SYSTEM + (words.AS_JSON if form == JSON else "")
    return [{"role": "system", "content": system}, {"role": "user", "content": text}]


def written(assessment: Assessment, language: str, form: str) -> str:
    """An assessment as it is answered."""
    if form == JSON:
        told = {"causes": assessment.causes, "examinations": assessment.examinations, "urgency": assessment.urgency}
        return json.dumps(told, ensure_ascii=False)
    if assessment.urgency == rules.CANNOT_TELL:
        return NOTHING_SAID[language]
    joined = words.AND[language][0]
    parts = [
        said[language].format(joined.join(some))
        for said, some in ((CAUSES_SAID, assessment.causes), (EXAMINATIONS_SAID, assessment.examinations))
        if some
    ]
    return "".join(parts) + LEVEL_SAID[language].format(URGENCY_SAID[language][assessment.urgency])


def _row(text: str, case: Case | None, kind: str, language: str, form: str, name: str) -> dict[str, Any]:
    right = Assessment(rules.CANNOT_TELL) if case is None else assessed(case, language)
    answer = {"role": "assistant", "content": written(right, language, form)}
    return {
        "messages": [*asked(text, form), answer], "task": kind, "group": name, "language": language, "form": form,
        "right": asdict(right), "red_flag": case.red_flag if case else "", "synthetic": True,
    }  # fmt: skip


def out_of_scope(language: str, wordings: str) -> Sequence[str]:
    """How what is out of scope is said, in the wordings of a split."""
    some = of_split(words.OUT_OF_SCOPE[language], wordings)
    return (*some, *words.OUT_ASKED[language]) if wordings == SUITE else some


def _drawn(
    kind: str, split: str, wordings: str, language: str, draws: random.Random, flags: float
) -> tuple[str, Case | None, str]:
    """What is said, the case where there is one, and what has one answer or nearly so: a pattern, a symptom that is too little,
    or the wording of what is out of scope. Rows of one are a group in a language: a model knows it or does not."""
    if kind == OUT:
        text = draws.choice(out_of_scope(language, wordings))
        return text.format(months=draws.randrange(1, 12)), None, text
    said_as = {one: some for one in words.SYMPTOMS[language] if (some := words.symptom_said(language, one, wordings))}
    number, drawn = draws.choice([one for one in combinations_of(split) if said_as.keys() >= set(one[1])])
    symptoms = list(drawn) if kind == ASSESS else [draws.choice(drawn)]
    others = [s for at, p in enumerate(rules.PATTERNS) if at != number for s in p.symptoms if s in said_as]
    if kind == ASSESS and draws.random() < 0.3:
        symptoms.append(draws.choice(others))
    flag = draws.choice([*words.RED_FLAGS[language]]) if kind == ASSESS and draws.random() < flags else ""
    template = draws.choice(of_split(words.SAID[language], TRAIN if wordings == words.OPEN else wordings))
    told = "{age}" in template
    days = draws.choice([*words.DAYS[language]])
    history = draws.choice([*words.HISTORY[language]]) if told else "none"
    case = Case(tuple(symptoms), days, draws.randrange(18, 90) if told else 40, history, flag)
    said = [draws.choice(said_as[one]) for one in symptoms]
    said += [draws.choice(of_split(words.RED_FLAGS[language][flag], wordings))] if flag else []
    draws.shuffle(said)
    comma, last = words.AND[language]
    listed = comma.join(said[:-1]) + last + said[-1] if len(said) > 1 else said[0]
    text = template.format(
        age=case.age, sex=draws.choice(words.SEXES[language]), symptoms=listed, days=words.DAYS[language][days],
        history=words.HISTORY[language][history],
    )  # fmt: skip
    return text.strip(), case, rules.PATTERNS[number].causes["en"][0] if kind == ASSESS else symptoms[0]
