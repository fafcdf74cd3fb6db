"""Guided output: which tokens a grammar allows next. The grammars themselves are llguidance's.

The state of a grammar is a function of the answer's tokens: `Grammar.allowed` is given them and goes forward or back to where
they end. So a preemption, a rejected draft or a cancelled request leaves nothing to mend.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from typing import TYPE_CHECKING

import llguidance
import numpy as np

from shoal.engine.events import Guide
from shoal.errors import RequestError
from shoal.inputs.tokenizer import END_ID, Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# White space between the parts of guided JSON: none, a space, or a new line with an indent, which is all that `json.dumps`
# writes up to 16 columns deep. Without a bound an answer may go on with white space until its length cuts it. And a schema may
# not ask for keywords to be ignored that no grammar knows.
JSON_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"( |\n {0,16}|\n\t{0,8})?", "lenient": False}


_NAMES = {
    "json_schema": "JSON schema",
    "json_object": "JSON object",
    "regex": "regular expression",
    "choice": "choice",
    "lark": "grammar",
}
# What takes llguidance long of a whole number's divisor is the part of it that is coprime to 10: a second of a core for this
# much, hours for a thousand times as much. In ``allOf`` divisors multiply.
MOST_DIVISOR = 100_000
# Characters of all expressions of a guide. Parts that may be empty take time by the square of their number:
# half a second of a core for so many, minutes for ten times as many.
LONGEST_PATTERNS = 8192
_PATTERN = re.compile(r'"pattern": ?"((?:[^"\\]|\\.)*)"')
_DIVISOR = re.compile(r'"multipleOf": ?(-?[0-9.]+(?:[eE][+-]?[0-9]+)?)')
_EXCERPT = re.compile(r"^( *\d+ \|.*| *\^ *)$", re.MULTILINE)  # llguidance's own of what it compiles


class GrammarError(Exception):
    """A grammar that is too large to be followed any further."""


class StrayError(GrammarError):
    """Tokens that the grammar does not allow. No such token is ever drawn, so something is broken."""


class Grammars:
    """Compiles guides for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        """`vocab`: ids that the model has, the tokenizer's or more."""
        self._source, self._vocab = tokenizer, vocab
        control = [tokenizer.special(name) for name in tokenizer.specials]
        self._never = [each for each in control if each not in tokenizer.ends and not tokenizer.token_bytes(each)]

    @cached_property
    def _tokenizer(self) -> llguidance.LLTokenizer:
        return llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Pieces(self._source)))

    def compile(self, guide: Guide) -> Grammar:
        """The state at an answer's beginning. Raises RequestError (param ``guided``) with what is wrong with the guide."""
        try:
            need_bounded(guide)
            matcher = llguidance.LLMatcher(self._tokenizer, _source(guide), log_level=0)
            if matcher.is_error():
                raise ValueError(matcher.get_error())
            grammar = Grammar(matcher, self._vocab, self._source.ends)
            first = grammar.allowed([])  # one that is too large, or that no text follows, is found out only now
            first[self._never] = False
            if not first.any():
                raise ValueError("it begins with control tokens, which no answer may hold")
        except (ValueError, GrammarError) as error:
            reason = " ".join(_EXCERPT.sub("", str(error)).split())[:300]
            raise RequestError(f"a {_NAMES[guide.kind]} that cannot be followed", param="guided", got=reason) from None
        return grammar


class Grammar:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab: int, ends: Sequence[int] = (END_ID,)) -> None:
        self._matcher, self._vocab, self._ends = matcher, vocab, list(ends)
        self._at: list[int] = []  # the tokens that the matcher has consumed

    def allowed(self, answer: Sequence[int]) -> np.ndarray:
        """bool [V]: what may come after the tokens `answer`; ``<|end|>`` only where the grammar may end. Raises
        GrammarError, StrayError where `answer` itself is not allowed."""
        self._go_to(list(answer))
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.zeros(self._vocab, dtype=bool)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab]
        mask[: len(known)] = known
        mask[self._ends] = mask[self._ends[0]]  # llguidance knows one of them
        return mask

    def _go_to(self, answer: list[int]) -> None:
        same = len(self._at)
        if answer[:same] != self._at:
            same = next(i for i, (a, b) in enumerate(zip([*answer, -1], [*self._at, -2], strict=False)) if a != b)
            self._matcher.rollback(len(self._at) - same)
            self._check()
        taken = same + self._matcher.try_consume_tokens(answer[same:])
        self._at = answer[:taken]
        self._check()
        if taken < len(answer):
            raise StrayError(f"token {answer[taken]} after {taken} that it allows")

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().splitlines()[0][:300])


def need_bounded(guide: Guide) -> None:
    """Raises ValueError for what would take a grammar minutes or hours to compile: long expressions, and large values of
    ``multipleOf``."""
    if not isinstance(guide.spec, str):
        return
    # keys of patternProperties are expressions as well, and their schemas are counted with them
    whole = guide.kind == "regex" or '"patternProperties"' in guide.spec
    patterns = len(guide.spec) if whole else sum(map(len, _PATTERN.findall(guide.spec)))
    if patterns > LONGEST_PATTERNS:
        raise ValueError(f"its expressions have {patterns} characters, more than {LONGEST_PATTERNS}")
    together = 1
    for given in set(_DIVISOR.findall(guide.spec)):
        divisor = int("0" + "".join(map(str, Decimal(given).as_tuple().digits)))
        for factor in (2, 5):
            while divisor and divisor % factor == 0:
                divisor //= factor
        together = math.lcm(together, divisor or 1)
        if together > MOST_DIVISOR:
            raise ValueError(
                f"the values of multipleOf, without their factors 2 and 5, have a least common multiple above {MOST_DIVISOR}"
            )


class _Pieces:
    """Our tokenizer as llguidance wants to see it: the bytes of each token."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.ends[0], None
        self.special_token_ids = [tokenizer.special(name) for name in tokenizer.specials]
        ids = range(len(tokenizer))
        self.tokens = [(tokenizer.control(token) or "").encode() or tokenizer.token_bytes(token) for token in ids]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


def _source(guide: Guide) -> str:
    """`guide` as llguidance's grammar. Raises ValueError."""
    matcher = llguidance.LLMatcher
    if guide.kind == "choice":
        # one terminal, since a rule has at most 2000 alternatives
        texts = " | ".join(json.dumps(text) for text in guide.spec)
        return matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {texts}")
    if guide.kind == "json_object":
        return matcher.grammar_from_json_schema('{"type": "object"}', overrides=JSON_OPTIONS)
    assert isinstance(guide.spec, str)
    if guide.kind == "lark":
        return matcher.grammar_from_lark(guide.spec)
    if guide.kind == "regex":
        return matcher.grammar_from_regex(guide.spec)
    return matcher.grammar_from_json_schema(guide.spec, overrides=JSON_OPTIONS)
