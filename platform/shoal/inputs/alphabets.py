"""The two alphabets that pieces of a BPE are written in: a printable letter for each byte, or sentencepiece's."""

from __future__ import annotations

import re

import tokenizers

SPACE = "\u2581"  # sentencepiece's mark
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # and its tokens of a byte


def is_spaced(core: tokenizers.Tokenizer) -> bool:
    """Are the pieces of a tokenizer of sentencepiece's alphabet, with a token for every byte?"""
    return bool(getattr(core.model, "byte_fallback", False)) and all(
        core.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256)
    )


def spaced_bytes(piece: str) -> bytes:
    """The bytes that a piece of sentencepiece's alphabet stands for."""
    byte = _BYTE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(SPACE, " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's printable stand-in for each byte (the mapping of GPT-2's tokenizer) -> the byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_alphabet()
