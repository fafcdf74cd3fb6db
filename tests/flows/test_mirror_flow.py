"""A run's checkpoints in S3: copied while it trains, fetched where the run's folder is lost, and S3 on a bad day."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoal import presets
from shoal.errors import CheckpointError
from shoal.model.net import Net
from shoal.train import log, mirror
from shoal.train.checkpoint import CheckpointStore
from shoal.train.loop import fit
from shoal.train.loss import LossModel
from shoal.train.mirror import Mirror
from shoal.train.optim import make_optimizer
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.state import TrainState
from tests.corpus import write_corpus
from tests.s3 import Service, service

ALONE = Ranks(0, 1, torch.device("cpu"))
PRESET = presets.get("test")


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="runs")
        yield made


@pytest.fixture
def place(request: pytest.FixtureRequest, s3: Service) -> str:
    s3.slow = 0
    return f"s3://runs/{request.node.name}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "data", PRESET, documents=20, heldout=6)


def plan(data: Path, run: Path, place: str, **more: object) -> FitPlan:
    few = {"steps": 6, "eval_every": 0, "eval_rows": 4, "checkpoint_minutes": 0.0, "accumulate": 1}
    values = {**few, "mirror": place, **more}
    return pretrain_plan("test", str(data), str(run), **values)


def history(run: Path, kind: str, key: str) -> list:
    return [record[key] for record in log.read(run) if record["kind"] == kind]


class Interrupted(Exception):
    pass


def interrupt(record: log.Record) -> None:
    if record["kind"] == "step" and record["step"] == 4:
        raise Interrupted


def copied(place: str, name: str, seconds: float = 120.0) -> None:
    """Waits until a copy is whole."""
    end = time.monotonic() + seconds
    while name not in Mirror(place, keep=2).names():
        assert time.monotonic() < end, f"{name} was not copied"
        time.sleep(0.05)


@pytest.mark.drill
def test_a_run_whose_folder_is_lost_goes_on_from_s3_to_the_bit(data: Path, place: str, tmp_path: Path) -> None:
    calm = fit(plan(data, tmp_path / "calm", ""))
    with pytest.raises(Interrupted):
        fit(plan(data, tmp_path / "hit", place), interrupt)
    copied(place, "step-00000003")
    shutil.rmtree(tmp_path / "hit" / "checkpoints")
    resumed = fit(plan(data, tmp_path / "hit", place))
    losses = [history(tmp_path / run, "step", "loss") for run in ("hit", "calm")]
    assert losses[0] == losses[1] and resumed.bpb == calm.bpb
    models = [Path(result.out, "model.safetensors").read_bytes() for result in (resumed, calm)]
    assert models[0] == models[1]
    before, last = Mirror(place, keep=2).names()
    # one that comes while another is copied is left out where a newer one is there by then
    assert last == "step-00000006" and before in ("step-00000003", "step-00000004", "step-00000005")
    assert history(tmp_path / "hit", "copied", "path")[-1] == f"{place}/step-00000006"


@pytest.mark.drill
def test_s3_that_is_down_for_a_while_costs_no_step(
    s3: Service, data: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "PAUSE", 0.05)
    monkeypatch.setattr("shoal.data.sources.s3.ATTEMPTS", 2)

    def go_down(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 1:
            s3.slow = 5  # more refusals than the client takes

    result = fit(plan(data, tmp_path / "run", place, steps=3), go_down)
    assert result.steps == 3 and s3.slow == 0
    assert any("slow down" in text and "trying again" in text for text in history(tmp_path / "run", "warning", "text"))
    assert Mirror(place, keep=2).names()[-1] == "step-00000003"


def test_s3_that_stays_down_is_said_and_nothing_is_lost(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is no folder stands for it: S3's client alone tries for half a minute."""
    monkeypatch.setattr(mirror, "PATIENCE", 0.2)
    (tmp_path / "file").write_text("in the way")
    result = fit(plan(data, tmp_path / "run", str(tmp_path / "file" / "copies"), steps=2))
    said = history(tmp_path / "run", "warning", "text")
    assert any("trying again" in text for text in said) and "could not be copied" in said[-1]
    assert result.steps == 2 and (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_a_half_written_copy_and_a_damaged_one_are_passed_over(s3: Service, place: str, tmp_path: Path) -> None:
    """The copy of step 3 has no manifest, that of step 2 another byte, so step 1 is taken."""
    model = LossModel(Net(PRESET.model).init_(0))
    optimizer, copies = make_optimizer(model, PRESET.train), Mirror(place, keep=5)
    store = CheckpointStore(tmp_path / "run", 5, copies)
    for step in (1, 2, 3):
        store.save(model, optimizer, TrainState(step=step), ALONE)
        copies.close()
        copies = store.mirror = Mirror(place, keep=5)
    client, prefix = s3.client, place.removeprefix("s3://runs/")
    client.delete_object(Bucket="runs", Key=f"{prefix}/step-00000003/manifest.json")
    client.put_object(Bucket="runs", Key=f"{prefix}/step-00000002/rng-00000.safetensors", Body=b"not what was written")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    said: list[str] = []
    found = store.newest(ALONE, said.append)
    assert found == tmp_path / "run" / "checkpoints" / "step-00000001"
    assert len(said) == 1 and "step-00000002 is damaged (rng-00000.safetensors has 20 bytes" in said[0]


def test_what_is_here_is_used_when_the_mirror_does_not_answer_and_nothing_is_begun_anew(
    s3: Service, tmp_path: Path
) -> None:
    model = LossModel(Net(PRESET.model).init_(0))
    optimizer, nowhere = make_optimizer(model, PRESET.train), Mirror("s3://nobody-made-this/run", keep=2)
    here = CheckpointStore(tmp_path / "run")
    path = here.save(model, optimizer, TrainState(step=1), ALONE)
    said: list[str] = []
    assert CheckpointStore(tmp_path / "run", 2, nowhere).newest(ALONE, said.append) == path
    assert "the bucket does not exist" in said[0] and "going on from what is in" in said[0]
    with pytest.raises(CheckpointError, match="the bucket does not exist"):
        CheckpointStore(tmp_path / "other", 2, nowhere).newest(ALONE, said.append)


@pytest.mark.drill
def test_the_best_checkpoint_stays_and_the_model_is_made_of_it(data: Path, place: str, tmp_path: Path) -> None:
    """A rate that is far too high in the end: the last evaluation is not the best."""
    wild = {"steps": 8, "eval_every": 2, "keep": 1, "keep_best": True, "clip": 1e9, "warmup": 1.0, "decay": 0.0}
    result = fit(plan(data, tmp_path / "run", place, learning_rate=1.0, **wild))
    evals = {r["step"]: r["bpb"] for r in log.read(tmp_path / "run") if r["kind"] == "eval"}
    means = {step: (bpb["text"]["full"] + bpb["code"]["full"]) / 2 for step, bpb in evals.items()}
    best = min(means, key=means.__getitem__)
    assert best < 8, means
    assert history(tmp_path / "run", "best", "best_step") == [best]
    assert result.bpb["text"]["full"] == pytest.approx(evals[best]["text"]["full"])
    kept = [f"step-{best:08d}", "step-00000008"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")) == kept
    assert Mirror(place, keep=1).names() == kept
    state = json.loads((tmp_path / "run" / "checkpoints" / kept[1] / "state.json").read_text())
    assert (state["best_step"], state["best"]) == (best, pytest.approx(means[best]))
