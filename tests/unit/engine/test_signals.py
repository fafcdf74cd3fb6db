"""What the engine says of how sure the model was: by definition, and the same in any batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from shoal import Engine, Model
from shoal.engine import runner
from shoal.engine.events import Completion, Guide, Request, Sampling, Signals
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.router import features, fit_router, page_sums
from tests.unit.engine.lively import lively
from tests.unit.engine.test_speculative import EAGER

MODEL = lively()
PROMPTS = ["the sea", "a fish that swims in the deep sea at night", "def f(x):\n    return x + 1\n"]


@pytest.fixture(scope="module")
def routed() -> Model:
    """A model whose router was fitted to noise, in float64 as the model is."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(32, 2 * MODEL.config.width + 3, generator=draws)
    gaps = torch.rand(32, len(MODEL.config.exits) - 1, generator=draws)
    return Model(MODEL.config, MODEL.net, Tokenizer.bytes_only(), router=fit_router(MODEL.config, x, gaps, steps=20))


def asked(prompt: str, depth: str = "full", **sampling: object) -> Request:
    how = Sampling(**{"max_tokens": 40, "ignore_eos": True, "logprobs": 0, "seed": 5, **sampling})  # type: ignore[arg-type]
    return Request(prompt, how, depth, signals=True)


def run(model: Model, requests: Sequence[Request], **options: object) -> list[Completion]:
    return Engine(model, units=200, **options).generate([*requests])  # type: ignore[arg-type]


def signals(answer: Completion) -> Signals:
    assert answer.finished is not None and answer.finished.signals is not None
    return answer.finished.signals


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0},
        {"temperature": 0.7, "top_p": 0.8},
        {"repetition_penalty": 1.5, "presence_penalty": 1.0},
        {"guided": Guide("regex", "[a-z]{40}"), "ignore_eos": False},
        {"temperature": 0, "speculative": 4},
    ],
)
@pytest.mark.parametrize("depth", ["shallow", "full"])
def test_the_nll_of_an_answer_is_that_of_every_16th_token_by_the_model_alone(
    sampling: dict[str, object], depth: str
) -> None:
    """`logprobs` are of the same logits: before penalties, grammars and filters."""
    for answer in run(MODEL, [asked(prompt, depth, **sampling) for prompt in PROMPTS]):
        nll = [-each.logprob for each in answer.logprobs][::16]
        assert len(nll) == 3
        told = signals(answer)
        assert told.answer_nll == pytest.approx(sum(nll) / 3, rel=1e-12)
        assert told.answer_nll_max == pytest.approx(max(nll), rel=1e-12)
        assert told.predicted_gaps == () and told.router_distance is None  # nobody decided


def test_signals_do_not_depend_on_the_batch(routed: Model) -> None:
    requests = [asked(prompt, "auto", temperature=0.9) for prompt in PROMPTS]
    alone = [signals(run(routed, [request])[0]) for request in requests]
    together = [
        signals(answer) for answer in run(routed, requests, max_batch=2, max_batch_tokens=2 + MODEL.config.page)
    ]
    for one, other in zip(alone, together, strict=True):
        assert one.answer_nll == pytest.approx(other.answer_nll, rel=1e-9)
        assert one.router_distance == pytest.approx(other.router_distance, rel=1e-5)
        assert one.predicted_gaps == pytest.approx(other.predicted_gaps, rel=1e-4)


def test_what_the_router_saw_and_predicted_is_told(routed: Model) -> None:
    """Against its own features of the whole prompt in one piece."""
    router = routed.router
    assert router is not None
    for answer, prompt in zip(run(routed, [asked(prompt, "auto") for prompt in PROMPTS]), PROMPTS, strict=True):
        ids = torch.tensor(routed.tokenizer.encode(prompt))
        first = MODEL.config.exits[0]
        states = routed.net(ids[None], exits=[first])[first][0]
        x = features(page_sums(routed.net, states, ids), states[-1], len(ids)).float()
        mean, quantile = router(x)
        told = signals(answer)
        assert told.prompt_nll == pytest.approx(float(x[-3]), rel=1e-4)
        assert told.predicted_gaps == pytest.approx(mean.tolist(), rel=1e-3)
        z = ((x - router.center) / router.spread)[torch.arange(len(x)) != len(x) - 3]  # it does not read the loss
        assert told.router_distance == pytest.approx(float((z * z).mean()), rel=1e-4)
        early = answer.depth < MODEL.config.layers
        bound = float(quantile[MODEL.config.exits.index(answer.depth)]) if early else 0.0
        assert told.router_bound == pytest.approx(bound, rel=1e-3)


