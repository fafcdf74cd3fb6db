"""Words and runs of n words as 64-bit hashes: what two texts are compared by. Letters: n words in a gram, W words in a text.

Notable: texts are compared by their words alone. Case, spaces, punctuation, markup (tags, entities, link targets, LaTeX's
commands), invisible characters and Unicode's variants of a letter make no difference, nor do commas in a number and a
hyphen where a line ends within a word.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import xxhash

_INVISIBLE = "\u00ad\u200b-\u200d\u2060\ufeff"  # soft hyphen, spaces without a width
# scripts without spaces: a character is a word
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_LETTER = r"[^\W_\u0e00-\u0eff\u3040-\u9fff]"
_BROKEN = rf"(?<=[^\W\d_])[-\u2010]\r?\n[ \t]{{0,20}}(?=[^\W\d_{_ALONE}])"  # by a hyphen at a line's end
_WORD = re.compile(
    rf"[{_ALONE}]|\d{{1,3}}(?:(?:,|\{{,\}})\d{{3}})+(?!\d)|{_LETTER}(?:{_LETTER}|[{_INVISIBLE}\u0300-\u036f]|{_BROKEN})*"
)
_MARKUP = re.compile(
    r"</?[A-Za-z][^<>]{0,200}>|&(?:[A-Za-z]{2,8}|#\d{1,6}|#[xX][0-9A-Fa-f]{1,6});"  # HTML
    r"|\]\([^()\s]{0,500}\)|```\w*"  # Markdown
    r"|\\(?:(?:begin|end)\{[a-z]{1,20}\*?\}|(?:text|math)[a-z]{2,4}\b|(?:sub){0,2}section\b|emph\b|underline\b|item\b|[nrt])"
)
_IGNORED = re.compile(rf"[-\u2010\s{{}},{_INVISIBLE}]")  # within a word
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the order of the words counts
_FIGURE = 2**63  # this bit of a word's hash: it holds a digit


def words(text: str) -> np.ndarray:
    """uint64 [W]: the words of a text."""
    return _hashed(_WORD.findall(_without_markup(text)))


def placed(text: str) -> tuple[np.ndarray, np.ndarray]:
    """`words`, and where each begins and ends in the text: int64 [W, 2]."""
    found = [*_WORD.finditer(_without_markup(text))]
    return _hashed([word[0] for word in found]), np.array([word.span() for word in found], dtype=np.int64).reshape(
        -1, 2
    )


def grams(words: np.ndarray, n: int) -> np.ndarray:
    """uint64 [W - n + 1]: every run of n words; empty when there are fewer."""
    size = len(words) - n + 1
    if size <= 0:
        return np.empty(0, dtype=np.uint64)
    total = words[:size].copy()
    for at in range(1, n):  # wraps around, which is meant
        total = total * _FACTOR + words[at : at + size]
    return total ^ (total >> np.uint64(29))


def figures(words: np.ndarray) -> np.ndarray:
    """uint64, sorted and each once: the words with a digit, each with the word before it. A figure alone is often in another
    text by chance: "width 12" says what 12 is."""
    at = np.flatnonzero(words >= np.uint64(_FIGURE))
    before = np.where(at > 0, words[np.maximum(at - 1, 0)], np.uint64(0))
    return np.unique(before * _FACTOR + words[at])


def _without_markup(text: str) -> str:
    """The text with spaces in place of markup: of the same length."""
    return _MARKUP.sub(lambda found: " " * len(found[0]), text)


def _hashed(some: list[str]) -> np.ndarray:
    known: dict[str, int] = {}
    hashed = [known[w] if w in known else known.setdefault(w, _hash(w)) for w in some]
    return np.array(hashed, dtype=np.uint64)


def _hash(word: str) -> int:
    plain = _IGNORED.sub("", word)
    plain = plain.lower() if plain.isascii() else unicodedata.normalize("NFKC", plain).casefold()
    digest = xxhash.xxh3_64_intdigest(plain.encode("utf-8", "surrogatepass"))
    return digest | _FIGURE if any(map(str.isdigit, plain)) else digest & (_FIGURE - 1)
