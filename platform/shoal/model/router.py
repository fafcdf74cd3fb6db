"""The router: from a prompt's first-group states to the depth that the answer needs.

    prompt -> group 1 -> page sums -> features -> small MLP -> predicted gap of each early exit (mean, 0.8-quantile)
           -> `choose`: the smallest exit within the tolerance, or the cheapest under the server's budget

The gap of an exit is its loss minus full depth's, in nats a token, on the *answer*. Its predictions are calibrated on held-out
prompts, and what is promised is a mean: prompts like those lose at most the tolerance in the mean, in 95 % of calibrations by
240 prompts; fewer are less sure (docs/figures.md). Of one prompt, or of the share of prompts that lose more, nothing is
promised. The calibration travels with the model (``router.json``). Features are sums over pages, written when a page is
complete, so a prompt served from the prefix cache is routed exactly as a fresh one (docs/architecture.md, "Depth").

Letters: n prompt tokens, D width, P page, A early exits (all but full depth), M calibration prompts.
"""

# long: what is promised stands beside what decides by it, and what comes of it
from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.errors import DataError
from shoal.inputs.tokenizer import PATCH_ID

if TYPE_CHECKING:
    from shoal.model.net import Net

QUANTILE = 0.8
HIDDEN = 64
NOISE = 2.0  # standard deviations added to features in fitting: some hundred prompts are few for some hundred features
TOLERANCES = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0)  # nats/token, of the calibration's table
NEVER = -1e9  # a bound that no predicted gap is within; JSON has no word for minus infinity
HIGHEST_PRICE = 100.0  # nats for all layers: every prompt takes the first exit
LEAST_PROMPTS = 8  # to fit, calibrate and test on
NLL = -3  # place of the mean exit-1 NLL among the features
# standard deviations above a mean, that 97.5 % of a normal distribution are below: as few and as skewed losses as calibrate a
# router keep to a bound at 95 % in 86 to 100 % of calibrations (decision 0006)
SURE = 1.959964
AT_ONCE = 2**20  # gaps that are looked at together, as a router is calibrated
HEAD_ROWS = 64  # places of a prompt whose logits exist at once
EXTRA = 3  # columns of a page's sums beside the hidden state: NLL sum, NLL count, patch count


