"""Tokenizers of models whose chat templates know tools: templates in the manner of the families', in tests/data/open/tools."""

from __future__ import annotations

import dataclasses
import json
from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import AddedToken

from shoal import presets
from shoal.api.served import ServedModel
from shoal.inputs.tokenizer import Tokenizer
from shoal.open_weights.vocabulary import calling, made
from tests.unit.open_weights.conftest import DATA

TOLD: dict[str, Any] = json.loads((DATA / "tools" / "chats.json").read_text())
TOOLS = TOLD["tools"]
FORMATS = {
    "qwen2": "hermes",
    "qwen3": "hermes",
    "smollm3": "hermes-text",
    "llama3": "llama",
    "mistral": "mistral",
    "phi4": "phi",
}


def core_of(family: str) -> tokenizers.Tokenizer:
    told = TOLD[family]
    core = tokenizers.Tokenizer.from_file(str(DATA / "tokenizer" / "tokenizer.json"))
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in told["special"]])
    core.add_tokens([AddedToken(name, special=False, normalized=False) for name in told["added"]])
    return core


@lru_cache
def tokenizer(family: str) -> Tokenizer:
    core, names = core_of(family), TOLD[family]["names"]
    end = core.token_to_id(names["eos_token"])
    return calling(made(core, names, (end,), family), jinja(family))


def jinja(family: str) -> str:
    return (DATA / "tools" / f"{family}.jinja").read_text()


def served(family: str) -> ServedModel:
    """One whose context holds tools."""
    wide = dataclasses.replace(presets.get("small").model, max_length=4096)
    return ServedModel("fish", wide, tokenizer(family), jinja(family))
