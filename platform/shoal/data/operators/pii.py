"""Personal data taken out of texts: e-mail addresses become ``[email]``, public IP addresses ``[ip]``, telephones ``[phone]``;
where it is asked for also keys that services give out ``[secret]``, payment cards ``[card]`` and bank accounts ``[iban]``.

Notable: rules find what is written in a usual form and nothing else; names and postal addresses stay. Code stays code: what
``@`` joins is an address only below a domain that is given out, so ``x@self.weight`` and ``q@k.mT`` are left.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from shoal.data.documents import Document

Kind = Literal["email", "ip", "phone", "secret", "card", "iban"]
ALL: tuple[Kind, ...] = ("secret", "iban", "card", "email", "ip", "phone")  # longer forms first: a card is no telephone

# Top domains: those of countries, and the others in which people have mail.
_TOP = """ac ad ae af ag ai al am ao aq ar as at au aw ax az ba bb bd be bf bg bh bi bj bm bn bo br bs bt bw by bz ca cc cd cf
cg ch ci ck cl cm cn co cr cu cv cw cx cy cz de dj dk dm do dz ec ee eg er es et eu fi fj fk fm fo fr ga gd ge gf gg
gh gi gl gm gn gp gq gr gs gt gu gw gy hk hm hn hr ht hu id ie il im in io iq ir is it je jm jo jp ke kg kh ki km kn
kp kr kw ky kz la lb lc li lk lr ls lt lu lv ly ma mc md me mg mh mk ml mm mn mo mp mq mr ms mt mu mv mw mx my mz na
nc ne nf ng ni nl no np nr nu nz om pa pe pf pg ph pk pl pm pn pr ps pt pw py qa re ro rs ru rw sa sb sc sd se sg sh
si sk sl sm sn so sr ss st su sv sx sy sz tc td tf tg th tj tk tl tm tn to tr tt tv tw tz ua ug uk us uy uz va vc ve
vg vi vn vu wf ws ye yt za zm zw academy aero agency app art asia bank berlin biz blog boutique business cafe care cat
center city clinic cloud club coach com community company consulting coop dental dev digital directory earth edu
education email energy engineering enterprises events example expert family farm finance fitness foundation fund
gallery global gmbh gov green group guru hamburg health help holdings hospital host hotel house industries info ink
institute int international jobs kitchen koeln land law legal life limited live london ltd management market marketing
media mil mobi museum net network news ngo nrw nyc one online org paris partners pharmacy photo photography post press
pro productions properties restaurant rocks sale school schule science scot security services shop site social
software solar solutions space store studio support swiss systems taxi team tech technology tel tips today tokyo tools
top tours town trade training travel university vet video vip wales website wien wiki work works world wtf xyz yoga
zone"""
TOP = frozenset(_TOP.split())
_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}@(?!(?:self|cls|this)\.)(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+"
    r"([A-Za-z]{2,24}|xn--[A-Za-z0-9-]{1,59})(?![\w(\[-])"
)
_IP = re.compile(
    r"(?<![\w.])(?:\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\d)"
    r"|(?<![0-9A-Fa-f]:)(?<!::)[0-9A-Fa-f]{1,4}(?::[0-9A-Fa-f]{0,4}){1,6}:[0-9A-Fa-f]{1,4}(?!\w|:[\w:]|\.\d))"
)
_VERSION = re.compile(r"(?:[=<>~!^]=|(?<![A-Za-z])v(?:er(?:sion)?)?_*)[\s:=\"']*\Z", re.IGNORECASE)
_GAP = r"[ .\u00a0\u2010-\u2013-]"  # between the parts of a number: a space, a dot, hyphens and dashes
_PHONE = re.compile(
    rf"(?<![\w.+-])(?<!\d{_GAP})"
    rf"(?:\+\d{{1,3}}{_GAP}?(?:\(\d{{1,4}}\){_GAP}?)?\d{{1,4}}(?:{_GAP}?\d{{2,4}}){{2,4}}"  # +49 (30) 1234 567
    # (555) 123-4567, 1-800-555-0199, 555 123 4567; but no three of more numbers in a row
    rf"|(?:1{_GAP})?(?:\(\d{{3}}\) ?|[2-9]\d{{2}}{_GAP})\d{{3}}{_GAP}\d{{4}}(?!{_GAP}\d))"
    rf"(?![\w-])"
)


_SECRET = re.compile(
    r"(?<![\w-])(?:(?:sk|pk|rk)[-_](?:[A-Za-z]+[-_]){0,3}[A-Za-z0-9_-]{16,}|(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}"
    r"|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]{8,})(?![\w-])"
)
_CARD = re.compile(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")


def scrub(document: Document, kinds: Sequence[Kind], counts: Counter[str]) -> Document:
    """The document without the personal data of these `kinds`; what was taken out is added to `counts`, by kind."""
    return document.mended(lambda text: scrubbed(text, kinds, counts))


def scrubbed(text: str, kinds: Sequence[Kind], counts: Counter[str]) -> str:
    """`text` without the personal data of these `kinds`; what was taken out is added to `counts`, by kind."""
    for kind in kinds:
        pattern, holds = _RULES[kind]
        text = pattern.sub(lambda m, k=kind, h=holds: _replace(m, k, h, counts), text)  # type: ignore[misc]
    return text


def _replace(match: re.Match[str], kind: str, holds: Callable[[re.Match[str]], bool], counts: Counter[str]) -> str:
    if not holds(match):
        return match[0]
    counts[kind] += 1
    return f"[{kind}]"


def _is_mail(found: re.Match[str]) -> bool:
    top: str = found[1]
    return top.startswith("xn--") or ((top.islower() or top.isupper()) and top.lower() in TOP)


def _is_public(found: re.Match[str]) -> bool:
    """Whether it is an address that leads to somebody: 127.0.0.1, 10.0.0.1 and ::1 do not, nor does a version."""
    address = found[0]
    if _VERSION.search(found.string[max(0, found.start() - 24) : found.start()]):
        return False
    try:
        return ipaddress.ip_address(address).is_global and len(re.findall(r"\w+", address)) > 2  # 1::2 is a slice
    except ValueError:
        return False


def _is_card(found: re.Match[str]) -> bool:
    """Whether its last digit is the check digit of the others (Luhn)."""
    digits = [int(letter) for letter in found[0] if letter.isdigit()][::-1]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(found: re.Match[str]) -> bool:
    """Whether its check digits are right: 1 modulo 97, letters as numbers and the first four characters last."""
    bare = found[0].replace(" ", "")
    return len(bare) >= 15 and int("".join(str(int(letter, 36)) for letter in bare[4:] + bare[:4])) % 97 == 1


_RULES: dict[Kind, tuple[re.Pattern[str], Callable[[re.Match[str]], bool]]] = {
    "email": (_EMAIL, _is_mail),
    "ip": (_IP, _is_public),
    "secret": (_SECRET, lambda found: True),
    "card": (_CARD, _is_card),
    "iban": (_IBAN, _is_iban),
    "phone": (_PHONE, lambda found: sum(map(str.isdigit, found[0])) >= 9),
}
