"""Chat templates are run, within bounds (`template_bounds`), as transformers runs them."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

from shoal.errors import RequestError, first_line
from shoal.inputs import template_bounds
from shoal.inputs.template_bounds import BoundedEnvironment, TooMuch, paid_filter

GIVEN = ("messages", "add_generation_prompt")  # to a template, by whoever encodes a chat
_HALF = re.compile("[\ud800-\udfff]")
_LONGEST_DATE = 256  # characters of a date's form
LONGEST = 2**17  # characters of a template; the longest that are known have a quarter of it


class EndlessTemplateError(RequestError):
    """A chat template that does more than any chat needs."""


def rendered(template: str, values: Mapping[str, Any]) -> str:
    """What the template makes of `values`. Raises RequestError (param ``messages``) when it fails, EndlessTemplateError where
    it takes more than `template_bounds` lets it."""
    try:
        compiled = _compiled(template)
        template_bounds.begin(dict(values))
        return compiled.render(values)
    except TooMuch:
        got = "one that does or writes more than any chat needs"
        do = "give the model another with `shoal import --chat-template`, or shorten the chat"
        raise EndlessTemplateError("chat template stopped", param="messages", got=got, do=do) from None
    except Exception as error:  # of the template's own making, 1/0 included
        got = f"{type(error).__name__}: {error}"[:160]
        raise RequestError("chat template failed", param="messages", got=got) from error
    finally:
        template_bounds.end()


@lru_cache(maxsize=8)
def variables(template: str) -> frozenset[str]:
    """The names that a chat template reads beside those that every one is given. Empty for one that is broken."""
    if why_broken(template):
        return frozenset()
    found = meta.find_undeclared_variables(_environment.parse(template))
    return frozenset(found - set(GIVEN) - set(_environment.globals))


@lru_cache(maxsize=8)
def literals(template: str) -> frozenset[str]:
    """The texts that a chat template compares with, looks for, or writes in an expression. Empty for one that is broken."""
    if why_broken(template):
        return frozenset()
    found = (each.value for each in _environment.parse(template).find_all(nodes.Const))
    return frozenset(text for text in found if isinstance(text, str))


@lru_cache(maxsize=32)  # compiling takes longer than encoding a short chat
def _compiled(template: str) -> Template:
    if len(template) > LONGEST:
        raise TemplateError(f"{len(template):,} characters, and at most {LONGEST:,} are read")
    return _environment.from_string(template)


def why_broken(template: str) -> str:
    """What keeps a chat template from being rendered, whatever the chat; "" where nothing does."""
    try:
        _compiled(template)
    except Exception as error:  # Python's compiler has limits of its own
        return f"{type(error).__name__}: {first_line(error)}"[:160]
    return "" if template.strip() else "nothing in it"


class _Generation(Extension):
    """The block with which some templates frame what the model writes; it is shown as it is."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Half of a surrogate pair, which no UTF-8 can hold, stays the escape that JSON has for it.
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return _HALF.sub(lambda half: f"\\u{ord(half.group()):04x}", text)


def _now(form: str) -> str:
    if len(form) > _LONGEST_DATE:  # 256 times as much is kept for what it makes
        raise TemplateError(f"strftime_now: {len(form):,} characters, and at most {_LONGEST_DATE} are read")
    return datetime.datetime.now().strftime(form)


_environment = BoundedEnvironment(
    trim_blocks=True, lstrip_blocks=True, autoescape=False, extensions=[LoopControlExtension, _Generation]
)
_environment.filters["tojson"] = paid_filter("tojson", _to_json)  # jinja's own would escape HTML
_environment.globals |= {
    "raise_exception": _raise,
    "strftime_now": _now,
}