@pytest.mark.parametrize("signals_asked", [False, True])
@pytest.mark.parametrize("nll", [False, True])
def test_the_head_runs_over_a_prompt_only_for_who_reads_its_loss(
    routed: Model, nll: bool, signals_asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that reads it, or a request whose signals are asked for. Depths and answers are the same, out of the prefix
    cache too, where pages of who did not want it have no loss."""
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(32, 2 * MODEL.config.width + 3, generator=draws)
    router = fit_router(MODEL.config, x, torch.rand(32, 2, generator=draws), steps=20, nll=nll)
    model = Model(MODEL.config, MODEL.net, Tokenizer.bytes_only(), router=router)
    ran: list[bool] = []

    def counted(*args: object) -> torch.Tensor:
        sums = page_sums(*args)  # type: ignore[arg-type]
        ran.append(bool(sums[:, -2].any()))
        return sums

    monkeypatch.setattr(runner, "page_sums", counted)
    engine = Engine(model, units=200)
    first, again = (
        engine.generate([replace(asked(PROMPTS[1], "auto"), signals=wanted)])[0] for wanted in (signals_asked, True)
    )
    assert ran[0] == (nll or signals_asked) and router.reads_nll == nll
    assert (first.depth, first.tokens) == (again.depth, again.tokens)


def test_the_distance_of_what_the_router_was_fitted_to_is_1(routed: Model) -> None:
    x = torch.randn(16, 2 * MODEL.config.width + 3, generator=torch.Generator().manual_seed(1))
    router = fit_router(MODEL.config, torch.cat([x, x, x, x]), torch.rand(64, len(MODEL.config.exits) - 1), steps=1)
    found = sum(router.distance(row) for row in x) / len(x)
    assert 0.7 < found < 1.5
    assert router.distance(x[0] + 10 * router.spread) > 50


@pytest.mark.parametrize("options", [{}, {"max_batch": 2, "max_batch_tokens": 2 + MODEL.config.page}])
def test_gaps_are_the_divergence_of_each_exit_along_full_depths_own_answer(options: dict[str, int]) -> None:
    """Against one pass of the whole network over prompt and answer, in any batch; and never where full depth does not run."""
    how = Sampling(temperature=0, max_tokens=12, speculative=0, ignore_eos=True)
    requests = [Request(prompt, how, "full", signals=True, gaps=True) for prompt in PROMPTS]
    plain = Request(PROMPTS[0], replace(how, max_tokens=30), "shallow", signals=True, gaps=True)
    *answers, shallow = run(MODEL, [*requests, plain], **options)
    assert signals(shallow).gaps == ()
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        ids = MODEL.tokenizer.encode(prompt)
        whole = torch.tensor([*ids, *answer.tokens[:-1]])
        states = MODEL.net(whole[None], exits=MODEL.config.exits)
        full, *early = (
            MODEL.net.head(states[e][0, len(ids) - 1 :], e).log_softmax(-1)
            for e in (MODEL.config.exits[-1], *MODEL.config.exits[:-1])
        )
        wanted = [float((full.exp() * (full - exit_)).sum(-1).mean()) for exit_ in early]
        assert min(wanted) > 1e-3 and signals(answer).gaps == pytest.approx(wanted, rel=1e-6)


def test_gaps_are_looked_at_only_where_they_are_asked_for(routed: Model) -> None:
    how = Sampling(temperature=0, max_tokens=4, speculative=0)
    asked_, not_ = run(routed, [Request(PROMPTS[0], how, "full", signals=True, gaps=gaps) for gaps in (True, False)])
    assert asked_.tokens == not_.tokens and signals(asked_).gaps and signals(not_).gaps == ()


@pytest.mark.parametrize(("asked_for", "budget", "told"), [(None, None, 0.05), (0.3, None, 0.3), (None, 0.5, None)])
def test_what_the_router_was_to_keep_is_told(
    routed: Model, asked_for: float | None, budget: float | None, told: float | None
) -> None:
    request = replace(asked(PROMPTS[0], "auto", speculative=0), quality_tolerance=asked_for)
    (answer,) = run(routed, [request], compute_budget=budget)
    assert signals(answer).tolerance == told


def test_drafts_that_stood_are_counted() -> None:
    (answer,) = run(EAGER, [asked(PROMPTS[0], temperature=0, speculative=4, max_tokens=30)], speculative_max_batch=8)
    engine = Engine(EAGER, units=200, speculative_max_batch=8)
    engine.generate([asked(PROMPTS[0], temperature=0, speculative=4, max_tokens=30)])
    assert signals(answer).drafts_accepted == engine.scheduler.metrics.drafts_accepted > 0


def test_nothing_is_told_unless_it_is_asked_for_and_tokens_are_the_same(routed: Model) -> None:
    with_them = run(routed, [asked(prompt, "auto") for prompt in PROMPTS])
    without = run(routed, [replace(asked(prompt, "auto"), signals=False) for prompt in PROMPTS])
    for one, other in zip(with_them, without, strict=True):
        assert one.tokens == other.tokens
        assert other.finished is not None and other.finished.signals is None
