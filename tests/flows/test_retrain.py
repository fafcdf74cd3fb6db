"""A release gets a candidate: its router alone, or a fine-tuning of its parent, rounded again; trained here, without Ray."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model, cli, presets
from shoal.data.alone import alone
from shoal.errors import ResourceError, UsageError
from shoal.evaluate import routing
from shoal.inputs.tokenizer import Tokenizer
from shoal.loop import retrainings
from shoal.loop.capture import Forgotten
from shoal.loop.cut import Settings, cut, name_of
from shoal.loop.earlier import Earlier
from shoal.loop.labels import CORRECTION, Found, Labelled
from shoal.loop.learned import LOCK, WORK
from shoal.loop.learned import forget as taken_out
from shoal.loop.release import Release
from shoal.loop.suites import freeze
from shoal.machine import sha256_of
from shoal.model.router import fit_router
from shoal.stages.retrain import Retrain
from shoal.train.loop import fit
from tests.corpus import write_corpus


def chat(number: int) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": f"item {number}?"},
        {"role": "assistant", "content": f"shelf {number * 7 % 10}"},
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `shoal curate` makes it; the watch saw the router's signal alone move."""
    return cut_of(300, tmp_path_factory.mktemp("cuts") / "1")


def cut_of(count: int, folder: Path) -> Path:
    rows = [Labelled(chat(number), CORRECTION, f"person {number}", f"chatcmpl-{number}") for number in range(count)]
    cut(Found(rows, len(rows)), folder, Settings(heldout=0.6), told={"moved": ["regret"]})
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process in place of Ray's workers."""
    monkeypatch.setattr("shoal.on_ray.train.train", lambda plan, **how: fit(plan))
    monkeypatch.setattr("shoal.on_ray.resources.local_ray", nullcontext)


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """What serves is rounded, and has its parent."""
    parent = Model.from_preset("test", seed=3)
    parent.save(tmp_path / "fp32")
    parent.quantized().save(tmp_path / "int8")
    made = Release(tmp_path / "release")
    made.add(tmp_path / "int8", fp32=tmp_path / "fp32")
    return made


def retrain(release: Release, folder: Path, *more: str) -> int:
    return cli.main(["retrain", "--release", str(release.directory), "--cut", str(folder), "--json", *more])


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


@pytest.mark.drill
def test_where_only_regret_moved_the_router_is_fitted_alone(
    release: Release, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in release.version(1).served.iterdir()}
    assert retrain(release, folder) == 0
    result = told(capsys)
    assert (result["version"], result["kind"]) == (2, "router")
    made, stable = release.version(2), release.version(1)
    assert (release.state().stable, release.state().candidate) == (1, 2)
    first, second = (Model.load(each.served) for each in (stable, made))
    assert first.router is None and second.router is not None
    for name, tensor in first.net.state_dict().items():
        assert torch.equal(second.net.state_dict()[name], tensor)
    assert (made.parent / "model.safetensors").read_bytes() == (stable.parent / "model.safetensors").read_bytes()
    assert {path.name: path.read_bytes() for path in stable.served.iterdir()} == before
    lineage = made.lineage
    assert (lineage["parent"], lineage["kind"], lineage["cut"]["labels"]) == (
        1,
        "router",
        {CORRECTION: lineage["cut"]["train"]},
    )
    assert lineage["cut"]["sha256"] == sha256_of(folder / "cut.json")
    assert not any((release.directory / WORK).iterdir()) and release.check() == 2


