"""A recipe from an empty folder to its report, on a shape and data of a test's size, trained here without Ray's workers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.customer_service import RECIPE
from recipes.customer_service.customers import CustomerService
from recipes.named import named, names
from shoal import cli, presets
from shoal.config import Preset
from shoal.errors import UsageError
from shoal.loop.gate import gate
from shoal.model.model import Model
from shoal.train.loop import fit

# a drill: the first test trains, rounds and measures, on what may be a busy machine
pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """All of it, smaller: 60 conversations, and a model that learns nothing in its minute."""
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("LEARNED", 60), ("FITTED", 40), ("ASKED", 5), ("NO_CALL", 8)):
            patch.setattr(f"recipes.customer_service.customers.{name}", count)
        test = presets.get("test")
        model = dataclasses.replace(test.model, train_length=1280, block=8, page=16, vocab=700, image_size=0)
        train = dataclasses.replace(test.train, batch_tokens=1280, accumulate=1)
        patch.setattr(CustomerService, "most_tokens", 12)
        patch.setattr(CustomerService, "preset", Preset("test", model, train))
        patch.setattr("shoal.on_ray.train.train", lambda plan, **how: fit(plan))
        patch.setattr("shoal.on_ray.resources.local_ray", contextlib.nullcontext)
        patch.setattr("recipes.run.AT_ONCE", 1)  # another process would know nothing of these
        yield


def recipe(folder: Path, *more: str) -> int:
    return cli.main(["recipe", "customer-service", "--out", str(folder), "--minutes", "0.05", "--workers", "1", *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe") / "shop"
    assert recipe(folder) == 0
    return folder


def test_one_command_leaves_two_models_frozen_suites_and_a_report(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert list(report["suites"]) == ["known-wordings", "new-wordings", "safety-no-call"]
    safe = report["suites"].pop("safety-no-call")
    assert {"call or not", "invented", "unharmed"} <= set(safe["int8"]) and "exact call" not in safe["int8"]
    for by in report["suites"].values():
        assert {"majority", "keyword rule", "nearest", "fp32", "int8"} <= set(by)
        assert all({"exact call", "invented", "tone", "unharmed"} <= set(figures) for figures in by.values())
        assert "int8 unguided" in by and "fp32 unguided" not in by
    spoken = {(row["who"], row["language"]) for row in report["languages"]}
    assert {(who, language) for who in ("keyword rule", "fp32", "int8") for language in ("en", "zh")} <= spoken
    depths = {(row["model"], row["depth"]) for row in report["depths"]}
    assert {(model, depth) for model in ("fp32", "int8") for depth in ("shallow", "middle", "full", "auto")} == depths
    assert Model.load(folder / "int8").config.quantization == "w8a8" and Model.load(folder / "model").router is not None
    assert report["costs"]["int8"]["bytes"] < report["costs"]["fp32"]["bytes"]
    assert list(report["seconds"]) == ["data", "learn", "quantize", "evaluate"]
    assert "From an empty folder to this page in" in (folder / "report.md").read_text("utf-8")
    uses = (folder / "suites" / "uses.jsonl").read_text("utf-8").splitlines()
    assert len(uses) == 1 and json.loads(uses[0])["recipe"] == "customer-service"


def test_the_report_begins_with_what_a_rule_does_better(folder: Path) -> None:
    """Seconds of training lose to twenty keywords, and it says so before any figure."""
    report = json.loads((folder / "report.json").read_text("utf-8"))
    first = next(line for line in (folder / "report.md").read_text("utf-8").splitlines()[1:] if line)
    assert first == f"- {report['weak'][0]}" and "the model loses to the" in first


def test_the_same_command_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is there is kept; what is missing is made from it."""
    before = (folder / "report.json").read_text("utf-8")
    (folder / "report.json").unlink()
    monkeypatch.setattr("shoal.on_ray.train.train", lambda plan, **how: pytest.fail("it trained again"))
    assert recipe(folder, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    old = json.loads(before)
    assert told["suites"] == old["suites"] and told["data_sha256"] == old["data_sha256"]


def test_a_folder_of_other_settings_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe(folder, "--seed", "5") == 1
    said = capsys.readouterr().err
    assert "was begun with other settings" in said and "seed 5" in said and "seed 0" in said


def test_the_gate_reads_its_suites(folder: Path) -> None:
    """The INT8 model beside itself is no worse anywhere; that it is no better is what the gate would refuse it for."""
    found = gate(folder / "int8", folder / "int8", folder / "suites", need_recent=False)
    checks = {check.name: check.status for check in found.checks}
    assert checks["safety-no-call, no call"] == "pass" and "known-wordings, call" in checks
    assert "fail" not in checks.values()


def test_a_recipe_is_found_by_its_name_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    assert "customer-service" in names() and named("customer-service") is RECIPE
    assert all(named(name).name == name for name in names())
    with pytest.raises(UsageError, match="did you mean 'customer-service'"):
        named("custmer-service")
    assert cli.main(["recipe", "medicne", "--out", str(tmp_path / "x")]) == 2 and not (tmp_path / "x").exists()


@pytest.mark.parametrize(("option", "value"), [("--minutes", "0"), ("--minutes", "nan"), ("--workers", "0")])
def test_a_wrong_number_is_refused_before_anything_is_made(tmp_path: Path, option: str, value: str) -> None:
    assert cli.main(["recipe", "customer-service", "--out", str(tmp_path / "x"), option, value]) == 2
    assert not (tmp_path / "x").exists()
