"""Tasks whose levels are known and hidden, and what `shoal bench route` makes of a model that is trained on them."""

import io
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from shoal.bench import route_train
from shoal.bench.commands import bench
from shoal.bench.route import _NAMES, _beside, measured, route
from shoal.bench.route_tasks import FAMILIES, LEVELS, NAMES, VOCAB, WORDS, Asked, prompts, rows
from shoal.config import TrainConfig
from shoal.errors import ConfigError, UsageError
from shoal.evaluate.frontier import BUDGETS
from shoal.model.router import NLL
from shoal.progress import results
from shoal.train.optim import make_optimizer

NAMED = {number: word for word, number in WORDS.items()}


def said(ids: np.ndarray) -> list[str]:
    return [NAMED[int(token)] for token in ids]


def values(family: str, words: list[str]) -> dict[str, tuple[str, int]]:
    """What every name comes to, and in how many steps, worked out from an instance's words alone."""
    found: dict[str, tuple[str, int]] = {}
    for word in words:
        value, count = found.get(word[2], (word[2], 0))  # a name that was said before, or a value
        assert value not in NAMES
        if family == "arithmetic" and word[1] == ":":
            value = str((int(value) + int(word[4])) % 3)
        if family == "parity":  # of a list's first item its digit is said
            value = str((int(value) + (word[4] == "1")) % 2) if word[1] == ":" else str(int(word[2] == "1"))
        found[word[0]] = value, count + 1
    return found