@pytest.mark.drill
def test_a_fine_tuning_starts_from_the_parent_and_is_rounded_as_what_serves(
    release: Release,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[dict[str, float | None]] = []
    monkeypatch.setattr("shoal.on_ray.train.train", lambda plan, **how: limits.append(plan.limits) or fit(plan))
    suites = tmp_path / "suites"
    suites.mkdir()
    rows = [json.dumps({"messages": chat(number), "task": "shop", "group": str(number)}) for number in range(400, 410)]
    (suites / "shop.jsonl").write_text("".join(f"{row}\n" for row in rows))
    freeze(suites)
    few = cut_of(40, tmp_path / "few")  # each held-out question is asked of both models
    assert retrain(release, few, "--kind", "finetune", "--minutes", "0.01", "--suites", str(suites)) == 0
    result = told(capsys)
    tuned, rounded = limits
    assert (tuned["minutes"], tuned["steps"], rounded["steps"]) == (0.01, None, 100)
    assert rounded["minutes"] == pytest.approx(0.01 / 3)  # a slow machine's verdict does not wait for all of these
    assert result["kind"] == "finetune" and result["passed"] is False  # few questions, and nothing was learned in 1 s
    made, stable = release.version(2), release.version(1)
    served, parent = Model.load(made.served), Model.load(made.parent)
    assert served.config == Model.load(stable.served).config and parent.config.quantization == "none"
    assert made.failed and made.parent != made.served
    before = Model.load(stable.parent)
    assert any(
        not torch.equal(tensor, before.net.state_dict()[name]) for name, tensor in parent.net.state_dict().items()
    )
    with pytest.raises(UsageError, match="did not let version 2 pass"):
        release.promote(why="in a test")
    release.promote(why="in a test", force=True)
    assert release.stable().number == 2


@pytest.mark.drill
def test_what_is_replayed_says_how_far_to_go_and_too_few_rows_leave_the_router_that_there_is(
    release: Release, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Thirty new rows and no old chats: the depth router could not be fitted to so few."""
    corpus = write_corpus(tmp_path / "data", presets.get("test"))
    parent = Model.from_preset("test", seed=3)
    parent.tokenizer = Tokenizer.load(corpus / "tokenizer.json")
    parent.save(tmp_path / "parent")
    served = parent.quantized()
    served.router = fit_router(served.config, torch.randn(40, 2 * served.config.width + 3), torch.rand(40, 2))
    served.save(tmp_path / "served")
    made = Release(tmp_path / "another")
    made.add(tmp_path / "served", fp32=tmp_path / "parent")
    rows = [Labelled(chat(number), CORRECTION, f"person {number}", f"chatcmpl-{number}") for number in range(30)]
    cut(Found(rows, len(rows)), tmp_path / "few", Settings(heldout=0.3))
    more = ["--kind", "finetune", "--minutes", "0.01", "--replay", str(corpus)]
    assert retrain(made, tmp_path / "few", *more) == 0
    err = capsys.readouterr().err
    assert "of the way from the parent" in err and "the one of before is kept" in err
    router, before = Model.load(made.version(2).served).router, served.router
    assert router is not None and router.calibration == before.calibration
    assert all(torch.equal(one, other) for one, other in zip(router.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--kind", "all"], "--kind"),
        (["--minutes", "-1"], "--minutes"),
        (["--kind", "finetune", "--minutes", "90"], "the budget of retraining"),
    ],
)
def test_a_retraining_that_cannot_be_says_so_before_it_begins(
    release: Release, folder: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert retrain(release, folder, *more) == 2
    assert said in capsys.readouterr().err
    assert len(release.versions()) == 1


def test_a_cut_that_trains_on_what_a_suite_asks_is_no_proof(
    release: Release, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that was made without that suite."""
    (tmp_path / "suites").mkdir()
    asked = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["messages"]
    rows = [asked, *(chat(number) for number in range(400, 420))]
    told = (json.dumps({"messages": row, "task": "shop", "group": str(at)}) for at, row in enumerate(rows))
    (tmp_path / "suites/shop.jsonl").write_text("".join(f"{row}\n" for row in told))
    freeze(tmp_path / "suites")
    assert retrain(release, folder, "--kind", "finetune", "--suites", str(tmp_path / "suites")) == 1
    assert "trains on what a suite asks: got '1 rows'" in " ".join(capsys.readouterr().err.split())
    assert len(release.versions()) == 1


def test_what_an_earlier_cut_held_out_is_not_learned_and_what_nobody_goes_on_with_is_gone(
    release: Release, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[dict[str, Any]]()

    def trained(stage: Retrain, parent: Path, served: Path, work: Path) -> tuple[Path, Path]:
        read.extend(map(json.loads, (work / "mix.jsonl").read_text().splitlines()))
        return served, parent

    monkeypatch.setattr(Retrain, "_finetune", trained)
    rows = [Labelled(chat(number), CORRECTION, f"person {number}", f"chatcmpl-{number}") for number in range(300)]
    learned = Earlier((folder,), (folder,), ()).trained_on()
    cut(Found(rows, len(rows)), tmp_path / "second", Settings(heldout=0.6, seed=1), learned=learned)
    left = release.directory / WORK / "0123456789ab-finetune-7"
    left.mkdir(parents=True)
    how = ("--kind", "finetune", "--cooldown", "0")
    assert retrain(release, folder, *how) == 0
    first = told(capsys)
    assert (first["left_out"], first["removed"]) == (0, 1) and not left.exists()
    read.clear()
    assert retrain(release, tmp_path / "second", *how) == 0
    second = told(capsys)
    held = {json.loads(line)["messages"][0]["content"] for line in (folder / "recent.jsonl").read_text().splitlines()}
    assert read and not held & {row["messages"][0]["content"] for row in read}
    asked = [json.loads(line)["messages"][0]["content"] for line in (tmp_path / "second/train.jsonl").open()]
    assert second["left_out"] == sum(one in held for one in asked) > 20
    assert release.version(3).lineage["left_out"] == second["left_out"]


@pytest.mark.drill
def test_two_at_once_and_one_too_soon_are_refused(
    release: Release, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(release.directory / LOCK, ResourceError("")):
        assert retrain(release, folder) == 1
    assert "another retraining" in capsys.readouterr().err
    assert retrain(release, folder) == 0
    assert retrain(release, folder) == 2
    assert "the cooldown of retraining" in capsys.readouterr().err
    assert retrain(release, folder, "--cooldown", "0") == 0
    assert len(release.versions()) == 3


@pytest.mark.drill
def test_who_is_forgotten_while_a_candidate_learns_is_in_no_version(
    release: Release, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "cut")
    asked = json.loads((folder / "train.jsonl").read_text().splitlines()[0])["id"]
    refit = routing.refit

    def meanwhile(*given: Any, **more: Any) -> Any:
        monkeypatch.setattr(routing, "refit", refit)
        assert taken_out(tmp_path / "cut", Forgotten({asked}))
        return refit(*given, **more)

    monkeypatch.setattr(routing, "refit", meanwhile)
    assert retrain(release, tmp_path / "cut") == 1
    assert "somebody was forgotten while it was learned from" in " ".join(capsys.readouterr().err.split())
    assert len(release.versions()) == 1 and not any((release.directory / WORK).iterdir())
    assert retrainings.read(release.directory).failed == 1
    assert retrain(release, tmp_path / "cut") == 0 and name_of(asked) not in (release.version(2).learned or ())
    known = retrainings.read(release.directory)
    assert known.failed == 0 and [run.outcome for run in known.runs] == ["failed", "unjudged"]
