"""A release gets a candidate: its router alone, or a fine-tuning of its parent, rounded again; trained here, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model, cli
from shoal.data.alone import alone
from shoal.errors import ResourceError
from shoal.loop.release import Release
from shoal.machine import sha256_of
from shoal.stages.retrain import LOCK, WORK
from shoal.train.loop import fit


def chat(number: int) -> str:
    said = [
        {"role": "user", "content": f"item {number}?"},
        {"role": "assistant", "content": f"shelf {number * 7 % 10}"},
    ]
    return json.dumps({"messages": said, "task": "shop"})


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "train.jsonl").write_text("".join(f"{chat(number)}\n" for number in range(40)))
    (folder / "heldout.jsonl").write_text("".join(f"{chat(number)}\n" for number in range(40, 160)))
    (folder / "cut.json").write_text(json.dumps({"parts": ["day=2026-11-27"], "rows": 40, "moved": ["regret"]}))
    return folder


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process in place of Ray's workers."""
    monkeypatch.setattr("shoal.on_ray.train.train", lambda plan, **how: fit(plan))


@pytest.fixture
def release(tmp_path: Path) -> Release:
    """What serves is rounded, and has its parent."""
    parent = Model.from_preset("test", seed=3)
    parent.save(tmp_path / "fp32")
    parent.quantized().save(tmp_path / "int8")
    made = Release(tmp_path / "release")
    made.add(tmp_path / "int8", fp32=tmp_path / "fp32")
    return made


def retrain(release: Release, cut: Path, *more: str) -> int:
    return cli.main(["retrain", "--release", str(release.directory), "--cut", str(cut), "--json", *more])


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_where_only_regret_moved_the_router_is_fitted_alone(
    release: Release, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in release.version(1).served.iterdir()}
    assert retrain(release, cut) == 0
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
    assert (lineage["parent"], lineage["kind"], lineage["cut"]["parts"]) == (1, "router", ["day=2026-11-27"])
    assert lineage["cut"]["sha256"] == sha256_of(cut / "cut.json")
    assert not any((release.directory / WORK).iterdir()) and release.check() == 2


def test_a_fine_tuning_starts_from_the_parent_and_is_rounded_as_what_serves(
    release: Release, cut: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "gate.json").write_text(json.dumps({"passed": True, "checks": []}))
    assert (
        retrain(release, cut, "--kind", "finetune", "--minutes", "0.05", "--verdict", str(tmp_path / "gate.json")) == 0
    )
    assert told(capsys)["kind"] == "finetune"
    made, stable = release.version(2), release.version(1)
    served, parent = Model.load(made.served), Model.load(made.parent)
    assert served.config == Model.load(stable.served).config and parent.config.quantization == "none"
    assert made.passed and made.parent != made.served
    before = Model.load(stable.parent)
    assert any(
        not torch.equal(tensor, before.net.state_dict()[name]) for name, tensor in parent.net.state_dict().items()
    )
    release.promote(why="in a test")
    assert release.stable().number == 2


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--kind", "all"], "--kind"),
        (["--minutes", "-1"], "--minutes"),
        (["--kind", "finetune", "--minutes", "90"], "the budget of retraining"),
    ],
)
def test_a_retraining_that_cannot_be_says_so_before_it_begins(
    release: Release, cut: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert retrain(release, cut, *more) == 2
    assert said in capsys.readouterr().err
    assert len(release.versions()) == 1


def test_a_cut_without_labels_teaches_nothing(
    release: Release, cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("cut.json", "heldout.jsonl"):
        (tmp_path / name).write_text((cut / name).read_text())
    (tmp_path / "train.jsonl").write_text("")
    assert retrain(release, tmp_path, "--kind", "finetune") == 1
    assert "rows with labels" in capsys.readouterr().err
    assert retrain(release, tmp_path / "none") == 2
    assert "is not a cut" in capsys.readouterr().err


def test_two_at_once_and_one_too_soon_are_refused(
    release: Release, cut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with alone(release.directory / LOCK, ResourceError("")):
        assert retrain(release, cut) == 1
    assert "another retraining" in capsys.readouterr().err
    assert retrain(release, cut) == 0
    assert retrain(release, cut) == 2
    assert "the cooldown of retraining" in capsys.readouterr().err
    assert retrain(release, cut, "--cooldown", "0") == 0
    assert len(release.versions()) == 3
