"""A recipe on imported weights, of a form and of data of a test's size: both columns stand in one report, on the same rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from recipes.footprint import footprint
from recipes.law.licences import Law
from shoal import Model, cli, presets
from shoal.config import Preset
from shoal.train.loop import fit

# a drill: it trains, rounds and measures twice, on what may be a busy machine
pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]
DATA = Path(__file__).parents[1] / "data" / "open"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("LEARNED", 60), ("FITTED", 100), ("ASKED", 12), ("UNSAID", 4)):
            patch.setattr(f"recipes.law.licences.{name}", count)
        test = presets.get("test")
        model = dataclasses.replace(test.model, train_length=640, block=8, page=16, vocab=700, image_size=0)
        patch.setattr(
            Law, "preset", Preset("test", model, dataclasses.replace(test.train, batch_tokens=640, accumulate=1))
        )
        patch.setattr(Law, "most_tokens", 8)
        patch.setattr(Law, "open_rows", 6)
        patch.setattr("shoal.on_ray.train.train", lambda plan, **how: fit(plan))
        patch.setattr("shoal.on_ray.resources.local_ray", contextlib.nullcontext)
        patch.setattr("recipes.run.AT_ONCE", 1)  # another process would know nothing of these
        yield


def recipe(out: Path, *more: str) -> int:
    return cli.main(["recipe", "law", "--out", str(out), "--minutes", "0.05", "--workers", "1", *more])


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("open")
    shutil.copytree(DATA / "smollm2", source / "from")
    shutil.copytree(DATA / "tokenizer", source / "from", dirs_exist_ok=True)
    config = source / "from" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 1024}))
    options = ["--from", str(source / "from"), "--out", str(source / "model"), "--name", "smol", "--dtype", "float32"]
    assert cli.main(["import", *options]) == 0
    return source / "model"


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("recipe") / "law"
    assert recipe(out) == 0
    return out


@pytest.fixture(scope="module")
def both(imported: Path, fresh: Path) -> Path:
    assert recipe(fresh.parent / "open", "--model", str(imported), "--beside", str(fresh)) == 0
    return fresh.parent / "open"


def test_both_columns_stand_in_one_report_on_the_same_rows(both: Path) -> None:
    report = json.loads((both / "report.json").read_text("utf-8"))
    sizes = {"known-licences": 6, "new-licences": 6, "safety-not-said": 4}  # the last has no more
    assert report["suites"].keys() == sizes.keys()
    for suite, by in report["suites"].items():
        assert list(by)[:3] == ["majority", "keyword rule", "nearest"] and by["fp32"] and by["int8"]
        assert {figures["verdict"]["rows"] for figures in by.values()} == {report["rows"][suite][0]} == {sizes[suite]}
        assert {"open fp32", "open int8"} <= set(by)
    assert any(note.startswith("new-licences: 6 of 12 answers are asked for") for note in report["notes"])
    assert {row["depth"] for row in report["depths"] if row["model"] == "open int8"} == {"full"}
    markdown = (both / "report.md").read_text("utf-8")
    assert "open int8" in markdown and "Is there a warranty?" in markdown and "no router" in markdown


def test_what_serves_is_the_imported_model_tuned_and_rounded(both: Path, imported: Path) -> None:
    base, tuned, rounded = (Model.load(path) for path in (imported, both / "model", both / "int8"))
    assert tuned.source == base.source and tuned.tokenizer.sha256 == base.tokenizer.sha256
    assert rounded.config.quantization == "w8a8"
    pairs = zip(base.net.parameters(), tuned.net.parameters(), strict=True)
    assert any(not one.equal(other) for one, other in pairs), "nothing was learned"
    assert not (both / "fresh").exists() and not (both / "learn-2").exists(), "the last lesson alone"


def test_each_model_of_the_report_was_served_alone_and_measured(both: Path, fresh: Path) -> None:
    for folder in (both, fresh):
        for cost in json.loads((folder / "report.json").read_text("utf-8"))["costs"].values():
            assert cost["served"]["resident_bytes"] > 50e6 and cost["served"]["ready_s"] > 0
            assert cost["served"]["disk_bytes"] > cost["bytes"]
    assert "resident, MB" in (fresh / "report.md").read_text("utf-8")


def test_the_choice_of_the_router_stands_beside_its_layers(fresh: Path) -> None:
    rows = json.loads((fresh / "report.json").read_text("utf-8"))["depths"]
    auto = [row for row in rows if row["depth"] == "auto"]
    assert auto and all(abs(sum(row["chosen"].values()) - 1) < 1e-9 for row in auto)
    layers = {"shallow": 1, "middle": 2, "full": 4}
    for row in auto:
        used = [layers[name] / 4 for name, share in row["chosen"].items() if share]
        assert min(used) - 1e-9 <= row["layers"] <= max(used) + 1e-9


def test_another_run_beside_it_makes_the_report_anew_and_trains_nothing(
    both: Path, imported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.on_ray.train.train", lambda plan, **how: pytest.fail("it trained again"))
    assert recipe(both, "--model", str(imported)) == 0
    assert "fp32" not in json.loads((both / "report.json").read_text("utf-8"))["costs"]


def test_what_cannot_stand_beside_each_other_is_refused_before_anything_is_made(
    imported: Path, fresh: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x"
    for more, said in (
        (["--beside", str(fresh)], "give --model as well"),
        (["--model", str(imported), "--beside", str(tmp_path)], "a run of law from fresh weights with seed 0"),
        (["--model", str(imported), "--beside", str(fresh), "--seed", "3"], "with seed 3"),
        (["--model", str(fresh / "model")], "an imported model"),
        (["--model", str(tmp_path)], "config.json"),
    ):
        assert recipe(out, *more) != 0 and not out.exists()
        assert said in capsys.readouterr().err


def test_a_folder_that_cannot_be_served_costs_the_report_a_line_and_not_itself(tmp_path: Path) -> None:
    from recipes.run import _footprint

    found = _footprint(tmp_path)
    assert list(found) == ["failed"] and "shoal.cli serve --no-ray" in found["failed"]


def test_a_service_that_was_measured_has_ended(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    started = []

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *given: object, **more: object) -> None:
            super().__init__(*given, **more)  # type: ignore[call-overload]
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    found = footprint(fresh / "int8", fresh / "policy.yaml")
    assert found["disk_bytes"] == sum(path.stat().st_size for path in (fresh / "int8").rglob("*") if path.is_file())
    assert [process.poll() is not None for process in started] == [True]
