"""The gate on real models that really answer: what a good candidate passes, and what each bad one is stopped by.

The models are random and say nonsense. The suites take what one of them answers as right, so it is right in everything.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model, presets
from shoal.api.requests import guide_of
from shoal.cli import main
from shoal.data.batches import spaced
from shoal.data.chats.heldout import Question, questions
from shoal.engine.engine import Engine
from shoal.engine.events import Completion, Finished, Guide, Request, Sampling
from shoal.errors import DataError, RequestError, ResourceError
from shoal.evaluate.prompts import Heldout, measured
from shoal.inputs.chat import DEFAULT_TEMPLATE, Encoded, encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop import costs
from shoal.loop.gate import Verdict, gate
from shoal.loop.suites import USES, freeze, looked_at, read, tasks, use
from shoal.model.net import Net
from shoal.model.router import NEVER, fit_router
from tests.corpus import write_corpus

MOST_TOKENS = 8  # of an answer; more of it says no more here
BROKEN = Finished("broken", "error", error=RequestError("logits are not finite"))
ASKED = [f"{word} {number}?" for number in range(70) for word in ("Where is", "Who has", "What costs", "How long")]


def saved(folder: Path, model: Model) -> Path:
    model.save(folder)
    return folder


def changed(noise: float, seed: int = 1) -> Model:
    """The stable model with something added to all weights."""
    model, draws = Model.from_preset("test"), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.net.parameters():
            weight.add_(noise * weight.std().nan_to_num() * torch.randn(weight.shape, generator=draws))
    return model


def answers(model: Model, asked: list[str]) -> list[str]:
    sampling = Sampling(temperature=0.0, max_tokens=MOST_TOKENS)
    prompts = [
        encode_chat([{"role": "user", "content": text}], model.tokenizer, model.config, template=model.chat_template)
        for text in asked
    ]
    return [done.text for done in Engine(model).generate([Request(prompt, sampling) for prompt in prompts])]


def write(path: Path, asked: list[str], right: list[str]) -> None:
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": said}]}
        for text, said in zip(asked, right, strict=True)
        if said.strip()
    ]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def short(untimed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.loop.gate.MOST_TOKENS", MOST_TOKENS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stable, better (that answers another way), and suites: shop and safety, in which stable is right where both agree or
    all through, and recent, in which better is."""
    folder = tmp_path_factory.mktemp("gate")
    stable, other = Model.from_preset("test"), changed(0.3)
    saved(folder / "stable", stable)
    saved(folder / "better", other)
    old, new = answers(stable, ASKED), answers(other, ASKED)
    write(folder / "kept" / "shop.jsonl", ASKED, old)
    write(folder / "kept" / "safety-shop.jsonl", ASKED[:40], old[:40])
    freeze(folder / "kept")
    write(folder / "won" / "recent-shop.jsonl", ASKED, new)
    freeze(folder / "won")
    write(folder / "few" / "shop.jsonl", ASKED[:30], old[:30])
    freeze(folder / "few")
    return folder


def judged(place: Path, candidate: Path, suites: str, **more: object) -> tuple[Verdict, dict[str, str]]:
    found = gate(candidate, place / "stable", place / suites, **more)
    return found, {check.name: check.status for check in found.checks}


def test_the_same_model_loses_nothing_and_has_no_reason_to_be_released(place: Path) -> None:
    found, checks = judged(place, place / "stable", "kept", need_recent=False)
    assert found.passed and found.verdict == "pass"
    assert checks["shop, chat"] == checks["safety-shop, chat"] == checks["tokens an answer"] == "pass"
    found, checks = judged(place, place / "stable", "kept")
    assert not found.passed and found.verdict == "inconclusive" and checks["recent"] == "inconclusive"
    found, checks = judged(place, place / "stable", "won")
    assert found.verdict == "fail" and checks["recent-shop, chat"] == "fail"


def test_one_that_is_better_at_what_is_new_passes_there(place: Path) -> None:
    found, checks = judged(place, place / "better", "won")
    assert found.passed and checks["recent-shop, chat"] == "pass"
    assert checks["frozen"] == checks["safety"] == "skipped", "that nothing else was asked is said"
    (check,) = (check for check in found.checks if check.name.startswith("recent"))
    assert check.low is not None and check.low > 0 and check.items >= 200


