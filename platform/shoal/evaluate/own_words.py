"""Chats that a model makes up, questions too: what there is to learn from, and to measure on, where nothing else is at hand.

An instructed model whose user's turn is open goes on as a user would (Magpie, arXiv 2406.08464). It answers what it asked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.inputs.chat import Encoded, encode_chat
from shoal.model.model import Model

ASKED, ANSWERED = 48, 192  # tokens at most
TEMPERATURE = 0.8  # of a question; at 1 a small model asks nonsense
PLACE = "\N{SNOWMAN}"  # stands for a question, to see what a template writes before one

Chat = list[dict[str, str]]


def chats(model: Model, count: int) -> list[Chat]:
    """`count` chats of `model` with itself, a question and its answer each, the same each time; fewer where its context has
    no room for an answer to what it asked."""
    opened, context = _opened(model), model.config.context
    engine, decode = Engine(model), model.tokenizer.decode
    most = max(1, min(ASKED, (context - len(opened)) // 4))
    asks = [Request(opened, Sampling(max_tokens=most, temperature=TEMPERATURE, seed=seed)) for seed in range(count)]
    asked = [decode(answer.tokens).strip() or str(seed) for seed, answer in enumerate(engine.generate(asks))]
    questions = [[{"role": "user", "content": text}] for text in asked]
    prompts = [(question, _encoded(model, question, opened=True)) for question in questions]
    prompts = [(question, prompt) for question, prompt in prompts if len(prompt.ids) < context]
    answers = engine.generate(
        Request(prompt, Sampling(max_tokens=min(ANSWERED, context - len(prompt.ids)), seed=seed))
        for seed, (_, prompt) in enumerate(prompts)
    )
    said = zip(prompts, answers, strict=True)
    return [[*question, {"role": "assistant", "content": decode(answer.tokens)}] for (question, _), answer in said]


def ids(model: Model, said: Sequence[Chat]) -> list[list[int]]:
    """The ids of each chat, as the model's template writes it."""
    return [_encoded(model, chat, opened=False).ids[: model.config.context] for chat in said]


@torch.inference_mode()
def agreement(model: Model, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """Early exit's name -> share of the places of `rows` of ids at which its likeliest token is full depth's."""
    config, net = model.config, model.net
    early = {name: layers for name, layers in config.exit_names.items() if layers != config.layers}
    same, places = dict.fromkeys(early, 0), 0
    for row in rows:
        hidden = net(torch.tensor([row], device=model.device), exits=config.exits)
        wanted = net.head(hidden[config.layers], config.layers).argmax(-1)
        places += wanted.numel()
        for name, layers in early.items():
            same[name] += int((net.head(hidden[layers], layers).argmax(-1) == wanted).sum())
    return {name: count / max(places, 1) for name, count in same.items()}


def _opened(model: Model) -> list[int]:
    """What stands before a question; where a template writes none as it is, what stands before any text."""
    place = model.tokenizer.encode(PLACE)
    whole = _encoded(model, [{"role": "user", "content": PLACE}], opened=False).ids
    starts = (at for at in range(1, len(whole)) if whole[at : at + len(place)] == place)
    return whole[: next(starts, 0)] or model.tokenizer.prompt("") or model.tokenizer.prompt("\n")


def _encoded(model: Model, messages: Chat, *, opened: bool) -> Encoded:
    return encode_chat(
        messages,
        model.tokenizer,
        model.config,
        template=model.chat_template,
        add_generation_prompt=opened,
        answers=False,
    )
