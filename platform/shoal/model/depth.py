"""The router: from a prompt's first-group states to the depth that the answer needs.

    prompt -> group 1 -> page sums -> features -> small MLP -> predicted gap of each early exit (mean, 0.8-quantile)
           -> `choose`: the smallest exit within the tolerance, or the cheapest under the server's budget

The gap of an exit is its loss minus full depth's, in nats a token, on the *answer*. Its predictions are calibrated on
held-out prompts; the calibration travels with the model (``router.json``). Features are sums over pages, written when a
page is complete, so a prompt served from the prefix cache is routed exactly as a fresh one (design section 5).

Letters: n prompt tokens, D width, P page, A early exits (all but full depth), M calibration prompts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.inputs.tokenizer import PATCH_ID

if TYPE_CHECKING:
    from shoal.model.net import Net

QUANTILE = 0.8
HIDDEN = 64
EXTRA = 3  # columns of a page's sums beside the hidden state: NLL sum, NLL count, patch count


def page_sums(net: Net, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Feature sums of each page, [ceil(n/P), D + 3]: hidden states, exit-1 NLL and how many tokens it covers, patches.

    `hidden` [n, D] after group 1 and `tokens` [n], both from a page's start. The NLL is taken at four places a page, each
    predicting the next token of the same page: cheap for the head, and a page's sums depend on that page alone.
    """
    page = net.config.page
    at = torch.arange(len(tokens), device=tokens.device)
    stride = max(2, page // 4)
    sampled = at[(at % stride == stride - 2) & (at + 1 < len(tokens))]
    sampled = sampled[tokens[sampled + 1] != PATCH_ID]
    sums = hidden.new_zeros(-(-len(tokens) // page), hidden.shape[1] + EXTRA)
    sums[:, :-EXTRA].index_add_(0, at // page, hidden)
    if len(sampled):
        logits = net.head(hidden[sampled], net.config.exits[0])
        nll = F.cross_entropy(logits, tokens[sampled + 1], reduction="none").to(sums.dtype)
        sums[:, -3].index_add_(0, sampled // page, nll)
        sums[:, -2].index_add_(0, sampled // page, torch.ones_like(nll))
    sums[:, -1].index_add_(0, at // page, (tokens == PATCH_ID).to(sums.dtype))
    return sums


def features(sums: Tensor, last: Tensor, length: int) -> Tensor:
    """What the router sees of one prompt, [2D + 3]: mean and last hidden state, mean exit-1 NLL, log length, image share.

    `sums` [pages, D + 3] from `page_sums`, `last` [D] the last prompt token's state after group 1.
    """
    total = sums.sum(0)
    nll = total[-3] / total[-2].clamp(min=1)
    rest = torch.stack([nll, total.new_tensor(math.log(length)), total[-1] / length])
    return torch.cat([total[:-EXTRA] / length, last, rest])


@dataclass
class Calibration:
    """How predictions become decisions. Both tables rise along their first column, and so does caution fall: a larger
    tolerance or a smaller budget never deepens a request."""

    default_tolerance: float = 0.05  # nats/token for depth "auto" when neither the request nor the server says
    thresholds: list[tuple[float, float]] = field(default_factory=list)  # tolerance -> bound on the 0.8-quantile
    prices: list[tuple[float, float]] = field(default_factory=list)  # compute budget -> price of a unit of cost
    report: dict[str, float] = field(default_factory=dict)  # realised regret and depth on the test split


class Router(nn.Module):
    """Predicted gaps of the early exits, and the decision. Weights are fp32 whatever the model's precision."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.exits = config.exits
        inputs, early = 2 * config.width + EXTRA, len(config.exits) - 1
        self.center: Tensor
        self.spread: Tensor
        self.register_buffer("center", torch.zeros(inputs))
        self.register_buffer("spread", torch.ones(inputs))
        self.hidden = nn.Linear(inputs, HIDDEN)
        self.mean = nn.Linear(HIDDEN, early)
        self.quantile = nn.Linear(HIDDEN, early)
        self.calibration = Calibration()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 0.8-quantile of the gap, each [..., A] in nats a token, for features [..., 2D + 3]."""
        z = torch.tanh(self.hidden((x.float() - self.center) / self.spread))
        return self.mean(z), self.quantile(z)

    @torch.no_grad()
    def choose(self, x: Tensor, tolerance: float | None = None, budget: float | None = None) -> int:
        """The depth in layers for one prompt's features [2D + 3].

        With `tolerance` (nats/token), the smallest exit whose calibrated bound is within it; else with `budget` in (0, 1],
        the exit of least predicted gap plus priced cost; else by the calibration's default tolerance. A tolerance of 0
        and a budget of 1 are full depth by definition.
        """
        mean, quantile = (y.tolist() for y in self(x))
        if tolerance is None and budget is not None:
            if budget >= 1:
                return self.exits[-1]
            price = _step_up(self.calibration.prices, budget)
            costs = [gap + price * e / self.exits[-1] for gap, e in zip([*mean, 0.0], self.exits, strict=True)]
            return self.exits[costs.index(min(costs))]
        tolerance = self.calibration.default_tolerance if tolerance is None else tolerance
        bound = _step_down(self.calibration.thresholds, tolerance)
        if tolerance > 0:
            for gap, e in zip(quantile, self.exits, strict=False):
                if gap <= bound:
                    return e
        return self.exits[-1]


def fit_router(config: ModelConfig, x: Tensor, gaps: Tensor, *, seed: int = 0, steps: int = 400) -> Router:
    """A calibrated router from features `x` [M, 2D + 3] and measured gaps [M, A] of held-out prompts.

    Half of the prompts fit the weights, a quarter calibrates, a quarter tests (the calibration's report).
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, gaps = x[order].float(), gaps[order].float()
    half, three = len(x) // 2, 3 * len(x) // 4
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = Router(config)
    router.center.copy_(x[:half].mean(0))
    router.spread.copy_(x[:half].std(0).clamp(min=1e-3))
    optimizer = torch.optim.AdamW(router.parameters(), lr=3e-3, weight_decay=0.1)
    for _ in range(steps):
        mean, quantile = router(x[:half])
        miss = gaps[:half] - quantile
        pinball = torch.maximum(QUANTILE * miss, (QUANTILE - 1) * miss).mean()
        loss = F.huber_loss(mean, gaps[:half], delta=0.5) + pinball
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    router.requires_grad_(False)
    _calibrate(router, x[half:three], gaps[half:three])
    router.calibration.report = realised(router, x[three:], gaps[three:])
    return router


def realised(router: Router, x: Tensor, gaps: Tensor, tolerance: float | None = None) -> dict[str, float]:
    """What the router's decisions cost on prompts with known gaps: mean depth share, mean regret (nats/token), the share of
    prompts whose own gap was above the tolerance, and the depth share if each took the smallest exit within it."""
    limit = router.calibration.default_tolerance if tolerance is None else tolerance
    full = torch.cat([gaps, gaps.new_zeros(len(gaps), 1)], dim=1)
    chosen = [router.exits.index(router.choose(row, limit)) for row in x]
    regret = full[torch.arange(len(x)), chosen]
    oracle = [next(i for i, gap in enumerate(row) if gap <= limit) for row in full.tolist()]
    share = [e / router.exits[-1] for e in router.exits]
    return {
        "tolerance": limit,
        "prompts": float(len(x)),
        "depth_share": sum(share[i] for i in chosen) / max(1, len(x)),
        "regret": float(regret.mean()) if len(x) else 0.0,
        "violations": float((regret > limit).float().mean()) if len(x) else 0.0,
        "oracle_depth_share": sum(share[i] for i in oracle) / max(1, len(x)),
    }


@torch.no_grad()
def _calibrate(router: Router, x: Tensor, gaps: Tensor) -> None:
    """Fill the tables: for each tolerance the largest bound whose mean realised gap stays within it (conformal risk
    control, arXiv 2208.02814, with its 1/(n+1) correction), and for each budget the price by bisection."""
    mean, quantile = router(x)
    full = torch.cat([gaps, gaps.new_zeros(len(gaps), 1)], dim=1)
    cost = torch.tensor([e / router.exits[-1] for e in router.exits])
    rows, worst = torch.arange(len(x)), float(full.max().clamp(min=0))

    def regret(bound: float) -> float:
        within = torch.cat([quantile <= bound, torch.ones(len(x), 1, dtype=torch.bool)], dim=1)
        picked = full[rows, within.float().argmax(1)]
        return (float(picked.clamp(min=0).sum()) + worst) / (len(x) + 1)

    candidates = sorted({-1e9, *quantile.flatten().tolist()})
    table: list[tuple[float, float]] = []
    for tolerance in (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0):
        bound = table[-1][1] if table else -1e9
        for candidate in candidates:
            if candidate > bound and regret(candidate) <= tolerance:
                bound = candidate
        table.append((tolerance, bound))

    def spent(price: float) -> float:
        total = torch.cat([mean, mean.new_zeros(len(mean), 1)], dim=1) + price * cost
        return float(cost[total.argmin(1)].mean())

    prices = []
    for budget in (0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        low, high = 0.0, 100.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if spent(middle) <= budget else (middle, high)
        prices.append((budget, high))
    router.calibration.thresholds, router.calibration.prices = table, prices


def _step_down(table: list[tuple[float, float]], at: float) -> float:
    """The value of the last entry not above `at`: the cautious neighbour. -inf below the table."""
    return max((value for key, value in table if key <= at), default=-math.inf)


def _step_up(table: list[tuple[float, float]], at: float) -> float:
    """The value of the last entry not above `at` for a table whose values fall; its first value below the table."""
    return min((value for key, value in table if key <= at), default=table[0][1] if table else 0.0)
