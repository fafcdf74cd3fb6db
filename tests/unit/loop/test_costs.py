"""What a candidate's router may lose and run, beside a stable version that keeps its promise or breaks it: figures made up,
verdicts by hand and by drawing.

A model of four layers with exits at 1, 2 and 4, whose router promises 0.05 nats a token.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shoal import Model
from shoal.config import ModelConfig
from shoal.data.chats.heldout import Question
from shoal.engine.engine import Engine
from shoal.engine.events import Completion, Request
from shoal.engine.plan import Outcome, Plan
from shoal.errors import EngineDeadError
from shoal.evaluate.prompts import Heldout, Prompts
from shoal.inputs.chat import Encoded
from shoal.loop import costs
from shoal.loop.paired import FAIL, INCONCLUSIVE, PASS, Check
from shoal.model.router import Router
from tests.clocks import tells

EXITS, PROMISED, COUNT, DRAWS = (1, 2, 4), 0.05, 200, 400


def routed(depths: Sequence[int], gaps: np.ndarray) -> costs._Routed:
    """Questions that run `depths`, with what the two early exits lose, [n, 2]."""
    rows = np.concatenate([gaps, np.zeros((len(gaps), 1))], axis=1)
    lost = [float(row[EXITS.index(depth)]) for row, depth in zip(rows, depths, strict=True)]
    return costs._Routed([depth / EXITS[-1] for depth in depths], lost, list(range(len(depths))), rows.tolist())


def of(*mean: float, scatter: float = 0.01, count: int = COUNT) -> np.ndarray:
    """Gaps of these means, give or take `scatter`."""
    return np.array(mean) + scatter * np.linspace(-1, 1, count)[:, None]


def some(share: float, deep: int = 4, shallow: int = 2, count: int = COUNT) -> list[int]:
    """Depths of which a `share` is deep."""
    return [deep] * round(share * count) + [shallow] * (count - round(share * count))


def layers(mine: Sequence[int], gaps: np.ndarray, its: np.ndarray, stable: Sequence[int] | None = None) -> Check:
    known = routed([1] * len(its) if stable is None else stable, its)
    return costs._layers(routed(mine, gaps), known, EXITS, PROMISED, PROMISED)[0]


@pytest.mark.parametrize(
    ("mine", "gaps", "its", "status", "says"),
    [
        # the second exit keeps what the first, which the stable version takes, does not: a half of the layers, and a tenth
        (some(0.0), of(0.12, 0.02), of(0.12, 0.02), PASS, "at 2 of 4 layers for all it does not: at most 55%"),
        (some(0.09), of(0.12, 0.02), of(0.12, 0.02), INCONCLUSIVE, "55%"),
        (some(0.2), of(0.12, 0.02), of(0.12, 0.02), FAIL, "55%"),
        # by its own exits, which it spoilt, the candidate would have had all layers
        (some(0.5), of(0.4, 0.09), of(0.12, 0.02), FAIL, "55%"),
        # the second exit loses 0.045, give or take 0.012: it may keep the promise
        (
            some(0.0),
            of(0.12, 0.02),
            of(0.12, 0.045, scatter=0.15),
            PASS,
            "at 2 of 4 layers for all it may not, at full",
        ),
        (some(0.5), of(0.12, 0.02), of(0.12, 0.045, scatter=0.15), INCONCLUSIVE, "55%"),
        # no depth but full keeps it: all layers are the bound, and one more
        (
            some(0.9),
            of(0.12, 0.07),
            of(0.12, 0.07),
            PASS,
            "at full depth alone it does not: at most 100% of the layers",
        ),
        (some(1.0), of(0.12, 0.07), of(0.12, 0.07), FAIL, "full depth for every question"),
        (some(0.995), of(0.12, 0.07), of(0.12, 0.07), INCONCLUSIVE, "at most 100%"),
        # who does not keep the promise has no more layers than the stable version
        (some(0.0), of(0.12, 0.07), of(0.12, 0.07), FAIL, "of a candidate that is shown to keep its promise"),
        (some(0.0), of(0.12, 0.045, scatter=0.15), of(0.12, 0.02), INCONCLUSIVE, "of a candidate that is shown"),
    ],
)
def test_what_mends_a_promise_runs_no_deeper_than_the_shallowest_depth_that_keeps_it(
    mine: list[int], gaps: np.ndarray, its: np.ndarray, status: str, says: str
) -> None:
    found = layers(mine, gaps, its)
    assert (found.status, found.items) == (status, COUNT) and says in found.told, found.told
    assert found.value == pytest.approx(np.mean(mine)), "beside the stable version, which takes the first exit"


def test_what_the_stable_version_runs_is_not_too_much_for_another() -> None:
    """It takes the first exit where that loses, and the second where it would not: the first for all would keep its promise."""
    its = np.where(np.arange(COUNT)[:, None] < 60, [0.3, 0.0], [-0.1, 0.0]) + of(0.0, 0.0)
    stable = [1] * 60 + [2] * 140
    assert costs._shallowest(routed(stable, its), EXITS, PROMISED)[0] == 1
    for deep, status in ((140, PASS), (160, PASS), (200, FAIL)):
        found = layers([1] * (COUNT - deep) + [2] * deep, of(0.1, 0.02), its, stable)
        assert found.status == status and found.limit == pytest.approx(costs.MOST_MORE)


def drawn(draw: Callable[[np.random.Generator], Check]) -> dict[str, float]:
    """How often each status came of `DRAWS` draws."""
    rng = np.random.default_rng(0)
    found = [draw(rng).status for _ in range(DRAWS)]
    return {status: found.count(status) / DRAWS for status in (PASS, INCONCLUSIVE, FAIL)}


@pytest.mark.drill
def test_one_in_forty_is_judged_by_a_depth_that_does_not_keep_the_promise_or_not_by_one_that_does() -> None:
    """Losses that scatter by 0.1 from question to question; where a depth loses just what is promised 2.5 % are judged wrongly
    in either direction (of 400 draws at most 4.5 %, two and a half standard errors above)."""

    def gaps(rng: np.random.Generator, second: float) -> np.ndarray:
        return np.array([0.15, second]) + 0.1 * rng.standard_normal((COUNT, 2))

    def case(second: float, share: float) -> dict[str, float]:
        return drawn(lambda rng: layers(some(share), of(0.12, 0.02), gaps(rng, second)))

    assert case(PROMISED, 0.5)[PASS] <= 0.045 and case(PROMISED, 0.5)[FAIL] <= 0.045
    assert case(0.02, 0.5)[FAIL] >= 0.9 and case(0.09, 0.5)[PASS] >= 0.9

    def deeper(rng: np.random.Generator) -> Check:
        """A tenth of its questions at full depth are just what is allowed: of so few the normal interval is a little narrow."""
        mine = np.where(rng.random(COUNT) < 0.1, 4, 2).tolist()
        return layers(mine, of(0.12, 0.02), gaps(rng, 0.0))

    assert drawn(deeper)[PASS] <= 0.085


def test_what_is_lost_on_what_is_new_is_no_leave_to_lose_it_on_what_is_known() -> None:
    """The stable version loses 0.5 on questions that it does not know, and on those that it does what it promises, or 0.08."""
    for known, own, status in ((0.02, 0.02, FAIL), (0.08, 0.06, FAIL), (0.08, 0.08, FAIL)):
        its = np.concatenate([of(known, 0.0), of(0.5, 0.0)])
        mine = np.concatenate([of(own, 0.0), of(0.3, 0.0)])
        assert loss(mine, its).status == status
    same = np.concatenate([of(0.08, 0.0), of(0.08, 0.0)])
    assert loss(same, same).status == PASS, "no worse than what serves"
    assert loss(of(0.08, 0.0), of(0.08, 0.0), bar=COUNT).used == pytest.approx(0.0)
    assert loss(of(0.02, 0.0), of(0.08, 0.0), bar=COUNT).used is None, "by its promise, and beside nobody"


def loss(mine: np.ndarray, its: np.ndarray, bar: int = COUNT) -> Check:
    return costs._loss(routed([1] * len(mine), mine), routed([1] * len(its), its), bar, PROMISED, PROMISED)


def test_questions_of_two_people_show_little() -> None:
    """Of 200 questions a half of each; one of them loses 0.04, the other 0.02."""
    gaps = np.repeat([[0.04, 0.0], [0.02, 0.0]], 100, axis=0)
    two = costs._Routed(
        [0.25] * 200, gaps[:, 0].tolist(), [0] * 100 + [1] * 100, [[*row, 0.0] for row in gaps.tolist()]
    )
    assert costs._loss(two, two, 200, PROMISED, PROMISED).status == INCONCLUSIVE
    each = routed([1] * 200, gaps)
    assert costs._loss(each, each, 200, PROMISED, PROMISED).status == PASS


@pytest.mark.parametrize(
    ("value", "high", "status"),
    [
        (0.040, 0.050, "pass"),
        (0.049, 0.056, "inconclusive"),
        (0.052, 0.059, "fail"),
        (0.061, 0.082, "fail"),
        (float("nan"), float("nan"), "fail"),
    ],
)
def test_a_router_s_promise_is_kept_where_the_upper_end_of_its_loss_is_within_it(
    value: float, high: float, status: str
) -> None:
    assert costs.kept(value, high, 0.05) == status


class Always(Router):
    """Gives all prompts one depth."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__(config)
        self.depth = depth

    def choose(self, *_: object) -> int:  # type: ignore[override]
        return self.depth