def test_one_that_forgot_is_refused_by_name(place: Path) -> None:
    """It answers otherwise what the stable version answered right."""
    found, checks = judged(place, place / "better", "kept", need_recent=False)
    assert found.verdict == "fail" and checks["shop, chat"] == "fail" and checks["safety-shop, chat"] == "fail"
    assert "shop, chat" in found.sentence


def test_tasks_are_those_of_what_is_known_and_not_of_what_is_new_or_must_be_safe(place: Path) -> None:
    assert tasks(place / "kept") == {"chat"} and tasks(place / "won") == set()
    with pytest.raises(DataError, match="no frozen suites"):
        tasks(place)


def test_both_are_guided_as_a_service_guides_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In calls by the schema of a strict tool; by a format of the row; a chat with neither, and one that no service takes, by
    nothing."""
    order = {"type": "string", "enum": ["A1"]}
    parameters = {"type": "object", "properties": {"o": order}, "required": ["o"], "additionalProperties": False}
    tool = {"name": "t", "strict": True, "parameters": parameters}
    answer = {"role": "assistant", "content": "Is it B2?"}
    asked = [{"messages": [{"role": "user", "content": f"A1 {number}"}, answer]} for number in range(9)]
    with_tools = [{**row, "tools": [{"type": "function", "function": tool}], "task": "tools"} for row in asked]
    format_ = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": ["Is it B2?"]}}}
    formed = [{**row, "response_format": format_, "task": "formed"} for row in asked]
    wrong = [{**row, "response_format": {"type": "xml"}, "task": "wrong"} for row in asked]
    odd = [
        {**row, "tools": [{"type": "function", "function": {**tool, "name": "no name"}}], "task": "odd"}
        for row in asked
    ]
    rows = [*asked, *with_tools, *odd, *formed, *wrong]
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "shop.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    freeze(tmp_path / "suites")
    config = dataclasses.replace(presets.get("test").model, max_length=1024)  # tools are told in letters
    model = Model(config, Net(config).init_(0), Tokenizer.bytes_only(), name="test")
    stable, seen = saved(tmp_path / "stable", model), list[Guide | None]()
    monkeypatch.setattr(costs, "checks", lambda *_, **__: [])

    class Seen(Engine):
        def generate(self, requests: Any, **more: Any) -> list[Completion]:
            seen.extend(one.sampling.guided for one in requests)
            return super().generate(requests, **more)

    monkeypatch.setattr("shoal.loop.gate.Engine", Seen)
    found = gate(stable, stable, tmp_path / "suites", need_recent=False, guides=guide_of)
    assert {check.name for check in found.checks} >= {"shop, chat", "shop, tools", "shop, odd"}
    guided = [guide for guide in seen if guide is not None]
    assert len(seen) == 2 * len(rows)
    assert sum('"enum": ["A1"]' in str(guide.spec) for guide in guided) == 2 * len(with_tools)
    by_format = [guide for guide in guided if guide == Guide("json_schema", '{"enum": ["Is it B2?"]}')]
    assert len(by_format) == 2 * len(formed) and len(guided) == 2 * (len(with_tools) + len(formed))


def test_too_few_questions_are_said_with_how_many_it_takes(place: Path) -> None:
    found, checks = judged(place, place / "stable", "few", need_recent=False)
    assert found.verdict == "inconclusive" and not found.passed and checks["shop, chat"] == "inconclusive"
    (check,) = (check for check in found.checks if check.name == "shop, chat")
    assert check.needed is not None and check.needed > 90 and f"{check.needed:,} are needed" in check.told


@pytest.mark.parametrize("what", ["shape", "tokenizer", "chat template"])
def test_another_kind_of_model_is_refused_before_it_is_asked(place: Path, tmp_path: Path, what: str) -> None:
    model = Model.from_preset("test" if what != "shape" else "tiny")
    folder = saved(tmp_path / "other", model)
    if what == "tokenizer":
        model.tokenizer = Tokenizer.train(["the shop has a lamp"] * 50, model.config.vocab)
        folder = saved(tmp_path / "another", model)
    if what == "chat template":
        model.chat_template += "\n{# #}"
        folder = saved(tmp_path / "another", model)
    found, checks = judged(place, folder, "kept")
    assert found.verdict == "refused" and list(checks) == ["shape"] and what in found.sentence


def with_router(folder: Path, name: str, *, deep: bool = False) -> Path:
    """The stable model with a router that gives all prompts the first exit, or full depth: its calibration lets it."""
    model = Model.from_preset("test")
    router = fit_router(model.config, torch.randn(40, 2 * model.config.width + 3), torch.zeros(40, 2))
    router.calibration.thresholds = [(0.0, NEVER)] if deep else [(0.0, 1e9)]
    model.router = router
    return saved(folder / name, model)


@pytest.mark.drill
def test_a_router_that_loses_more_runs_deeper_or_is_gone_is_stopped(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shallow` takes the first exit, which in a random model loses nothing that its calibration would not allow."""
    monkeypatch.setattr(costs, "MOST", 2 * costs.LEAST)  # each look runs all of them through two models
    shallow, deep = with_router(tmp_path, "shallow"), with_router(tmp_path, "deep", deep=True)
    known = {name: Model.load(path) for name, path in (("shallow", shallow), ("deep", deep))}
    asked = questions(place / "kept" / "shop.jsonl", known["deep"].tokenizer, known["deep"].config, DEFAULT_TEMPLATE)

    def status(candidate: Model, stable: Model) -> dict[str, tuple[str, float | None]]:
        return {check.name: (check.status, check.value) for check in costs.router(candidate, stable, asked)[0]}

    assert {status for status, _ in status(known["shallow"], known["shallow"]).values()} == {"pass"}
    same = status(known["deep"], known["deep"])
    assert same == {"router, loss": ("pass", 0.0), "router, layers": ("pass", 1.0)}
    deeper = status(known["deep"], known["shallow"])
    first = known["deep"].config.exits[0] / known["deep"].config.layers
    assert deeper["router, layers"] == ("fail", pytest.approx(1 / first)) and deeper["router, loss"][0] == "pass"
    lost = status(known["shallow"], known["deep"])["router, loss"]
    rows = {
        task: [Heldout(some[place].row, some[place].group) for place in spaced(len(some), costs.MOST)]
        for task, some in asked.items()
    }
    wanted = measured(known["shallow"].net, rows).gaps[:, 0].mean()
    assert lost[1] is not None and abs(lost[1] - float(wanted)) < 0.05
    bare = Model.load(place / "stable")
    assert status(bare, known["deep"]) == {"router": ("fail", None)} and status(bare, bare)["router"][0] == "skipped"
    # beside full depth for all, which loses nothing, it is held to its own promise
    assert status(known["deep"], bare) == {"router, loss": ("pass", 0.0), "router, layers": ("pass", 1.0)}
    few = {task: some[:10] for task, some in asked.items()}
    assert [check.status for check in costs.router(known["deep"], known["deep"], few)[0]] == ["inconclusive"]


