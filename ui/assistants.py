"""Who answers on which chat page: one for anything, and one for each domain that a model can be tuned for.

An assistant is words only: the same model answers on every page, or the one that the user picks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ui.look import HERE, Place

CHATS = "chats"  # the group of pages
LARGER = "def larger(a, b):"
ZLIB = (  # clauses of the zlib licence
    "This software is provided 'as-is', without any express or implied warranty.",
    "This notice may not be removed or altered from any source distribution.",
    "Permission is granted to anyone to use this software for any purpose, including commercial applications, and to alter it "
    "and redistribute it freely",
)


@dataclass(frozen=True)
class Assistant:
    place: Place
    system: str  # what the model is told before the conversation; may be empty
    hint: str  # on an empty page
    notice: str = ""  # stays on top of the page
    tools: bool = False  # may the model call those that the service executes?
    # label -> a first message, as the demo corpus puts it
    examples: dict[str, dict[str, Any]] = field(default_factory=dict)


ASSISTANTS = (
    Assistant(
        Place("Chat", "", CHATS),
        system="",
        hint="Pick an example, or write a message below.",
        examples={
            "Where is my kettle?": {"text": "Where is my kettle?"},
            "Write a function": {"text": f"Write this function: Return the larger of two numbers.\n{LARGER}"},
            "What colour is this shape?": {"text": "what color is the shape?", "files": [str(HERE / "shape.png")]},
            "Summarise a function": {"text": f"Summarise this function:\n{LARGER}\n    return a if a > b else b"},
        },
    ),
    Assistant(
        Place("Customer service", "customer-service", CHATS),
        system="You answer the customers of a shop. Be brief and friendly, and say what the customer can do next. "
        "When you do not know something about an order, say so.",
        tools=True,
        hint="Ask about an order, a return or a repair. Easy questions are answered on the shallow path.",
        examples={
            "When does my order arrive?": {"text": "When does my order arrive?"},
            "How can I send the lamp back?": {"text": "How can I send the lamp back?"},
            "When do I get my money back for the chair?": {"text": "When do I get my money back for the chair?"},
            "For how long is my kettle guaranteed?": {"text": "For how long is my kettle guaranteed?"},
        },
    ),
    Assistant(
        Place("Code", "code", CHATS),
        system="You write and explain Python. Give complete code that runs, then one sentence on how it works.",
        hint="Ask for a function, an explanation or a test.",
        examples={
            "Write a function": {"text": f"Write this function: Return the larger of two numbers.\n{LARGER}"},
            "Summarise a function": {"text": f"Summarise this function:\n{LARGER}\n    return a if a > b else b"},
            "Complete a function": {"text": "Complete this function:\ndef is_even(number):"},
            "Write a test": {"text": f"Write a test of this function:\n{LARGER}\n    return a if a > b else b"},
        },
    ),
    Assistant(
        Place("Medicine", "medicine", CHATS),
        system="You explain medical words and findings in plain language to readers who are not physicians. You do not "
        "diagnose, and you do not recommend a treatment or a dose. Where care may be urgent, say first that emergency "
        "services should be called.",
        hint="Ask what a word means, or what to ask a physician.",
        notice="This is no medical advice. Answers come from a language model and can be wrong; do not act on them. "
        "Ask a physician, and in an emergency call the emergency number of your country.",
        examples={
            "What does hypertension mean?": {"text": "What does hypertension mean?"},
            "A resting heart rate of 55": {"text": "What does a resting heart rate of 55 mean?"},
            "Questions about a new medicine": {"text": "What should I ask my physician about a new medicine?"},
            "Bilateral pulmonary infiltrates": {"text": "Explain in plain words: bilateral pulmonary infiltrates."},
        },
    ),
    Assistant(
        Place("Law", "law", CHATS),
        system="You answer questions about licence texts, for a test.",  # as `shoal recipe law` teaches it
        hint="Paste a clause in each line, and ask what it permits in the last.",
        notice="This is no legal advice. Answers come from a language model and can be wrong; a quote that does not stand in "
        "the text was made up. Ask a lawyer.",
        examples={
            "Is there a warranty?": {"text": f"{ZLIB[0]}\n{ZLIB[1]}\nIs there a warranty?"},
            "May I sell it?": {"text": f"{ZLIB[1]}\n{ZLIB[2]}\nMay I sell it?"},
            "May I use its patents?": {"text": f"{ZLIB[0]}\n{ZLIB[2]}\nMay I use its patents?"},
        },
    ),
)
PICTURES = [
    file for assistant in ASSISTANTS for example in assistant.examples.values() for file in example.get("files", [])
]
