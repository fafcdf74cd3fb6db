"""Documents made fit to learn from, or dropped with a reason: Unicode repair, quality rules, identity for dedup.

Notable: every rule is a plain function of one document, so that counts by reason come out, and a threshold is one constant.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from dataclasses import replace

import ftfy
import xxhash

from shoal.data import pysource
from shoal.data.documents import Document, Skipped

LEAST_CHARACTERS = 40  # of text or code; an image needs no text at all
LEAST_RATIO = 0.1  # of compressed to raw size: prose has 0.4, code 0.25, tables 0.15, one line over and over 0.01
RATIO_SAMPLE = 2**16  # characters looked at
MOST_SYMBOLS = {"text": 0.4, "code": 0.6}  # share of characters that are neither letters, digits nor white space
LONG_LINE = 200  # mean characters a line from which code counts as minified
GENERATED = re.compile(r"generated (by|from|with|using)|auto-?generated|@generated|do not edit", re.IGNORECASE)
HEADER = 1000  # characters in which a generated file says so

# Text keeps its own quotes, entities and ligatures: only what is certainly broken is mended.
_REPAIR = ftfy.TextFixerConfig(
    unescape_html=False, uncurl_quotes=False, fix_latin_ligatures=False, fix_character_width=False, normalization="NFC"
)


def clean(document: Document) -> Document | Skipped:
    """The document with its text repaired, or why it is dropped."""
    text = repair(document.text)
    fault = None
    if document.modality == "text":
        fault = text_fault(text)
    elif document.modality == "code":
        fault = code_fault(text, python=document.origin.endswith((".py", ".pyi")))
    if fault:
        return Skipped(document.origin, document.source, fault, operator="quality")
    return replace(document, text=text)


def repair(text: str) -> str:
    """NFC text with mojibake, control characters, terminal escapes and line ends put right, trailing space removed."""
    if text.isascii() and text.isprintable():  # most captions: nothing could be wrong
        return text.strip()
    mended = unicodedata.normalize("NFC", ftfy.fix_text(text, _REPAIR))
    return "\n".join(line.rstrip() for line in mended.split("\n")).strip("\n")


def text_fault(text: str) -> str | None:
    """Why prose is not kept, or None."""
    if len(text.strip()) < LEAST_CHARACTERS:
        return "too short"
    if _symbols(text) > MOST_SYMBOLS["text"]:
        return "mostly symbols"
    return "repetitive" if _repetitive(text) else None


def code_fault(text: str, *, python: bool) -> str | None:
    """Why source code is not kept, or None. `python`: it must parse."""
    if len(text.strip()) < LEAST_CHARACTERS:
        return "too short"
    if GENERATED.search(text[:HEADER]):
        return "generated"
    if len(text) > LONG_LINE * (text.count("\n") + 1):
        return "minified"
    if _symbols(text) > MOST_SYMBOLS["code"]:
        return "mostly symbols"
    if _repetitive(text):
        return "repetitive"
    return "does not parse" if python and pysource.parse(text) is None else None


def fingerprint(document: Document) -> bytes:
    """16 bytes that are equal for documents of equal content: text up to white space, and image bytes."""
    digest = xxhash.xxh3_128(" ".join(document.text.split()).encode())
    digest.update(b"\0" + (document.image or b""))
    return digest.digest()


def _symbols(text: str) -> float:
    plain = sum(map(str.isalnum, text)) + sum(map(str.isspace, text))
    return 1 - plain / max(1, len(text))


def _repetitive(text: str) -> bool:
    sample = text[:RATIO_SAMPLE].encode()
    return len(zlib.compress(sample, 1)) < LEAST_RATIO * len(sample)
