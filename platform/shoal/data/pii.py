"""Personal data taken out of texts: e-mail addresses become ``[email]``, public IP addresses ``[ip]``, telephones ``[phone]``.

Notable: rules find what is written in a usual form and nothing else; names and postal addresses stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from shoal.data.documents import Document

Kind = Literal["email", "ip", "phone"]

_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}(?![\w-])"
)
_IP = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)|[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:]))"
)
_PHONE = re.compile(
    r"(?<![\w.+-])"
    r"(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # +49 (30) 1234 567
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4})"  # (555) 123-4567, 555-123-4567
    r"(?![\w-])"
)


def scrub(document: Document, kinds: Sequence[Kind], counts: Counter[str]) -> Document:
    """The document without the personal data of these `kinds`; what was taken out is added to `counts`, by kind."""

    def mend(text: str) -> str:
        for kind in kinds:
            pattern, holds = _RULES[kind]
            text = pattern.sub(lambda m, k=kind, h=holds: _replace(m, k, h, counts), text)  # type: ignore[misc]
        return text

    questions = tuple((mend(question), mend(answer)) for question, answer in document.questions)
    text = "\n".join(f"Question: {q} Answer: {a}" for q, a in questions) if questions else mend(document.text)
    return replace(document, text=text, questions=questions)


def _replace(match: re.Match[str], kind: str, holds: Callable[[str], bool], counts: Counter[str]) -> str:
    if not holds(match[0]):
        return match[0]
    counts[kind] += 1
    return f"[{kind}]"


def _is_public(address: str) -> bool:
    """Whether it is an address that leads to somebody: 127.0.0.1, 10.0.0.1 and ::1 do not."""
    try:
        return ipaddress.ip_address(address).is_global and len(re.findall(r"\w+", address)) > 2  # 1::2 is a slice
    except ValueError:
        return False


_RULES: dict[Kind, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "email": (_EMAIL, lambda _: True),
    "ip": (_IP, _is_public),
    "phone": (_PHONE, lambda number: sum(map(str.isdigit, number)) >= 9),
}
