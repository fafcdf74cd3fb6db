"""What one HTTP request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Tokens are bounded by the model's context besides, an image's pixels by `inputs.media`."""

    body_bytes: int = 16 * 2**20  # counted as they arrive, before anything is parsed
    messages: int = 1024
    images: int = 16
    tools: int = 128
    choices: int = 64  # prompts times n
    inputs: int = 2048  # of /v1/embeddings
    tokenized: int = 2**20  # characters, or token ids, that /tokenize and /detokenize take: a second or two of a core
    stops: int = 16
    seconds: float = 600.0  # then the request ends with 408


def at_most(param: str, got: int, allowed: int, what: str | None = None) -> None:
    """Raises RequestError naming the field when `got` of `what` are more than `allowed`."""
    if got > allowed:
        raise RequestError(f"too many {what or param}", param=param, got=got, allowed=f"at most {allowed}")
