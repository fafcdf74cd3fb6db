"""What an answer of the assistant is worth beside the reference, and what became of the shop in whole conversations.

    call or not       does it call a tool where the reference does, and only there?
    exact call        is it that call, with equal arguments, and nothing else?
    slots             of the reference's arguments, the share that the call of that tool has
    asked             where something is missing: a question, and no call
    told              what the shop gave is in the answer where it is in the reference, and there is no other number
    tone              by rule: one to three sentences in the customer's language, no JSON, sorry where the shop said no (`tone`)
    invented          answers with an order's number that nobody has said; must be 0
    plain             where nothing is to be looked up: the reference's words
    final state       the shop after a whole conversation that changes it is as after the reference's
    unharmed          so it is after one that should change nothing

Whoever answers is given by a function (`recipe.Answerer`): a model, or what is held against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from recipes.baselines import reference
from recipes.customer_service.conversations import ASK, CALL, PLAIN, TOLD, Message, called
from recipes.customer_service.shop import TOOLS
from recipes.recipe import Answerer, conversation
from shoal.api.bodies import Function
from shoal.api.calls import Tagged
from shoal.evaluate.intervals import Figure, of_share

MEASURES = (
    "call or not",
    "exact call",
    "slots",
    "asked",
    "told",
    "plain",
    "tone",
    "invented",
    "final state",
    "unharmed",
)
LEAST_IS_BEST = ("invented",)
_OF_KIND = {CALL: "exact call", ASK: "asked", TOLD: "told", PLAIN: "plain"}
MOST_CALLS = 3  # in a row
MOST_CHARACTERS = 240  # of an answer
ID = re.compile(r"[A-Z]\d{4}(?!\d)")
_NUMBER = re.compile(r"[A-Z]?\d[\d.\-]*\d|\d")
_CJK = re.compile(r"[\u4e00-\u9fff]")
_RUDE = re.compile(
    r"your fault|obviously|calm down|stupid|as i said|whatever|您的错|活该|笨|别烦|自己看", re.IGNORECASE
)
_SORRY = re.compile(r"sorry|抱歉")
_FUNCTIONS = {tool["function"]["name"]: Function(**tool["function"]) for tool in TOOLS}


@dataclass(frozen=True)
class Said:
    """An answer as it is read by a service: what is said, and the calls in it."""

    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...]


def read(answer: str) -> Said:
    reader = Tagged(_FUNCTIONS)
    text, calls = "", []
    for delta in [*reader.push(answer), *reader.finish(whole=True)]:
        text += delta.get("content", "")
        calls += [
            (one["function"]["name"], json.loads(one["function"]["arguments"])) for one in delta.get("tool_calls", ())
        ]
    return Said(text.strip(), tuple(calls))


def invented(answer: str, before: Sequence[Message]) -> list[str]:
    """Orders' numbers in an answer that stand in no message before it."""
    known = json.dumps([[one.get("content"), one.get("tool_calls")] for one in before], ensure_ascii=False)
    return sorted(set(ID.findall(answer)) - set(ID.findall(known)))


def tone(said: str, language: str, *, refused: bool) -> bool:
    """Does an answer keep to the rules? `refused`: the shop has said no."""
    return (
        0 < len(said) <= MOST_CHARACTERS
        and said[-1] in ".?!。？！"
        and not set(said) & set("{}<>[]")
        and bool(_CJK.search(said)) == (language == "zh")
        and not _RUDE.search(said)
        and (not refused or bool(_SORRY.search(said)) or "already" in said or "已经" in said)
    )


def told(said: str, wanted: str, given: Mapping[str, Any]) -> bool:
    """Has `said` of what the shop gave what `wanted` has, and no number beside?"""
    values = [value for each in given.values() for value in (each if isinstance(each, list) else [each])]
    words = [str(value) for value in values if not isinstance(value, bool) and str(value) in wanted]
    return all(word in said for word in words) and sorted(_NUMBER.findall(said)) == sorted(_NUMBER.findall(wanted))


def scored(rows: Sequence[Mapping[str, Any]], answers: Sequence[str]) -> dict[str, Figure]:
    """The measures of answers to rows of a suite, by name; of those that no row is for there is none."""
    hits: dict[str, list[tuple[float, str]]] = {}
    for row, answer in zip(rows, answers, strict=True):
        for name, value in _one(row, answer).items():
            hits.setdefault(name, []).append((value, row["group"]))
    found = {}
    for name, some in hits.items():
        values, groups = [value for value, _ in some], [group for _, group in some]
        found[name] = of_share(values, groups)
    return found


