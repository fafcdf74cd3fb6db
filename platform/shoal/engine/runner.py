"""A plan's rows through the network: the only file that makes device tensors of a plan.

    rows of all requests, deepest first
    group 1  ├──────── all new rows ────────┤   rows whose state after group 1 is kept join here
    group 2  ├──── those that go on ────┤
    group 3  ├── .. ──┤        each group runs on a prefix of the rows, so a step costs what its depths cost
    head     the sampled rows of every exit, each through its own exit, in one product

Letters: N rows, R works (one request each), G layer groups, M pages of the longest request, D width, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from shoal.config import GROUPS
from shoal.engine import drafts, graphs, speculative
from shoal.engine.compared import Audited, Compared
from shoal.engine.device import Unread
from shoal.engine.drafts import Drafted, Drafter, Rounds
from shoal.engine.events import Sampling, Signals, TokenLogprob
from shoal.engine.graphs import Graphs
from shoal.engine.layout import StepLayout
from shoal.engine.penalties import Draw
from shoal.engine.plan import Decision, Outcome, Plan, Sampled, Work
from shoal.engine.sampler import Sampler
from shoal.engine.tolerance import Chain
from shoal.errors import first_line
from shoal.model.adapters import Adapter, Bank, Beside, nothing
from shoal.model.cache import GroupCache, PagedStep
from shoal.model.cpu import fused
from shoal.model.gpu import launch
from shoal.model.linears import prepack_
from shoal.model.model import Model
from shoal.model.router import NLL, Router, features, page_sums
from shoal.model.sending import sent

log = logging.getLogger(__name__)
T = TypeVar("T")

SCORED_ROWS = 64  # rows of a prompt whose logits exist at once


class Runner:
    def __init__(
        self,
        model: Model,
        units: int,
        compute_budget: float | None = None,
        kv_dtype: torch.dtype | None = None,
        graph_rows: int = 0,
    ) -> None:
        """K/V memory for `units` units (the null unit included) in `kv_dtype` [the model's], on its device. There, decoding
        steps of up to `graph_rows` requests are replayed as graphs, where that can be done."""
        self.model, self.config, self.net = model, model.config, model.net
        self.device, self.compute_budget = model.device, compute_budget
        self.cache = GroupCache.zeros(self.config, units, self.net.dtype, self.device, kv_dtype)
        self.sampler = Sampler(model.forbidden(), model.tokenizer.ends)
        with fused.compiling():
            prepack_(self.net)
            self._compile()
        self.adapters: Mapping[str, Adapter] = {}  # by identity; replaced as a whole
        self._bank = Bank(self.net, [])
        self._asked: tuple[Router | None, bool] = None, False  # the router, and whether it reads the prompt's loss
        self._reads_nll()
        self.graphs = graphs.of_device(self.net, self.cache, graph_rows) if graph_rows else None
        self._replay(Graphs.prepare)

    @torch.inference_mode()
    def _replay(self, call: Callable[[Graphs], T]) -> T | None:
        """What `call` of the graphs gives; None where there are none, or none any more: a device that refuses to record, or a
        kernel, takes the other way from then on."""
        if self.device in launch.GIVEN_UP:
            self.graphs = None
        if self.graphs is None:
            return None
        try:
            return call(self.graphs)
        except RuntimeError as error:
            log.warning("decoding goes on without graphs: %s", first_line(error))
        except Exception as error:
            launch.give_up(self.device, error)
        self.graphs = None
        return None

    @torch.inference_mode()
    def _compile(self) -> None:
        """Run steps of few requests, of more, and of a prompt over the null unit, and draw a token, so that no request waits
        for what they compile (numba takes half a minute without its cache)."""
        adapter = nothing(self.net)
        beside = Bank(self.net, [adapter]).beside([adapter], [1])  # a row with an adapter takes another way
        steps = (
            (range(2), None),
            (range(2), beside),
            (range(max(fused.FEW.values()) + 2), None),
            ((0, fused.SHORT + 1), None),
        )
        for starts, added in steps:
            rows = starts[-1]
            at = torch.zeros(rows, dtype=torch.long, device=self.device)
            tables = torch.zeros(len(starts) - 1, 1, dtype=torch.long, device=self.device)
            step = PagedStep(at, at - 1, tables, list(starts), self.config.page, self.config.block, beside=added)
            x = torch.zeros(rows, self.config.width, dtype=self.net.dtype, device=self.device)
            logits = self.net.head(self.net.groups[0].paged(x, step, self.cache), self.config.exits[0])  # type: ignore[operator]
        self.sampler.sample(logits[:1], [_Anybody()])

    @torch.inference_mode()
    def run(self, plan: Plan) -> Outcome:
        """Run one step: write its K/V, decide depths, sample tokens. Nothing here outlives a failure but K/V slots that
        no request counts as computed."""
        whole = self.graphs is not None and self.graphs.takes(plan.works)
        works, drafted, rounds = self._draft(plan.works, whole)
        if whole and (samples := self._replayed(works, drafted, rounds)) is not None:
            return Outcome(samples)
        layout = StepLayout(works, self.config, self.device, self._beside)
        fresh = [work for work in works if work.first == 0]
        x = self._embed(fresh) if fresh else torch.empty(0, self.config.width, dtype=self.net.dtype, device=self.device)
        if fresh:
            x = self._group(0, x, layout if len(fresh) == len(works) else layout.of(fresh))
        if len(fresh) < len(works):
            x = self._join(works, x)
        self._hold(works, x, layout.starts)
        scores: dict[Work, list[TokenLogprob]] = {}
        compared = Compared.of(works, layout.starts, self.config) if self.config.exits[:-1] else None
        audited = Audited.of(works, layout.starts, self.config)
        logits = self._deeper(works, x, layout, scores, compared, audited)
        samples = self._sample(works, logits, drafted, compared, rounds) if logits is not None else []
        lost = audited.lost(self.net, SCORED_ROWS) if audited is not None else ()
        decisions = [self._decide(work) for work in plan.decisions]
        return Outcome(samples, decisions, [scores[work] for work in plan.scores], lost)

    def _replayed(
        self, works: Sequence[Work], drafted: Mapping[Work, Drafted], rounds: Rounds | None
    ) -> list[Sampled] | None:
        """What `works` give by graphs, which take them; None where that cannot be, and the step is to be run without."""
        logits = self._replay(lambda graphs: graphs.run(works))
        starts = [0, *accumulate(work.count for work in works)]
        compared = Compared.of(works, starts, self.config) if self.config.exits[:-1] else None
        if compared is not None and logits is not None:
            exits = self._replay(lambda graphs: graphs.exits(compared.rows))
            if exits is None:
                return None
            compared.exits = exits
        return None if logits is None else self._sample(works, logits, drafted, compared, rounds)

    def _draft(self, works: Sequence[Work], whole: bool) -> tuple[list[Work], dict[Work, Drafted], Rounds | None]:
        """`works`, with those that may draft replaced by the verification of what they drafted; what those with a tolerance
        drafted; and what of all is to be read. The requests themselves do not change: their drafts stand in copies
        (`speculative.py`). `whole`: graphs take them, and where somebody drafts, the first group of all others runs beside."""
        if not any(work.drafts for work in works):
            return list(works), {}, None
        drafting = [
            Drafter(work, speculative.ahead_of(work.running, list(work.running.tokens)), i)
            for i, work in enumerate(works)
            if work.drafts or whole
        ]
        for each in drafting:
            each.drafted = Drafted() if each.work.drafts and each.work.running.tolerance else None
        rounds = Rounds.of(works, self.device)
        if whole or rounds is not None or not drafts.draft(self.net, self.cache, self.sampler, drafting):
            planned = works if whole else []
            drafts.by_steps(lambda *given: self._first(planned, *given), self.sampler, drafting, rounds)
        found = list(works)
        for each in drafting:
            found[each.place] = each.rest()
        return found, {found[each.place]: each.drafted for each in drafting if each.drafted is not None}, rounds

    def _first(
        self, planned: Sequence[Work], going: Sequence[Drafter], more: int, newest: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`drafts.First` of a step; by graphs where these take the whole one, `planned`."""
        rows = [Work(each.ahead, len(each.ahead.tokens) - 1, 1, 0, 1) for each in going]
        if planned:
            requests = [each.place for each in going]
            found = self._replay(lambda graphs: graphs.first(planned, rows, requests, more, newest))
            if found is not None:
                return found
        x = self._embed(rows) if newest is None else self.net.embed_inputs(newest)
        x = self._group(0, x, StepLayout(rows, self.config, self.device, self._beside))
        return x, self.net.head(x[:more], self.config.exits[0]) if more else None

    def _sample(
        self,
        works: Sequence[Work],
        logits: Tensor,
        drafted: Mapping[Work, Drafted],
        compared: Compared | None,
        rounds: Rounds | None,
    ) -> list[Sampled]:
        """What each sampled work of `works` gives, for logits [S, V] of their sampled rows."""
        unread = Unread()
        if rounds is not None:
            rounds.wait_in(unread)
        # before anything is closed in the logits
        gaps = {} if compared is None else compared.gaps(logits, self.net, unread)
        draws: list[Draw] = []
        chains: list[Chain] = []
        for work in works:
            if work in drafted:
                chains.append(drafted[work].chain(len(draws), work))
            if work.verify:
                draws += [speculative.Place.of(work.running, work.start + 1 + i) for i in range(work.count)]
            elif work.sample:
                draws.append(work.running)
        found, samples = iter(self.sampler.sample(logits, draws, chains, unread)), list[Sampled]()
        for work in works:
            if work.verify:
                proposed = work.running.tokens[work.start + 1 :]
                samples.append(speculative.accept(proposed, [next(found) for _ in range(work.count)]))
            elif work.sample:
                samples.append(next(found))
        return [replace(one, gaps=gaps[at]) if at in gaps else one for at, one in enumerate(samples)]

    def _embed(self, works: Sequence[Work]) -> Tensor:
        """[N, D] of the new rows of `works`."""
        tokens = [token for work in works for token in work.running.tokens[work.start : work.end]]
        patches, grids = [], []
        for work in works:
            images = work.running.images
            if images is not None and work.start < work.running.prompt_len:
                span = images.between(work.start, work.end)
                patches.append(images.values[span])
                grids.append(images.grid[span])
        ids = sent(tokens, self.device, torch.long)
        if not patches:
            return self.net.embed_inputs(ids)
        return self.net.embed_inputs(ids, *(sent(np.concatenate(parts), self.device) for parts in (patches, grids)))

    def take(self, adapters: Mapping[str, Adapter]) -> None:
        """These are loaded from now on; those that requests were admitted with stay as long as they run."""
        self.adapters, self._bank = adapters, Bank(self.net, [])

    def _beside(self, works: Sequence[Work]) -> Beside | None:
        """What adapters add to the linears' outputs for the rows of `works`; None where none has an adapter."""
        adapters = [work.running.adapter for work in works]
        held = {adapter.identity: adapter for adapter in adapters if adapter is not None}
        if not held:
            return None
        if not held.keys() <= self._bank.places.keys():
            self._bank = Bank(self.net, [*{**self.adapters, **held}.values()])
        return self._bank.beside(adapters, [work.count for work in works])

    def _group(self, index: int, x: Tensor, layout: StepLayout) -> Tensor:
        out: Tensor = self.net.groups[index].paged(x, layout.step(index, len(x)), self.cache)  # type: ignore[operator]
        return out

    def _join(self, works: Sequence[Work], x: Tensor) -> Tensor:
        """All rows of the plan after group 1: the new ones and those whose states were kept, in the plan's order."""
        pieces, at = [], 0
        for work in works:
            if work.first == 0:
                pieces.append(x[at : at + work.count])
                at += work.count
            else:
                holding = work.running.holding
                assert holding.states_from is not None
                if len(holding.states) > 1:
                    holding.states = [torch.cat(holding.states)]
                pieces.append(holding.states[0][work.start - holding.states_from : work.end - holding.states_from])
        return torch.cat(pieces)

    def _hold(self, works: Sequence[Work], x: Tensor, starts: list[int]) -> None:
        for r, work in enumerate(works):
            if work.hold:
                work.running.holding.states.append(x[starts[r] : starts[r + 1]].clone())

    def _deeper(
        self,
        works: Sequence[Work],
        x: Tensor,
        layout: StepLayout,
        scores: dict[Work, list[TokenLogprob]],
        compared: Compared | None,
        audited: Audited | None,
    ) -> Tensor | None:
        """The remaining groups; the logits [S, V] of the sampled rows in the plan's order, None when nothing is sampled; and
        `scores`, `compared` and `audited` filled in."""
        exits: list[Tensor] = []
        for j in range(1, GROUPS + 1):
            going = sum(work.last > j for work in works)  # a prefix, as works are sorted
            if audited is not None:
                audited.see(self.config.ends[j - 1], x)
            rows: list[int] = []
            for r, work in enumerate(works):
                if work.last == j:
                    start, end = layout.starts[r], layout.starts[r + 1]
                    if work.score:
                        scores[work] = self._score(work, x[start : start + work.scored], j)
                    if work.sample:
                        rows += range(start if work.verify else end - 1, end)
            if rows:
                at = x[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] == len(rows) - 1 else x[sent(rows, self.device)]
                exits.append(self.net.exit(at, self.config.ends[j - 1]))
            if not going:
                break
            if compared is not None and self.config.ends[j - 1] in self.config.exits:
                compared.exits.append(self.net.exit(x[sent(compared.rows, self.device)], self.config.ends[j - 1]))
            x = self._group(j, x[: layout.starts[going]], layout)
        if not exits:
            return None
        return self.net.logits(exits[0] if len(exits) == 1 else torch.cat(exits[::-1]))

    def _score(self, work: Work, hidden: Tensor, groups: int) -> list[TokenLogprob]:
        """Logprobs of the prompt's tokens after the rows `hidden` [rows, D], a few rows at a time so that the logits of a
        long prompt never exist at once."""
        targets = work.running.tokens[work.start + 1 : work.start + 1 + len(hidden)]
        found: list[TokenLogprob] = []
        for start in range(0, len(hidden), SCORED_ROWS):
            rows = slice(start, start + SCORED_ROWS)
            logits = self.net.head(hidden[rows], self.config.ends[groups - 1])
            found += self.sampler.score(logits, targets[rows], work.running.sampling.prompt_logprobs or 0)
        return found

    def _decide(self, work: Work) -> Decision:
        """The depth of a prompt, and of its answer so far where the router looks again, whose last rows went through group 1 in
        this step."""
        running, holding, router = work.running, work.running.holding, self.model.router
        nll = running.watched or self._reads_nll()
        if running.least and router is not None:
            router = router.later
        assert router is not None and holding.states_from is not None
        states = holding.states[0] if len(holding.states) == 1 else torch.cat(holding.states)
        holding.states = [states]
        known = len(holding.notes) * holding.page
        sums = list(holding.notes)
        fresh: list[Tensor] = []
        if known < len(running.tokens):
            ids = sent(running.tokens[known:], self.device, torch.long)
            # each by itself: the prefix cache may keep one for long, and a view would keep those of the whole prompt
            fresh = [sums.clone() for sums in page_sums(self.net, states[known - holding.states_from :], ids, nll)]
        x = features(torch.stack(sums + fresh), states[-1], len(running.tokens))
        told = router.predicted(x)
        asked, again = running.request.quality_tolerance, None if running.look is None else router.later
        layers = router.choose(x, asked, self.compute_budget, told, again, running.shift)
        if not running.watched or running.least:
            return Decision(layers, fresh)
        budgeted = asked is None and self.compute_budget is not None
        promised = None if budgeted else router.calibration.default_tolerance if asked is None else asked
        return Decision(layers, fresh, _seen(router, x, layers, *told, promised))

    def _reads_nll(self) -> bool:
        """Does the router read the prompt's loss at exit 1? What says so lies on the device, which is asked once a router."""
        router = self.model.router
        if self._asked[0] is not router:
            self._asked = router, router is not None and router.reads_nll
        return self._asked[1]


def _seen(
    router: Router, x: Tensor, layers: int, mean: list[float], quantile: list[float], tolerance: float | None
) -> Signals:
    """What `router` saw of a prompt with the features `x` [2D + 3] that is to run through `layers`, and what it predicted;
    `tolerance`: what the answer may lose."""
    nll, distance = float(x[NLL]), router.distance(x)
    if not math.isfinite(distance):
        return Signals()
    return Signals(
        prompt_nll=nll or None,  # a prompt of a few tokens has no place where it is taken
        predicted_gaps=tuple(mean),
        router_bound=0.0 if layers == router.exits[-1] else quantile[router.exits.index(layers)],
        router_distance=distance,
        tolerance=tolerance,
    )


@dataclass
class _Anybody:
    """Whom `Runner._compile` draws a token for."""

    sampling: Sampling = field(default_factory=lambda: Sampling(top_p=0.5))
    tokens: list[int] = field(default_factory=list)
    prompt_len: int = 0
    seed: int = 0
    grammar: None = None
    watched: bool = True
    there: Sequence[Tensor] = ()
