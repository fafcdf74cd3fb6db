"""What cuts a text into pieces is other people's program too: patterns that a tokenizer searches for, and what it writes in
their place. A library runs them, and nobody can stop it; so a tokenizer is refused that could take forever for one text.

    nested repeats      ``(a+)+`` takes twice as long for each character more: seen in the pattern
    what else is slow   ``a*b`` takes n squared for n characters of one kind: measured, on texts of twice the length each
    what grows          ten replacements of one letter by ten are 10,000,000,000 of them: multiplied
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import tokenizers
from tokenizers import models

from shoal.errors import CheckpointError, first_line

MOST_CONTROLS = 4096  # control tokens; a template's text is searched for each of them
MOST_NUMBER = 2**22  # of a token: sixteen times the largest vocabularies
_LONGEST = 2**15  # characters of the longest text that is tried
_SECONDS = 1.0  # of a processor that it may take, fifty times what usual patterns do
_TRIES = 2  # that both take longer: what is charged to a thread once, as a machine's page faults are, is no pattern's
_GROWTH = 64  # times as long as a text may become
_RUNS = ("a", "A", "1", " ", "\n", "!", "\u00e9", "\u6f6e", "aA", "a1", " a", "\n ", "'s")
_REPEAT = re.compile(r"[*+][?+]?|\?[?+]?|\{(\d*)(,?)(\d*)\}[?+]?")
_ESCAPE = re.compile(r"\\[pPxukg]\{[^}]*\}|\\.", re.DOTALL)
_HEAD = re.compile(r"\((?:\?(?:[imsx-]*[:)]|[=!>]|<[=!]|<\w+>|#))?")  # of a group
_MANY = 50  # repeats, from which on a bound is as good as none


def is_panic(error: BaseException) -> bool:
    """Did the library give up in a way of its own, of a class that it lets nobody import?"""
    return type(error).__name__ == "PanicException"


def need_bounded(core: tokenizers.Tokenizer, what: object) -> None:
    """Raises CheckpointError for a tokenizer that may take forever, or write without end, for some text."""
    need_close(core, what)
    values = json.loads(core.to_str())
    controls = sum(token["special"] for token in values["added_tokens"])
    if controls > MOST_CONTROLS:
        raise CheckpointError(f"tokenizer {what}", got=f"{controls} control tokens", allowed=f"at most {MOST_CONTROLS}")
    parts = {key: values[key] for key in ("normalizer", "pre_tokenizer")}
    if (reason := why_unbounded(json.dumps(parts))) is not None:
        raise CheckpointError(
            f"tokenizer {what}", got=reason, do="give one whose time and length follow from the text's"
        )


def need_close(core: tokenizers.Tokenizer, what: object) -> None:
    """Raises CheckpointError for a token of a number that no vocabulary reaches: the library lists all below it that are none,
    and ends the process where that does not fit the memory."""
    last = max(core.get_vocab(with_added_tokens=True).values(), default=0)
    if last > MOST_NUMBER:
        raise CheckpointError(f"tokenizer {what}", got=f"a token of number {last}", allowed=f"at most {MOST_NUMBER}")


@lru_cache(maxsize=32)
def why_unbounded(parts: str) -> str | None:
    """What is wrong with a normalizer and a pre_tokenizer, as tokenizer.json has them; None where nothing is."""
    found = list(_steps(json.loads(parts)))
    growth = 1
    for step in found:
        if step["type"] == "Precompiled":
            return "a normalizer of type Precompiled, which may write anything"
        if step["type"] in ("Replace", "Prepend"):
            growth *= max(1, len(str(step.get("content", step.get("prepend", "")))))
    if growth > _GROWTH:
        return f"a normalizer that makes a text {growth:.0e} times as long"
    patterns = [step["pattern"]["Regex"] for step in found if "Regex" in (step.get("pattern") or {})]
    nested = next((pattern for pattern in patterns if _is_nested(pattern)), None)
    if nested is not None:
        return f"pattern {nested[:80]!r}, with repeats of what repeats"
    return _why_slow(parts, patterns) if patterns else None


def _steps(values: Any) -> Iterator[Mapping[str, Any]]:
    """Each part of a tokenizer that has a type, those in sequences too."""
    if isinstance(values, list):
        for each in values:
            yield from _steps(each)
    elif isinstance(values, dict):
        if isinstance(values.get("type"), str):
            yield values
        for each in values.values():
            yield from _steps(each)


def _is_nested(pattern: str) -> bool:
    """Does a group that repeats without bound hold something that does? A possessive repeat (``a++``) tries nothing again."""
    groups, at = [False], 0
    while at < len(pattern):
        char, closed = pattern[at], False
        if char == "\\":
            escape = _ESCAPE.match(pattern, at)
            at = escape.end() if escape else at + 1
        elif char == "[":
            at = _after_class(pattern, at)
        elif char == "(":
            groups.append(False)
            head = _HEAD.match(pattern, at)
            at = head.end() if head else at + 1
            if pattern[at - 1] == ")":  # of options alone
                groups.pop()
            continue
        else:
            at += 1
            if char == ")" and len(groups) > 1:
                closed = groups.pop()
                groups[-1] |= closed
        repeat = _REPEAT.match(pattern, at) if char not in "|^$" else None
        if repeat:
            at = repeat.end()
            text = repeat.group()
            count = int(repeat[3] or 0) if repeat[2] else int(repeat[1] or 0)
            unbounded = text[0] in "*+" or (text[0] == "{" and (count > _MANY or bool(repeat[2] and not repeat[3])))
            possessive = len(text) > 1 and text[-1] == "+"
            if unbounded and closed and not possessive:
                return True
            groups[-1] |= unbounded and not possessive
    return False


def _after_class(pattern: str, at: int) -> int:
    """Behind a ``[...]``, which may hold others."""
    depth, first = 0, at
    while at < len(pattern):
        char = pattern[at]
        at += 2 if char == "\\" else 1
        if char == "[":
            depth += 1
            first = at + (pattern[at : at + 1] == "^")
        elif char == "]" and at - 1 > first:
            depth -= 1
            if not depth:
                break
    return at


def _why_slow(parts: str, patterns: Sequence[str]) -> str | None:
    """What takes too long, of texts of one or two characters again and again; behind them all that a pattern may wait for, else
    the library would see that it need not begin."""
    bare = json.loads(tokenizers.Tokenizer(models.BPE()).to_str()) | json.loads(parts)
    core = tokenizers.Tokenizer.from_str(json.dumps(bare))
    own = "".join(dict.fromkeys(re.sub(r"\\.|\W", "", "".join(patterns))))[:16]
    for run in (*_RUNS, *own):
        length = 8
        while length <= _LONGEST:
            text = run * (length // len(run)) + "\0" + own
            try:
                took = _took(core, text)
            except BaseException as error:
                if not is_panic(error):
                    raise
                return f"a pattern that gives up at {length} characters of {run!r}: {first_line(error)[:80]}"
            if took > _SECONDS:
                return f"a pattern that takes {took:.1f} s for {length} characters of {run!r}"
            length *= 2
    return None


def _took(core: tokenizers.Tokenizer, text: str) -> float:
    """Seconds of a processor for one text: at most `_SECONDS`, or the least of `_TRIES`. In the library's own memory, since for
    32,768 pieces in Python its collector looks at all that the process holds, and is timed as well."""
    took = float("inf")
    for _ in range(_TRIES):
        start = time.thread_time()
        cut = tokenizers.PreTokenizedString(core.normalizer.normalize_str(text) if core.normalizer else text)
        if core.pre_tokenizer:
            core.pre_tokenizer.pre_tokenize(cut)
        took = min(took, time.thread_time() - start)
        if took <= _SECONDS:
            break
    return took
