"""A router fitted by workers on Ray: as by one process, to the last bit, though a worker is killed; and what they refuse."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Model, presets
from shoal.errors import CheckpointError, ResourceError
from shoal.evaluate import routing
from shoal.evaluate.pieces import Models, Piece
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import cost
from shoal.model.net import Net
from shoal.on_ray.each import TRIES, quiet_data
from shoal.on_ray.measure import workers
from tests.corpus import write_corpus

pytestmark = [pytest.mark.ray, pytest.mark.drill]


def die_once(models: Models, mark: str) -> int:
    """Kills the worker that does it first; the next one says who it is."""
    del models
    if not Path(mark).exists():
        Path(mark).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def die(models: Models, mark: str) -> None:
    """Kills each worker that does it."""
    del models
    with Path(mark).open("a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def presets_of(models: Models) -> int:
    """What any worker can do."""
    del models
    return len(presets.NAMES)


def refuse(models: Models, mark: str) -> None:
    """An error of ours, which is no reason to try again."""
    del models
    with Path(mark).open("a") as file:
        file.write("x")
    raise CheckpointError("no model here", do="give one")


@pytest.mark.usefixtures("shared_ray")
def test_a_router_by_workers_is_that_of_one_process_though_one_is_killed(tmp_path: Path) -> None:
    before, made = torch.get_num_threads(), presets.get("test").model
    torch.set_num_threads(1)
    data = write_corpus(tmp_path / "data", presets.get("test"), documents=20, heldout=40)
    there = workers([cost.parameters(made).total], gpus=False)
    mark = tmp_path / "mark"

    def run(some: Sequence[Piece]) -> Iterator[Any]:
        if mark.exists():
            return there(some)
        ours = there([Piece(die_once, (str(mark),)), *some])
        assert next(ours) != os.getpid()
        return ours

    try:
        for name in ("here", "there"):
            Model(made, Net(made).init_(0), Tokenizer.load(data / "tokenizer.json")).save(tmp_path / name)
        with quiet_data():
            assert routing.refit(tmp_path / "here", data) == routing.refit(tmp_path / "there", data, run=run)
    finally:
        torch.set_num_threads(before)
    assert mark.exists()
    for path in (tmp_path / "here").iterdir():
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


@pytest.mark.usefixtures("shared_ray")
def test_a_piece_whose_workers_die_ends_the_command_in_one_line(tmp_path: Path) -> None:
    mark = tmp_path / "tried"
    with (
        quiet_data(),
        pytest.raises(ResourceError, match="cannot measure: got 'job 1, whose process died 4 times'") as caught,
    ):
        list(workers([10], gpus=False)([Piece(presets_of), Piece(die, (str(mark),)), Piece(presets_of)]))
    assert mark.read_text() == "x" * TRIES and "\n" not in str(caught.value)
