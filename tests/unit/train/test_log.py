"""What a run says, to files and to people."""

import json
import math
import resource
from pathlib import Path

import pytest
import torch

from shoal import presets
from shoal.model.cost import flops_per_token, scoring_flops
from shoal.train import log
from shoal.train.meter import Meter, matmul_rate, training_flops

STEP = {
    "progress": 0.25, "loss": 3.2, "ce": [3.5, 3.3, 3.1], "patch": 0.4, "bpb": 2.5, "rate": 1e-3, "grad_norm": 0.7,
    "tokens_per_second": 12345.6, "utilisation": 0.31, "eta": 75.0,
}  # fmt: skip


def test_records_go_to_the_file_and_to_the_listener_of_rank_0(tmp_path: Path) -> None:
    heard: list[log.Record] = []
    first, second = log.Speaker(tmp_path, True, heard.append), log.Speaker(tmp_path, False, heard.append)
    first("step", STEP, step=1)
    second("step", STEP, step=1)
    second("checkpoint", step=1, everywhere=True)
    assert [(r["kind"], r["step"]) for r in heard] == [("step", 1), ("checkpoint", 1)]
    assert len(log.metrics_file(tmp_path).read_text().splitlines()) == 1


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    """JSON has no word for nan; other programs read this file."""
    log.Speaker(tmp_path, True, log.ignore)("step", {"bpb": math.nan, "ce": [1.0, math.inf]}, step=1)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    (text,) = log.metrics_file(tmp_path).read_text().splitlines()
    record = json.loads(text, parse_constant=refuse)
    assert record["bpb"] is None and record["ce"] == [1.0, None]


def test_a_resumed_history_has_each_step_once(tmp_path: Path) -> None:
    say = log.Speaker(tmp_path, True, log.ignore)
    say("start", step=0)
    for step in (1, 2, 3):
        say("step", {"loss": step}, step=step)
    say("start", step=2)  # step 3 came after the last checkpoint, so it is done again
    for step in (3, 4):
        say("step", {"loss": 10 * step}, step=step)
    with log.metrics_file(tmp_path).open("a") as file:
        file.write('{"kind": "step", "st')  # and then the power went
    steps = [(r["step"], r["loss"]) for r in log.read(tmp_path) if r["kind"] == "step"]
    assert steps == [(1, 1), (2, 2), (3, 30), (4, 40)]


def test_a_run_that_begins_again_replaces_the_old_one(tmp_path: Path) -> None:
    say = log.Speaker(tmp_path, True, log.ignore)
    for start in (0, 0):
        say("start", step=start)
        say("step", {}, step=1)
    assert [r["kind"] for r in log.read(tmp_path)] == ["start", "step"]


def test_a_torn_line_costs_no_record_after_it(tmp_path: Path) -> None:
    """As a full disk leaves it: the next record begins on a line of its own."""
    say = log.Speaker(tmp_path, True, log.ignore)
    say("start", step=0)
    with log.metrics_file(tmp_path).open("ab") as file:
        file.write(b'{"kind": "step", "st')
    say("step", {"loss": 2.0}, step=2)
    found = log.history(tmp_path)
    assert [(r["kind"], r["step"]) for r in found.records] == [("start", 0), ("step", 2)] and found.unreadable == 1


def test_what_a_full_disk_did_not_take_is_written_when_there_is_room(tmp_path: Path) -> None:
    say = log.Speaker(tmp_path, True, log.ignore)
    say("start", step=0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = log.metrics_file(tmp_path).stat().st_size + 20  # a record is torn there
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        say("step", {"loss": 1.0}, step=1)
        say("step", {"loss": 2.0}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert log.metrics_file(tmp_path).stat().st_size == room, "torn indeed"
    say("step", {"loss": 3.0}, step=3)
    found = log.history(tmp_path)
    assert [r["step"] for r in found.records] == [0, 1, 2, 3] and found.unreadable >= 1


@pytest.mark.parametrize(
    "line",
    [
        b"12",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\x00" * 40,
        b"[" * 100_000,
        b'{"step": 1}',
        b'{"kind": "step"}',
        b'{"kind": "step", "step": "1"}',
        b'{"kind": "start", "step": null}',
        b'{"kind": 1, "step": 1}',
    ],
    ids=lambda line: repr(line[:20]),
)
def test_what_is_no_record_is_passed_over_and_counted(tmp_path: Path, line: bytes) -> None:
    say = log.Speaker(tmp_path, True, log.ignore)
    say("start", step=0)
    with log.metrics_file(tmp_path).open("ab") as file:
        file.write(line + b"\n")
    say("step", {"loss": 1.0}, step=1)
    found = log.history(tmp_path)
    assert [r["kind"] for r in found.records] == ["start", "step"] and found.unreadable == 1


def test_numbers_that_json_has_no_word_for_come_back_as_none() -> None:
    record = log.parse(b'{"kind": "step", "step": 1, "loss": NaN, "rate": 1e999}')
    assert record == {"kind": "step", "step": 1, "loss": None, "rate": None}


def test_utilisation_is_work_done_over_work_possible() -> None:
    config = presets.get("test").model
    early = 2 * 2 * config.vocab * config.width
    scoring = scoring_flops(config, config.train_length)  # of blocks, which has no backward pass
    assert scoring > 0
    assert training_flops(config) == 3 * (flops_per_token(config, config.train_length) + early) - 2 * scoring
    meter = Meter(training_flops(config), rate=1e9, world=2, memory=0.5)
    assert meter.read() == {"tokens_per_second": 0.0, "utilisation": 0.0}
    meter.add(tokens=100, seconds=2.0)
    meter.add(tokens=300, seconds=1.0)
    rate = (0.5 * 100 + 300) / (0.5 * 2 + 1)
    assert meter.read() == pytest.approx(
        {"tokens_per_second": rate, "utilisation": rate * training_flops(config) / 2e9}
    )


def test_the_matmul_rate_is_that_of_a_computer() -> None:
    """Between a slow phone and a rack of accelerators, in operations a second."""
    assert 1e8 < matmul_rate(torch.device("cpu"), seconds=0.02, size=128) < 1e15
