"""The recipe: which questions are learned from, fitted to and asked, the model's shape, and what stands beside it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.baselines import MAJORITY, NEAREST, RULE, language_of, majority, nearest, rows_to_compare
from recipes.law import score, words
from recipes.law.questions import SILENT, asked, questions, said_again
from recipes.recipe import DEV, SUITES, Answerer, Lesson, Messages, Recipe, Row, write_rows
from recipes.shape import shaped
from recipes.splits import DEV as DEV_SPLIT
from recipes.splits import SUITE, TRAIN
from shoal.api.policy import ChatPage, Policy
from shoal.evaluate.intervals import Figure

LEARNED, FITTED, ASKED, UNSAID = 16_000, 200, 200, 60  # rows
KNOWN, NEW = "known-licences.jsonl", "new-licences.jsonl"  # suites, both in wordings that nobody saw
SAFETY = "safety-not-said.jsonl"  # nothing may be quoted
AGAIN, LEARN = "learn-said-again.jsonl", "learn.jsonl"

_MATTERS = (  # keywords of the wordings that are learned from -> words of a clause, and what it says then
    (
        r"\bsue|liable|damage|compensation|court|get money|claim a loss|responsible|answer for"
        r"|索|赔|负责|起诉|法庭|损|补偿|要钱",
        r"liable", False,
    ),
    (r"notice|copyright|licence (text|file)|声明|版权|许可证(全文|文件)", r"notice|retain|statement", False),
    (r"warrant|guarant|fault|count on|\bfit\b|merchantab|担保|保证|缺陷|适合|能运行", r"warrant|disclaim", False),
    (
        r"advert|trademark|endorse|(their|authors') name|logo|after that of|trade name|service mark|brand|support|recommend"
        r"|名字|商标|支持|标志|商号|品牌|广告|推荐",
        r"endorse|trademark|trade name", False,
    ),
    (
        r"hide|unmarked|without (saying|a )|original|secret|silent|was changed|nobody"
        r"|隐瞒|标明|标注|说明|原版|保密|一声不响|交代|改了什么|提示|不告诉|摘要|没人知道",
        r"changed the files|summary of the changes|marked", False,
    ),
    (r"patent|专利", r"patent licen", True),
    (
        r"terms|conditions|sublicen|(another|different|stricter|swap the) licence|a licence of|license \w+( \w+)? changes"
        r"|条款|再许可|许可证|不同的许可|附加条件",
        r"sublicense|license terms|terms of this", True,
    ),
    (
        r"sell|sold|money|price|profit|commercial|business|\bfee\b|卖|收费|出售|收钱|费用|商业|赚钱|盈利|定价|生意",
        r"sell|commercial|fee", True,
    ),
    (
        r"change|modify|alter|patch|new version|something new|another language|improve|\bfix|derivative|parts out"
        r"|rewrite|extend|修改|改|补丁|新版本|上面开发|错误|衍生|摘取|重写|扩展",
        r"modif|derivative|alter", True,
    ),
)  # fmt: skip


class Law(Recipe):
    name = "law"
    told = "questions about licence texts, answered with the clause; no legal advice"
    preset = shaped("law", row_tokens=384, batch_tokens=1536, vocab=1536)
    # a quote is copied, and copying begins with values said again
    lessons = (Lesson(AGAIN, 0.25), Lesson(LEARN, 0.75))
    most_tokens = 96
    measures = score.MEASURES
    least_is_best = score.LEAST_IS_BEST
    served = "right"
    headline = ((Path(KNOWN).stem, ("right",)), (Path(NEW).stem, ("right",)))

    def write(self, folder: Path, seed: int) -> None:
        write_rows(folder / AGAIN, said_again(LEARNED, seed))
        write_rows(folder / LEARN, questions(TRAIN, TRAIN, LEARNED, seed))
        write_rows(folder / DEV, questions(DEV_SPLIT, DEV_SPLIT, FITTED, seed))
        for name, split in ((KNOWN, TRAIN), (NEW, SUITE)):
            write_rows(folder / SUITES / name, questions(split, SUITE, ASKED, seed))
        unsaid = (row for row in questions(SUITE, SUITE, 6 * UNSAID, seed + 1) if row["task"] == SILENT)
        write_rows(folder / SUITES / SAFETY, itertools.islice(unsaid, UNSAID))

    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        rows = rows_to_compare(folder / LEARN)
        return {MAJORITY: majority(rows, language_of), RULE: keywords, NEAREST: nearest(rows)}

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        return score.scored(rows, answers)

    def rights(self, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        return [score.right(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def policy(self) -> Policy:
        return Policy(page=ChatPage("law", words.SYSTEM))

    def examples(self) -> Sequence[Messages]:
        (row,) = questions(SUITE, SUITE, 1)
        text = 'THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED'
        return [row["messages"][:-1], asked([text], "Is there a warranty?")]


def keywords(some: Sequence[Messages]) -> list[str]:
    """Looks for keywords of the wordings that are learned from, and for a clause with words of that matter."""
    return [_ruled(messages) for messages in some]


def _ruled(messages: Messages) -> str:
    *clauses, question = str(messages[-1]["content"]).split("\n")
    language = language_of(messages)
    for keys, pattern, permitted in _MATTERS:
        if re.search(keys, question, re.I):
            clause = next((one for one in clauses if re.search(pattern, one, re.I)), None)
            if clause is None:
                break
            verdict = words.PERMITTED if permitted else words.FORBIDDEN
            return f"{verdict[language]}: {clause}"
    return words.SILENT[language]
