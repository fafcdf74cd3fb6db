"""Logits to tokens, for a whole batch at once: grammar, penalties, bias, temperature, top-k, top-p, min-p, seeds, logprobs.

Two promises. Control tokens other than ``<|end|>``, and ids that the tokenizer does not have, are never chosen: their
logits are set to -inf here, before anything else, and nothing raises them again. And a token depends on its request
alone: the noise comes from (seed, position, token), every operation works on rows, and filters are thresholds on the
logit (equal logits are kept or dropped together), so neither batch mates nor a preemption can change it.

Random tokens are drawn by a race: token v, of weight w_v, arrives at the time E_v / w_v with E_v exponential noise, and the
first is taken, which is v with probability w_v / sum w. The noise is the same whatever the weights are, so two similar
distributions mostly draw the same token: that is what self-speculation verifies by (`speculative.py`). On a CPU compiled
loops find the same tokens (`model/cpu/draw.py`).

Letters: R rows (requests), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.engine import filters
from shoal.engine.device import Unread, fetched, picked, viewed
from shoal.engine.events import TokenLogprob
from shoal.engine.guided import GrammarError, StrayError
from shoal.engine.penalties import Draw, adjust, banned, too_early
from shoal.engine.plan import Sampled
from shoal.engine.signals import Logits, looked_at
from shoal.engine.tolerance import Chain, apart, greedy_price, sampled_price, settle
from shoal.errors import GenerationError, RequestError
from shoal.inputs.tokenizer import END_ID
from shoal.model.cpu import fused
from shoal.model.sending import sent

STUCK = "a grammar that cannot be followed any further"
PRICED = 64  # drafts whose prices are computed at once: their laws take memory in fp64


@dataclass(frozen=True)
class Priced:
    """Drafts that may stand at a price [P]."""

    rows: list[int]  # of the step's, which verify them
    taken: Tensor  # [P], on the logits' device
    exits: list[Tensor]  # [P] of [V]: the logits that each was drawn from ...
    cut: bool = False  # ... where that was of `filters.CANDIDATES_THERE` tokens at most (`Sampler.propose`)

    @classmethod
    def of(cls, chains: Sequence[Chain], device: torch.device) -> Priced | None:
        """Those of `chains`; None for none."""
        rows = [chain.first + place for chain in chains for place in range(len(chain.exits))]
        if not rows:
            return None
        exits = [each for chain in chains for each in chain.exits]
        if there := [each for chain in chains for each in chain.there]:
            return cls(rows, torch.stack(there), exits, cut=True)
        drafts = [draft for chain in chains for draft in chain.drafts]
        return cls(rows, sent(drafts, device, torch.long), exits)


class Sampler:
    def __init__(self, forbidden: Tensor, ends: Sequence[int] = (END_ID,)) -> None:
        """`forbidden` bool [V]: tokens that are never chosen (`Model.forbidden`); `ends`: those that end an answer."""
        self._ends = list(ends)
        # ids without a token stand at the end of the vocabulary: they are closed as one piece, control tokens in runs
        allowed = (~forbidden).nonzero().flatten()
        self._known = int(allowed[-1]) + 1 if len(allowed) else 0
        self._closed = _runs(forbidden[: self._known].tolist())
        # int32 [V]: equal ids start their noise alike in every row
        self._ids = _scramble(torch.arange(len(forbidden), dtype=torch.int32, device=forbidden.device))

    def sample(
        self, logits: Tensor, draws: Sequence[Draw], chains: Sequence[Chain] = (), unread: Unread | None = None
    ) -> list[Sampled]:
        """One token for each row of `logits` [R, V], which become those that it is drawn from. Where `chains` have drafts in
        some rows and a tolerance, such a draft may be the token. What is `unread` comes in the same copy."""
        self._close(logits)
        unread = unread or Unread()
        if logits.device.type != "cpu":
            return self._there(logits, draws, chains, unread)
        unread.read()
        watched = Logits.of(logits, draws)
        reported = {r: logits[r].clone() for r, draw in enumerate(draws) if draw.sampling.logprobs is not None}
        masks, stuck = _follow_grammars(logits, draws)
        adjust(logits, draws, self._ends)
        choice = _argmax(logits)
        best = picked(logits, choice)  # NaN wins a max: one look here finds every bad row
        random = [r for r, draw in enumerate(draws) if draw.sampling.temperature > 0]
        if random:
            choice[random] = self._drawn(logits, choice, draws, random)
        tokens = [token if math.isfinite(highest) else -1 for token, highest in zip(choice.tolist(), best, strict=True)]
        costs: dict[int, float] = {}
        # what is on a CPU is read for nothing: prices are computed of drafts alone that are not drawn
        for chain in chains:
            costs |= settle(chain, tokens, lambda row, place, c=chain: self._price(logits[row], draws[row], c, place))  # type: ignore[misc]
        nll = watched.nll(tokens) if watched else {}
        logprobs = _logprobs(reported, draws, tokens) if reported else {}
        return [
            Sampled(0, error=stuck.get(r) or self._why_none(draws[r], best[r], masks.get(r)))
            if token < 0 or r in stuck
            else Sampled(token, logprobs.get(r), nll=nll.get(r), spent=costs.get(r, 0.0))
            for r, token in enumerate(tokens)
        ]

    def propose(self, logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
        """As `sample`, for drafts that stay on their device: a token [R] and the largest logit [R, 1] of each row of `logits`
        [R, V], which the host does not wait for. Not for those with a grammar. Where the
        likeliest `filters.CANDIDATES_THERE` are not enough for a top-p the draft is one of these, and may be another one than
        `sample` draws: it is verified."""
        self._close(logits)
        adjust(logits, draws, self._ends)
        return self._choice(logits, draws, filters.CANDIDATES_THERE)[:2]

    def _there(self, logits: Tensor, draws: Sequence[Draw], chains: Sequence[Chain], unread: Unread) -> list[Sampled]:
        """As `sample`, on a device: what the host must know comes in one copy, the prices of all drafts of `chains` among it. A
        second is taken where some row's top-p keeps more than `filters.CANDIDATES_THERE` tokens."""
        at = [r for r, draw in enumerate(draws) if draw.sampling.logprobs is not None or looked_at(draw)]
        given = logits[sent(at, logits.device)].double() if at else None
        masks, stuck = _follow_grammars(logits, draws)
        adjust(logits, draws, self._ends)
        priced = Priced.of(chains, logits.device)
        told = self._told(logits, draws, priced, at, given, filters.CANDIDATES_THERE, unread)
        if not all(told[2]):
            told = self._told(logits, draws, priced, at, given, logits.shape[-1], unread)
        numbers, best, _, asked, chosen, values, ids = told
        tokens = [int(token) if math.isfinite(highest) else -1 for token, highest in zip(numbers, best, strict=True)]
        prices = map(sampled_price, asked[::2], asked[1::2])
        price, costs = dict(zip(priced.rows if priced else [], prices, strict=True)), dict[int, float]()
        for chain in chains:
            costs |= settle(chain, tokens, lambda row, _: price[row])
        most, ways, found = len(ids) // max(1, len(at)), 2 if priced else 1, list[Sampled]()
        for r, token in enumerate(tokens):
            if token < 0 or r in stuck:
                found.append(Sampled(0, error=stuck.get(r) or self._why_none(draws[r], best[r], masks.get(r))))
                continue
            entry, nll = None, None
            if r in at:
                i, count = at.index(r), draws[r].sampling.logprobs
                own = chosen[i * ways + (r in costs)]
                if count is not None:
                    span = slice(i * most, i * most + count)
                    entry = TokenLogprob(token, own, tuple(zip(map(int, ids[span]), values[span], strict=True)))
                if looked_at(draws[r]) and math.isfinite(own):
                    nll = -own
            found.append(Sampled(token, entry, nll=nll, spent=costs.get(r, 0.0)))
        return found

    def _told(
        self,
        logits: Tensor,
        draws: Sequence[Draw],
        priced: Priced | None,
        at: list[int],
        given: Tensor | None,
        candidates: int,
        unread: Unread,
    ) -> list[list[float]]:
        """What `_there` asks, in one copy: tokens [R], the largest logits [R], whether `candidates` were enough for the filters
        of each row, what prices of what is `priced` follow from [P, 2]; and of the rows `at` [A], whose logits are `given` [A,
        V], the logprob of the token and, where anything is priced, of the draft [A, 1 or 2], the best [A, most] and which
        tokens have these. What is `unread` is read with them."""
        choice, best, enough = self._choice(logits, draws, candidates)
        none, tokens = best.new_zeros(0), choice[:, None]
        asked = [choice, best, enough, none, none, none, none]
        if priced is not None:
            asked[3], exact = self._prices(logits, best, draws, priced, candidates)
            asked[2] = torch.cat([enough, *exact])
            drafts = choice.index_copy(0, sent(priced.rows, logits.device), priced.taken)
            tokens = torch.stack([choice, drafts], -1)
        if given is not None:
            logprobs = torch.log_softmax(given, -1)
            top = logprobs.topk(max([1, *(draws[r].sampling.logprobs or 0 for r in at)]), dim=-1)
            asked[4:] = logprobs.gather(-1, tokens[sent(at, logits.device)]), top.values, top.indices
        found = fetched(*asked, *unread.tensors)
        unread.came(found[len(asked) :])
        return found[: len(asked)]

    def _choice(self, logits: Tensor, draws: Sequence[Draw], candidates: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [R] of `logits` [R, V], the largest logits [R, 1], and of each row that has filters whether `candidates` were
        enough for these."""
        choice = logits.argmax(-1)
        best, enough = logits.gather(-1, choice[:, None]), choice.new_ones(1)
        if random := [r for r, draw in enumerate(draws) if draw.sampling.temperature > 0]:
            rows, drawn = sent(random, logits.device), [draws[r] for r in random]
            z, enough = self._kept(logits[rows], drawn, [candidates] * len(drawn))
            choice = choice.index_copy(0, rows, self._first(z, drawn))
        return choice, best, enough

    def score(self, logits: Tensor, targets: Sequence[int], count: int) -> list[TokenLogprob]:
        """Logprob of each of `targets` [R] under its row of `logits` [R, V] (changed in place), with the `count` best. A
        control token that the prompt holds has the logprob -inf: the model is never asked for it."""
        self._close(logits)
        return _entries(logits, targets, [count] * len(targets))

    def _close(self, logits: Tensor) -> None:
        rows: Any = logits if (numbers := viewed(logits)) is None else numbers
        rows[..., self._known :] = -math.inf
        for start, end in self._closed:
            rows[..., start:end] = -math.inf

    def _drawn(self, logits: Tensor, likeliest: Tensor, draws: Sequence[Draw], rows: list[int]) -> Tensor:
        """Sampled tokens [D] of `rows` [D] of `logits` [R, V], whose `likeliest` [R] token is known: those of `_race`, most of
        them without it where the compiled loops may be used."""
        drawn = [draws[r] for r in rows]
        if not fused.usable(logits):
            return self._race(logits[rows], drawn)
        heats = filters.heat(logits, [draw.sampling for draw in drawn])
        lowest = torch.full([len(rows)], -math.inf, dtype=torch.double)
        filtered = [d for d, draw in enumerate(drawn) if filters.filtered(draw.sampling)]
        if filtered:
            limits = filters.limits(logits, [drawn[d].sampling for d in filtered])
            at = [rows[d] for d in filtered]
            lowest[filtered] = fused.thresholds(logits, at, likeliest, heats[filtered], *limits)
        keys = _keys([draw.seed for draw in drawn], [len(draw.tokens) for draw in drawn])
        found, ties = fused.race(logits, rows, likeliest, heats, lowest, self._ids, keys)
        if ties:
            found[ties] = self._race(logits[[rows[d] for d in ties]], [drawn[d] for d in ties])
        return found

    def _race(self, logits: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Sampled tokens [R]: of those that each row's filters keep, the first to arrive."""
        return self._first(self._kept(logits, draws)[0], draws)

    def _first(self, z: Tensor, draws: Sequence[Draw]) -> Tensor:
        """The first to arrive [R] of tokens whose weights are e^z [R, V]. In fp64, so that every device finds the same."""
        noise = self.noise([draw.seed for draw in draws], [len(draw.tokens) for draw in draws])
        return _argmax(z.double().exp_().div_(noise))

    def _kept(
        self, logits: Tensor, draws: Sequence[Draw], candidates: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """[R, V]: logarithms of what tokens weigh at each row's temperature, the likeliest at 0, and -inf where its filters
        leave them out; and of rows with filters, whether `candidates` [R] were enough to tell [None: as many as that takes]."""
        enough = torch.ones(1, dtype=torch.bool, device=logits.device)
        heats = filters.heat(logits, [draw.sampling for draw in draws])
        z = (logits - logits.amax(-1, keepdim=True)) / heats[:, None]
        filtered = [r for r, draw in enumerate(draws) if filters.filtered(draw.sampling)]
        if filtered:
            at, samplings = sent(filtered, logits.device), [draws[r].sampling for r in filtered]
            kept = z[at].double()
            if candidates is None:
                lowest = filters.thresholds(kept, samplings)
            else:
                lowest, enough = filters.lowest(kept, samplings, [candidates[r] for r in filtered])
            z[at] = z[at].masked_fill(kept < lowest[:, None], -math.inf)
        return z, enough

    def _price(self, logits: Tensor, draw: Draw, chain: Chain, place: int) -> float:
        """What it costs in nats, on a CPU, that the draft at `place` of `chain` stands where `logits` [V] are those of full
        depth. `_prices` has the same number."""
        if draw.sampling.temperature == 0:
            return greedy_price(logits, int(logits.argmax()), chain.drafts[place])
        laws = self._kept(torch.stack([logits, chain.exits[place]]), [draw, draw])[0]
        return sampled_price(*map(float, apart(laws[:1], laws[1:])))

    def _prices(
        self, logits: Tensor, best: Tensor, draws: Sequence[Draw], priced: Priced, candidates: int
    ) -> tuple[Tensor, list[Tensor]]:
        """What prices of what is `priced` follow from (`sampled_price`), fp64 [P, 2], for `logits` [R, V], the `best` of which
        are [R, 1]: how far full depth's law and the draft's are apart, and in greedy decoding the price itself and 1; and
        whether `candidates` were enough for the laws of drafts that are not cut."""
        rows, enough = sent(priced.rows, logits.device), list[Tensor]()
        full = logits[rows]
        gap = best[rows].double() - full.gather(-1, priced.taken[:, None]).double()
        found = torch.cat([gap, torch.ones_like(gap)], -1)
        random = [i for i, row in enumerate(priced.rows) if draws[row].sampling.temperature > 0]
        for start in range(0, len(random), PRICED):
            some = random[start : start + PRICED]
            places, drawn = sent(some, logits.device), [draws[priced.rows[i]] for i in some]
            both = torch.cat([full[places], torch.stack([priced.exits[i] for i in some])])
            own = filters.CANDIDATES_THERE if priced.cut else candidates
            laws, told = self._kept(both, [*drawn, *drawn], [candidates] * len(some) + [own] * len(some))
            found = found.index_copy(0, places, torch.stack(apart(*laws.chunk(2)), -1))
            if not priced.cut:
                enough.append(told)
        return found, enough

    def noise(self, seeds: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Exponential noise of each token at each (seed, position), fp64 [R, V]: a hash of the three, so that it needs no
        state. The key is splitmix64 of seed and position; the token is mixed in with 32 bits, which a CPU does fastest."""
        low, high = sent(_keys(seeds, positions), self._ids.device).unbind(-1)
        return exponential(_scramble(self._ids ^ low[:, None], high[:, None]))

    def _why_none(self, draw: Draw, highest: float, mask: np.ndarray | None) -> RequestError:
        """Why there is no token for `draw`, whose largest logit, `highest`, is not finite. Either the request itself closes
        every token, or the model's numbers are wrong. `mask`: what its grammar allows."""
        if highest == -math.inf:
            open_ = np.zeros(len(self._ids), dtype=bool)
            open_[: self._known] = True
            for start, end in self._closed:
                open_[start:end] = False
            if mask is not None:
                open_ &= mask
            open_[too_early(draw, self._ends)[0]] = False
            if not open_.any():
                name = "guided" if mask is not None else "min_tokens"
                got = f"none, after {len(draw.tokens) - draw.prompt_len} of the answer"
                do = "ask for a grammar that goes on with text" if mask is not None else "ask for fewer"
                return RequestError("tokens that may come next", param=name, got=got, do=do)
            open_[banned(draw)[0]] = False
            if not open_.any():
                return RequestError("tokens that may come next", param="banned", got="none", do="ban fewer")
        return GenerationError("the model gave logits that are not finite", do="try again")


def exponential(bits: Tensor) -> Tensor:
    """Exponential noise, fp64, of int32 `bits` (changed in place): -log of the middles of 2^23 equal parts of (0, 1).

    fp32 holds each of these middles as it is, so that none rounds to 1: noise of 0 would make 0 / 0 of a closed token's weight,
    and NaN wins a race. So noise is 6e-8 to 16.7, and a weight of 0 never comes first."""
    return bits.bitwise_right_shift_(9).bitwise_and_(0x7FFFFF).double().add_(0.5).mul_(2.0**-23).log_().neg_()


def _runs(flags: list[bool]) -> list[tuple[int, int]]:
    """Start and end of each run of true `flags`."""
    edges = [i for i, (a, b) in enumerate(pairwise([False, *flags, False])) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _argmax(x: Tensor) -> Tensor:
    """The first largest of each row, [R] for [R, V]."""
    numbers = viewed(x)
    return x.argmax(-1) if numbers is None else torch.from_numpy(numbers.argmax(-1))


def _mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _keys(seeds: Sequence[int], positions: Sequence[int]) -> np.ndarray:
    """Two int32 [R, 2] of each seed and position, for `Sampler.noise`."""
    mixed = _mix64(np.array([seed % 2**64 for seed in seeds], dtype=np.uint64))
    return _mix64(mixed + np.array(positions, dtype=np.uint64)).view(np.int32).reshape(len(seeds), 2)


def _scramble(x: Tensor, key: Tensor | int = 0) -> Tensor:
    """int32 bits, each of which depends on all bits of `x` and `key`: a multiply-xorshift hash (lowbias32's constants)."""
    x = x ^ (x.bitwise_right_shift(16).bitwise_and_(0xFFFF))
    x = x.mul_(0x7FEB352D).add_(key)
    x ^= x.bitwise_right_shift(15).bitwise_and_(0x1FFFF)
    x = x.mul_(0x846CA68B - 2**32)
    return x.bitwise_xor_(x.bitwise_right_shift(16).bitwise_and_(0xFFFF))


def _follow_grammars(logits: Tensor, draws: Sequence[Draw]) -> tuple[dict[int, np.ndarray], dict[int, RequestError]]:
    """Close, in place, what the grammars of guided requests do not allow next. Returns, by row, what they allow and what went
    wrong: a grammar that is too large to follow is a mistake of the request, a token that it does not allow is one of ours."""
    masks: dict[int, np.ndarray] = {}
    stuck: dict[int, RequestError] = {}
    for r, draw in enumerate(draws):
        if draw.grammar is not None:
            try:
                masks[r] = draw.grammar.allowed(draw.tokens[draw.prompt_len :])
            except StrayError as error:
                stuck[r] = GenerationError("the answer left its grammar", got=str(error), do="try again")
            except GrammarError as error:
                stuck[r] = RequestError(STUCK, param="guided", got=str(error), do="ask for a simpler one")
    if masks:
        at, closed = sent(list(masks), logits.device), sent(~np.stack(list(masks.values())), logits.device)
        logits[at] = logits[at].masked_fill(closed, -math.inf)
    return masks, stuck


def _logprobs(reported: dict[int, Tensor], draws: Sequence[Draw], tokens: Sequence[int]) -> dict[int, TokenLogprob]:
    """Row -> the chosen token's logprob and its best alternatives, of the model's own distribution over the tokens it may
    choose: before grammar, bias, penalties, temperature and filters."""
    rows = [r for r in reported if tokens[r] >= 0]
    if not rows:
        return {}
    wanted = [draws[r].sampling.logprobs or 0 for r in rows]
    entries = _entries(torch.stack([reported[r] for r in rows]), [tokens[r] for r in rows], wanted)
    return dict(zip(rows, entries, strict=True))


def _entries(logits: Tensor, targets: Sequence[int], wanted: Sequence[int]) -> list[TokenLogprob]:
    """Logprob of each of `targets` [R] under its row of `logits` [R, V], with the `wanted` [R] best."""
    logprobs = torch.log_softmax(logits.double(), -1)
    best = logprobs.topk(max([1, *wanted]), dim=-1)
    chosen = logprobs.gather(-1, sent(targets, logits.device, torch.long)[:, None]).flatten().tolist()
    values, ids = best.values.tolist(), best.indices.tolist()
    return [
        TokenLogprob(target, chosen[i], tuple(zip(ids[i][:count], values[i][:count], strict=True)))
        for i, (target, count) in enumerate(zip(targets, wanted, strict=True))
    ]
