"""Personal data and secrets taken out of texts. Each kind is replaced by its name: ``[email]``, ``[ip]`` (public addresses),
``[phone]``, ``[secret]`` (keys, tokens, private keys, passwords in URLs), ``[card]``, ``[iban]`` and ``[id]`` (identity, tax
and passport numbers).

Notable: patterns find what is written in a usual form and nothing else; names, postal addresses and dates of birth stay. Code
stays code: what ``@`` joins is an address only below a domain that is given out, so ``x@self.weight`` and ``q@k.mT`` are left.
Texts are searched as they are, and again with what is escaped in them as it will be read (`_unescaped`).
"""

from __future__ import annotations

import html
import ipaddress
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

from shoal.data.documents import Document
from shoal.data.operators.id_numbers import card_spans, iban_spans, id_spans
from shoal.data.operators.phones import phone_spans
from shoal.data.operators.secret_tokens import Span, secret_spans

Kind = Literal["email", "ip", "phone", "secret", "card", "iban", "id"]
# longer forms first: a card is no telephone
ALL: tuple[Kind, ...] = ("secret", "iban", "card", "id", "email", "ip", "phone")

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
# What stands for another character, or parts words though it counts as a letter: as JSON, URLs, HTML, terminals and Markdown
# write it, and letters of scripts without spaces (and Korean's particles) beside others.
_ALONE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_ESCAPE = re.compile(
    r"\\(?:[nrt\"'/]|u[0-9A-Fa-f]{4}|x[0-9A-Fa-f]{2})|%[0-9A-Fa-f]{2}"
    r"|&(?:nbsp|lt|gt|amp|quot|apos|commat|#\d{1,6}|#[xX][0-9A-Fa-f]{1,5});|\x1b\[[0-9;]{0,20}m"
    r"|(?:(?<![^\s(*~>\[])_{1,3}(?=[\w+(])|(?<=[\w=)])_{1,3}(?![^\s.,;:!?)*~<\]]))"
    rf"|(?<=[A-Za-z0-9_=-])[{_ALONE}]|[{_ALONE}](?=[A-Za-z0-9+(])"
)
_CONTROLS = {"n": "\n", "r": "\n", "t": "\t"}
_TWO_DIGITS = re.compile(r"\d\d")
_VERSION = re.compile(r"(?:[=<>~!^]=|(?<![A-Za-z])v(?:er(?:sion)?)?_*)[\s:=\"']*\Z", re.IGNORECASE)


def scrub(document: Document, kinds: Sequence[Kind], counts: Counter[str]) -> Document:
    """The document without the personal data of these `kinds`; what was taken out is added to `counts`, by kind."""
    return document.mended(lambda text: scrubbed(text, kinds, counts))


def scrubbed(text: str, kinds: Sequence[Kind], counts: Counter[str]) -> str:
    """`text` without the personal data of these `kinds`; what was taken out is added to `counts`, by kind."""
    for kind in kinds:
        pieces, done = list[str](), 0
        for start, end in merged([*_SPANS[kind](text), *_unescaped(text, _SPANS[kind])]):
            pieces += [text[done:start], f"[{kind}]"]
            counts[kind] += 1
            done = end
        text = "".join([*pieces, text[done:]]) if pieces else text
    return text


def merged(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, those that overlap as one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if found and start < found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def email_spans(text: str) -> Iterator[Span]:
    """Where e-mail addresses stand in `text`."""
    for found in _EMAIL.finditer(text) if "@" in text else ():
        top: str = found[1]
        if top.startswith("xn--") or ((top.islower() or top.isupper() or top.istitle()) and top.lower() in TOP):
            yield found.span()


def ip_spans(text: str) -> Iterator[Span]:
    """Where public IP addresses stand in `text`: 127.0.0.1, 10.0.0.1 and ::1 lead to nobody, nor does a version."""
    for found in _IP.finditer(text):
        address = found[0]
        if _VERSION.search(text[max(0, found.start() - 24) : found.start()]):
            continue
        try:
            # 1::2 is a slice
            if ipaddress.ip_address(address).is_global and len(re.findall(r"\w+", address)) > 2:
                yield found.span()
        except ValueError:
            continue


def _unescaped(text: str, find: Callable[[str], Iterator[Span]]) -> Iterator[Span]:
    """Where `find` finds something in the lines of `text` that hold an `_ESCAPE`, once each is the character it stands for."""
    end = 0
    while first := _ESCAPE.search(text, end):
        start = text.rfind("\n", 0, first.start()) + 1
        end = text.find("\n", first.end())
        end = end if end >= 0 else len(text)
        pieces, length, done = list[str](), 0, start
        plain, places = [0], [start]  # from a place in the line as it is read on, the same in `text`
        for escape in _ESCAPE.finditer(text, start, end):
            length += escape.start() - done
            pieces += [text[done : escape.start()], _character(escape[0])]
            done = escape.end()
            plain += [length, length + 1]
            places += [escape.start(), done]
            length += 1
        for span in find("".join([*pieces, text[done:end]])):
            at = [bisect_right(plain, place) - 1 for place in span]
            yield (places[at[0]] + span[0] - plain[at[0]], places[at[1]] + span[1] - plain[at[1]])


def _character(escape: str) -> str:
    """What an `_ESCAPE` stands for: one character; a space where that is a part of one, or parts words."""
    if escape[0] == "&":
        return html.unescape(escape)[:1] or " "
    if escape[0] == "\\":
        return chr(int(escape[2:], 16)) if escape[1] in "ux" else _CONTROLS.get(escape[1], escape[1])
    code = int(escape[1:], 16) if escape[0] == "%" else 128
    return chr(code) if code < 128 else " "


def _in_lines(find: Callable[[str], Iterator[Span]]) -> Callable[[str], Iterator[Span]]:
    """`find`, but only in lines with two digits beside each other, each with the line before it, which may name a number. All
    that is looked for has such digits, and most lines have none. Spans may be found twice."""

    def found(text: str) -> Iterator[Span]:
        end = 0
        while pair := _TWO_DIGITS.search(text, end):
            line = text.rfind("\n", 0, pair.start())
            start = text.rfind("\n", 0, max(line, 0)) + 1
            end = text.find("\n", pair.end())
            end = end if end >= 0 else len(text)
            yield from ((start + first, start + last) for first, last in find(text[start:end]))

    return found


_SPANS: dict[Kind, Callable[[str], Iterator[Span]]] = {
    "secret": secret_spans,
    "iban": _in_lines(iban_spans),
    "card": _in_lines(card_spans),
    "id": _in_lines(id_spans),
    "email": email_spans,
    "ip": ip_spans,
    "phone": _in_lines(phone_spans),
}
