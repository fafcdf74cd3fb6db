"""What one HTTP request may ask for."""

from __future__ import annotations

from dataclasses import dataclass

from shoal.errors import RequestError


@dataclass(frozen=True)
class Limits:
    """Besides these, tokens are bounded by the model's context and an image's pixels by `inputs.media`."""

    body_bytes: int = 16 * 2**20  # counted as they arrive, before anything is parsed
    bodies_bytes: int = 256 * 2**20  # of all requests that one process answers now, but for files
    messages: int = 1024
    images: int = 16
    tools: int = 128
    choices: int = 64  # prompts times n
    inputs: int = 2048  # of /v1/embeddings
    tokenized: int = 2**20  # characters, or token ids, that /tokenize and /detokenize take: a second or two of a core
    stops: int = 16
    stop_characters: int = 1024  # of each, which is looked for with each token; and
    stop_ids: int = 1024
    bad_words: int = 128  # each looked for with each token
    file_bytes: int = 200 * 2**20  # of an uploaded file
    held_files: int = 1000  # of one key; and
    held_bytes: int = 10 * 2**30
    batch_lines: int = 50_000
    open_batches: int = 100  # of one key, that have not ended
    held_batches: int = 1000  # of one key; of more the oldest that have ended are forgotten
    seconds: float = 600.0  # then the request ends with 408


def at_most(param: str, got: int, allowed: int, what: str | None = None) -> None:
    """Raises RequestError naming the field when `got` of `what` are more than `allowed`."""
    if got > allowed:
        raise RequestError(f"too many {what or param}", param=param, got=got, allowed=f"at most {allowed}")
