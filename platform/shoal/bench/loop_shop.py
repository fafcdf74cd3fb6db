"""What the customers of the loop's benchmark ask: the shop that the quickstart's model knows, and what becomes of it.

    old        questions of `data.chats.customer_service`, each once
    catalogue  the same shop with other items, and two matters that it did not have
    german     the old shop's matters in German

Of the old shop and the catalogue the right answers are known, with which customers of the benchmark correct wrong ones.

All of it is made by template, so the shift is as clean as we made it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from shoal.data.chats.customer_service import INTENTS, ITEMS, OPENINGS

NEW_ITEMS = (
    "drone", "tent", "blender", "scarf", "tablet", "speaker", "scooter", "scanner", "rucksack", "toaster", "camera", "helmet",
)  # fmt: skip
NEW_MATTERS = (
    "Can I pay for the {item} by instalments?", "Is a monthly plan offered for the {item}?",
    "Can I put a voucher towards the {item}?", "My gift card is declined for the {item}.",
    "Do you rent out the {item} by the week?", "How do I extend my subscription for the {item}?",
)  # fmt: skip
NEW_ANSWERS = (
    "You can pay the {item} in six instalments.", "You can pay the {item} in six instalments.",
    "Enter the code for the {item} at the till.", "Enter the code for the {item} at the till.",
    "You can rent the {item} by the week under My rentals.", "You extend the plan of your {item} under My rentals.",
)  # fmt: skip
GERMAN_ITEMS = ("Lampe", "Jacke", "Uhr", "Kaffeemaschine", "Tasche", "Tastatur", "Bohrmaschine", "Decke")
GERMAN = (
    "Wo bleibt meine {item}?", "Wann kommt meine {item} an?", "Ich möchte meine {item} zurückgeben.",
    "Meine {item} ist kaputt.", "Bitte stornieren Sie die Bestellung meiner {item}.", "Ist die {item} noch auf Lager?",
    "Wie lange habe ich Garantie auf die {item}?", "Ich brauche eine Rechnung für meine {item}.",
    "Kann ich die {item} umtauschen?", "Was kostet die {item}?", "Kann ich die {item} auf Rechnung bezahlen?",
    "Ich möchte mit einem Menschen über meine {item} sprechen.",
)  # fmt: skip
GERMAN_OPENINGS = ("", "Hallo. ", "Guten Tag. ", "Bitte helfen Sie mir. ", "Ich habe eine Frage. ")


@dataclass(frozen=True)
class Asked:
    """A question with its right answer, and the phrasing that it is made of."""

    text: str
    answer: str
    phrasing: str


def known(domain: str) -> list[Asked]:
    """All questions of the old shop or of the catalogue, each once, with answers, in no order that matters."""
    items: tuple[str, ...] = ITEMS
    pairs = [(phrasing, intent.answer) for intent in INTENTS for phrasing in intent.phrasings]
    if domain == "catalogue":
        items, pairs = NEW_ITEMS, pairs + list(zip(NEW_MATTERS, NEW_ANSWERS, strict=True)) * 4
    every = (
        Asked(opening + phrasing.format(item=item), answer.format(item=item), phrasing)
        for opening, (phrasing, answer), item in product(OPENINGS, pairs, items)
    )
    return list({one.text: one for one in every}.values())


def questions(domain: str) -> list[str]:
    """All different questions of a domain, in no order that matters."""
    return list(dict.fromkeys(_questions(domain)))


def _questions(domain: str) -> Iterator[str]:
    if domain == "german":
        for opening, asked, item in product(GERMAN_OPENINGS, GERMAN, GERMAN_ITEMS):
            yield opening + asked.format(item=item)
        return
    items = ITEMS if domain == "old" else NEW_ITEMS
    asked_of = [phrasing for intent in INTENTS for phrasing in intent.phrasings]
    asked_of += [] if domain == "old" else [phrasing for phrasing in NEW_MATTERS for _ in range(4)]
    for opening, asked, item in product(OPENINGS, asked_of, items):
        yield opening + asked.format(item=item)