def steps(family: str, words: list[str]) -> tuple[str, int]:
    """The answer and the number of steps of a prompt."""
    found = values(family, [word for word in words[1:] if "?" not in word])
    asked = [found[word[1]] for word in words if "?" in word]
    if family == "order":  # two of different sides, as far out
        assert len({value for value, _ in asked}) == 2 and len({count for _, count in asked}) == 1
    return asked[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_levels_are_what_the_words_say(family: str) -> None:
    asked = FAMILIES[family](np.random.default_rng(3), 60)
    for number in range(60):
        for question, answer, level in zip(
            asked.questions[number], asked.answers[number], asked.levels[number], strict=True
        ):
            words = said(np.concatenate([asked.instances[number], question]))
            assert steps(family, words) == (NAMED[int(answer)], int(level)), words
    assert set(asked.levels.flatten().tolist()) == set(range(1, LEVELS + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_answers_and_levels_that_their_words_say(family: str) -> None:
    for row, answer, level in zip(*prompts(family, np.random.default_rng(6), 60), strict=True):
        words = said(row)
        if family == "variables":  # what is asked about is what the last line reads
            words = [*words, f"?{words[-1][2]}"]
        assert steps(family, words) == (NAMED[int(answer)], int(level)), words


@pytest.mark.parametrize("family", FAMILIES)
def test_neither_length_nor_wording_tells_the_level(family: str) -> None:
    """One length; and at every level as many different words, of as many kinds, the name that is asked about as often, and as
    many words of a kind at every place: the last line of a program once said at level 1 a digit, and a name at all others."""
    ids, _, levels = prompts(family, np.random.default_rng(4), 600)
    assert ids.shape == (600, ids.shape[1])
    shapes: dict[int, set[tuple[object, ...]]] = {}
    for row, level in zip(ids, levels.tolist(), strict=True):
        some = said(row)
        names = Counter(letter for word in some[1:] if word[0] != "?" for letter in word if letter.isalpha())
        asked = [names[word[1]] for word in some if word[0] == "?"] or [names[some[-1][0]]]
        shapes.setdefault(level, set()).add((tuple(sorted(names.values())), tuple(asked)))
    assert len({frozenset(shape) for shape in shapes.values()}) == 1 and all(len(one) == 1 for one in shapes.values())
    # how the words are shared out over levels is what it is over levels that are dealt anew; so are kinds of words by place
    kinds = np.array([_kind(NAMED.get(token, "")) for token in range(VOCAB)])[ids]
    counted = (
        [np.bincount(row, minlength=VOCAB) for row in ids],
        (kinds[..., None] == np.arange(6)).reshape(len(ids), -1),
    )
    for bags in map(np.asarray, counted):
        draws = np.random.default_rng(0)
        by_chance = [_spread(bags, draws.permutation(levels)) for _ in range(200)]
        assert _spread(bags, levels) <= np.mean(by_chance) + 4 * np.std(by_chance)


def _kind(word: str) -> int:
    """Of a word without its name: a name, a value, or a name and a digit."""
    last = word[-1:]
    if len(word) < 2 or word[1] not in "=:":
        return 0
    return 3 + int(last) if word[1] == ":" else 1 + (last in "012<>")


def _spread(bags: np.ndarray, levels: np.ndarray) -> float:
    """The chi-square of words [n, V] by level [n]."""
    table = np.stack([bags[levels == level].sum(0) for level in range(1, LEVELS + 1)])
    table = table[:, table.sum(0) > 0].astype(float)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_training_rows_hold_questions_without_answers(family: str) -> None:
    asked = FAMILIES[family](np.random.default_rng(5), 4)
    tokens, targets = rows(asked)
    assert tokens.shape == targets.shape and tokens.max() < VOCAB
    for number in range(4):
        inside = asked.instances.shape[1]
        at = np.flatnonzero(targets[number] >= 0)
        traced, at = at[at < inside], at[at >= inside]
        words = said(tokens[number, 1:inside])
        for place, word in enumerate(words, 1):  # what a fact comes to, from those before it
            assert NAMED[int(targets[number, place])] == values(family, words[:place])[word[0]][0]
        assert len(traced) == inside - 1
        assert targets[number, at].tolist() == asked.answers[number].tolist()
        assert tokens[number, at].tolist() == asked.questions[number, :, -1].tolist()
        assert not set(tokens[number, inside:]) & set(asked.answers[number].tolist())


def test_a_padded_batch_has_no_targets_and_no_documents_in_its_padding() -> None:
    config = route_train.config_of("narrow")
    made = [FAMILIES[family](np.random.default_rng(1), 3) for family in ("variables", "order")]
    batch = route_train.batch(config, made)
    longest = rows(made[1])[0].shape[1]
    assert batch.tokens.shape == (6, longest)
    short = rows(made[0])[0].shape[1]
    assert (batch.docs[:3, :short] == 0).all() and (batch.docs[:3, short:] == -1).all()
    assert (batch.targets[:3, short:] == -1).all() and (batch.docs[3:] == 0).all()


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="shape"):
        route_train.config_of("huge")


@pytest.mark.parametrize("families", [["lookup"], ["lookup", "arithmetic"]])
def test_tables_in_a_file_show_each_policy_of_each_family_and_seed_in_full(
    families: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def apart(name: str, seed: int) -> dict[str, float]:
        return {"gap": _NAMES.index(name) / 100 + seed, "low": -0.125, "high": 0.125}

    losses = {name: _NAMES.index(name) / 1000 for name in _NAMES}
    runs = []
    for seed in range(3):
        lost = {"mean": losses, "behind": {name: apart(name, seed) for name in _NAMES if name != "router"}}
        of = {family: {"nats": lost, "missed": lost} for family in [*families, "all"]}
        runs.append({"exact_match": dict.fromkeys(families), "families": of})
    monkeypatch.setattr("sys.stdout", io.StringIO())
    results().print(_beside(runs))
    printed = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert "…" not in printed
    found = re.findall(r"^ *(\w+) +(\w+(?: look)?) +(0\.\d+)", printed, re.MULTILINE)
    shown = [*families, *["all"] * (len(families) > 1)]
    assert found == [(family, name, f"{losses[name]:.3f}") for family in shown for name in _NAMES]
    for name in set(_NAMES) - {"router"}:
        for seed in range(3):
            assert printed.count(f" {apart(name, seed)['gap']:.3f} (-0.125 to 0.125)") == 2 * len(shown)


@pytest.mark.drill
def test_the_benchmark_from_training_to_its_line_of_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = {"seeds": 1, "steps": 3, "families": ("lookup", "parity"), "fit": 30, "test": 30, "keep": tmp_path}
    route(Console(), **how)
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    (run,) = first["runs"]
    assert set(run["exact_match"]) == {"lookup", "parity"} and set(run["families"]) == {"lookup", "parity", "all"}
    counted = sum(row["full"]["prompts"] for row in run["exact_match"]["lookup"].values())
    assert counted == 30
    behind = run["families"]["lookup"]["nats"]["behind"]
    assert set(behind) == {"length", "domain", "random", "oracle", "second look"}
    for found in run["families"]["all"]["nats"], run["families"]["all"]["missed"]:
        assert all(row["low"] < row["high"] for row in found["at"]["random"])
        for name, line in found["at"].items():
            assert [row["flops_share"] for row in line] == list(BUDGETS)
            assert all(row["low"] is None or row["low"] <= row["gap"] <= row["high"] for row in line)
            assert found["mean"][name] == pytest.approx(sum(row["gap"] for row in line) / len(line))
    assert run["tolerance"] == 0.05 and run["calibration"]["all together"]["prompts"] == 60
    (kept,) = tmp_path.iterdir()
    stamp = kept.stat().st_mtime_ns
    route(Console(), **how)  # goes on from what is kept
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert kept.stat().st_mtime_ns == stamp and again["runs"][0]["families"] == run["families"]


def test_training_ends_with_its_updates_or_with_its_minutes(tmp_path: Path) -> None:
    updates, minutes = route_train.Length(10), route_train.Length(10, 2.0)
    assert [updates.done(n, 1e9) for n in (0, 4, 9)] == [0.1, 0.5, 1.0]
    assert [minutes.done(10**6, seconds) for seconds in (0, 30, 120, 500)] == [0, 0.25, 1, 1]
    assert (str(updates), str(minutes)) == ("10 updates", "2 minutes")
    assert str(route_train.Length(10, rows=6)) == "10 updates of 6 rows", (
        "another model than that of as many rows as usual"
    )
    drawn = list[int]()

    def variables(draws: np.random.Generator, count: int) -> Asked:
        drawn.append(count)
        return FAMILIES["variables"](draws, count)

    route_train.trained("test", 5, route_train.Length(2, rows=3), {"variables": variables}, None, print)
    assert drawn == [3, 3]
    how = ("test", 5, route_train.Length(1, 1e-4), {"variables": FAMILIES["variables"]}, tmp_path, print)
    net, count = route_train.trained(*how)
    again, read = route_train.trained(*how)
    assert count == read >= 1
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), again.parameters(), strict=True))