def page_sums(net: Net, hidden: Tensor, tokens: Tensor, nll: bool = True) -> Tensor:
    """Feature sums of each page, [ceil(n/P), D + 3]: hidden states, exit-1 NLL and how many tokens it covers, patches.

    `hidden` [n, D] after group 1 and `tokens` [n], both from a page's start. The NLL, where it is wanted, is taken at four
    places a page, each predicting the next token of the same page: so a page's sums depend on that page alone.
    """
    page = net.config.page
    at = torch.arange(len(tokens), device=tokens.device)
    kind = torch.promote_types(hidden.dtype, torch.float32)  # a sum of a page in bf16 would lose what is small
    sums = hidden.new_zeros(-(-len(tokens) // page), hidden.shape[1] + EXTRA, dtype=kind)
    sums[:, :-EXTRA].index_add_(0, at // page, hidden.to(kind))
    sampled, first = _sampled(tokens, page) if nll else at[:0], net.config.exits[0]
    if len(sampled):
        # a few rows at a time: the logits of a long prompt never exist at once
        losses = torch.cat(
            [
                F.cross_entropy(net.head(hidden[some], first).to(kind), tokens[some + 1], reduction="none")
                for some in sampled.split(HEAD_ROWS)
            ]
        )
        sums[:, -3].index_add_(0, sampled // page, losses)
        sums[:, -2].index_add_(0, sampled // page, torch.ones_like(losses))
    sums[:, -1].index_add_(0, at // page, (tokens == PATCH_ID).to(sums.dtype))
    return sums


def _sampled(tokens: Tensor, page: int) -> Tensor:
    """The places of `tokens` [n] where the exit-1 NLL is taken, none of them before a patch: how many, a GPU is waited for."""
    stride = sample_stride(page)
    places = torch.arange(stride - 2, max(stride - 2, len(tokens) - 1), stride, device=tokens.device)
    return places[tokens[places + 1] != PATCH_ID]


def sample_stride(page: int) -> int:
    """Tokens from one place where the exit-1 NLL is taken to the next: four places a page."""
    return max(2, page // 4)


def features(sums: Tensor, last: Tensor, length: int) -> Tensor:
    """What the router sees of one prompt, [2D + 3]: mean and last hidden state, mean exit-1 NLL, log length, image share.

    `sums` [pages, D + 3] from `page_sums`, `last` [D] the last prompt token's state after group 1.
    """
    total = sums.sum(0)
    nll = total[-3] / total[-2].clamp(min=1)
    rest = torch.stack([nll, total.new_full((), math.log(length)), total[-1] / length])
    return torch.cat([total[:-EXTRA] / length, last, rest])


@dataclass
class Calibration:
    """How predictions become decisions. Both tables rise along their first column and grow less cautious with it: a larger
    tolerance or a smaller budget never deepens a request."""

    after: int = 0  # tokens of the answer that are there when it decides; 0 but for a second look
    default_tolerance: float = 0.05  # nats/token for depth "auto" when neither the request nor the server says
    thresholds: list[tuple[float, float]] = field(default_factory=list)  # tolerance -> bound on the 0.8-quantile
    offset: float = 0.0  # of a second look: the first one's bound is as much above its own
    prices: list[tuple[float, float]] = field(default_factory=list)  # compute budget -> price of a unit of cost
    # What came of it on the test split, which neither the weights nor the tables have seen:
    report: dict[str, float] = field(default_factory=dict)  # at the default tolerance, see `realised`
    # tolerance, mean depth share, mean regret (nats/token), share of prompts whose own gap is above the tolerance
    by_tolerance: list[tuple[float, float, float, float]] = field(default_factory=list)
    by_budget: list[tuple[float, float, float]] = field(default_factory=list)  # budget, mean depth share, mean regret


class Router(nn.Module):
    """Predicted gaps of the early exits, and the decision. Weights are fp32 whatever the model's precision.

    `later` is a router of its own for a second look, after `later.after` tokens of an answer, by features of prompt and answer
    so far; it may only go deeper. None: there is one look. What it says of gaps is of the rest of the answer, and its tables
    are of both looks together: a request that will be looked at again is decided by them from the first. They
    hold tolerances alone, and of these the ones at which it pays."""

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
        self.later: Router | None = None

    @property
    def after(self) -> int:
        """Tokens of the answer that are there when it decides: 0 but for the second look."""
        return self.calibration.after

    @property
    def reads_nll(self) -> bool:
        """Does the prompt's loss at exit 1 count, here or in the second look? Both share the sums of a page. For a router that
        does not read it its spread is infinite, and nobody runs the head to route."""
        return bool(torch.isfinite(self.spread[NLL])) or (self.later is not None and self.later.reads_nll)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and 0.8-quantile of the gap, each [..., A] in nats a token, for features [..., 2D + 3]."""
        # a GPU multiplies fp32 in TF32 (`Model.on_gpu`), three digits of the numbers that bounds are held against, but no fp64
        exact = torch.float64 if x.device.type == "cuda" else torch.float32

        def product(linear: nn.Linear, z: Tensor) -> Tensor:
            return F.linear(z, linear.weight.to(exact), linear.bias.to(exact))

        z = torch.tanh(product(self.hidden, (x.to(exact) - self.center) / self.spread))
        return product(self.mean, z).float(), product(self.quantile, z).float()

    @torch.no_grad()
    def distance(self, x: Tensor) -> float:
        """How far the features `x` [2D + 3] are from those it was fitted to: the mean of ((x - center) / spread)^2 over those
        that it reads, which is 1 in the mean over what it was fitted to."""
        read = torch.isfinite(self.spread)
        return float(((x.float() - self.center) / self.spread)[read].square().mean())

    @torch.no_grad()
    def predicted(self, x: Tensor) -> tuple[list[float], list[float]]:
        """`forward` of one prompt's features, as numbers; NaN where these are not finite. A GPU is waited for once."""
        both = torch.stack(self(x))
        mean, quantile = both.masked_fill(~torch.isfinite(x).all(), math.nan).tolist()
        return mean, quantile

    @torch.no_grad()
    def choose(
        self,
        x: Tensor,
        tolerance: float | None = None,
        budget: float | None = None,
        predicted: tuple[list[float], list[float]] | None = None,
        again: Router | None = None,
        shift: float = 0.0,
    ) -> int:
        """The depth in layers for one prompt's features [2D + 3].

        With `tolerance` (nats/token), the smallest exit whose calibrated bound is within it; else with `budget` in (0, 1],
        the exit of least predicted gap plus priced cost; else by the calibration's default tolerance. A tolerance of 0
        and a budget of 1 are full depth by definition, and what is not finite is given it to be safe. `predicted`:
        what it is to decide by, where that is known already. `again`: the second look that comes, whose tables are of both.
        `shift`: nats that each gap is taken to be larger by than predicted, where a tolerance decides.
        """
        mean, quantile = self.predicted(x) if predicted is None else predicted
        if not all(map(math.isfinite, (*mean, *quantile))):
            return self.exits[-1]
        if again is not None:
            return self._first_within(quantile, again.bound(tolerance) - shift, again.calibration.offset)
        if tolerance is None and budget is not None:
            if budget >= 1:
                return self.exits[-1]
            price = _step_up(self.calibration.prices, budget)
            costs = [gap + price * e / self.exits[-1] for gap, e in zip([*mean, 0.0], self.exits, strict=True)]
            return self.exits[costs.index(min(costs))]
        return self._first_within(quantile, self.bound(tolerance) - shift)

    def choices(
        self, x: Tensor, tolerance: float | None = None, budget: float | None = None, again: Router | None = None
    ) -> list[int]:
        """What `choose` gives each of the prompts x [M, 2D + 3], whose gaps are predicted at once."""
        with torch.no_grad():
            both = torch.stack(self(x)).masked_fill(~torch.isfinite(x).all(-1, keepdim=True), math.nan)
        told = zip(x, *both.tolist(), strict=True)
        return [self.choose(row, tolerance, budget, (mean, quantile), again) for row, mean, quantile in told]

    def bound(self, tolerance: float | None = None) -> float:
        """What the predicted quantile of an exit must be within at `tolerance` [the default]: `NEVER` where none will do."""
        tolerance = self.calibration.default_tolerance if tolerance is None else tolerance
        return _step_down(self.calibration.thresholds, tolerance) if tolerance > 0 else NEVER

    def covers(self, tolerance: float | None = None) -> bool:
        """Has it a bound of its own for `tolerance` [the default]? A second look is not taken where it was not seen to pay."""
        tolerance = self.calibration.default_tolerance if tolerance is None else tolerance
        nearest = max((each for each in TOLERANCES if each <= tolerance), default=None)
        return any(each == nearest for each, _ in self.calibration.thresholds)

    def _first_within(self, quantile: list[float], bound: float, offset: float = 0.0) -> int:
        for gap, e in zip(quantile, self.exits, strict=False):
            if gap <= bound + offset:
                return e
        return self.exits[-1]


def fit_router(
    config: ModelConfig,
    x: Tensor,
    gaps: Tensor,
    groups: Tensor | None = None,
    *,
    seed: int = 0,
    steps: int = 400,
    nll: bool = False,
) -> Router:
    """A calibrated router from features `x` [M, 2D + 3] and measured gaps [M, A] of held-out prompts.

    Half of the prompts fit the weights, a quarter calibrates, a quarter tests (the calibration's report); those of one of
    `groups` [M], whole numbers, do the same [each prompt is a group of its own]. `nll` as of `fit_weights`. Raises DataError
    for fewer than `LEAST_PROMPTS` or three groups, and for features or gaps that are not finite.
    """
    if len(x) < LEAST_PROMPTS:
        raise DataError("prompts to fit the router", got=len(x), allowed=f"at least {LEAST_PROMPTS}")
    if not (torch.isfinite(x).all() and torch.isfinite(gaps).all()):
        raise DataError("features or gaps of the router's prompts are not finite", do="retrain the model")
    groups = torch.arange(len(x)) if groups is None else groups
    order, half, three = dealt(groups, seed)
    x, gaps, groups = x[order].float(), gaps[order].float(), groups[order]
    router = fit_weights(config, x[:half], gaps[:half], seed=seed, steps=steps, nll=nll)
    _calibrate(router, x[half:three], gaps[half:three], groups[half:three])
    table, held = router.calibration, (x[three:], gaps[three:])
    table.report = {**realised(router, *held), "groups": float(len(groups[three:].unique()))}
    for tolerance in TOLERANCES:
        found = realised(router, *held, tolerance=tolerance)
        table.by_tolerance.append((tolerance, found["depth_share"], found["regret"], found["violations"]))
    for budget, _ in table.prices[::10]:
        spent, regret = _spent(router, *held, budget=budget)
        table.by_budget.append((budget, float(spent.mean()), float(regret.mean())))
    return router


def fit_weights(
    config: ModelConfig, x: Tensor, gaps: Tensor, *, seed: int = 0, steps: int = 400, nll: bool = False
) -> Router:
    """A router that predicts the gaps [M, A] of features `x` [M, 2D + 3], both fp32, and is not calibrated. `nll`: it reads the
    prompt's loss at exit 1, which has a price (`cost.routing_flops`) and told it nothing in what was measured. Raises DataError
    for one prompt, which has no spread."""
    if len(x) < 2:
        raise DataError("prompts to fit the router's weights", got=len(x), allowed="at least 2")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = Router(config)
    router.center.copy_(x.mean(0))
    router.spread.copy_(x.std(0).clamp(min=1e-3))
    noise = NOISE * router.spread
    if not nll:
        router.spread[NLL], noise[NLL] = math.inf, 0.0
    with torch.no_grad():  # what is not learned from a prompt is what the prompts have in common
        router.mean.bias.copy_(gaps.mean(0))
        router.quantile.bias.copy_(gaps.quantile(QUANTILE, dim=0))
    optimizer, draws = (
        torch.optim.AdamW(router.parameters(), lr=3e-3, weight_decay=0.1),
        torch.Generator().manual_seed(seed),
    )
    for _ in range(steps):
        mean, quantile = router(x + noise * torch.randn(x.shape, generator=draws))
        miss = gaps - quantile
        pinball = torch.maximum(QUANTILE * miss, (QUANTILE - 1) * miss).mean()
        loss = F.huber_loss(mean, gaps, delta=0.5) + pinball
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return router.requires_grad_(False)


def dealt(groups: Tensor, seed: int) -> tuple[Tensor, int, int]:
    """An order of the prompts by group, and two places in it, near a half and three quarters, where a new group begins: up to
    the first they fit weights, up to the second they calibrate, and the others test."""
    kinds, of, sizes = groups.unique(return_inverse=True, return_counts=True)
    if len(kinds) < 3:
        raise DataError("documents or conversations to fit the router", got=len(kinds), allowed="at least 3")
    drawn = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed))
    order = drawn.argsort()[of].argsort(stable=True)  # prompts of the first group drawn, then of the second, ...
    ends = sizes[drawn].cumsum(0)
    middles = ends - sizes[drawn] / 2  # a group goes where its middle falls
    first = min(max(1, int((middles < len(groups) / 2).sum())), len(kinds) - 2)
    second = min(max(first + 1, int((middles < 3 * len(groups) / 4).sum())), len(kinds) - 1)
    return order, int(ends[first - 1]), int(ends[second - 1])


def realised(router: Router, x: Tensor, gaps: Tensor, tolerance: float | None = None) -> dict[str, float]:
    """What the router's decisions cost on prompts with known gaps: mean depth share, mean regret (nats/token), the share of
    prompts whose own gap was above the tolerance, and the depth share if each took the smallest exit within it."""
    limit = router.calibration.default_tolerance if tolerance is None else tolerance
    spent, regret = _spent(router, x, gaps, tolerance=limit)
    shares = torch.tensor([e / router.exits[-1] for e in router.exits])
    within = torch.cat([gaps <= limit, torch.ones(len(gaps), 1, dtype=torch.bool)], dim=1)
    return {
        "tolerance": limit,
        "prompts": float(len(x)),
        "depth_share": float(spent.mean()),
        "regret": float(regret.mean()),
        "violations": float((regret > limit).float().mean()),
        "oracle_depth_share": float(shares[within.float().argmax(1)].mean()),
    }


def _spent(
    router: Router, x: Tensor, gaps: Tensor, tolerance: float | None = None, budget: float | None = None
) -> tuple[Tensor, Tensor]:
    """Share of the layers and gap [M] of what `choose` gives each of the prompts x [M, 2D + 3], with gaps [M, A]."""
    full = torch.cat([gaps, gaps.new_zeros(len(gaps), 1)], dim=1)
    depths = router.choices(x, tolerance, budget)
    at = torch.tensor([router.exits.index(depth) for depth in depths])
    return torch.tensor(depths) / router.exits[-1], full[torch.arange(len(x)), at]


@torch.no_grad()
def _calibrate(router: Router, x: Tensor, gaps: Tensor, groups: Tensor) -> None:
    """Fill the tables: `thresholds` of the mean realised gap, as `promised` has it; for each budget, in steps of 0.01, the
    price by bisection."""
    mean, quantile = router(x)
    full = torch.cat([gaps, gaps.new_zeros(len(gaps), 1)], dim=1)
    cost = torch.tensor([e / router.exits[-1] for e in router.exits])
    rows, worst = torch.arange(len(x)), float(full.max())

    def regrets(bounds: Tensor) -> Tensor:
        within = quantile <= bounds[:, None, None]
        picked = torch.cat([within, torch.ones_like(within[..., :1])], dim=-1).float().argmax(-1)
        return promised(full[rows, picked].clamp(min=0), worst, groups)

    some = max(1, AT_ONCE // len(x))
    router.calibration.thresholds = thresholds(
        quantile.flatten().tolist(), lambda bounds: torch.cat([*map(regrets, bounds.split(some))])
    )
    gap = torch.cat([mean, mean.new_zeros(len(mean), 1)], dim=1).double()
    budgets = torch.arange(round(100 * float(cost[0])), 100) / 100
    low, high = torch.zeros(len(budgets), dtype=torch.float64), torch.full((len(budgets),), HIGHEST_PRICE).double()
    for _ in range(40):
        middle = (low + high) / 2
        fits = cost[(gap + middle[:, None, None] * cost).argmin(2)].mean(1) <= budgets
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    router.calibration.prices = [(round(b, 2), p) for b, p in zip(budgets.tolist(), high.tolist(), strict=True)]


def thresholds(bounds: Iterable[float], regrets: Callable[[Tensor], Tensor]) -> list[tuple[float, float]]:
    """For each of `TOLERANCES` the largest of `bounds` up to which what is lost stays within it; `NEVER` where none does.
    `regrets`: what is lost at each of some bounds [B], in fp64."""
    rising = torch.tensor(sorted(bounds), dtype=torch.float64)
    tried = [*zip(rising.tolist(), regrets(rising).tolist(), strict=True)]
    found = []
    for tolerance in TOLERANCES:
        # up to the first that is too much: a larger one that happens to fit again promises nothing
        safe = itertools.takewhile(lambda pair, t=tolerance: pair[1] <= t, tried)  # type: ignore[misc]
        found.append((tolerance, max((bound for bound, _ in safe), default=NEVER)))
    return found


def promised(lost: Tensor, worst: float, groups: Tensor) -> Tensor:
    """What the mean of prompts like those that lose `lost` [..., M], at most `worst` each, is within, [...] in fp64: its upper
    bound in 95 % of draws of `groups` [M] (risk-controlling prediction sets, arXiv 2101.02703, section 3.2; 97.5 % by name, see
    `SURE`), and no less than one more prompt loses in expectation (conformal risk control, arXiv 2208.02814, with its 1/(n+1)
    correction), which is more where none, or all, have lost something."""
    return ((lost.double().sum(-1) + worst) / (lost.shape[-1] + 1)).clamp(min=_upper(lost, groups))


def _upper(values: Tensor, groups: Tensor) -> Tensor:
    """The upper bound of the mean of values [..., M], [...] in fp64, with the scatter of the sums of `groups` [M] about it and
    their skew, as L. Chen, "Testing the mean of skewed distributions", JASA 90 (1995), corrects a normal bound; infinite for
    fewer than two groups. Most prompts lose nothing and some much: where few of these were drawn, mean and scatter are both too
    small."""
    kinds, of = groups.unique(return_inverse=True)
    mean = values.double().mean(-1)
    if len(kinds) < 2:
        return torch.full_like(mean, math.inf)
    sums = mean.new_zeros(*mean.shape, len(kinds)).index_add_(-1, of, values.double() - mean[..., None])
    square, cube = sums.square().sum(-1), (sums**3).sum(-1)
    scatter = (square * len(kinds) / (len(kinds) - 1)).sqrt() / values.shape[-1]
    # a sixth of it, by the root of how many groups
    skew = torch.where(square > 0, cube.clamp(min=0) / (6 * square**1.5), 0.0)
    wide = SURE + skew * (1 + 2 * SURE**2) + 4 * skew**2 * (SURE + 2 * SURE**3)
    return mean + wide * scatter


def _step_down(table: list[tuple[float, float]], at: float) -> float:
    """The value of the last entry not above `at`: the cautious neighbour. -inf below the table."""
    return max((value for key, value in table if key <= at), default=-math.inf)


def _step_up(table: list[tuple[float, float]], at: float) -> float:
    """The value of the last entry not above `at` for a table whose values fall; its first value below the table."""
    return min((value for key, value in table if key <= at), default=table[0][1] if table else 0.0)
