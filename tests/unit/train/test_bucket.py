"""A run in S3: what a lost machine takes with it (nothing), what a rank reads of a checkpoint, and what is refused. Machines
are caches here."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data import models, remote
from shoal.data.lease import leased
from shoal.data.place import Bucket
from shoal.errors import CheckpointError, ConfigError, DataError
from shoal.evaluate.seen import rows_read
from shoal.train import bucket, log, ranges
from shoal.train.bucket import LEASE, folder_of, need_possible, store_of
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, finetune_plan, pretrain_plan
from shoal.train.ranges import cut, together
from shoal.train.run import StoppedError
from tests.s3 import Service, service, upload
from tests.unit.train.test_resume import Interrupted, said, stop_at, weights

Machine = Callable[[str], Path]
RUNS = itertools.count()


@pytest.fixture(scope="module")
def s3() -> Iterator[Service]:
    with service() as made:
        made.client.create_bucket(Bucket="ocean")
        yield made


@pytest.fixture
def uri(s3: Service) -> str:
    """Of a run that no other test has."""
    return f"s3://ocean/runs/{next(RUNS)}"


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    def begin(name: str) -> Path:
        monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / name))
        return tmp_path / name

    begin("first")
    bucket.bucket_of.cache_clear()
    return begin


def short(shards: str | Path, run: str | Path, **more: object) -> FitPlan:
    few = {"steps": 6, "eval_every": 0, "eval_rows": 4, "checkpoint_minutes": 0.0, "accumulate": 1}
    values: dict[str, Any] = {**few, **more}
    return pretrain_plan("test", str(shards), str(run), **values)


@pytest.fixture(scope="module")
def calm(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a folder, to which nothing happens."""
    run = tmp_path_factory.mktemp("calm")
    fit(short(shards, run))
    return run


def objects(s3: Service, uri: str) -> list[str]:
    return sorted(name for name, _ in Bucket(uri, s3.inside).sizes())


@pytest.mark.drill
def test_a_run_whose_machine_is_lost_goes_on_from_s3_on_another_to_the_bytes_of_one_in_a_folder(
    s3: Service, uri: str, shards: Path, calm: Path, machine: Machine
) -> None:
    with pytest.raises(Interrupted):
        fit(short(shards, uri), stop_at(4, "checkpoint"))
    lost = machine("second")
    result = fit(short(shards, uri))
    assert not (lost / "corpora").exists() and result.out == f"{uri}/model"
    assert (models.here(result.out) / "model.safetensors").read_bytes() == weights(calm)
    folder = folder_of(uri)
    assert said(folder, "start", "step") == [(0,), (4,)], "the metrics went along"
    assert said(folder, "step", "step", "loss") == said(calm, "step", "step", "loss")
    assert Bucket(uri, s3.inside).text("metrics.jsonl") == log.metrics_file(folder).read_bytes()
    kept = {name.split("/")[1] for name in objects(s3, uri) if name.startswith("checkpoints/")}
    assert kept == {"step-00000005", "step-00000006"} and LEASE not in objects(s3, uri)
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["metrics.jsonl"], (
        "nothing is left of what was put"
    )
    assert [path.name for path in store_of(uri).steps()] == sorted(kept)
    assert rows_read([uri], shards) == rows_read([calm], shards)


@pytest.mark.drill  # of a run in a folder: test_training_checkpoint
def test_a_checkpoint_of_other_bytes_or_half_put_is_passed_over(
    s3: Service, uri: str, shards: Path, calm: Path, machine: Machine
) -> None:
    with pytest.raises(Interrupted):
        fit(short(shards, uri, keep=3), stop_at(4, "checkpoint"))
    place = Bucket(uri, s3.inside)
    place.put_text("checkpoints/step-00000004/shard-00000.safetensors", b"other")
    place.remove(["checkpoints/step-00000003/manifest.json"])
    machine("second")
    fit(short(shards, uri, keep=3))
    warned = [text for (text,) in said(folder_of(uri), "warning", "text")]
    assert any(
        f"{uri}/checkpoints/step-00000004 is damaged (shard-00000.safetensors has 5 bytes" in text for text in warned
    )
    assert said(folder_of(uri), "start", "step") == [(0,), (2,)]
    assert (models.here(f"{uri}/model") / "model.safetensors").read_bytes() == weights(calm)


