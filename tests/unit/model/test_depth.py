import torch

from shoal import Model
from shoal.config import dump, load
from shoal.model.depth import Calibration, Router, features, fit_router, page_sums, realised


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


def test_budget_is_kept_on_average():
    config, x, gaps = synthetic()
    router = fit_router(config, x[:300], gaps[:300])
    for budget in (0.4, 0.6, 0.8):
        mean = sum(router.choose(row, budget=budget) for row in x) / len(x) / config.layers
        assert mean <= budget + 0.05


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