def test_a_shape_is_trained_at_its_own_rate_and_at_another_it_is_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = list[float]()

    def optimizer(model: torch.nn.Module, train: TrainConfig) -> Any:
        rates.append(train.learning_rate)
        return make_optimizer(model, train)

    monkeypatch.setattr(route_train, "make_optimizer", optimizer)
    monkeypatch.setattr(route_train, "RATES", {"test": 1e-4})
    how = (5, route_train.Length(2, rows=3), {"variables": FAMILIES["variables"]}, tmp_path, print)
    route_train.trained("test", *how)
    monkeypatch.setattr(route_train, "RATES", {})
    for _ in range(2):
        route_train.trained("test", *how)
    assert rates == [1e-4, route_train.TRAIN.learning_rate], "the last is read from where it was kept"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.drill
def test_one_seed_for_minutes_says_which_and_how_many_updates(capsys: pytest.CaptureFixture[str]) -> None:
    route(Console(), shape="test", seeds=1, seed=7, minutes=1e-4, families=("variables",), fit=30, test=30)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    (run,) = said["runs"]
    assert run["seed"] == 7 and run["updates"] >= 1 and (said["steps"], said["minutes"]) == (None, 1e-4)
    assert [row["exit"] for row in run["families"]["variables"]["nats"]["fixed"]] == ["shallow", "middle", "full"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--minutes", "0"),
        ("--minutes", "inf"),
        ("--minutes", "nan"),
        ("--seeds", "0"),
        ("--steps", "0"),
        ("--rows", "0"),
        ("--seed", "-1"),
    ],
)
def test_what_is_no_length_of_training_is_refused(option: str, value: str) -> None:
    found = CliRunner().invoke(bench, ["route", option, value])
    assert isinstance(found.exception, UsageError) and option in str(found.exception)


def test_hits_and_gaps_are_those_of_the_exits(tmp_path: Path) -> None:
    net, updates = route_train.trained(
        "narrow", 0, route_train.Length(1), {"lookup": FAMILIES["lookup"]}, tmp_path, print
    )
    assert updates == 1
    found = measured(net, np.random.default_rng(9), ("lookup",), 5)
    ids, answers, levels = (torch.from_numpy(some) for some in prompts("lookup", np.random.default_rng(9), 5))
    assert torch.equal(found.levels, levels)
    losses = []
    for place, layers in enumerate(net.config.exits):
        says = net.head(net(ids, exits=[layers])[layers][:, -1], layers).log_softmax(-1)
        assert torch.equal(found.hits[:, place], says.argmax(-1) == answers)
        losses.append(-says[torch.arange(5), answers])
    for place in range(2):
        torch.testing.assert_close(found.prompts.gaps[:, place], losses[place] - losses[-1])
    # the second look sees the states after group 2, and neither the head's losses
    assert not found.seen[:, NLL].any() and not found.prompts.features[:, NLL].any()
    width, states = net.config.width, net(ids, exits=[net.config.exits[1]])[net.config.exits[1]]
    torch.testing.assert_close(found.seen[:, :width], states.mean(1))
    torch.testing.assert_close(found.seen[:, width : 2 * width], states[:, -1])
