import copy
import math

import pytest
import torch

from shoal import Model, presets
from shoal.config import dump, load
from shoal.errors import DataError
from shoal.model.depth import (
    TOLERANCES,
    Calibration,
    Router,
    _calibrate,
    features,
    fit_router,
    page_sums,
    realised,
)


def synthetic(n=400, seed=0):
    """Prompts whose first feature decides how much depth they need, and the gaps that follow from it."""
    config = Model.from_preset("test").config
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2 * config.width + 3, generator=g)
    hard = torch.sigmoid(3 * x[:, :1])
    gaps = hard * torch.tensor([0.4, 0.15]) + 0.01 * torch.randn(n, 2, generator=g)
    return config, x, gaps


def test_router_learns_and_keeps_its_promise():
    config, x, gaps = synthetic()
    router = fit_router(config, x[:300], gaps[:300])
    result = realised(router, x[300:], gaps[300:], tolerance=0.1)
    assert result["regret"] <= 0.1
    assert result["depth_share"] < 0.8  # the promise on the mean regret leaves room to save depth
    # against choosing at random with the same mean depth: the shallow picks are the easy prompts
    shallow = [router.choose(row, 0.1) == config.exits[0] for row in x[300:]]
    assert gaps[300:, 0][torch.tensor(shallow)].mean() < gaps[300:, 0].mean() / 2


def test_knobs_are_monotone_and_their_ends_are_definitions():
    config, x, gaps = synthetic()
    router = fit_router(config, x[:200], gaps[:200])
    for row in x[200:260]:
        depths = [router.choose(row, tolerance=t) for t in (0, 0.005, 0.01, 0.04, 0.1, 0.4, 2.0)]
        assert depths[0] == config.layers and depths == sorted(depths, reverse=True)
        spent = [router.choose(row, budget=b) for b in (1.0, 0.9, 0.65, 0.5, 0.3, 0.1)]
        assert spent[0] == config.layers and spent == sorted(spent, reverse=True)


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.55, 0.7, 0.83])
def test_17_a_budget_is_kept_on_prompts_that_calibration_never_saw(wide_router, budget):
    router, x, _ = wide_router
    depths = [router.choose(row, budget=budget) for row in x]
    assert sum(depths) / len(depths) / router.exits[-1] == pytest.approx(budget, abs=0.03)


@pytest.fixture(scope="module")
def wide_router():
    """A router, and prompts with their gaps that it has never seen."""
    config, x, gaps = synthetic(6000)
    return fit_router(config, x[:4000], gaps[:4000], steps=200), x[4000:], gaps[4000:]


def test_17_ends_of_the_knobs_are_full_depth_and_mean_depth_falls_between(wide_router):
    router, x, _ = wide_router
    for name, values in (("tolerance", (0, 0.01, 0.03, 0.1, 0.3, 1.0)), ("budget", (1, 0.9, 0.61, 0.6, 0.3, 0.05))):
        means = [sum(router.choose(row, **{name: value}) for row in x[:300]) / 300 for value in values]
        assert means[0] == router.exits[-1] and means == sorted(means, reverse=True) and means[-1] < means[0] / 2


def test_the_mean_regret_stays_within_the_tolerance(wide_router):
    """Conformal risk control: over many small calibration sets, the mean gap of fresh prompts is within the tolerance."""
    wide, x, gaps = wide_router
    router = copy.deepcopy(wide)
    found = {0.03: [], 0.1: [], 0.2: []}
    for start in range(0, 1200, 30):
        router.calibration = Calibration()
        _calibrate(router, x[start : start + 30], gaps[start : start + 30])
        for tolerance, regrets in found.items():
            regrets.append(realised(router, x[1200:1300], gaps[1200:1300], tolerance)["regret"])
    for tolerance, regrets in found.items():
        assert 0 < sum(regrets) / len(regrets) <= tolerance


def test_the_report_is_what_came_of_it_on_the_test_split():
    config, x, gaps = synthetic(400)
    router = fit_router(config, x, gaps, seed=5)
    held = torch.randperm(400, generator=torch.Generator().manual_seed(5))[300:]
    table = router.calibration
    assert table.report == realised(router, x[held], gaps[held])
    assert [row[0] for row in table.by_tolerance] == list(TOLERANCES)
    for tolerance, share, regret, violations in table.by_tolerance:
        depths = [router.choose(row, tolerance) for row in x[held]]
        lost = [0.0 if e == 4 else float(gaps[at, config.exits.index(e)]) for e, at in zip(depths, held, strict=True)]
        assert share == pytest.approx(sum(depths) / 400) and regret == pytest.approx(sum(lost) / 100, abs=1e-6)
        assert violations == pytest.approx(sum(gap > tolerance for gap in lost) / 100)
    for budget, share, regret in table.by_budget:
        assert share == pytest.approx(sum(router.choose(row, budget=budget) for row in x[held]) / 400)
        assert share <= budget + 0.15 and regret < 0.4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_features_that_are_not_finite_get_full_depth(wide_router, bad):
    router, x, _ = wide_router
    row = x[0].clone()
    row[3] = bad
    for knobs in ({"tolerance": 5.0}, {"budget": 0.1}, {}):
        assert router.choose(row, **knobs) == router.exits[-1]
    with pytest.raises(DataError, match="not finite"):
        fit_router(presets.get("test").model, torch.stack([row] * 20), torch.zeros(20, 2))
    with pytest.raises(DataError, match="prompts to fit the router: got 5"):
        fit_router(presets.get("test").model, x[:5], torch.zeros(5, 2))


def test_page_sums_of_a_prefix_do_not_change_with_what_follows():
    """The reason for sums by page: a prompt served from the prefix cache is routed exactly as a fresh one."""
    model = Model.from_preset("test", dtype="float64")
    page, tokens = model.config.page, torch.randint(9, 265, (45,))
    hidden = model.net(tokens[None], exits=(1,))[1][0]
    whole = page_sums(model.net, hidden, tokens)
    head = page_sums(model.net, hidden[: 3 * page], tokens[: 3 * page])
    rest = page_sums(model.net, hidden[3 * page :], tokens[3 * page :])
    pieces = torch.cat([head, rest])
    assert (pieces - whole).abs().max() < 1e-12
    assert (features(pieces, hidden[-1], 45) - features(whole, hidden[-1], 45)).abs().max() < 1e-12
    assert whole[:, -2].sum() > 0  # the exit-1 loss was sampled


def test_calibration_survives_its_file():
    config, x, gaps = synthetic(120)
    table = fit_router(config, x, gaps).calibration
    assert load(Calibration, dump(table)) == table


def test_an_uncalibrated_router_is_cautious():
    config = Model.from_preset("test").config
    row = torch.zeros(2 * config.width + 3)
    assert Router(config).choose(row) == config.layers
    assert Router(config).choose(row, tolerance=5.0) == config.layers
