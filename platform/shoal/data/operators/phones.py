"""Telephone numbers in the forms that countries write them in, as libphonenumber (`phonenumbers`) reads them.

Notable: a pattern finds what is written like a telephone number, which costs little; the library judges it. A number without a
country code is taken in a form that few other numbers have, or behind a word such as "phone".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain

import phonenumbers
from phonenumbers import NumberParseException

from shoal.data.operators.secret_tokens import AFTER, BEFORE, Span

# whose numbers are looked for where no country code is given
REGIONS = (
    "US", "GB", "DE", "FR", "IT", "ES", "NL", "BE", "CH", "AT", "PL", "SE", "NO", "DK", "FI", "PT", "IE", "CZ", "GR",
    "TR", "RU", "UA", "IN", "CN", "JP", "KR", "AU", "NZ", "ZA", "NG", "BR", "MX", "AR", "IL", "AE", "ID", "PH",
)  # fmt: skip
_GAP = r"[ ./\u00a0\u2010-\u2013-]"  # between the parts of a number: a space, a dot, a slash, hyphens and dashes
_GROUPS = rf"(?:{_GAP}?\(?\d{{1,12}}\)?)"
_WORDS = (
    "telephone|telefon|t\u00e9l\u00e9phone|tel\u00e9fono|telefono|telefoon|tel|t\u00e9l|phone|mobile|mobil|cell|handy|portable|m\u00f3vil"
    "|celular|whatsapp|sms|fax"
)
_PHONE = re.compile(
    rf"(?:(?<![\w.+/-])|(?<=/)(?=\+))(?<!\d{_GAP})(?:"
    rf"(?P<abroad>\+[1-9]\d{{0,2}}{_GROUPS}{{1,6}}|00[1-9]\d{{6,13}}|00{_GAP}?[1-9]\d{{0,2}}{_GAP}{_GROUPS}{{1,6}})"
    # (555) 123-4567, 1-800-555-0199, 555 123 4567; but no three of more numbers in a row
    rf"|(?P<american>(?:1{_GAP})?(?:\(\d{{3}}\) ?|[2-9]\d{{2}}{_GAP})\d{{3}}{_GAP}\d{{4}}(?!{_GAP}\d))"
    rf"|(?P<home>(?:\(0\d{{1,4}}\) ?|0[1-9]\d{{0,4}}{_GAP}|[78]? ?\(\d{{2,4}}\) ?)\d{{2,8}}(?:{_GAP}\d{{2,4}}){{0,4}}"
    rf"|1[3-9]\d{_GAP}\d{{4}}{_GAP}\d{{4}})"
    rf")(?![\w-])(?!{_GAP}\d)"
)
# What signs hold together ends at a space, whatever number stands behind it, as in a line of a log.
_TIED = re.compile(
    r"(?<![\w.+-])(?<!\d/)(?:(?P<abroad>\+[1-9](?:\d{8,14}|\d{0,2}(?:[./-]\(?\d{1,12}\)?){2,6}))"
    r"|(?P<american>(?:1[.-])?[2-9]\d{2}(?P<sign>[.-])\d{3}(?P=sign)\d{4}|\(\d{3}\) ?\d{3}-\d{4})"
    r"|(?P<home>0\d{1,4}/\d{5,8}|\(0\d{1,4}\) ?\d{5,8}))(?![\w-]|[./]\d)"
)
_NAMED = re.compile(
    rf"{BEFORE}(?:{_WORDS})s?{AFTER}(?:[\s:=#.\"'>|]|[_-]?(?:no|nr|num|number|nummer|num\u00e9ro|n\u00famero|is|ist){AFTER}){{0,6}}(?<!\w)"
    rf"(?P<number>\(?\d{_GROUPS}{{1,6}})(?![\w-]|\.\d)", re.IGNORECASE,
)  # fmt: skip
_DATE = re.compile(r"(?:\d{1,2}([./-])\d{1,2}\1(?:19|20)\d\d|(?:19|20)\d\d([./-])\d{1,2}\2\d{1,2})(?!\d)")
_DECIMAL = re.compile(r"\+?\d+\.\d+")
_LEAST, _MOST = 9, 15  # digits
_LEAST_NAMED = 7  # behind a word


def phone_spans(text: str) -> Iterator[Span]:
    """Where telephone numbers stand in `text`; spans may overlap."""
    for found in chain(_PHONE.finditer(text), _TIED.finditer(text)):
        if _is_phone(found[0], found.lastgroup or ""):
            yield found.span()
    for found in _NAMED.finditer(text):
        number = found["number"]
        if _LEAST_NAMED <= sum(map(str.isdigit, number)) <= _MOST and not _DATE.search(number) and _possible(number):
            yield found.span("number")


@lru_cache(2**12)
def _is_phone(number: str, form: str) -> bool:
    if not _LEAST <= sum(map(str.isdigit, number)) <= _MOST or _DATE.search(number) or _DECIMAL.fullmatch(number):
        return False
    if form == "american":  # of films, too: 555 is nobody's
        return _possible(number, ("US",))
    if form == "abroad" and number.startswith("+"):
        return _possible(number, (None,))
    return any(phonenumbers.is_valid_number(parsed) for parsed in _read(number, REGIONS))


def _possible(number: str, regions: tuple[str | None, ...] = REGIONS) -> bool:
    return any(phonenumbers.is_possible_number(parsed) for parsed in _read(number, regions))


def _read(number: str, regions: tuple[str | None, ...]) -> Iterator[phonenumbers.PhoneNumber]:
    """What the number is in each of the regions where it is one; None: it has a country code."""
    for region in regions:
        try:
            yield phonenumbers.parse(number, region)
        except NumberParseException:
            continue
