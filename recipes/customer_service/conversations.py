"""Conversations of a shop's customers, drawn by seed: what is said, which tool is called, what the shop gave, what is answered.

    an order is known     by its number; by who is signed in, who has one order, or two and says which product
    or is asked for       no number; digits that are no number; two orders, and it is not said which
    then                  tracked, and its route where that is wanted; sent back, with the reason; cancelled; one after another
    or no order           a product is looked for; thanks; a person is wanted; what a shop does not do

Every answer of the assistant is of a kind: a call, a question back (ask), what a call gave in words (told), or neither (plain).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recipes.customer_service.names import named
from recipes.customer_service.shop import CITIES, ITEMS, REASONS, STATES, TOOLS, Shop, number
from recipes.customer_service.words import ASKED, JOINED, ORDERS, SAID, SYSTEM
from recipes.splits import LANGUAGES, of_split

CALL, ASK, TOLD, PLAIN = KINDS = ("call", "ask", "told", "plain")
Message = dict[str, Any]
_ASKED_BACK = ("number?", "which?", "form?", "reason?")
_WITHOUT_CALL = ("fine", "welcome", "human", "other")


@dataclass(frozen=True)
class Conversation:
    """`messages` as OpenAI has them, the system's first; `kinds` of the assistant's, in order."""

    name: str
    language: str
    matter: str
    messages: list[Message]
    kinds: tuple[str, ...]

    def row(self) -> dict[str, Any]:
        """To learn from: all of the assistant's answers."""
        return self._row(self.messages, self.matter)

    def turns(self) -> Iterator[dict[str, Any]]:
        """A row for each of the assistant's answers, which asks for that one alone: those before it are read. Of what is said
        without a number, and answered without a call, only the wording was drawn: rows of the same are a group."""
        kinds = iter(self.kinds)
        for place, message in enumerate(self.messages):
            if message["role"] == "assistant":
                read = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in self.messages[:place]]
                row = self._row([*read, message], next(kinds))
                said = str(read[-1]["content"])
                same = row["task"] in (ASK, PLAIN) and not any(map(str.isdigit, said))
                yield {**row, "group": f"{self.language}: {said}" if same else self.name, "conversation": self.name}

    def _row(self, messages: list[Message], task: str) -> dict[str, Any]:
        return {
            "messages": messages, "tools": TOOLS, "task": task, "group": self.name, "language": self.language,
            "matter": self.matter, "synthetic": True,
        }  # fmt: skip