@pytest.mark.drill
def test_who_puts_nothing_fails_at_the_end_alone_and_loses_nothing(
    s3: Service, uri: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Bucket.put

    def refused(self: Bucket, file: Path, name: str) -> str:
        if name.startswith("checkpoints/step-00000003/"):
            raise DataError("S3 does not answer")
        return put(self, file, name)

    monkeypatch.setattr(Bucket, "put", refused)
    fit(short(shards, uri, keep=9))
    (warned,) = [text for (text,) in said(folder_of(uri), "warning", "text")]
    assert f"cannot write checkpoint {uri}/checkpoints/step-00000003: got 'S3 does not answer'" in warned
    assert [path.name[-1] for path in store_of(uri).steps()] == ["1", "2", "4", "5", "6"]
    with pytest.raises(CheckpointError, match="step-00000003: got 'S3 does not answer'"):
        fit(short(shards, uri, keep=9, steps=3, resume="never"))


def test_one_command_trains_there_and_one_that_was_taken_over_publishes_nothing(
    s3: Service, uri: str, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.data.lease.RENEWED", 0.05)
    with (
        leased(Bucket(uri, s3.inside), "another", command="run", name=LEASE),
        pytest.raises(DataError, match=f"another run is writing to {uri}: got 'process"),
    ):
        fit(short(shards, uri))
    assert objects(s3, uri) == []

    def taken_over(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 2:
            Bucket(uri, s3.inside).put_text(LEASE, json.dumps({"run": "another", "who": "x"}).encode())

    Bucket(uri, s3.inside).put_text(LEASE, json.dumps({"run": "mine", "who": "x"}).encode())
    with pytest.raises(CheckpointError, match=f"another run took over {uri}"):
        fit(short(shards, uri, lease="mine"), taken_over)
    assert [path.name for path in store_of(uri).steps()] == ["step-00000001"], "from before it was taken over"


@pytest.mark.parametrize("other_stops", [False, pytest.param(True, marks=pytest.mark.drill)])
def test_a_run_that_was_taken_over_does_not_train_on_for_nothing(
    s3: Service, uri: str, shards: Path, monkeypatch: pytest.MonkeyPatch, other_stops: bool
) -> None:
    monkeypatch.setattr(bucket, "LOOK", 0.01)
    place, taken = Bucket(uri, s3.inside), {"run": "another", "who": "x"}
    place.put_text(LEASE, json.dumps({"run": "mine"}).encode())

    def take_over(record: log.Record) -> None:
        if record["kind"] == "step":
            if record["step"] == 2:
                place.put_text(LEASE, json.dumps(taken).encode())
                if other_stops:
                    place.put_text("stop", b"")
            assert record["step"] < 300, "it goes on"

    with pytest.raises(CheckpointError, match=f"another run took over {uri}"):
        fit(short(shards, uri, lease="mine", steps=100_000, checkpoint_minutes=60.0), take_over)
    assert ("stop" in objects(s3, uri)) == other_stops and not store_of(uri).steps()


@pytest.mark.parametrize("seconds", [0.01, pytest.param(0.5, marks=pytest.mark.drill)])
def test_an_object_called_stop_ends_a_run_with_a_checkpoint(
    s3: Service, uri: str, shards: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """And it goes, or the next sitting would end at once: whether it is looked for again before the run has ended or not."""
    monkeypatch.setattr(bucket, "LOOK", seconds)
    begun = threading.Event()

    def ask(record: log.Record) -> None:
        if record["kind"] == "step" and not begun.is_set():
            begun.set()
            Bucket(uri, s3.inside).put_text("stop", b"")

    with pytest.raises(StoppedError):
        fit(short(shards, uri, steps=100_000, checkpoint_minutes=60.0), ask)
    assert len(store_of(uri).steps()) == 1 and "stop" not in objects(s3, uri)


def test_what_needs_a_common_folder_is_refused_and_so_is_a_bucket_that_is_not_there(
    uri: str, shards: Path, chats: Path, tmp_path: Path
) -> None:
    for more, what in (({"mirror": str(tmp_path)}, "mirror"), ({"profile": 2}, "profile")):
        with pytest.raises(ConfigError, match=f"{what}: got .*{uri} is in S3"):
            need_possible(short(shards, uri, **more))
    need_possible(short(shards, tmp_path / "run", mirror=str(tmp_path)))
    with pytest.raises(DataError, match=r"s3://nowhere/run.*: the bucket does not exist"):
        fit(short(shards, "s3://nowhere/run"))
    Bucket(f"{uri}/model", bucket.S3()).put_text("notes.txt", b"mine")
    with pytest.raises(CheckpointError, match=r"model is not a model that may be replaced: got 'notes\.txt'"):
        fit(short(shards, uri))


@pytest.mark.drill
def test_chats_corpus_and_model_are_read_from_s3_and_the_router_of_a_model_there_is_changed(
    s3: Service, uri: str, shards: Path, chats: Path, tmp_path: Path
) -> None:
    upload(shards, f"{uri}-data", s3.inside)
    Bucket(f"{uri}-chats", s3.inside).put(chats, "a.jsonl")
    result = fit(short(f"{uri}-data", uri, steps=1))
    rows = f"{uri}-chats/a.jsonl"
    plan = finetune_plan(result.out, rows, f"{uri}-tuned", heldout=rows, steps=1, eval_every=0)
    assert not plan.router_data.endswith("-data") and fit(plan).out == f"{uri}-tuned/model"
    assert remote.local(rows).read_bytes() == chats.read_bytes()
    with pytest.raises(DataError, match=r"b\.jsonl is missing"):
        remote.local(f"{uri}-chats/b.jsonl")
    with models.changed(result.out) as folder:
        assert (folder / "manifest.json").is_file()


@given(st.lists(st.tuples(st.integers(0, 1 << 26), st.integers(1, 1 << 25)), max_size=12))
def test_ranges_are_put_together_and_cut_so_that_all_bytes_come_and_none_twice(asked: list[tuple[int, int]]) -> None:
    spans = [(start, start + size) for start, size in asked]
    parts = list(cut(together(spans)))
    assert all(0 < end - start <= ranges.MOST for start, end in parts)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(parts))
    wanted = {edge for span in spans for edge in (span[0], span[1] - 1)}
    assert all(any(start <= byte < end for start, end in parts) for byte in wanted)
    beside = sum(end - start for start, end in parts) - len_of(spans)
    assert 0 <= beside <= ranges.APART * max(0, len(spans) - 1)


def len_of(spans: list[tuple[int, int]]) -> int:
    """Bytes that are in any of `spans`."""
    total = reached = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total