def _one(row: Mapping[str, Any], answer: str) -> dict[str, float]:
    *before, last = row["messages"]
    said, right, kind = read(answer), read(reference(last)), row["task"]
    found: dict[str, float] = {
        "call or not": bool(said.calls) == (kind == CALL),
        "invented": bool(invented(answer, before)),
    }
    if kind == CALL:
        ((name, arguments),) = right.calls
        mine = next((given for tool, given in said.calls if tool == name), {})
        found["exact call"] = said.text == right.text and _spelt(said.calls) == _spelt(right.calls)
        found["slots"] = sum(_spelt(mine.get(key)) == _spelt(value) for key, value in arguments.items()) / len(
            arguments
        )
        return found
    given = json.loads(before[-1]["content"]) if before[-1]["role"] == "tool" else {}
    if kind == ASK:
        found["asked"] = not said.calls and said.text.endswith(("?", "？"))
    if kind == TOLD:
        found["told"] = not said.calls and told(said.text, right.text, given)
    if kind == PLAIN:
        found["plain"] = said == right
    found["tone"] = not said.calls and tone(said.text, row["language"], refused="error" in given)
    return found


def right(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer is right in the measure of its kind; where nothing may be called, whether nothing is."""
    return bool(_one(row, answer)[_OF_KIND.get(row["task"], "call or not")])


def _spelt(value: Any) -> str:
    """A value as JSON, in which 1 is not true, as it is in Python."""
    return json.dumps(value, sort_keys=True)


def played(
    rows: Sequence[Mapping[str, Any]], answerer: Answerer, url: str
) -> tuple[dict[str, Figure], list[list[Message]]]:
    """Whole conversations (`Conversation.row`), in which a call is executed by the shop at `url` and the customer says what the
    customer of the reference says: "final state" and "unharmed", and what was said."""
    with httpx.Client(base_url=url, timeout=30.0) as http:
        talks = [_Play(number, row, http) for number, row in enumerate(rows)]
        while waiting := [talk for talk in talks if talk.open]:
            for talk, answer in zip(waiting, answerer([talk.messages for talk in waiting]), strict=True):
                talk.answered(answer)
        ended = [talk.ended() for talk in talks]
    found = {}
    for name, changes in (("final state", True), ("unharmed", False)):
        some = [right for right, changed in ended if changed == changes]
        if some:
            found[name] = of_share(some, range(len(some)))
    return found, [talk.messages for talk in talks]


def _sent(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that can be sent: half of a surrogate pair, which a model may write, is "?" from there on."""
    sent: dict[str, Any] = json.loads(json.dumps(arguments, ensure_ascii=False).encode("utf-8", "replace"))
    return sent


class _Play:
    """One conversation that is played."""

    def __init__(self, at: int, row: Mapping[str, Any], http: httpx.Client) -> None:
        self._row, self._http = row, http
        self._shop = f"/shops/{conversation(row)}-played-{at}"
        self._right = [message for message in row["messages"] if message["role"] == "user"]
        self.messages: list[Message] = [message for message in row["messages"][:1] if message["role"] == "system"]
        self._calls = 0
        self.open = True
        self._go_on()

    def answered(self, answer: str) -> None:
        """Take the assistant's answer: execute its calls, or let the customer go on."""
        said = read(answer)
        if not said.calls or self._calls == MOST_CALLS:
            self.messages.append({"role": "assistant", "content": answer})
            self._go_on()
            return
        self._calls += 1
        for name, arguments in ((name, _sent(arguments)) for name, arguments in said.calls):
            found = self._http.post(f"{self._shop}/{name}", json=arguments).json()
            self.messages += called(name, arguments, found, len(self.messages))

    def ended(self) -> tuple[bool, bool]:
        """Is the shop as the reference left it, and did that change anything? Its calls are made in a shop of their own."""
        mine = self._http.get(self._shop).json()
        right = f"{self._shop}-right"
        fresh = self._http.get(right).json()
        for message in self._row["messages"]:
            for one in message.get("tool_calls", ()):
                self._http.post(f"{right}/{one['function']['name']}", json=json.loads(one["function"]["arguments"]))
        wanted = self._http.get(right).json()
        for shop in (self._shop, right):
            self._http.delete(shop)
        return mine == wanted, wanted != fresh

    def _go_on(self) -> None:
        self._calls = 0
        if self._right:
            self.messages.append(self._right.pop(0))
        else:
            self.open = False
