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
    "包裹": ("快件",), "购买": ("选购",), "图片": ("图像",), "帮助": ("协助",), "错误": ("差错",), "疾病": ("病症",),
    "修理": ("维修",), "马上": ("立刻",),
}  # fmt: skip
CODE_LINE = re.compile(
    r"^(?: {4}|\t|```|@\w|(?:async )?def |class |import |from \w+ import |.*[{};]\s*$)", re.MULTILINE
)
LETTERS_OF_A_SLIP = 4  # shortest word that one is made in
# letters and signs of scripts that put no spaces between words: a word there begins and ends anywhere
UNSPACED = r"\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uff9f"
LETTERS = re.compile(r"[^\W\d_]+")
WORDS_A_SLIP = 8  # one slip for so many words, at least one
# a word with a sign of code in it is looked for from its first letter only: from each one a long line would take minutes
KEPT = re.compile(
    r"```.*?```|`[^`]*`|\"[^\"]*\"|“[^”]*”|「[^」]*」|https?://\S+"
    rf"|(?<![^\s`\"{UNSPACED}])[^\s\d_@/\\{{}}()=<>`\"{UNSPACED}]*+[\d_@/\\{{}}()=<>][^\s{UNSPACED}]*",
    re.DOTALL,
)


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
        given = tuple(other.strip() for other in re.split("[,\uff0c]", others) if other.strip())
        if equals and word.strip() and given:
            found[word.strip().lower()] = given
        elif line.partition("#")[0].strip():
            raise DataError(f"{path}, line {number}", got=line[:60], allowed="WORD = OTHER, OTHER")
    return found


def paraphrased(text: str, draw: int, synonyms: Synonyms = SYNONYMS) -> str | None:
    """Other words for the same: another form of the question, if it has one of `FORMS`, and synonyms for some words."""
    prose, rest = _prose(text)
    formed = _other_form(prose, draw)
    # no case tells a long or a dotless letter from another, but it is another word
    words = [m for m in _outside(_synonym_pattern(synonyms), formed) if m[0].lower() in synonyms]
    chosen = [m for number, m in enumerate(words) if _part(draw, number) % 2]
    if not chosen and formed == prose:
        chosen = words[:1]

    def other(match: re.Match[str]) -> str:
        others = synonyms[match[0].lower()]
        word = others[_part(draw, match.start()) % len(others)]
        return _capital(word) if match[0][0].isupper() else word

    formed = _exchanged(formed, chosen, other)
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
    words = [m for m in _outside(LETTERS, text) if len(m[0]) >= LETTERS_OF_A_SLIP]
    if not words:
        return None
    order = sorted(range(len(words)), key=lambda n: _part(draw, n))
    chosen = [words[n] for n in sorted(order[: -(-len(words) // WORDS_A_SLIP)])]
    return _exchanged(text, chosen, lambda m: _slip(m[0], _part(draw, m.start()))) + rest


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


def _outside(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    """The matches of `pattern` that touch nothing that is kept, in order."""
    found, kept = [], KEPT.finditer(text)
    span = next(kept, None)
    for match in pattern.finditer(text):
        while span and span.end() <= match.start():
            span = next(kept, None)
        if not span or match.end() <= span.start():
            found.append(match)
    return found


def _exchanged(text: str, places: Sequence[re.Match[str]], new: Callable[[re.Match[str]], str]) -> str:
    """`text` with what stands in `places`, which are in order, exchanged."""
    parts, at = [], 0
    for match in places:
        parts += [text[at : match.start()], new(match)]
        at = match.end()
    return "".join([*parts, text[at:]])


def _synonym_pattern(synonyms: Synonyms) -> re.Pattern[str]:
    longest_first = sorted(synonyms, key=lambda word: (-len(word), word))
    return re.compile("|".join(map(_whole, longest_first)), re.IGNORECASE)


def _whole(word: str) -> str:
    """An expression for `word` where it stands as one: of letters that spaces part from others, no more of such may follow."""
    before, behind = (r"\b" if not re.match(f"[{UNSPACED}]", end) else "" for end in (word[0], word[-1]))
    return before + re.escape(word) + behind


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _part(draw: int, number: int) -> int:
    """A number of its own for each `number`, out of one draw."""
    return xxhash.xxh3_64_intdigest(number.to_bytes(8, "little"), seed=draw)
