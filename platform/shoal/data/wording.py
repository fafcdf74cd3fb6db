"""A question put in other words, or with the slips of a hurried hand: plain functions of a text and a number.

Each gives None where it finds nothing to change. From the first line of code on, nothing is changed; links, numbers and what
stands in quotes keep their spelling.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import xxhash

from shoal.errors import DataError

Synonyms = Mapping[str, Sequence[str]]

# A sentence's whole form -> other forms of the same question; \1 is what it asks about.
FORMS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        r"how (?:do|can) i (.+)\?",
        (r"what must I do to \1?", r"can you tell me how to \1?", r"I would like to know how to \1."),
    ),
    (r"where is (.+)\?", (r"where can I find \1?", r"can you tell me where \1 is?", r"I am looking for \1.")),
    (r"what is (.+)\?", (r"can you tell me what \1 is?", r"I would like to know what \1 is.")),
    (r"can i (.+)\?", (r"is it possible to \1?", r"may I \1?", r"I would like to \1. Is that possible?")),
    (r"(?:please )?(summarise|summarize|explain|describe|write|translate) (.+)", (r"can you \1 \2", r"please \1 \2")),
    (r"i (?:want|need) to (.+)\.", (r"I would like to \1.", r"how can I \1?", r"I wish to \1.")),
    (r"i (?:want|need) (.+)\.", (r"I would like \1.", r"can I have \1?")),
    (r"do you have (.+)\?", (r"have you got \1?", r"is there \1?")),
)
SYNONYMS: Synonyms = {
    "begin": ("start",), "big": ("large",), "broken": ("faulty", "defective"), "buy": ("purchase",), "bought": ("purchased",),
    "error": ("fault",), "fast": ("quickly",), "fix": ("repair", "mend"), "get": ("receive",), "help": ("assist",),
    "illness": ("disease",), "money": ("payment",), "parcel": ("package",), "picture": ("image",), "quick": ("fast",),
    "right": ("correct",), "send": ("ship",), "shape": ("figure",), "show": ("display",), "sick": ("ill",),
    "start": ("begin",), "stop": ("end",), "task": ("job",), "wrong": ("incorrect",),
}  # fmt: skip
CODE_LINE = re.compile(
    r"^(?: {4}|\t|```|@\w|(?:async )?def |class |import |from \w+ import |.*[{};]\s*$)", re.MULTILINE
)
LETTERS_OF_A_SLIP = 4  # shortest word that one is made in
WORDS_A_SLIP = 8  # one slip for so many words, at least one
KEPT = re.compile(r"```.*?```|`[^`]*`|\"[^\"]*\"|https?://\S+|\S*[\d_@/\\{}()=<>]\S*", re.DOTALL)


def read_synonyms(path: str | Path) -> Synonyms:
    """The synonyms of a domain: lines such as ``heart attack = myocardial infarction, MI``; ``#`` starts a comment.

    Raises DataError for a file that cannot be read and for a line that is not of this form.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read synonyms {path}", got=str(error), do="give a UTF-8 text file") from error
    found: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(lines, 1):
        word, equals, others = line.partition("#")[0].partition("=")
        given = tuple(other.strip() for other in others.split(",") if other.strip())
        if equals and word.strip() and given:
            found[word.strip().lower()] = given
        elif line.partition("#")[0].strip():
            raise DataError(f"{path}, line {number}", got=line[:60], allowed="WORD = OTHER, OTHER")
    return found


def paraphrased(text: str, draw: int, synonyms: Synonyms = SYNONYMS) -> str | None:
    """Other words for the same: another form of the question, if it has one of `FORMS`, and synonyms for some words."""
    prose, rest = _prose(text)
    formed = _other_form(prose, draw)
    kept = _kept(formed)
    words = [m for m in _synonym_pattern(synonyms).finditer(formed) if not _touches(m, kept)]
    chosen = [m for number, m in enumerate(words) if _part(draw, number) % 2]
    if not chosen and formed == prose:
        chosen = words[:1]
    for match in reversed(chosen):
        others = synonyms[match[0].lower()]
        other = others[_part(draw, match.start()) % len(others)]
        formed = formed[: match.start()] + (_capital(other) if match[0][0].isupper() else other) + formed[match.end() :]
    return formed + rest if formed != prose else None


def _other_form(text: str, draw: int) -> str:
    """Another form of the same question, or `text` when it has none of `FORMS`."""
    for form, others in FORMS:
        if re.fullmatch(form, text, re.IGNORECASE):  # a dot matches no line end: sentences of one line alone
            inside = text[0].lower() + text[1:]  # its first word may come to stand inside the new sentence
            return _capital(re.sub(form, others[draw % len(others)], inside, count=1, flags=re.IGNORECASE))
    return text


def with_typos(text: str, draw: int) -> str | None:
    """A slip in one word of eight: two letters exchanged, one left out, or one doubled; never in a word's first letter."""
    text, rest = _prose(text)
    kept = _kept(text)
    found = re.finditer(r"[^\W\d_]+", text)
    words = [m for m in found if len(m[0]) >= LETTERS_OF_A_SLIP and not _touches(m, kept)]
    if not words:
        return None
    order = sorted(range(len(words)), key=lambda n: _part(draw, n))
    for match in sorted((words[n] for n in order[: -(-len(words) // WORDS_A_SLIP)]), key=lambda m: -m.start()):
        text = text[: match.start()] + _slip(match[0], _part(draw, match.start())) + text[match.end() :]
    return text + rest


def _prose(text: str) -> tuple[str, str]:
    """What comes before the first line of code, and the rest with the space before it."""
    code = CODE_LINE.search(text)
    prose = text[: code.start() if code else len(text)].rstrip()
    return prose, text[len(prose) :]


def _slip(word: str, draw: int) -> str:
    at = 1 + draw % (len(word) - 2)
    before, one, two, after = word[:at], word[at], word[at + 1], word[at + 2 :]
    slips: tuple[Callable[[], str], ...] = (
        lambda: before + two + one + after, lambda: before + two + after, lambda: before + one + one + two + after,
    )  # fmt: skip
    made = slips[draw // len(word) % 3]()
    return made if made != word else slips[1]()  # two equal letters exchanged


def _kept(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in KEPT.finditer(text)]


def _touches(match: re.Match[str], spans: Sequence[tuple[int, int]]) -> bool:
    return any(start < match.end() and match.start() < end for start, end in spans)


def _synonym_pattern(synonyms: Synonyms) -> re.Pattern[str]:
    longest_first = sorted(synonyms, key=lambda word: (-len(word), word))
    return re.compile(r"\b(?:" + "|".join(map(re.escape, longest_first)) + r")\b", re.IGNORECASE)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _part(draw: int, number: int) -> int:
    """A number of its own for each `number`, out of one draw."""
    return xxhash.xxh3_64_intdigest(number.to_bytes(8, "little"), seed=draw)
