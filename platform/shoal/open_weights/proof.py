"""What was exported, read again as anybody would and held against the model that it came from: logits, and chats as the
template writes them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import CheckpointError, RequestError
from shoal.inputs.chat import encode_chat
from shoal.model.model import Model

TOKENS = 64  # of the text whose logits are compared
NEAR = 1e-5  # of the largest logit
_SAID = ("Hello", "  What is 12 + 3?\n", "caf\u00e9 \U0001f41f\u200d", "def f(x):\n\treturn x", "<|im_end|></s>")
_SYSTEM = {"role": "system", "content": "Be short."}


def chats() -> list[list[dict[str, str]]]:
    """Twenty: with a system message and without, of one turn and of two."""
    found = []
    for said in _SAID:
        turn = [{"role": "user", "content": said}]
        two = [*turn, {"role": "assistant", "content": said[::-1]}, {"role": "user", "content": said}]
        found += [turn, two, [_SYSTEM, *turn], [_SYSTEM, *two]]
    return found


class Told:
    """What a model says at a depth: kept, so that no two models need be in memory."""

    def __init__(self, model: Model, depth: str | int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.context = model.config.context
        count = min(TOKENS, self.context)
        ids = torch.tensor(model.tokenizer.sayable)[
            torch.randint(len(model.tokenizer.sayable), (count,), generator=generator)
        ]
        self.logits: Tensor = model.logits(ids, depth).float()
        self.chats = [_rendered(model, chat) for chat in chats()]


def hold(source: Told, exported: str | Path, beside: Path) -> float:
    """Import what was `exported` once more, into a folder of its own in `beside`, and compare. Returns the largest difference
    of a logit. Raises CheckpointError where it is more than `NEAR`, or a chat is other tokens."""
    from shoal.open_weights.convert import import_model

    with tempfile.TemporaryDirectory(dir=beside, prefix=".proof-") as folder:
        import_model(exported, Path(folder) / "model", context=source.context)  # of longrope's tables the same one
        model = Model.load(Path(folder) / "model")
    again = Told(model, "full")
    apart = float((again.logits - source.logits).abs().max())
    if not apart <= NEAR * max(1.0, float(source.logits.abs().max())):
        raise CheckpointError(
            "what was exported says something else when it is read again", got=f"logits {apart:.1e} off"
        )
    for number, (was, now) in enumerate(zip(source.chats, again.chats, strict=True)):
        if was != now:
            raise CheckpointError("what was exported writes a chat in other tokens", got=chats()[number])
    return apart


def _rendered(model: Model, chat: Sequence[dict[str, str]]) -> list[int] | None:
    """None for a chat that the template refuses, as some do with a system's message."""
    try:
        return encode_chat(chat, model.tokenizer, model.config, template=model.chat_template).ids
    except RequestError:
        return None