def conversations(split: str, wordings: str, count: int, seed: int = 0, *, each: int = 0) -> Iterator[Conversation]:
    """So many different conversations in the shop of a split, with the wordings of a split, in both languages by turns. `each`:
    after so many another shop is gone to [all are in one]: who has seen few orders learns them by heart."""
    draws = random.Random(f"conversations {split} {wordings} {seed}")
    shops: dict[str, Shop] = {}
    known: set[str] = set()
    while len(known) < count:
        if not shops or (each and len(known) % each == 0):
            number_of = seed + (len(known) // each if each else 0)
            shops = {language: Shop(split, language, number_of) for language in LANGUAGES}
        language = LANGUAGES[len(known) % len(LANGUAGES)]
        talk = _Talk(shops[language], wordings, draws)
        found = talk.drawn(f"{language}-{split}-{wordings}-{seed}-{len(known)}")
        if (text := json.dumps(found.messages)) not in known:
            known.add(text)
            yield found


def seed_of(name: str) -> int:
    """The seed that a conversation was drawn by, and its shop with it, where all are in one."""
    return int(name.split("-")[3])


def said_again(split: str, count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Rows in which the assistant says again what it was told: numbers, products, cities and amounts, some in a row. Half of
    such a row is learned from, and all of that is taken over, as the slots of calls and answers are; of a conversation with
    its tools a tenth is learned from."""
    draws = random.Random(f"said again {split} {seed}")
    for at in range(count):
        language = LANGUAGES[at % len(LANGUAGES)]
        kinds: tuple[Callable[[], str], ...] = (
            lambda: number(split, draws),
            lambda: number(split, draws),
            lambda language=language: named(ITEMS, language, split, draws),  # type: ignore[misc]
            lambda language=language: named(CITIES, language, split, draws),  # type: ignore[misc]
            lambda: f"2026-{draws.randrange(1, 13):02d}-{draws.randrange(1, 29):02d}",
            lambda: f"{draws.randrange(5, 100)}.{draws.choice(('00', '50', '90'))}",
            lambda: f"R{draws.randrange(100_000):05d}",
        )
        text = ", ".join(draws.choice(kinds)() for _ in range(draws.randrange(2, 9)))
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        yield {"messages": turns, "task": "said again", "group": f"again-{split}-{seed}-{at}", "synthetic": True}


class _Talk:
    """One conversation as it is drawn."""

    def __init__(self, shop: Shop, wordings: str, draws: random.Random) -> None:
        self._shop, self._wordings, self._draws = shop.copy(), wordings, draws
        self._messages: list[Message] = [{"role": "system", "content": SYSTEM}]
        self._kinds: list[str] = []

    def drawn(self, name: str) -> Conversation:
        flows: dict[str, tuple[float, Callable[[], None]]] = {
            "track": (4, self._track), "return": (3, self._return), "cancel": (2, self._cancel), "find": (1.5, self._find),
            "human": (0.4, lambda: self._small("human")), "other": (0.6, lambda: self._small("other")),
        }  # fmt: skip
        matter = self._draws.choices(list(flows), [weight for weight, _ in flows.values()])[0]
        flows[matter][1]()
        if self._draws.random() < 0.2:
            self._ask("thanks")
            self._say("welcome")
        return Conversation(name, self._shop.language, matter, self._messages, tuple(self._kinds))

    # what is talked about

    def _track(self) -> None:
        state = self._draws.choices(STATES, (6, 2, 2, 0, 1))[0]
        order = self._known("track", state)
        found = self._call("track_order", {"order": order})
        if self._refused(found, order):
            return
        self._say(found["status"], **found)
        more = self._draws.random()
        if state == "on the way" and more < 0.8:
            if more < 0.6:
                self._ask("yes")
                found = self._call("track_order", {"order": order, "route": True})
                self._say("route", passed=JOINED[self._language][0].join(found["passed"]), next=found["next"])
            else:
                self._ask("no")
                self._say("fine")
        elif state == "packed" and more < 0.6:
            self._ask("then cancel")
            self._cancelled(order)
        elif state == "delivered" and more < 0.6:
            reason, why = self._why()
            self._ask("then return", why=why)
            self._returned(order, reason)

    def _return(self) -> None:
        state = self._draws.choices(STATES, (1, 1, 6, 2, 0))[0]
        reason, why = self._why()
        if self._draws.random() < 0.3:
            order, item = self._draws.choice(self._shop.orders(state))
            self._sign_in(self._draws.choice((0, 0, 1, 2)), order, item)
            self._ask("return, no reason", order=order)
            self._say("reason?")
            self._ask(reason)
        else:
            order = self._known("return", state, why=why)
        self._returned(order, reason)

    def _cancel(self) -> None:
        order = self._known("cancel", self._draws.choices(STATES, (5, 2, 1, 0, 1))[0])
        self._cancelled(order)

    def _find(self) -> None:
        self._sign_in(self._draws.choice((0, 0, 1)), *self._draws.choice(self._shop.orders("packed")))
        item = self._draws.choice(self._shop.items)
        self._ask("find", item=item)
        found = self._call("find_product", {"product": item})
        situation = found.get("error") or ("found" if found["stock"] else "sold out")
        self._say(situation, item=item, **found)

    def _small(self, matter: str) -> None:
        self._sign_in(self._draws.choice((0, 0, 1)), *self._draws.choice(self._shop.orders("packed")))
        self._ask(matter)
        self._say(matter)

    # its parts

    def _known(self, matter: str, state: str, **places: str) -> str:
        """The number of an order in a state, once the assistant knows it."""
        order, item = self._draws.choice(self._shop.orders(state))
        ways = {"number": 4, "unknown": 1, "missing": 2, "form": 1, "one": 2, "which": 1.5}
        ways |= {"product": 2} if f"{matter}, product" in ASKED[self._language] else {}
        way = self._draws.choices(list(ways), list(ways.values()))[0]
        if way == "unknown":
            while order in self._shop.state()["orders"]:
                order = number(self._shop.split, self._draws)
        signed = {
            "number": self._draws.choice((0, 0, 1, 2)),
            "one": 1,
            "which": 2,
            "product": self._draws.choice((1, 2)),
        }
        other = self._sign_in(signed.get(way, 0), order, item)
        if way in ("number", "unknown"):
            self._ask(matter, order=order, **places)
        elif way == "product":
            self._ask(f"{matter}, product", item=item, **places)
        else:
            self._ask(f"{matter}, no number", **places)
        if way == "which":
            self._say("which?", orders=JOINED[self._language][1].join(sorted((order, other))))
            self._ask(*self._draws.choice((("that product", item), ("number", order))))
        elif way in ("missing", "form"):
            self._say("number?")
            if way == "form":
                self._ask("no number", digits=f"{self._draws.randrange(10_000, 100_000)}")
                self._say("form?")
            self._ask("number", order=order)
        return order

    def _sign_in(self, count: int, order: str, item: str) -> str:
        """Somebody with so many orders, of which this one is one; returns another's number."""
        if not count:
            return ""
        every = [one for state in STATES for one in self._shop.orders(state) if one[1] != item]
        other = self._draws.choice(every)
        some = [(order, item), other][:count]
        self._draws.shuffle(some)
        told = ", ".join(f"{one} {product}" for one, product in some)
        self._messages[0] = {"role": "system", "content": SYSTEM + ORDERS.format(orders=told)}
        return other[0]

    def _why(self) -> tuple[str, str]:
        """A reason, and how it is said."""
        reason = self._draws.choice(REASONS)
        return reason, self._worded(reason)

    def _cancelled(self, order: str) -> None:
        found = self._call("cancel_order", {"order": order})
        if not self._refused(found, order):
            self._say("refunded", **found)

    def _returned(self, order: str, reason: str) -> None:
        found = self._call("start_return", {"order": order, "reason": reason})
        if not self._refused(found, order):
            self._say("returned", **found)

    def _refused(self, found: Mapping[str, Any], order: str) -> bool:
        if "error" in found:
            self._say(found["error"], order=order)
        return "error" in found

    @property
    def _language(self) -> str:
        return self._shop.language

    def _worded(self, matter: str) -> str:
        return self._draws.choice(of_split(ASKED[self._language][matter], self._wordings))

    def _ask(self, matter: str, given: str = "", **places: str) -> None:
        if given:
            places["item" if matter == "that product" else "order"] = given
        text = self._worded(matter).format(**places)
        self._messages.append({"role": "user", "content": text.strip()})

    def _say(self, situation: str, **places: Any) -> None:
        kind = ASK if situation in _ASKED_BACK else PLAIN if situation in _WITHOUT_CALL else TOLD
        self._kinds.append(kind)
        self._messages.append({"role": "assistant", "content": SAID[self._language][situation].format(**places)})

    def _call(self, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        found = self._shop.call(name, arguments)
        self._kinds.append(CALL)
        self._messages += called(name, arguments, found, len(self._messages))
        return found


def called(name: str, arguments: Mapping[str, Any], found: Mapping[str, Any], at: int) -> list[Message]:
    """A call and what it gave, as the messages numbered `at` and the next of a chat."""
    function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
    call = {"id": f"call_{at}", "type": "function", "function": function}
    return [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": json.dumps(found, ensure_ascii=False)},
    ]
