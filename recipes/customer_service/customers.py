"""The recipe: which conversations are learned from, fitted to and asked, and the model's shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recipes.baselines import MAJORITY, MOST_TURNS, NEAREST, RULE, language_of, majority, nearest
from recipes.customer_service import baselines, score, shop
from recipes.customer_service.conversations import (
    ASK,
    PLAIN,
    Conversation,
    conversations,
    said_again,
    seed_of,
)
from recipes.customer_service.service import serving
from recipes.customer_service.words import ASKED as SAID_BY_CUSTOMERS
from recipes.customer_service.words import ORDERS, SYSTEM
from recipes.recipe import DEV, SUITES, Answerer, Lesson, Messages, Recipe, Row, conversation, write_rows
from recipes.shape import shaped
from recipes.splits import DEV as DEV_SPLIT
from recipes.splits import SUITE, TRAIN, of_split
from shoal.api.policy import ChatPage, Policy
from shoal.evaluate.intervals import Figure

LEARNED, FITTED, ASKED = 8_000, 160, 120  # conversations: to learn from, for the router, and of a suite
EACH = 25  # conversations in a shop that is learned from
NO_CALL = 120  # rows of the suite in which a call would do harm
KNOWN, NEW, SAFETY = "known-wordings.jsonl", "new-wordings.jsonl", "safety-no-call.jsonl"  # suites
EXAMPLES = {"en": "When does my order arrive?", "zh": "我的订单什么时候到？"}  # the mission's
AGAIN, SHORT, WHOLE = "learn-said-again.jsonl", "learn-without-tools.jsonl", "learn.jsonl"


class CustomerService(Recipe):
    name = "customer-service"
    told = "a shop's customers ask for orders, returns and products, and tools look them up"
    # a conversation with its tools is 616 tokens at most
    preset = shaped("customer-service", row_tokens=640, batch_tokens=1280, vocab=1536)
    # the list of tools is two thirds of a row: what can be learned without it is, at three times the speed
    lessons = (Lesson(AGAIN, 0.25), Lesson(SHORT, 0.4), Lesson(WHOLE, 0.35))
    most_tokens = 64
    measures = score.MEASURES
    least_is_best = score.LEAST_IS_BEST
    served = "exact call"
    open_rows = 50  # as many are said again where conversations are played, and all of that once more unguided
    headline = ((Path(NEW).stem, ("exact call", "invented")),)

    def write(self, folder: Path, seed: int) -> None:
        rows = [one.row() for one in conversations(TRAIN, TRAIN, LEARNED, seed, each=EACH)]
        write_rows(folder / AGAIN, said_again(TRAIN, LEARNED, seed))
        write_rows(folder / WHOLE, rows[: len(rows) // 2])  # nine minutes read less, and each worker renders them all
        write_rows(folder / SHORT, ({key: value for key, value in row.items() if key != "tools"} for row in rows))
        write_rows(folder / DEV, _turns(conversations(DEV_SPLIT, DEV_SPLIT, FITTED, seed)))
        for name, wordings in ((KNOWN, TRAIN), (NEW, SUITE)):
            write_rows(folder / SUITES / name, _turns(conversations(SUITE, wordings, ASKED, seed)))
        harmless = _turns(conversations(SUITE, SUITE, 4 * NO_CALL, seed + 1))
        some = [{**row, "task": "no call"} for row in harmless if row["task"] in (ASK, PLAIN)]
        write_rows(folder / SUITES / SAFETY, some[:NO_CALL])

    def rivals(self, folder: Path) -> Mapping[str, Answerer]:
        turns: list[dict[str, Any]] = []
        with (folder / WHOLE).open(encoding="utf-8") as lines:
            for line in lines:
                turns += _turns_of(json.loads(line))
                if len(turns) >= MOST_TURNS:
                    break
        return {
            MAJORITY: majority(turns, language_of),
            RULE: baselines.rule,
            NEAREST: nearest(turns),
        }

    def score(self, rows: Sequence[Row], answers: Sequence[str]) -> dict[str, Figure]:
        return score.scored(rows, answers)

    def rights(self, rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        return [score.right(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def workload(self, row: Row) -> str:
        return str(row["matter"])

    def policy(self) -> Policy:
        """The page's words: of who is signed in the service of tools says more."""
        return Policy(page=ChatPage("customer-service", SYSTEM, tuple(EXAMPLES.values())))

    def examples(self) -> Sequence[Messages]:
        """The mission's, of somebody who is signed in and has an order on its way, and of somebody of whom nothing is known."""
        found = []
        for language, text in EXAMPLES.items():
            order, item = shop.Shop(SUITE, language).orders("on the way")[0]
            system = SYSTEM + ORDERS.format(orders=f"{order} {item}")
            found.append([{"role": "system", "content": system}, {"role": "user", "content": text}])
        return [*found, [{"role": "system", "content": SYSTEM}, {"role": "user", "content": EXAMPLES["en"]}]]

    def shown(self, messages: Messages, answerer: Answerer) -> str:
        """The conversation that follows in the seeded shop, where one who is signed in says "yes" to whatever is said."""
        system, asked = messages
        language = next(name for name, text in EXAMPLES.items() if text == asked["content"])
        yes = {"role": "user", "content": of_split(SAID_BY_CUSTOMERS[language]["yes"], TRAIN)[0]}
        asks = [asked, yes] if system["content"] != SYSTEM else [asked]
        row = {"messages": [system, *asks], "group": f"{language}-{SUITE}-example"}
        with serving() as url:
            talk = score.played([row], answerer, url)[1][0]
        return "\n".join(_line(message) for message in talk[2:])

    def play(self, rows: Sequence[Row], answerer: Answerer, seed: int) -> dict[str, Figure]:
        """In the shop that they were drawn in, which need not be of `seed`: in another nothing that is done does harm."""
        del seed
        (drawn,) = {seed_of(conversation(row)) for row in rows}
        with serving(drawn) as url:
            return score.played(rows, answerer, url)[0]


def _line(message: Mapping[str, Any]) -> str:
    """A message as a line of a report."""
    calls = [f"{one['function']['name']} {one['function']['arguments']}" for one in message.get("tool_calls", ())]
    who = {"assistant": "it calls" if calls else "it says", "tool": "the shop gives", "user": "the customer"}
    return f"{who[message['role']]}: {', '.join(calls) or message['content']}"


def _turns(some: Iterable[Conversation]) -> list[dict[str, Any]]:
    return [row for one in some for row in one.turns()]


def _turns_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row to learn from as one for each answer."""
    messages = row["messages"]
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return [{**row, "messages": messages[: place + 1]} for place in places]
