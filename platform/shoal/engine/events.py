"""What goes into the engine and what comes out: `Request` with its `Sampling`; `Token` and `Finished` events.

Every admitted request ends in exactly one `Finished`, whatever happens to it.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from shoal.config import AUTO
from shoal.errors import RequestError
from shoal.inputs.chat import Encoded

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]
GuideKind = Literal["json_schema", "json_object", "regex", "choice", "lark"]
MAX_TOP_LOGPROBS = 20
LATER = 100  # priority of what may wait for everything else, such as a batch
MAX_DRAFTS = 16
MAX_BIAS = 100  # what HTTP allows: a number that no logit comes near, and that every dtype holds


@dataclass(frozen=True)
class Guide:
    r"""What the whole answer must be: JSON of a schema (`spec` is its text), any JSON object (no `spec`), a match of the
    regular expression `spec`, one of the strings `spec`, or what llguidance's lark grammar `spec` derives. In an expression
    `[0-9]` is a digit, and `\d` one of any script, which takes up to four tokens where these are bytes. Raises RequestError
    when `kind` and `spec` do not fit; the engine checks the rest when the request is submitted.

    Examples:
        >>> from shoal import Engine, Model, Request, Sampling
        >>> from shoal.engine.events import Guide
        >>> engine = Engine(Model.from_preset("test"))
        >>> colour = Sampling(max_tokens=20, guided=Guide("choice", ["red", "green", "blue"]))
        >>> engine.generate([Request("The sky is", colour)])[0].text in ("red", "green", "blue")
        True
        >>> date = Sampling(max_tokens=20, guided=Guide("regex", "[0-9]{4}-[0-9]{2}-[0-9]{2}"))
        >>> len(engine.generate([Request("Today is", date)])[0].text)
        10
    """

    kind: GuideKind
    spec: str | Sequence[str] = ""

    def __post_init__(self) -> None:
        kinds = get_args(GuideKind)
        if self.kind not in kinds:
            raise RequestError("guided.kind", param="guided", got=self.kind, allowed=kinds)
        if self.kind == "choice":
            fits = (
                not isinstance(self.spec, str) and bool(self.spec) and all(isinstance(s, str) and s for s in self.spec)
            )
        else:
            fits = isinstance(self.spec, str) and bool(self.spec) != (self.kind == "json_object")
        if not fits:
            needs = {"choice": "one or more non-empty strings", "json_object": "nothing"}.get(self.kind, "a text")
            raise RequestError(f"guided.spec of {self.kind}", param="guided", got=self.spec, allowed=needs)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen (the names are vLLM's). Raises RequestError naming the field when a value cannot be used.

    Examples:
        >>> from shoal import Sampling
        >>> Sampling(temperature=0, max_tokens=64, stop="###").stop
        ('###',)
        >>> Sampling(top_p=1.5)
        Traceback (most recent call last):
        shoal.errors.RequestError: top_p: got 1.5; allowed: 0 to 1
    """

    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # smallest set of tokens with this much probability; 0: the likeliest
    top_k: int = 0  # 0: all
    min_p: float = 0.0  # least probability, as a share of the likeliest token's
    seed: int | None = None  # None: drawn anew for each request
    max_tokens: int = 16
    min_tokens: int = 0  # no stop before this many tokens
    stop: Sequence[str] = ()  # not part of the returned text, but
    include_stop: bool = False  # with this
    # what opens JSON and what closes it: the answer ends with the first, all of it
    frame: tuple[str, str] | None = None
    banned: Sequence[Sequence[int]] = ()  # runs of tokens that the answer never completes
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # how many alternatives to report a token; 0: the chosen one only
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt; all its rows are run, cached or not
    guided: Guide | None = None  # the answer follows this grammar, and may end only where the grammar may
    speculative: int | None = None  # tokens drafted ahead by group 1 a step; 0: none; None: the engine's default

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop  # one stop string, not its letters
        _keep(self, "stop", stop, Sequence, tuple, "strings")
        _keep(self, "stop_token_ids", self.stop_token_ids, Sequence, tuple, "token ids")
        _keep(self, "banned", self.banned, Sequence, tuple, "lists of token ids")
        for run in self.banned:
            if not isinstance(run, Sequence) or not run:
                raise RequestError("banned", param="banned", got=run, allowed="lists of at least one token id")
        object.__setattr__(self, "banned", tuple(map(tuple, self.banned)))
        _keep(self, "logit_bias", self.logit_bias, Mapping, dict, "token id -> number")
        for name in ("top_k", "max_tokens", "min_tokens"):
            _check_whole(name, getattr(self, name))
        for name in ("seed", "logprobs", "prompt_logprobs", "speculative"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name))
        runs = [token for run in self.banned for token in run]
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias), ("banned", runs)):
            for token in ids:
                _check_whole(name, token)
        limits: dict[str, tuple[float, float]] = {
            "temperature": (0, 100),
            "top_p": (0, 1),
            "top_k": (0, 2**31),
            "min_p": (0, 1),
            "max_tokens": (1, 2**31),
            "min_tokens": (0, self.max_tokens),
            "presence_penalty": (-2, 2),
            "frequency_penalty": (-2, 2),
            "repetition_penalty": (1e-3, 100),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not _is_number(value) or not low <= value <= high:
                raise RequestError(name, param=name, got=value, allowed=f"{low:.10g} to {high:.10g}")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= MAX_TOP_LOGPROBS:
                raise RequestError(name, param=name, got=value, allowed=f"0 to {MAX_TOP_LOGPROBS}")
        if self.speculative is not None and not 0 <= self.speculative <= MAX_DRAFTS:
            raise RequestError("speculative", param="speculative", got=self.speculative, allowed=f"0 to {MAX_DRAFTS}")
        if self.guided is not None and not isinstance(self.guided, Guide):
            raise RequestError("guided", param="guided", got=self.guided, allowed="a Guide")
        if self.guided is not None and (self.ignore_eos or self.min_tokens):
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            raise RequestError(
                f"{name} with guided", param=name, do="leave it out: the grammar says where the answer ends"
            )
        if self.frame is not None and (len(self.frame) != 2 or not all(self.frame)):
            raise RequestError("frame", param="frame", got=self.frame, allowed="two non-empty strings")
        odd = next((text for text in self.stop if not isinstance(text, str) or not text), None)
        if odd is not None:
            raise RequestError("stop", param="stop", got=odd, allowed="non-empty strings")
        for bias in self.logit_bias.values():
            if not _is_number(bias) or not -MAX_BIAS <= bias <= MAX_BIAS:
                allowed = f"numbers from -{MAX_BIAS} to {MAX_BIAS}"
                raise RequestError("logit_bias", param="logit_bias", got=bias, allowed=allowed)


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `prompt`: text, token ids, or an `Encoded` chat with images.

    Examples:
        >>> from shoal import Engine, Model, Request, Sampling
        >>> engine = Engine(Model.from_preset("test"))
        >>> one = Sampling(temperature=0, max_tokens=1)
        >>> [engine.generate([Request("2 + 2 =", one, depth=depth)])[0].depth for depth in ("shallow", "middle", "full")]
        [1, 2, 4]
    """

    prompt: str | Sequence[int] | Encoded
    sampling: Sampling = field(default_factory=Sampling)
    # "auto" (the router decides; with an adapter, that it knows nothing of: full), an exit name, or the layer count of an exit
    depth: str | int = AUTO
    # nats a token that the answer may lose against its depth. Where drafts pay, and at a fixed depth, the first exit drafts it
    # and it loses at most that (`engine/tolerance.py`); else it runs to the smallest exit whose calibrated bound is within it,
    # which bounds the mean loss over prompts of the calibration's mix, not this request's
    quality_tolerance: float | None = None
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    deadline: float | None = None  # seconds from submission; then the request ends with reason "deadline"
    priority: int = 0  # smaller runs earlier; from `LATER` on it gives its place to any that is below
    payer: str = ""  # payers share the engine evenly
    client: str = ""  # and so do the clients of one payer
    cache_salt: str = ""  # the prefix cache finds a page only for requests of the salt that it was made for
    answer: Sequence[int] = ()  # the first tokens of its answer, given by another engine: this one goes on after them
    spent: float = 0.0  # nats of its tolerance, on those
    ran: int = 0  # layers that ran for those, one after the other; 0: nobody counted
    # with `answer`: the depth is what a router chose and not the client's, which may look again, within `quality_tolerance`
    routed: bool = False
    adapter: str = ""  # identity of a loaded adapter that it is answered with; "": none
    signals: bool = False  # its `Finished` tells them
    gaps: bool = False  # and the gap of each early exit along its answer, where full depth gives it without drafts
    losses: int = 0  # engines that were lost while they had it
    beside: str = ""  # the same in all requests of one answer, which several replicas then run with the same weights

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise RequestError("sampling", param="sampling", got=self.sampling, allowed="a Sampling")
        if not isinstance(self.id, str) or not self.id:
            raise RequestError("id", param="id", got=self.id, allowed="a text")
        if not isinstance(self.depth, str):
            _check_whole("depth", self.depth)
        _check_whole("priority", self.priority)
        _check_whole("ran", self.ran)
        _keep(self, "answer", self.answer, Sequence, tuple, "token ids")
        for token in self.answer:
            _check_whole("answer", token)
        for name in ("deadline", "quality_tolerance", "spent"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and value >= 0):
                raise RequestError(name, param=name, got=value, allowed="a finite number, 0 or more")

    @property
    def sooner(self) -> int:
        """The priority that it goes on with elsewhere: it has waited already. What may wait still may."""
        return max(LATER, self.priority - 1) if self.priority >= LATER else self.priority - 1

    def after(self, tokens: Sequence[int], last: Token) -> Request:
        """What another engine is to do once `tokens` of the answer were told, of which `last` is what was told at last."""
        routed = (self.depth == AUTO or self.routed) and last.spent is None
        tolerance = self.quality_tolerance if routed or last.spent is not None else None
        return replace(
            self,
            answer=(*self.answer, *tokens),
            depth=last.depth,
            routed=routed,
            quality_tolerance=tolerance,
            spent=last.spent or 0.0,
            ran=last.ran,
        )


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a token, with the likeliest alternatives (token id, logprob), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Token:
    """One token of the answer; what ends it (``<|end|>`` or a stop token) is not part of it. `text` is what became
    complete with it: it may be empty, and never holds half a character. `depth`: layers that the request runs with. `spent`:
    nats that the answer has lost so far, where it has a tolerance and is verified; `ran`: layers that have run one after the
    other for all of it, 0 where nobody counts. Nobody changes one; it is not declared frozen because of what that costs
    (`plan.py`)."""

    request: str
    token: int
    text: str
    logprob: TokenLogprob | None = None
    depth: int = 0
    spent: float | None = None
    ran: int = 0


@dataclass(frozen=True)
class Signals:
    """What a request's own numbers said of it, where the engine had them anyway; losses in nats a token."""

    prompt_nll: float | None = None  # of the prompt's tokens at the first exit
    predicted_gaps: tuple[float, ...] = ()  # [A], of each early exit, by the router
    router_bound: float | None = None  # its predicted 0.8-quantile of the gap at the exit that it chose; 0: full depth
    router_distance: float | None = None  # mean of ((x - center) / spread)^2 over the features x that it reads
    answer_nll: float | None = None  # of a sample of the answer's tokens at its depth: mean
    answer_nll_max: float | None = None  # and most
    drafts_accepted: int = 0  # tokens of the answer that are drafts which stood
    # nats a token that the router chose the depth for; None where it was to keep a budget
    tolerance: float | None = None
    # [A], of each early exit: mean of KL(full depth || exit) over the places of full depth's answer; where `Request.gaps`
    gaps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The end of a request, sent exactly once. `text` is the last piece that was held back for a possible stop string."""

    request: str
    reason: FinishReason
    text: str = ""
    depth: int = 0  # layers it ran with, at last; 0 when it never ran
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens served from the prefix cache
    completion_tokens: int = 0  # of the whole answer, also where another engine gave its first tokens
    queue_seconds: float = 0.0
    first_token_seconds: float = 0.0  # from submission
    total_seconds: float = 0.0
    error: RequestError | None = None  # set when reason is "error" or "deadline"
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()  # if asked for, one a token of the prompt; the first is None
    spent: float | None = None  # nats that the whole answer lost, where it has a tolerance and was verified
    mean_depth: float = 0.0  # layers that ran one after the other for a token of it: with drafts fewer than `depth`
    signals: Signals | None = None  # where the engine has any
    first_depth: int = 0  # layers that its answer began with: fewer where the router's second look went deeper


Event = Token | Finished


@dataclass
class Completion:
    """What `Engine.generate` returns for one request."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason = "error"
    depth: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finished: Finished | None = None


def _keep(owner: object, name: str, value: Any, kind: Any, copy: Callable[[Any], object], allowed: str) -> None:
    """Put a copy of `value` into `owner`: what was checked cannot change under the engine."""
    if not isinstance(value, kind) or isinstance(value, (str, bytes)):
        raise RequestError(name, param=name, got=value, allowed=allowed)
    object.__setattr__(owner, name, copy(value))


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, param=name, got=value, allowed="a whole number")


def _is_number(value: object) -> bool:
    """Is it a finite number that a float can hold? A whole number may be of any size."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
