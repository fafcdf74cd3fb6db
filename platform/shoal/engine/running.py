"""One admitted request: its tokens, its place among the others, and what it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

from torch import Tensor

from shoal.engine.acceptance import Record
from shoal.engine.events import Finished, FinishReason, Request, Sampling, TokenLogprob
from shoal.engine.guided import Grammar
from shoal.engine.holding import Holding
from shoal.engine.images import PromptImages
from shoal.engine.pages import Pages
from shoal.engine.signals import Heard
from shoal.engine.text import TextStream
from shoal.errors import RequestError
from shoal.inputs.tokenizer import END_ID
from shoal.model.adapters import Adapter


@dataclass(eq=False)
class Running:
    """One request in the scheduler, from its submission to its `Finished`."""

    request: Request
    tokens: list[int]  # the prompt, then the answer
    prompt_len: int
    page: InitVar[int]  # token slots in a page
    text: TextStream
    seed: int  # of the sampler: the request's, or drawn for it
    order: tuple[int, int, int]  # priority, rank, since when (`shares`): smaller goes first
    arrival: float  # seconds, of the scheduler's clock
    images: PromptImages | None = None
    adapter: Adapter | None = None  # stays, though it were dropped meanwhile
    groups: int | None = None  # layer groups it runs through; None while the router has to decide
    layers: int = 0  # the same as a depth in layers; 0 until it has decided
    look: int | None = None  # tokens of its answer after which the router decides anew; None: never, or not again
    least: int = 0  # layers that it had before the router decided anew; 0: it has decided once at most
    looking: bool = False  # no token came since then
    looked: int = 0  # tokens that its answer had then
    shift: float = 0.0  # nats that the router's predicted gaps are taken for too small (`audits`)
    audited: bool = False  # full depth is to look at its answer once it is told
    end_ids: Sequence[int] = (END_ID,)  # the tokenizer's
    number: int = 0  # rises with every request that is submitted
    turn: int = 0  # its place among its client's requests (`shares`)
    holding: Holding = field(init=False)
    grammar: Grammar | None = None  # of a guided answer
    there: Sequence[Tensor] = ()  # of a copy that drafts: its last tokens, unread (`drafts.Rounds`)
    told: int | None = None  # the answer's next token, where another engine gave it already: not told again
    tolerance: float | None = None  # nats a token that it may lose by drafts; None: full depth does not look at it
    spent: float = 0.0  # nats so far
    acceptance: Record | None = None  # what is known of its drafts, once it decodes (`drafting`)
    ran: int = 0  # layers that ran one after the other for tokens of its answer, here and before: its time
    drawn: int = 0  # as many tokens
    watched: bool = False  # its signals are asked for
    heard: Heard = field(default_factory=Heard)  # of them, so far
    paused: bool = False  # its reader is behind
    cached_tokens: int = 0
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float = 0.0
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)  # of its first tokens, if asked for

    def __post_init__(self, page: int) -> None:
        longest = self.prompt_len + self.request.sampling.max_tokens
        asked = self.request
        self.holding = Holding.nothing(self.tokens, self.images, page, longest, asked.adapter, asked.cache_salt)

    def resume(self, answer: Sequence[int]) -> None:
        """Go on after the tokens `answer`, which another engine gave. The last of them is taken in as if it were drawn now,
        since it may be what ends the answer. Raises RequestError if one before it did."""
        for token in answer[:-1]:
            self.tokens.append(token)
            _, stopped = self.text.push(token, may_stop=self.answered >= self.sampling.min_tokens)
            if stopped:
                raise RequestError("answer", param="answer", do="nothing can follow a stop string")
        self.told = answer[-1]

    def undecide(self, pages: Pages) -> None:
        """Let the router decide anew, by prompt and answer so far; less deep than now it will not be."""
        self.look, self.least, self.looking, self.looked = None, self.layers, True, self.answered
        self.groups = self.acceptance = None  # what is known of drafts is of another depth
        self.holding.look(pages)

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
        return len(self.tokens) - self.holding.at

    @property
    def decoding(self) -> bool:
        """Does its next row give a token? Such rows go into every step."""
        return self.groups is not None and self.todo == 1

    @property
    def fresh(self) -> bool:
        """Has nothing been done for it, here or elsewhere?"""
        return self.admitted_at is None and not self.request.answer

    @property
    def scoring(self) -> bool:
        """Are logprobs of its prompt still to be made? Then all of its rows must run, whatever is cached."""
        return self.sampling.prompt_logprobs is not None and len(self.prompt_logprobs) < self.prompt_len

    def ends(self, token: int) -> bool:
        """Does `token` end the answer, without being part of it?"""
        return (token in self.end_ids and not self.sampling.ignore_eos) or token in self.sampling.stop_token_ids

    def finished(self, reason: FinishReason, now: float, error: RequestError | None) -> Finished:
        """The event of its end at `now`, with the last of its text."""
        total = now - self.arrival
        return Finished(
            request=self.id,
            reason=reason,
            text=self.text.finish(),
            depth=self.layers if self.admitted_at is not None else 0,
            prompt_tokens=self.prompt_len,
            cached_tokens=self.cached_tokens,
            completion_tokens=self.answered + (self.told is not None),  # which is the answer's, taken in or not
            queue_seconds=total if self.admitted_at is None else self.admitted_at - self.arrival,
            first_token_seconds=0.0 if self.first_token_at is None else self.first_token_at - self.arrival,
            total_seconds=total,
            error=error,
            prompt_logprobs=() if self.scoring else tuple(self.prompt_logprobs),
            spent=None if self.tolerance is None else self.spent,
            mean_depth=self.ran / self.drawn if self.drawn else 0.0,
            signals=self.heard.all() if self.watched else None,
            first_depth=0 if self.admitted_at is None else self.least or self.layers,
        )
