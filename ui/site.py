"""What every page is given: where the API is, the user's key, and the other pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import openai

from ui import login, look, talk
from ui.look import Place
from ui.talk import Card, Words

Component = Any  # of Gradio, which has no types
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of every event


def judged_by_the_api(choice: Component) -> Component:
    """`choice`, whose value goes on as it is: a gateway that began anew knows no choices, and would refuse what an open page
    shows."""
    choice.preprocess = lambda value: value
    return choice


@dataclass(frozen=True)
class Site:
    page: gr.Blocks
    places: Sequence[Place]
    root: str  # path of the first page
    url: str  # of the API, ends in /v1
    model: str | None  # named first; None: the server's first
    api: openai.AsyncOpenAI

    def client(self, request: gr.Request) -> openai.AsyncOpenAI:
        """What asks the API with the key that this browser logged in with."""
        key = login.key_of(request.cookies)
        return self.api.with_options(api_key=key) if key else self.api

    async def cards(self, request: gr.Request) -> list[Card]:
        """Raises openai.OpenAIError."""
        return await talk.read_cards(self.client(request), self.model)

    def header(self, here: Place, request: gr.Request | None, said: str = "", *, fault: bool = False) -> str:
        """The line on top of a page; None: before anybody asks for it."""
        keyed = request is not None and bool(login.key_of(request.cookies))
        return look.header(self.places, here, self.root, said, fault=fault, keyed=keyed)

    def head(self, here: Place) -> Component:
        """The line on top, instead of Gradio's own, and the name of the browser's tab."""
        self.page.load(None, None, None, js=look.titled(here.name))
        return gr.HTML(self.header(here, None), elem_id="head")


def of(cards: Sequence[Card], name: str | None) -> Card:
    """The card with `name`, or the first."""
    return next((card for card in cards if card.name == name), cards[0])


def words_of(card: Card, path: str) -> Words | None:
    """What the page at `path` says where this model was made for it; None elsewhere."""
    return card.words if card.words is not None and card.words.path == path else None


def depths(card: Card, picked: str = "auto") -> list[tuple[str, str]]:
    """Choices of depth: (label, value), the shallowest first. `picked`: by the service, where nobody chooses."""
    named = [
        (f"{name}, {layers} of {card.layers} layers{_agrees(card, name)}", name) for name, layers in card.depths.items()
    ]
    return [
        ("auto, by the question" if picked == "auto" else f"auto, {picked} by the service's policy", "auto"),
        *named,
    ]


def _agrees(card: Card, name: str) -> str:
    shares = card.adapted.get("agreement", {})
    return f", full depth's word at {shares[name]:.0%} of places" if name in shares else ""


def _worth(card: Card) -> str:
    """What the early exits of an imported model are worth, and what would make them more; "" where nobody measured it."""
    if not card.adapted:
        return ""
    learned = f"The early exits learned for {card.adapted['minutes']:g} minutes"
    worth = "they answer badly, and drafts of theirs save time only where most stand"
    return f"{learned}: {worth}. An hour of it: shoal assistant --adapt 60"


def depths_of(card: Card, chosen: str, picked: str = "auto") -> Any:
    """A control of depth for another model: what was `chosen` stays where this one has it."""
    return gr.update(choices=depths(card, picked), value=chosen if chosen in card.depths else "auto", info=_worth(card))


def about(card: Card) -> str:
    """``tiny · INT8 · 8 layers · 1024 tokens of context``."""
    return f"{card.name} · {kind(card)}"


def all_of(cards: Sequence[Card]) -> str:
    """`about` a server's only model, or the names of its models."""
    return about(cards[0]) if len(cards) == 1 else f"{len(cards)} models: {', '.join(map(label, cards))}"


def kind(card: Card) -> str:
    """``INT8 · 8 layers · 1024 tokens of context``."""
    size = f"{card.layers} layers · {card.context} tokens of context"
    return size if card.quantization == "none" else f"INT8 · {size}"


def label(card: Card) -> str:
    """``tiny · INT8``: what tells the models of a server apart."""
    return card.name if card.quantization == "none" else f"{card.name} · INT8"