@pytest.mark.drill
def test_a_router_alone_is_released_for_what_it_saves_the_answers(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers to what is new need be no more often right: that no router does."""
    monkeypatch.setattr(costs, "MOST", 2 * costs.LEAST)  # each look runs all of them through two models
    stable, candidate = with_router(tmp_path, "one"), with_router(tmp_path, "two", deep=True)
    found = gate(candidate, stable, place / "won")
    checks = {check.name: check.status for check in found.checks}
    # the stable version loses nothing that it may not
    assert checks["router, better"] != "pass" and checks["recent-shop, chat"] == "pass" and not found.passed
    same = {check.name: check.status for check in gate(stable, stable, place / "won").checks}
    assert "router, better" not in same and same["recent-shop, chat"] == "fail", "of the same router nothing is new"


def test_of_what_is_new_a_router_is_looked_at_on_what_it_was_not_fitted_to(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A retrained one is fitted to the other half of the groups that a cut holds out."""
    seen: list[int] = []

    def checks(model: Model, known: Model, *asked: dict[str, list[Question]], alone: bool) -> list[costs.Check]:
        seen.extend(one.group for each in asked for some in each.values() for one in some)
        return []

    monkeypatch.setattr(costs, "checks", checks)
    judged(place, place / "better", "won")
    half = looked_at(place / "won" / "recent-shop.jsonl")
    assert set(seen) == half and 0.3 < len(seen) / len(ASKED) < 0.7
    seen.clear()
    judged(place, place / "better", "few")
    assert len(seen) == len((place / "few" / "shop.jsonl").read_text().splitlines()), "of a frozen suite on all"


@pytest.mark.drill
def test_one_that_takes_longer_for_a_token_is_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the processor, which is made to say what a token takes."""
    model, known = Model.load(place / "stable"), Model.load(place / "stable")
    asked = questions(place / "kept" / "shop.jsonl", model.tokenizer, model.config, DEFAULT_TEMPLATE)
    for takes, status, turns in ((1.0, "pass", 7), (1.05, "pass", 7), (1.3, "fail", 7)):
        monkeypatch.setattr(costs, "_seconds", lambda engine, *_, takes=takes: takes if engine.model is model else 1.0)
        check = costs.speed(model, known, asked)
        assert (check.status, check.value, check.items) == (status, pytest.approx(takes), turns)
    seen: list[tuple[int, ...]] = []

    def counts(engine: Engine, prompts: list[list[Encoded]], depth: costs.Depth) -> float:
        assert all(len(batch) <= costs.BATCH for batch in prompts)
        seen.extend(tuple(prompt.ids) for batch in prompts for prompt in batch)
        return 1.0

    monkeypatch.setattr(costs, "_seconds", counts)
    costs.speed(model, known, asked)
    turn = seen[: costs.MOST]
    (some,) = costs._some(asked).values()
    counted = [one.prompt for one in some]
    assert sorted(turn) == sorted(tuple(prompt.ids) for prompt in counted), (
        "those that layers are counted on, once each"
    )
    assert seen == turn * (2 + 2 * costs.ROUNDS[0])
    monkeypatch.undo()
    monkeypatch.setattr(costs, "MOST", 16)  # it is the clock that is looked at here
    check = costs.speed(model, known, asked)
    assert check.value is not None and 0.2 < check.value < 5 and 7 <= check.items <= 25


def test_broken_weights_are_stopped(place: Path, tmp_path: Path) -> None:
    model = Model.from_preset("test")
    with torch.no_grad():
        for norm in model.net.exit_norms.values():
            next(norm.parameters()).fill_(float("nan"))
    found, _ = judged(place, saved(tmp_path / "nan", model), "kept", need_recent=False)
    assert found.verdict == "fail" and not found.passed


def test_a_candidate_that_breaks_off_fails_also_where_the_stable_version_is_wrong(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No score tells the two apart, and who says nothing is short and quick."""
    write(tmp_path / "suites" / "shop.jsonl", ASKED, ["Nobody says so."] * len(ASKED))
    freeze(tmp_path / "suites")
    models, load = list[Model](), Model.load
    monkeypatch.setattr(Model, "load", lambda path: (models.append(load(path)), models[-1])[1])

    class Breaks(Engine):
        def generate(self, requests: Iterable[Request]) -> list[Completion]:
            return [
                Completion(finished=BROKEN) if self.model is models[1] else one for one in super().generate(requests)
            ]

    monkeypatch.setattr("shoal.loop.gate.Engine", Breaks)
    monkeypatch.setattr(costs, "Engine", Breaks)
    found = gate(place / "stable", place / "stable", tmp_path / "suites", need_recent=False)
    (check,) = (check for check in found.checks if check.name == "shop, chat")
    assert found.verdict == "fail" and check.told == "it does not answer 280 of 280: logits are not finite"
    costs_of = {check.name: check.status for check in found.checks if check.name in ("router", costs.TIME)}
    assert costs_of == {"router": "skipped", costs.TIME: "skipped"}, "it is refused for what it is"


def test_who_is_asked_nothing_that_shows_costs_is_not_let_pass_for_it(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "suites" / "safety-shop.jsonl", ASKED[:5], answers(Model.from_preset("test"), ASKED[:5]))
    freeze(tmp_path / "suites")
    found = gate(place / "stable", place / "stable", tmp_path / "suites", need_recent=False)
    open_ = [check.name for check in found.checks if check.status == "inconclusive"]
    assert found.verdict == "inconclusive" and open_ == ["router", "time a token"]


def test_bits_per_byte_may_rise_by_one_percent(place: Path, tmp_path: Path) -> None:
    """Of a model whose last norm is 30 times as large, and so as sure of its nonsense, they rise."""
    corpus = write_corpus(tmp_path / "data", presets.get("test"))
    with pytest.raises(DataError, match="another tokenizer"):
        judged(place, place / "stable", "few", data=corpus)
    for name, factor in (("stable", 1.0), ("same", 1.0005), ("sure", 30.0)):
        model = Model.from_preset("test")
        model.tokenizer = Tokenizer.load(corpus / "tokenizer.json")
        with torch.no_grad():
            next(model.net.exit_norms[str(model.config.layers)].parameters()).mul_(factor)
        saved(tmp_path / name, model)
    for name, status in (("same", "pass"), ("sure", "fail")):
        found = gate(tmp_path / name, tmp_path / "stable", place / "few", data=corpus, need_recent=False)
        bits = {check.name: check for check in found.checks if check.name.startswith("bits")}
        assert {check.status for check in bits.values()} == {status} and len(bits) == 2


def test_a_directory_that_is_none_and_one_that_was_damaged_are_refused(place: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "damaged", Model.from_preset("test"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\xff" * 8)
    for candidate in (folder, tmp_path / "nowhere"):
        found, _ = judged(place, candidate, "kept")
        assert found.verdict == "refused" and "cannot be loaded" in found.sentence


def test_a_suite_that_changed_stops_everything(place: Path, tmp_path: Path) -> None:
    write(tmp_path / "suites" / "shop.jsonl", ASKED[:5], ["a"] * 5)
    with pytest.raises(DataError, match="holds no frozen suites"):
        read(tmp_path / "suites")
    freeze(tmp_path / "suites")
    with pytest.raises(DataError, match="is frozen"):
        freeze(tmp_path / "suites")
    write(tmp_path / "suites" / "shop.jsonl", ASKED[:5], ["b"] * 5)
    with pytest.raises(DataError, match="suite shop has changed"):
        gate(place / "stable", place / "stable", tmp_path / "suites")
    (tmp_path / "suites" / "shop.jsonl").unlink()
    with pytest.raises(DataError, match="is gone"):
        read(tmp_path / "suites")
    with pytest.raises(DataError, match="holds no suite"):
        freeze(tmp_path / "nowhere")


def test_what_a_suite_is_for_is_said_by_a_whole_word(tmp_path: Path) -> None:
    for name in ("safety", "safety-shop", "safetynets", "recent", "recent-shop", "recently-sold", "shop"):
        write(tmp_path / f"{name}.jsonl", ASKED[:1], ["a"])
    kinds = {suite.name: suite.kind for suite in freeze(tmp_path)}
    assert kinds == {
        "safety": "safety", "safety-shop": "safety", "safetynets": "frozen", "recent": "recent", "recent-shop": "recent",
        "recently-sold": "frozen", "shop": "frozen",
    }  # fmt: skip


def test_the_command_says_it_and_exits_so(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gate", "--suites", str(place / "few"), "--against", str(place / "stable"), "--no-recent"]
    before = len((place / "few" / USES).read_text().splitlines()) if (place / "few" / USES).exists() else 0
    assert main([*words, "--model", str(place / "stable"), "--json", "--out", str(tmp_path / "gate.json")]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((tmp_path / "gate.json").read_text())
    assert told["format"] == "shoal.gate" and told["passed"] is False and told["uses"] == before + 1
    assert main([*words, "--model", str(place / "stable"), "--margin", "0.2"]) == 0
    assert capsys.readouterr().out.startswith("Pass: ")
    for wrong, says in ((words, "--model and --against"), ([*words, "--model", "m", "--margin", "0"], "--margin")):
        assert main(wrong) == 2
        assert says in capsys.readouterr().err


def test_suites_that_cannot_be_counted_are_not_asked(tmp_path: Path) -> None:
    (tmp_path / USES).mkdir()
    with pytest.raises(ResourceError, match="asked and not counted"):
        use(tmp_path, {})
    (tmp_path / USES).rmdir()
    (tmp_path / USES).write_text('{"torn')
    assert use(tmp_path, {}) == 2 and json.loads((tmp_path / USES).read_text().split("\n")[1])["at"]
