"""Checkpoints written beside the updates: of one moment, whole or absent, one at a time, and never in training's way."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes
from safetensors import safe_open
from safetensors.torch import load_file

from shoal.errors import CheckpointError
from shoal.train import log, snapshot
from shoal.train.checkpoint import CheckpointStore, damage
from shoal.train.loop import fit
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.run import SHARE, Run
from shoal.train.state import read_state
from tests.unit.train.test_training_checkpoint import state, trained

KINDS = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8]
WRITE = snapshot.write_file


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Files are written once this is set."""
    opened = threading.Event()

    def later(path: Path, pieces: object, stop: threading.Event) -> snapshot.Entry:
        while not opened.wait(0.01):
            if stop.is_set():
                raise OSError("it was told to stop")
        return WRITE(path, pieces, stop)  # type: ignore[arg-type]

    monkeypatch.setattr(snapshot, "write_file", later)
    yield opened
    opened.set()


def writers() -> int:
    return sum(thread.name == "write-checkpoint" for thread in threading.enumerate())


def test_a_checkpoint_is_of_the_moment_at_which_it_was_begun(
    tmp_path: Path, alone: Ranks, gate: threading.Event
) -> None:
    """Weights, moments and step change while it is written, and it is not there before all of it is."""
    store, now = CheckpointStore(tmp_path), state(3)
    model, optimizer = trained(seed=1)
    torch.manual_seed(7)
    assert store.begin(model, optimizer, now, alone)
    drawn, before = torch.rand(4), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [{key: value.clone() for key, value in optimizer.state[p].items()} for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    now.step = 4
    assert not store.ready(alone) and store.steps() == []
    gate.set()
    saved = store.publish(alone)
    assert store.steps() == [saved.path] == [store.at(3)] and damage(saved.path) is None
    assert read_state(saved.path) == state(3)
    other, other_optimizer = trained(seed=2, updates=0)
    store.load(saved.path, other, other_optimizer, alone)
    assert torch.equal(torch.rand(4), drawn)
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    for p, want in zip(other.parameters(), moments, strict=True):
        assert all(torch.equal(other_optimizer.state[p][key], value) for key, value in want.items())
    assert not all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_what_a_thread_meets_is_one_line_where_it_is_heard(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path)
    before = store.save(*trained(seed=1), state(1), alone)
    monkeypatch.setattr(snapshot, "write_file", full)
    store.begin(*trained(seed=1), state(2), alone)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*step-00000002.*No space left") as caught:
        store.publish(alone)
    assert "\n" not in str(caught.value) and store.pending is None
    assert list(store.directory.iterdir()) == [before] and store.newest(alone, pytest.fail) == before


def test_files_that_others_do_not_see_whole_are_not_published(
    tmp_path: Path, alone: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a file system of many machines that lost the end of one."""

    def cut(path: Path, pieces: object, stop: threading.Event) -> snapshot.Entry:
        entry = WRITE(path, pieces, stop)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[:-1])
        return entry

    monkeypatch.setattr(snapshot, "write_file", cut)
    store = CheckpointStore(tmp_path)
    with pytest.raises(CheckpointError, match="bytes here, and"):
        store.save(*trained(seed=1), state(1), alone)
    assert list(store.directory.iterdir()) == []


def test_what_is_given_up_leaves_nothing_behind(tmp_path: Path, alone: Ranks, gate: threading.Event) -> None:
    store = CheckpointStore(tmp_path)
    store.begin(*trained(seed=1), state(1), alone)
    assert writers() == 1
    store.abandon(alone)
    assert writers() == 0 and list(store.directory.iterdir()) == []
    store.abandon(alone)  # nothing to give up


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path, alone: Ranks) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(*trained(seed=1), state(1), alone)
    half = store.directory / ".step-00000002.0a1b2c3d.tmp"
    half.mkdir()
    (half / "shard-00000.safetensors").write_bytes(b"half")
    assert CheckpointStore(tmp_path).newest(alone, pytest.fail) == path
    assert list(store.directory.iterdir()) == [path]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(array_shapes(max_dims=3, max_side=5), st.sampled_from(KINDS)), max_size=6))
def test_a_file_is_what_safetensors_reads(tmp_path_factory: pytest.TempPathFactory, kinds: list) -> None:
    """Of any tensors, views too; its hash is that of what is on the disk."""
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {str(i): (torch.randn(shape) * 9).to(kind).transpose(0, -1) for i, (shape, kind) in enumerate(kinds)}
    pieces = [snapshot.Piece(name, (0,) * tensor.dim(), tensor) for name, tensor in tensors.items()]
    entry = snapshot.write_file(path, pieces)
    content = path.read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == tensor.dtype and torch.equal(read[name], tensor) for name, tensor in tensors.items())
    with safe_open(path, framework="pt") as file:
        assert "DCP_SHARDING_INFO" in file.metadata()


@given(minutes=st.floats(0.01, 100), cost=st.floats(0, 1000), seconds=st.floats(0, 1e5))
def test_checkpoints_cost_at_most_their_share(minutes: float, cost: float, seconds: float) -> None:
    run = object.__new__(Run)
    run.plan = SimpleNamespace(checkpoint_minutes=minutes)  # type: ignore[assignment]
    run.store = SimpleNamespace(pending=None)  # type: ignore[assignment]
    run.saved_at, run.cost = 100.0, cost
    if run.due(100.0 + seconds):
        assert seconds >= 59.9 * minutes and cost <= 1.001 * SHARE * seconds
    else:
        assert seconds <= 60.1 * minutes or cost > 0.999 * SHARE * seconds
    run.store = SimpleNamespace(pending=object())  # type: ignore[assignment]
    assert not run.due(1e9), "not while one is written"


# ---- a run


def plan(shards: Path, run: Path, **more: object) -> FitPlan:
    values = {"steps": 8, "eval_every": 0, "eval_rows": 4, "checkpoint_minutes": 1e-9, "accumulate": 1, **more}
    return pretrain_plan("test", str(shards), str(run), **values)


def said(run: Path, kind: str) -> list[int]:
    return [record["step"] for record in log.read(run) if record["kind"] == kind]


@pytest.mark.drill
def test_updates_go_on_while_a_checkpoint_is_written(
    shards: Path, tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is begun after the first update and written after the fifth; nothing else of the run changes."""
    monkeypatch.setattr("shoal.train.run.SHARE", 1e9)

    def report(record: log.Record) -> None:
        order.append((record["kind"], record["step"]))
        if record == record | {"kind": "step", "step": 5}:
            gate.set()

    order: list[tuple[str, int]] = []
    result = fit(plan(shards, tmp_path / "run"), report)
    first = next(place for place, (kind, _) in enumerate(order) if kind == "checkpoint")
    assert order[first] == ("checkpoint", 1) and ("step", 5) in order[:first]
    assert said(tmp_path / "run", "checkpoint")[-1] == 8 and writers() == 0
    calm = fit(plan(shards, tmp_path / "calm", checkpoint_minutes=1e6))
    weights = [Path(each.out, "model.safetensors").read_bytes() for each in (result, calm)]
    assert weights[0] == weights[1]


class Interrupted(Exception):
    pass


@pytest.mark.drill
def test_a_run_that_ends_while_one_is_written_goes_on_from_the_one_before(
    shards: Path, tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.train.run.SHARE", 1e9)
    todo = plan(shards, tmp_path / "run")

    def report(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 2:
            gate.set()
        if record["kind"] == "checkpoint":
            gate.clear()
        if record["kind"] == "step" and record["step"] == 7:
            raise Interrupted

    with pytest.raises(Interrupted):
        fit(todo, report)
    left = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert left == ["step-00000001"] and writers() == 0
    gate.set()
    fit(todo)
    calm = dataclasses.replace(todo, run=str(tmp_path / "calm"))
    fit(calm)
    assert said(tmp_path / "run", "start") == [0, 1]
    models = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "calm")]
    assert models[0] == models[1]


def test_a_last_checkpoint_that_cannot_be_written_ends_the_run_in_a_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "write_file", full)
    with pytest.raises(CheckpointError, match=r"cannot write checkpoint .*No space left on device") as caught:
        fit(plan(shards, tmp_path / "run", steps=3))
    texts = [record["text"] for record in log.read(tmp_path / "run") if record["kind"] == "warning"]
    assert "\n" not in str(caught.value) and "training goes on, the newest checkpoint is none" in texts[0]