def losing(*lost: float) -> Callable[[object, dict[str, list[Heldout]], int | None], Prompts]:
    """Measures that `lost` is lost at the two early exits, give or take 0.01 a question."""

    def measured(net: object, rows: dict[str, list[Heldout]], after: int | None) -> Prompts:
        (some,) = rows.values()
        gaps = torch.tensor(lost) + 0.01 * torch.linspace(-1, 1, len(some))[:, None]
        return Prompts(
            torch.zeros(len(some), 1), gaps, *torch.ones(2, len(some)), ("chat",) * len(some), torch.arange(len(some))
        )

    return measured


def test_a_first_router_must_keep_its_promise_too_and_no_looser_one(monkeypatch: pytest.MonkeyPatch) -> None:
    known, model = Model.from_preset("test"), Model.from_preset("test")
    model.router = Always(model.config, 1)
    one = Encoded([1], [], [True])
    asked = {"chat": [Question(one, one, "", "chat", 0)] * 80}
    for lost, tolerance, status in ((0.02, 0.05, "pass"), (0.3, 0.05, "fail"), (0.3, 1.0, "fail")):
        model.router.calibration.default_tolerance = tolerance
        monkeypatch.setattr(costs, "measured", losing(lost, 0.0))
        found = {check.name: check.status for check in costs.router(model, known, asked)[0]}
        assert found == {"router, loss": status, "router, layers": "pass"}


