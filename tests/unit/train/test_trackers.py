"""Records in TensorBoard's files, read back; MLflow and W&B where they are installed, and one line where they are not."""

import errno
import importlib.util
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event

from shoal.errors import UsageError
from shoal.on_ray.train_records import following_file
from shoal.train import log
from shoal.train.trackers import scalars, together, trackers


def records(first: int, last: int, start: int = 0) -> list[log.Record]:
    """The records of a sitting that begins after step `start`."""
    step = {"bpb": 2.5, "patch": 0.0, "rate": 1e-3, "grad_norm": 1.0, "tokens_per_second": 900.0, "utilisation": 0.5}
    found: list[log.Record] = [{"kind": "start", "step": start, "time": 0.0}]
    for number in range(first, last + 1):
        found.append({"kind": "step", "step": number, "time": 1.0, **step, "loss": 10.0 + number, "ce": [3.0, None]})
    bpb = {"text": {"shallow": 3.0, "full": 2.0}, "image": {"full": None}}
    return [
        *found,
        {"kind": "eval", "step": last, "time": 2.0, "bpb": bpb, "patch": None},
        {"kind": "end", "time": 3.0},
    ]


def events(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all event files, oldest first; what a later file purges is left out, as TensorBoard does."""
    found: list[tuple[int, str, float]] = []
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + size])  # length, its checksum, event, its checksum
            at += 16 + size
            if event.session_log.status == 1:  # START
                found = [each for each in found if each[0] < event.step]
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    return found


def test_tensorboard_has_every_number_once_although_the_run_was_resumed(tmp_path: Path) -> None:
    for sitting in (records(1, 4), records(3, 5, start=2)):
        begun = int(time.time())
        (report,) = trackers(["tensorboard"], tmp_path, "fish")
        for record in sitting:
            report(record)
        while int(time.time()) == begun:  # files are named by the second
            time.sleep(0.02)
    found = events(tmp_path / "tensorboard")
    assert [(step, value) for step, name, value in found if name == "train/loss"] == [
        (n, 10.0 + n) for n in range(1, 6)
    ]
    assert [value for step, name, value in found if name == "heldout/text/full"] == [2.0]
    assert len(found) == len({(step, name) for step, name, _ in found})


def test_numbers_that_are_not_there_are_left_out() -> None:
    start, step, evaluation, end = records(1, 1)
    assert scalars(start) == scalars(end) == {}
    assert scalars(step)["train/loss_exit_1"] == 3.0 and "train/loss_exit_2" not in scalars(step)
    assert scalars(evaluation) == {"heldout/text/shallow": 3.0, "heldout/text/full": 2.0}


def test_a_tracker_that_fails_is_told_once_and_takes_nothing_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("no folder")
    seen: list[log.Record] = []
    report = together(*trackers(["tensorboard"], tmp_path, "fish"), seen.append)
    for record in records(1, 2):
        report(record)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: --track tensorboard: ") and line.endswith("the run goes on without it")
    assert seen == records(1, 2)


def test_an_unknown_tracker_and_one_that_is_not_installed_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="allowed: tensorboard, mlflow, wandb"):
        trackers(["comet"], tmp_path, "fish")
    for name in ("mlflow", "wandb"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(UsageError, match=f"--track {name}: it is not installed: pip install '{name}'"):
                trackers([name], tmp_path, "fish")


def test_mlflow_keeps_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # its small edition has no other that needs no server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    (report,) = trackers(["mlflow"], tmp_path, "fish")
    for record in records(1, 3):
        report(record)
    (run,) = mlflow.search_runs(output_format="list")
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == [(1, 11.0), (2, 12.0), (3, 13.0)]
    assert run.info.status == "FINISHED" and run.data.metrics["heldout/text/full"] == 2.0


def test_wandb_is_given_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (report,) = trackers(["wandb"], tmp_path, "fish")
    for record in records(1, 3):
        report(record)
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    end = time.monotonic() + 20  # its own process writes it
    while b"heldout/text/full" not in written.read_bytes():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_file_system_that_is_away_for_a_moment_ends_no_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the metrics that Ray is told of, which come the same way: an alert would ring for a run that goes on."""
    open_, away, heard = Path.open, threading.Event(), list[log.Record]()

    def opened(path: Path, mode: str = "r", *args: Any, **how: Any) -> Any:
        if mode == "rb" and path == log.metrics_file(tmp_path) and not away.is_set():
            away.set()
            raise OSError(errno.ESTALE, "Stale file handle")
        return open_(path, mode, *args, **how)

    monkeypatch.setattr("shoal.on_ray.train_records.POLL", 0.01)
    monkeypatch.setattr(Path, "open", opened)
    with following_file(str(tmp_path), heard.append):
        log.Speaker(tmp_path, True, log.ignore)("start", step=0)
        assert away.wait(60)
        log.Speaker(tmp_path, True, log.ignore)("end")
    assert [record["kind"] for record in heard] == ["start", "end"]
