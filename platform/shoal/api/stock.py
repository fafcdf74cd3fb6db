"""A Hugging Face checkpoint as the routes see a model: what `ServedModel` is for a model directory of ours.

Only another engine than ours can run one (``engine: vllm``). Read are config.json, tokenizer.json, tokenizer_config.json and
chat_template.jinja, with the libraries that our own models use, and no code of the checkpoint's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from shoal import config
from shoal.api.served import ServedModel, names_of
from shoal.errors import CheckpointError, RequestError
from shoal.inputs.alphabets import BYTE_OF, spaced_bytes
from shoal.inputs.tokenizer import StreamDecoder
from shoal.model.described import FORMAT

PLAIN = (  # for a checkpoint without a chat template
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass(frozen=True)
class StockConfig(config.Exits):
    """What the routes ask of a `ModelConfig`, for a model with one depth and no images."""

    vocab: int
    layers: int
    context: int
    quantization: str = "none"
    image_size: int = 0
    page: int = 16

    @property
    def exit_names(self) -> dict[str, int]:
        return {config.FULL: self.layers}


class StockTokenizer:
    """A ``tokenizer.json`` with the methods of `inputs.tokenizer.Tokenizer`."""

    def __init__(self, core: tokenizers.Tokenizer, eos: str | None = None, pad: str | None = None) -> None:
        self.end, self.pad = eos, pad
        # two, since what tells them apart is a switch of the whole tokenizer, and requests are encoded in several threads
        self._meant, self._plain = core, tokenizers.Tokenizer.from_str(core.to_str())
        self._meant.encode_special_tokens, self._plain.encode_special_tokens = False, True
        added = core.get_added_tokens_decoder()
        self.specials = tuple(token.content for token in added.values() if token.special)
        self._special_ids = {number for number, token in added.items() if token.special}
        self._pieces = {number: piece for piece, number in core.get_vocab(with_added_tokens=True).items()}
        plain = [piece for number, piece in self._pieces.items() if number not in added]
        self._byte_level = all(c in BYTE_OF for piece in plain for c in piece)

    def __len__(self) -> int:
        return max(self._pieces) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens spelt in it are plain characters. Raises RequestError as our own tokenizer."""
        return _ids(self._plain, text)

    def prompt(self, text: str) -> list[int]:
        """As `Tokenizer.prompt`."""
        return self.encode(text)

    def template_ids(self, text: str) -> list[int]:
        """Ids of a chat template's own text, whose control tokens are meant."""
        return _ids(self._meant, text)

    def control(self, token: int) -> str | None:
        """As `Tokenizer.control`."""
        return self._pieces.get(token) if token in self._special_ids else None

    def special(self, name: str) -> int:
        """Id of one of `specials`."""
        return next(number for number in self._special_ids if self._pieces.get(number) == name)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for; empty for control tokens and for ids without a token."""
        piece = self._pieces.get(token)
        if piece is None or token in self._special_ids:
            return b""
        if self._byte_level and all(c in BYTE_OF for c in piece):
            return bytes(BYTE_OF[c] for c in piece)
        return spaced_bytes(piece)

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        return StreamDecoder(self.token_bytes)


def _ids(core: tokenizers.Tokenizer, text: str) -> list[int]:
    try:
        ids: list[int] = core.encode_batch_fast([text], add_special_tokens=False)[0].ids  # as `Tokenizer.encode`
    except TypeError as error:
        raise RequestError("text is not valid Unicode", got=text[:40]) from error
    return ids


@dataclass(frozen=True)
class StockModel(ServedModel):
    """`ServedModel` with a `StockConfig` and a `StockTokenizer`."""

    @classmethod
    def load(cls, directory: str | Path, name: str | None = None) -> StockModel:
        """The checkpoint in `directory`, under `name` (default: the folder's). Raises CheckpointError naming the file at fault,
        ConfigError for empty names."""
        directory = Path(directory)
        own, *aliases = names_of(name, directory.name)
        values = _json(directory / "config.json")
        text = values.get("text_config", values)
        try:
            shape = StockConfig(
                int(text["vocab_size"]), int(text["num_hidden_layers"]), int(text["max_position_embeddings"])
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory / 'config.json'} lacks a number", got=str(error)) from error
        card = directory / "tokenizer_config.json"
        told = _json(card) if card.is_file() else {}
        try:
            core = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise CheckpointError(
                f"cannot read tokenizer {directory / 'tokenizer.json'}", got=str(error)[:160]
            ) from error
        tokenizer: Any = StockTokenizer(core, _content(told.get("eos_token")), _content(told.get("pad_token")))
        created = int((directory / "config.json").stat().st_mtime)
        shaped: Any = shape
        return cls(own, shaped, tokenizer, _template(directory, told), created, tuple(aliases))


def load(directory: str | Path, name: str | None = None) -> ServedModel:
    """A model directory of ours, or any other checkpoint as a `StockModel`."""
    card = Path(directory) / "config.json"
    return (ServedModel if not card.is_file() or _json(card).get("format") == FORMAT else StockModel).load(
        directory, name
    )


def _template(directory: Path, told: dict[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    template = file.read_text(encoding="utf-8") if file.is_file() else told.get("chat_template")
    if not isinstance(template, str):
        return PLAIN
    tokens = {name: _content(told.get(name)) or "" for name in ("bos_token", "eos_token", "pad_token")}
    return "".join(f"{{% set {name} = {json.dumps(text)} %}}" for name, text in tokens.items()) + template


def _content(token: Any) -> str | None:
    """A special token's text, which tokenizer_config.json gives alone or in a mapping."""
    return token.get("content") if isinstance(token, dict) else token


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint has no {path.name}", got=str(path.parent), do="give a checkpoint's directory"
        )
    return config.read_file(path)
