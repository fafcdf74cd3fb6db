"""Numbers of people and of their accounts, as python-stdnum checks them: identity and tax numbers, passports, payment cards,
bank accounts.

Notable: a number is taken where its written form is that of a country's and its check digits are right. Forms that are plain
digits, as most passports are, are taken only behind a word that names them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module

from stdnum import iban, luhn

from shoal.data.operators.secret_tokens import AFTER, BEFORE, Span

_GAP = "[ \u00a0\u2010-\u2013-]"
_CARD = re.compile(
    rf"(?<![\w.-])(?<!\d\d\d{_GAP})(?:[2-6]\d{{3}}({_GAP})\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{3}})?"
    rf"|3\d{{3}}({_GAP})\d{{6}}\2\d{{4,5}})(?![\w-]|\.\d|{_GAP}\d{{4}}{_GAP})"
    # what no spaces part ends at one
    r"|(?<![\w.-])(?:[2-6]\d{12,18}|[2-6]\d{3}-\d{4}-\d{4}-\d{4}(?:-\d{3})?|3\d{3}-\d{6}-\d{4,5})(?![\w-]|\.\d)"
)
_IBAN = re.compile(
    rf"(?<!\w)(?:[A-Z]{{2}}\d{{2}}(?:{_GAP}?[A-Z0-9]){{11,30}}|[a-z]{{2}}\d{{2}}[a-z0-9]{{11,30}})(?!\w)"
)
_LEAST_IBAN = 15  # letters and digits, Norway's

# module of stdnum -> the written form of its numbers
FORMS = {
    "us.ssn": r"\d{3}-\d{2}-\d{4}",
    "it.codicefiscale": r"[A-Z]{6}\d{2}[A-Z]\d{2}[A-Z]\d{3}[A-Z]",
    "es.dni": r"\d{8}-?[A-Z]",
    "es.nie": r"[XYZ]-?\d{7}-?[A-Z]",
    "fr.nir": r"[12] ?\d{2} ?(?:0[1-9]|1[0-2]) ?\d[\dAB] ?\d{3} ?\d{3} ?\d{2}",
    "br.cpf": r"\d{3}\.\d{3}\.\d{3}-\d{2}",
    "cn.ric": r"\d{17}[\dX]",
    "mx.curp": r"[A-Z]{4}\d{6}[HM][A-Z]{5}[0-9A-Z]\d",
    "in_.pan": r"[A-Z]{5}\d{4}[A-Z]",
    "in_.aadhaar": r"[2-9]\d{3} \d{4} \d{4}",
    "se.personnummer": r"\d{6}[-+]\d{4}",
    "dk.cpr": r"[0-3]\d[01]\d\d{2}-\d{4}",
    "fi.hetu": r"\d{6}[-+A]\d{3}[0-9A-Y]",
    "be.nn": r"\d{2}\.\d{2}\.\d{2}-\d{3}\.\d{2}",
    "ch.ssn": r"756\.\d{4}\.\d{4}\.\d{2}",
    "kr.rrn": r"\d{6}-[1-8]\d{6}",
}
# Britain's
_NATIONAL_INSURANCE = r"(?!BG|GB|KN|NK|NT|TN|ZZ)[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D]"
# the word that names a number of plain digits -> modules of stdnum, one of which must hold it valid
NAMED = {
    r"bsn|burgerservicenummer": ("nl.bsn",),
    r"pesel": ("pl.pesel",),
    r"steuer-?id(?:entifikationsnummer|nr)?|idnr|tax id": ("de.idnr", "us.tin"),
    r"f\u00f8dselsnummer": ("no.fodselsnummer",),
    r"nhs": ("gb.nhs",),
    r"sin|social insurance": ("ca.sin",),
    r"tfn|tax file": ("au.tfn",),
    r"ssn|social security": ("us.ssn",),
    r"personnummer": ("se.personnummer",),
    r"aadhaar": ("in_.aadhaar",),
}
_FILLER = (
    rf"(?:[\s:#=.,\"'()>|-]"
    rf"|_?(?:no|nr|num|number|nummer|n\u00b0|num\u00e9ro|n\u00famero|is|was|ist|est|es){AFTER}){{0,8}}"
)
_NAMED = re.compile(
    rf"{BEFORE}(?:{'|'.join(f'({words})' for words in NAMED)}){AFTER}{_FILLER}(?<!\w)(?P<digits>\d(?:[ .-]?\d){{7,13}})(?!\w)",
    re.IGNORECASE,
)
_PASSPORT = re.compile(
    rf"(?:passport|reisepass(?:nummer)?|passeport|pasaporte|passaporto|paspoort){AFTER}{_FILLER}"
    r"(?<!\w)(?P<digits>(?-i:[A-Z]{0,3}\d{6,9}|[A-Z][A-Z0-9]{8}|\d{2}[A-Z]{2}\d{5}))(?!\w)", re.IGNORECASE,
)  # fmt: skip
_MACHINE_READABLE = re.compile(r"P[A-Z<][A-Z<]{3}[A-Z<]{39}\s+[A-Z0-9<]{9}\d[A-Z<]{3}\d{7}[MFX<]\d{7}[A-Z0-9<]{16}")
_FORMS = re.compile(
    rf"(?<![\w.-])(?:{'|'.join(f'({form})' for form in (*FORMS.values(), _NATIONAL_INSURANCE))})(?![\w-]|\.\d)"
)
_DIGITS = re.compile(r"\d")


def card_spans(text: str) -> Iterator[Span]:
    """Where numbers of payment cards stand in `text`: in one piece or in a card's groups, with the right check digit."""
    for found in _CARD.finditer(text):
        digits = "".join(_DIGITS.findall(found[0]))
        if len(set(digits)) > 1 and luhn.is_valid(digits):
            yield found.span()


def iban_spans(text: str) -> Iterator[Span]:
    """Where bank accounts (IBAN) stand in `text`; words in capitals behind one are not taken for a part of it."""
    for found in _IBAN.finditer(text):
        number, start = found[0], found.start()
        for end in range(len(number), _LEAST_IBAN - 1, -1):
            at_end = end == len(number) or not number[end].isalnum()
            if at_end and iban.is_valid(re.sub(_GAP, "", number[:end]), check_country=False):
                yield start, start + end
                break


def id_spans(text: str) -> Iterator[Span]:
    """Where identity, tax and passport numbers stand in `text`."""
    modules = [*FORMS]
    for found in _FORMS.finditer(text):
        number = found.lastindex or 0
        if number > len(modules) or _valid(modules[number - 1])(found[0]):
            yield found.span()
    named = [*NAMED.values()]
    for found in _NAMED.finditer(text):
        which = next(at for at, words in enumerate(found.groups()) if words is not None)
        if any(_valid(module)(found["digits"]) for module in named[which]):
            yield found.span("digits")
    for found in _PASSPORT.finditer(text):
        if _DIGITS.search(found["digits"]):
            yield found.span("digits")
    yield from (found.span() for found in _MACHINE_READABLE.finditer(text))


@cache
def _valid(module: str) -> Callable[[str], bool]:
    found: Callable[[str], bool] = import_module(f"stdnum.{module}").is_valid
    return found
