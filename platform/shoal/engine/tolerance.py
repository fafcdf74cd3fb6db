"""What an answer may lose against full depth, and what it has lost: tolerant drafts (docs/decisions/0008).

A draft of the first exit stands, as always, where full depth draws the same token: that costs nothing. Where full depth draws
another one, the draft may stand all the same, at a price, as long as the answer has then spent at most its tolerance, in nats,
times the tokens before. That one itself does not count, since it may be what ends the answer, which is no token of it. So at
every length an answer has spent at most that much a token, and full depth has looked at every token before it is told.

Price of a draft x where full depth, whose law is p, draws another token:

    greedy    log p(best) - log p(x): what x is less likely than what full depth would have said after the same words
    sampled   KL(p || q) / TV(p, q), where q is the first exit's law, both as the sampler draws from them

A draft's law is what it was really drawn from: on a device q has at most the `filters.CANDIDATES_THERE` likeliest tokens of a
top-p where the host did not read each draft, and p is whole.

Whether a sampled draft may stand is known before either token is drawn: its price does not depend on them. So a token comes
from q where it may, and from p elsewhere. The draws differ with a probability of at least TV(p, q), whatever noise they share,
so the expected price is at least KL(p || q): over the answers that are told, the mean of KL(full depth || what the token was
drawn from) is at most what is spent. Paying KL(p || q) itself would not do: an exit's own words look good to it, and the noise
that they share lets most of the difference pass for nothing.

Where top-k, top-p or min-p leave the two laws different tokens, KL may be infinite, and the draft falls.

Letters: K drafts, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(eq=False)
class Allowance:
    """What one answer may spend, in nats a token, and has."""

    tolerance: float
    spent: float = 0.0  # nats

    def affords(self, price: float, tokens: int) -> bool:
        """May the answer, of so many `tokens` yet, pay `price` nats for the next one? A price that is no finite number is none
        that can be paid: a tolerance may be so large that times some tokens it is infinite, too."""
        return math.isfinite(price) and self.spent + price <= self.tolerance * tokens


@dataclass(frozen=True)
class Chain:
    """The drafts of one request in a step, verified by the rows from `first` on of those that the step samples. The last may be
    one that ends the answer."""

    first: int
    drafts: Sequence[int]  # [K]; of those that lie on a device as many as stand for something, once they are read
    exits: Sequence[Tensor]  # [K] of [V]: the logits that each was drawn from
    tolerance: float
    spent: float  # nats, before these
    answered: int  # tokens, before these
    there: Sequence[Tensor] = ()  # [K] of []: the drafts, where the host has not read them


def settle(chain: Chain, drawn: list[int], price: Callable[[int, int], float]) -> dict[int, float]:
    """Let drafts of `chain` stand in `drawn`, full depth's tokens by row [-1: none], which changes. Returns by row what those
    that it changed cost. `price` gives that of a row and the draft's place in the chain."""
    costs: dict[int, float] = {}
    allowance = Allowance(chain.tolerance, chain.spent)
    for place, draft in enumerate(chain.drafts):
        row = chain.first + place
        if drawn[row] == draft:
            continue
        # without a tolerance no tie is decided otherwise than without drafts
        if drawn[row] < 0 or chain.tolerance == 0:
            break
        cost = price(row, place)
        if not allowance.affords(cost, chain.answered + place):
            break
        allowance.spent += cost
        drawn[row], costs[row] = draft, cost
    return costs


def greedy_price(logits: Tensor, best: int, taken: int) -> float:
    """log p(best) - log p(taken) in nats, for full depth's `logits` [V]."""
    return float(logits[best].double() - logits[taken].double())


def apart(full: Tensor, exits: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and TV(p, q), fp64 [R], for the laws p and q whose unnormalised logarithms are the rows of `full` and `exits`
    [R, V]. Nothing waits for a device."""
    log_p, log_q = full.double().log_softmax(-1), exits.double().log_softmax(-1)
    p = log_p.exp()
    divergence = (p * (log_p - log_q)).masked_fill_(p <= 0, 0).sum(-1)
    return divergence, 0.5 * (p - log_q.exp()).abs().sum(-1)


def sampled_price(divergence: float, distance: float) -> float:
    """Nats, for two laws that are so far `apart`: infinite where q never gives what p may."""
    if distance == 0:
        return 0.0
    return max(0.0, divergence) / distance if math.isfinite(divergence) else math.inf