def test_a_handful_of_frozen_questions_is_no_measure_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Model.from_preset("test") for _ in range(2)]
    for model, depth in zip(models, (2, 1), strict=True):
        model.router = Always(model.config, depth)
    monkeypatch.setattr(costs, "measured", losing(0.02, 0.01))
    one = Encoded([1], [], [True])
    few, many = ({"chat": [Question(one, one, "", "chat", 0)] * count} for count in (3, 80))
    (check,) = costs.router(models[0], models[1], few, many)[0]
    assert check.status == "inconclusive" and check.needed == costs.LEAST and "3 frozen questions" in check.told
    assert [check.status for check in costs.router(models[0], models[1], {}, many)[0]] == ["pass", "fail"]


@pytest.mark.parametrize(
    ("lost", "depths", "promised", "wanted"),
    [
        # the stable version beside itself, which breaks its promise: no worse, and no reason to be released
        ((0.077, 0.02), (1, 1), (0.05, 0.05), {"loss": "pass", "better": "fail", "layers": "pass"}),
        ((0.03, 0.02), (1, 1), (0.05, 0.05), {"loss": "pass", "better": "fail", "layers": "pass"}),
        # the router that mends it runs deeper, and one that loses more than it is none
        ((0.12, 0.02), (2, 1), (0.05, 0.05), {"loss": "pass", "better": "pass", "layers": "pass"}),
        ((0.07, 0.09), (2, 1), (0.05, 0.05), {"loss": "fail", "better": "fail", "layers": "fail"}),
        # one that loses less, but more than is promised, mends nothing: it has no more layers than the stable version
        ((0.12, 0.09), (2, 1), (0.05, 0.05), {"loss": "pass", "better": "pass", "layers": "fail"}),
        # what keeps its promise is a measure
        ((0.03, 0.02), (2, 1), (0.05, 0.05), {"loss": "pass", "better": "pass", "layers": "fail"}),
        ((0.09, 0.02), (1, 2), (0.05, 0.05), {"loss": "fail", "better": "fail", "layers": "pass"}),
        ((float("nan"), 0.02), (1, 2), (0.05, 0.05), {"loss": "fail", "better": "fail", "layers": "pass"}),
        # full depth for all mends nothing that a router is for, and a promise of one's own makes no other broken or kept
        ((0.12, 0.02), (4, 1), (0.05, 0.05), {"loss": "pass", "better": "pass", "layers": "fail"}),
        ((0.03, 0.02), (4, 1), (0.001, 0.05), {"loss": "pass", "better": "pass", "layers": "fail"}),
        ((0.03, 0.02), (2, 1), (0.01, 0.05), {"loss": "fail", "better": "pass", "layers": "fail"}),
        ((0.50, 0.02), (1, 2), (1.0, 0.05), {"loss": "fail", "better": "fail", "layers": "pass"}),
    ],
)
def test_beside_a_stable_version_that_breaks_its_promise_what_mends_it_alone_runs_deeper(
    lost: tuple[float, float],
    depths: tuple[int, int],
    promised: tuple[float, float],
    wanted: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`lost` at the two early exits, give or take 0.01 a question; a candidate of the first of the `depths` and `promised`."""
    models = [Model.from_preset("test") for _ in depths]
    assert models[0].config.exits == (1, 2, 4)
    for model, depth, tolerance in zip(models, depths, promised, strict=True):
        model.router = Always(model.config, depth)
        model.router.calibration.default_tolerance = tolerance

    monkeypatch.setattr(costs, "measured", losing(*lost))
    monkeypatch.setattr(costs, "_seconds", lambda *_: 1.0)
    one = Encoded([1], [], [True])
    asked = {"chat": [Question(one, one, "", "chat", 0)] * 80}
    found = {check.name: check.status for check in costs.checks(*models, asked, asked, alone=True)}
    assert found == {f"router, {name}": status for name, status in wanted.items()} | {"time a token": "pass"}


@pytest.mark.parametrize(("lost", "status"), [((0.12, 0.02), PASS), ((0.03, 0.02), FAIL)])
def test_time_is_held_to_the_depth_that_the_layers_are(
    lost: tuple[float, float], status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [Model.from_preset("test") for _ in range(2)]
    for model, depth in zip(models, (2, 1), strict=True):
        model.router = Always(model.config, depth)
    monkeypatch.setattr(costs, "measured", losing(*lost))

    def seconds(engine: Engine, prompts: object, depth: costs.Depth) -> float:
        return 1.5 if engine.model is models[0] else {"auto": 1.0, 2: 1.45}[depth]

    monkeypatch.setattr(costs, "_seconds", seconds)
    one = Encoded([1], [], [True])
    check = costs.checks(models[0], models[1], {"chat": [Question(one, one, "", "chat", 0)] * 80})[-1]
    assert check.status == status and ("at 2 of 4 layers" in check.told) == (status == PASS)


@pytest.mark.parametrize("lost", [float("nan"), float("inf")])
def test_what_is_no_number_fails_and_can_be_written_down(lost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Model.from_preset("test") for _ in range(2)]
    for model, depth in zip(models, (1, 2), strict=True):
        model.router = Always(model.config, depth)
    monkeypatch.setattr(costs, "measured", losing(lost, 0.02))
    monkeypatch.setattr(costs, "_seconds", lambda *_: 1.0)
    one = Encoded([1], [], [True])
    found = costs.checks(*models, {"chat": [Question(one, one, "", "chat", 0)] * 80}, alone=True)
    assert {check.name: check.status for check in found[:2]} == {"router, loss": FAIL, "router, better": FAIL}
    json.dumps([asdict(check) for check in found], allow_nan=False)


class ByLength(Router):
    """Gives long prompts full depth, and all others the first exit."""

    def choose(self, x: torch.Tensor, *_: object) -> int:  # type: ignore[override]
        return self.exits[-1] if x[-2] > np.log(20) else self.exits[0]


@pytest.mark.drill
def test_turns_of_mixed_depths_are_alike_and_buy_nothing_with_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of eight answers run deep. With the machine's clock the other six have steps of their own; and prompts that the
    prefix cache has are neither read nor looked at by the router."""
    models = [Model.from_preset("test") for _ in range(2)]
    for model in models:
        model.router = ByLength(model.config)
    prompts = [Encoded([9 + number] * (40 if number < 2 else 16), [], [False]) for number in range(8)]
    asked = {"chat": [Question(prompt, prompt, "", "chat", 0) for prompt in prompts]}
    threads = torch.get_num_threads()
    turns, seen = list[list[tuple[bool, int, int]]](), list[tuple[bool, int, int]]()

    class Seen(Engine):
        def forget_prompts(self) -> None:
            assert torch.get_num_threads() == 1, "those that wait for others would spin"
            seen.clear()
            super().forget_prompts()

        def generate(self, requests: Sequence[Request]) -> list[Completion]:  # type: ignore[override]
            run = self.runner.run

            def looked_at(plan: Plan) -> Outcome:
                seen.append((plan.shallow, sum(work.count for work in plan.works), len(plan.decisions)))
                return run(plan)

            self.runner.run = looked_at  # type: ignore[method-assign]
            done = super().generate(requests)
            self.runner.run = run  # type: ignore[method-assign]
            turns.append(seen.copy())
            return done

    monkeypatch.setattr(costs, "Engine", Seen)
    torch.set_num_threads(2)
    try:
        assert costs.speed(*models, asked).items >= 7
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert len(turns) >= 16 and all(turn == turns[0] for turn in turns)
    decided, rest, *decode = turns[0]
    assert decided == (False, 2 * 40 + 6 * 16, 8) and not rest[0]
    assert decode == [(False, 8, 0)] * (costs.TOKENS - 1)


class Says:
    """An engine of 64 tokens of context, whose answers are `share` as long as they may be, and take a second each."""

    def __init__(self, share: float) -> None:
        self.config, self._share = SimpleNamespace(context=64), share
        self.asked, self.seconds = list[int](), 0

    def forget_prompts(self) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked += [request.sampling.max_tokens for request in requests]
        self.seconds += len(requests)
        return [Completion([1] * int(most * self._share)) for most in self.asked[-len(requests) :]]


def test_time_is_a_token_s_whatever_the_answers_come_to(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [[Encoded([1] * 8, [], [False] * 8), Encoded([1] * 60, [], [False] * 60)]]
    found = {}
    for share in (1.0, 0.5):
        engine = Says(share)
        tells(monkeypatch, "shoal.loop.costs", process_time=lambda engine=engine: engine.seconds)
        found[share] = costs._seconds(engine, prompts, "auto")  # type: ignore[arg-type]
        assert engine.asked == [costs.TOKENS, 4], (
            "of a prompt that nearly fills the context as many as there is room for"
        )
    assert found == {1.0: 2 / 36, 0.5: 2 / 18}, "one that breaks off is no quicker for it"
    with pytest.raises(EngineDeadError):
        costs._seconds(Says(0.0), prompts, "auto")  # type: ignore[arg-type]
