"""A small customer-service set, made by template: questions of a shop's customers with the answer that fits the intent.

Synthetic, and marked so: it shows the recipe and how the shallow path answers easy questions; it is no measure of a real desk.
Notable: the held-out rows use phrasings that no training row has, so they measure more than memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import xxhash

from shoal.data.chats.recipes import Chat, turns

SOURCE, LICENSE, TASK = "service-templates", "Apache-2.0", "customer service"
OPENINGS = ("", "Hello. ", "Hi! ", "Good morning. ", "Please help me. ", "I have a question. ", "Dear team, ", "Hey, ")
ITEMS = ("lamp", "kettle", "chair", "jacket", "phone", "radio", "bike", "printer", "table", "mirror")


@dataclass(frozen=True)
class Intent:
    """Phrasings with a place for an item, the last two of which are held out, and the answer."""

    name: str
    answer: str
    phrasings: tuple[str, ...]

    @property
    def heldout(self) -> tuple[str, ...]:
        return self.phrasings[-2:]


INTENTS = (
    Intent(
        "track",
        "Your {item} is on its way. You can follow it under My orders.",
        (
            "Where is my {item}?", "When does my {item} arrive?", "Can I track my {item}?", "My {item} has not arrived yet.",
            "I am still waiting for my {item}.", "How do I follow the parcel with my {item}?",
            "Has my {item} been sent?", "What is the delivery status of my {item}?",
        ),
    ),
    Intent(
        "return",
        "You can send the {item} back within 30 days. Print the label under My orders.",
        (
            "I want to return my {item}.", "How can I send the {item} back?", "Can I give the {item} back?",
            "I do not want the {item} any more.", "How do I return a {item}?", "Where do I send the {item} back to?",
            "I would like to return the {item} I bought.", "What must I do to send back my {item}?",
        ),
    ),
    Intent(
        "refund",
        "The money for your {item} is on your account within 5 days of its return.",
        (
            "When do I get my money back for the {item}?", "I have not got my refund for the {item}.",
            "How long does the refund for a {item} take?", "Where is my money for the {item}?",
            "I sent the {item} back. When am I paid?", "Has the refund for my {item} been made?",
            "How soon is the {item} refunded?", "I wait for the refund of my {item}.",
        ),
    ),
    Intent(
        "broken",
        "I am sorry that your {item} is broken. We send you a new one free of charge.",
        (
            "My {item} is broken.", "The {item} does not work.", "My {item} came damaged.", "The {item} stopped working.",
            "There is a fault in my {item}.", "The {item} you sent me is faulty.",
            "My new {item} is damaged.", "The {item} that I bought no longer works.",
        ),
    ),
    Intent(
        "cancel",
        "Your order of the {item} is cancelled. You pay nothing.",
        (
            "Please cancel my {item}.", "I want to cancel the order of a {item}.", "Cancel the {item} I ordered.",
            "Can I still cancel my {item}?", "I ordered a {item} by mistake.", "Stop the order of my {item}.",
            "Please call off my order of the {item}.", "I no longer need the {item}, please cancel it.",
        ),
    ),
    Intent(
        "stock",
        "The {item} is in stock and ships today.",
        (
            "Do you have the {item} in stock?", "Is the {item} available?", "Can I buy the {item} now?",
            "Have you got a {item}?", "Is there still a {item} left?", "Is the {item} sold out?",
            "Are there any {item}s in stock?", "Do you still sell the {item}?",
        ),
    ),
    Intent(
        "warranty",
        "Your {item} has a warranty of two years from the day you bought it.",
        (
            "Does the {item} have a warranty?", "How long is the warranty of my {item}?", "Is my {item} still under warranty?",
            "What does the warranty of the {item} cover?", "Is there a guarantee on the {item}?",
            "How many years of warranty does a {item} have?",
            "Tell me about the warranty of the {item}.", "For how long is my {item} guaranteed?",
        ),
    ),
    Intent(
        "invoice",
        "You find the invoice of your {item} under My orders, as a PDF.",
        (
            "I need an invoice for my {item}.", "Where is the invoice for the {item}?", "Please send the bill for my {item}.",
            "Can I get a receipt for the {item}?", "How do I download the invoice of my {item}?",
            "I lost the receipt of my {item}.",
            "Could you send the invoice of the {item}?", "Where do I find the bill for my {item}?",
        ),
    ),
    Intent(
        "exchange",
        "Of course. Send the {item} back, and we ship the other one at once.",
        (
            "Can I exchange my {item}?", "I want another colour of the {item}.", "I would like to swap my {item}.",
            "The {item} is the wrong size.", "You sent me the wrong {item}.", "Can I change my {item} for another one?",
            "May I exchange the {item} for another?", "I got a {item} in the wrong colour.",
        ),
    ),
    Intent(
        "price",
        "You find today's price of the {item} on its page. Shipping is free.",
        (
            "How much is the {item}?", "What does the {item} cost?", "What is the price of a {item}?",
            "How much do I pay for a {item}?", "Is the {item} on sale?", "Tell me the price of the {item}.",
            "What do you charge for the {item}?", "How much does a {item} cost?",
        ),
    ),
    Intent(
        "address",
        "Open My orders, choose the {item}, and change the address there until it is sent.",
        (
            "I moved. Send the {item} to my new address.", "How do I change the address for my {item}?",
            "The address of my {item} is wrong.", "Can you send my {item} to another address?",
            "Please deliver the {item} to my office.", "I gave the wrong address for the {item}.",
            "I need to change where my {item} is sent.", "Can the {item} go to a different address?",
        ),
    ),
    Intent(
        "payment",
        "You can pay the {item} by card, by bank transfer, or on invoice.",
        (
            "How can I pay for the {item}?", "Can I pay the {item} by card?", "Do you take bank transfers for the {item}?",
            "My card was refused for the {item}.", "Can I pay the {item} later?", "Which payments do you accept for a {item}?",
            "In what ways can I pay for a {item}?", "May I pay the {item} on invoice?",
        ),
    ),
    Intent(
        "manual",
        "The manual of the {item} is on its page, under Downloads.",
        (
            "Where is the manual of the {item}?", "How do I use the {item}?", "I lost the manual of my {item}.",
            "Do you have instructions for the {item}?", "How do I set up my {item}?", "I need help with starting the {item}.",
            "Can I download the manual of my {item}?", "Where do I find instructions for my {item}?",
        ),
    ),
    Intent(
        "human",
        "I pass you on to a colleague, who will ask about your {item}.",
        (
            "I want to talk to a person about my {item}.", "Can a human help me with the {item}?",
            "Let me speak to someone about the {item}.", "I want to complain about the {item}.",
            "Call me about my {item}.", "Give me an agent for my {item}.",
            "I need a real person for my {item}.", "May I speak to somebody about my {item}?",
        ),
    ),
)  # fmt: skip


def chats(split: str) -> Iterator[Chat]:
    """All rows of one split, in an order that mixes intents; those of one phrasing are of one group."""
    rows = []
    for intent, opening, item in product(INTENTS, OPENINGS, ITEMS):
        for phrasing in intent.phrasings:
            if (phrasing in intent.heldout) == (split == "heldout"):
                rows.append((opening + phrasing.format(item=item), intent.answer.format(item=item), phrasing))
    rows.sort(key=lambda row: xxhash.xxh3_64_intdigest(row[0].encode()))
    return (
        Chat(turns(asked, answer), TASK, SOURCE, LICENSE, f"{SOURCE}: {phrasing}", synthetic=True)
        for asked, answer, phrasing in rows
    )
