"""One admitted request: its tokens, the units that hold its K/V, and how far each layer group has come.

Letters: G layer groups, M pages a request can grow to, P token slots in a page, n patches.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shoal.config import GROUPS
from shoal.engine.events import Request, Sampling, TokenLogprob
from shoal.engine.guided import Grammar
from shoal.engine.pages import PageKey, Pages
from shoal.engine.text import TextStream
from shoal.errors import RequestError
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.inputs.tokenizer import END_ID, PATCH_ID


@dataclass(frozen=True)
class PromptImages:
    """The patches of a prompt and where they stand."""

    values: np.ndarray  # uint8 [n, 3p^2]
    grid: np.ndarray  # int64 [n, 2]: row and column
    at: list[int]  # position of each patch, rising
    names: list[str]  # sha256 of each patch's image

    @classmethod
    def of(cls, prompt: Encoded) -> PromptImages | None:
        values = prompt.patches
        if values is None:
            return None
        grid = media.grid(prompt.ids)
        at = np.flatnonzero(np.asarray(prompt.ids) == PATCH_ID).tolist()
        return cls(values, grid, at, [image.sha256() for image in prompt.images for _ in image.values])

    def between(self, start: int, end: int) -> slice:
        """The patches that stand at positions `start` .. `end` - 1."""
        return slice(bisect.bisect_left(self.at, start), bisect.bisect_left(self.at, end))


@dataclass(eq=False)
class Sequence:
    """State of one request in the scheduler. `computed[j]` tokens have their K/V in group j; `at` is the next row to run
    in the present pass, which may be an earlier one (a row that stands already is run again without being written)."""

    request: Request
    tokens: list[int]  # the prompt, then the answer
    prompt_len: int
    page: int  # P
    text: TextStream
    seed: int  # of the sampler: the request's, or drawn for it
    order: tuple[int, int]  # priority, then arrival: smaller goes first
    arrival: float  # seconds, of the scheduler's clock
    images: PromptImages | None = None
    groups: int | None = None  # layer groups it runs through; None until the router has decided
    layers: int = 0  # the same as a depth in layers; 0 while undecided
    tables: np.ndarray = field(init=False)  # int64 [G, M]: units of its pages, 0 where it owns none
    owned: list[int] = field(default_factory=lambda: [0] * GROUPS)  # units a group
    computed: list[int] = field(default_factory=lambda: [0] * GROUPS)
    found: list[int] = field(default_factory=lambda: [0] * GROUPS)  # tokens a group got from the prefix cache
    registered: list[int] = field(default_factory=lambda: [0] * GROUPS)  # pages a group offered to the prefix cache
    keys: list[PageKey] = field(default_factory=list)  # of its full pages
    at: int = 0
    held_from: int | None = None  # first position whose state after group 1 is held for the deeper groups
    held: list[Any] = field(default_factory=list)  # those states: the runner's
    notes: list[Any] = field(default_factory=list)  # router sums of the first cached pages: the runner's
    grammar: Grammar | None = None  # of a guided answer
    told: int | None = None  # the answer's next token, where another engine gave it already: not told again
    paused: bool = False  # its reader is behind
    cached_tokens: int = 0
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # of its first tokens, if asked for

    def __post_init__(self) -> None:
        longest = self.prompt_len + self.request.sampling.max_tokens
        self.tables = np.zeros((GROUPS, self.pages_for(longest)), dtype=np.int64)

    def resume(self, answer: Tokens[int]) -> None:
        """Go on after the tokens `answer`, which another engine gave. The last of them is taken in as if it were drawn now,
        since it may be what ends the answer. Raises RequestError if one before it did."""
        for token in answer[:-1]:
            self.tokens.append(token)
            _, stopped = self.text.push(token, may_stop=self.answered >= self.sampling.min_tokens)
            if stopped:
                raise RequestError("answer", param="answer", do="nothing can follow a stop string")
        self.told = answer[-1]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def sampling(self) -> Sampling:
        return self.request.sampling

    @property
    def answered(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_len

    @property
    def todo(self) -> int:
        """Rows to run in this pass, at least 1."""
        return len(self.tokens) - self.at

    @property
    def decoding(self) -> bool:
        """Does its next row give a token? Such rows go into every step."""
        return self.groups is not None and self.todo == 1

    @property
    def scoring(self) -> bool:
        """Are logprobs of its prompt still to be made? Then all of its rows must run, whatever is cached."""
        return self.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len

    def ends(self, token: int) -> bool:
        """Does `token` end the answer, without being part of it?"""
        return (token == END_ID and not self.sampling.ignore_eos) or token in self.sampling.stop_token_ids

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page)

    def lacking(self, tokens: int, groups: int) -> int:
        """Units it still needs for `tokens` tokens in its first `groups` groups."""
        need, lack = self.pages_for(tokens), 0
        for have in self.owned[:groups]:
            if have < need:
                lack += need - have
        return lack

    def give(self, group: int, units: list[int]) -> None:
        """Append `units` to its table of `group`."""
        have = self.owned[group]
        self.tables[group, have : have + len(units)] = units
        self.owned[group] = have + len(units)

    def cut(self, group: int, pages: int) -> list[int]:
        """Take the units of all but its first `pages` pages out of its table of `group`, and return them."""
        units: list[int] = self.tables[group, pages : self.owned[group]].tolist()
        self.tables[group, pages : self.owned[group]] = 0
        self.owned[group] -= len(units)
        return units

    def units(self) -> list[list[int]]:
        """Its units in page order, a list for each group."""
        return [self.tables[j, :have].tolist() for j, have in enumerate(self.owned)]

    def extend_keys(self, pages: Pages) -> None:
        """Make the keys of all pages that its tokens fill."""
        while (len(self.keys) + 1) * self.page <= len(self.tokens):
            start = len(self.keys) * self.page
            names: list[str] = []
            if self.images is not None:
                names = list(dict.fromkeys(self.images.names[self.images.between(start, start + self.page)]))
            parent = self.keys[-1] if self.keys else None
            self.keys.append(pages.key(parent, self.tokens[start : start + self.page], names))

    def reset(self) -> None:
        """Back to having nothing stored; its tokens, text and depth stay. The units were released by the caller."""
        self.tables[:] = 0
        self.owned, self.computed, self.registered = [0] * GROUPS, [0] * GROUPS, [0] * GROUPS
        self.at, self.held_from = 0, None
        self.held, self.notes = [], []
        if self.scoring:
            self.prompt_logprobs = []
