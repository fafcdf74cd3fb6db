"""What one process asks of the others and does beside them, call by call; `test_parallel` has them train together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

from shoal.errors import DataError, ShoalError
from shoal.train.parallel import Ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 1)
ALONE, SECOND = Ranks(0, 1, CPU), Ranks(1, 3, CPU)


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What torch was told of threads."""
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.mark.parametrize(("world", "told"), [(1, []), (2, [1])])
def test_a_process_is_what_its_group_says_and_shares_the_cores_with_the_others(
    monkeypatch: pytest.MonkeyPatch, threads: list[int], world: int, told: list[int]
) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: world - 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    assert Ranks.join() == Ranks(world - 1, world, CPU)
    assert threads == told
    assert Ranks.join().first == (world == 1)


@pytest.mark.parametrize(("local", "index"), [(None, 0), ("1", 1), ("5", 1)])
def test_a_gpu_is_taken_by_the_place_on_the_machine(
    monkeypatch: pytest.MonkeyPatch, threads: list[int], local: str | None, index: int
) -> None:
    told: list[object] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", told.append)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert Ranks.join() == Ranks(0, 1, torch.device("cuda", index))
    assert told == ["high", torch.device("cuda", index)] and threads == []


@contextmanager
def gathered(monkeypatch: pytest.MonkeyPatch, before: list[Any], after: list[Any]) -> Iterator[None]:
    """The others say these, by rank."""

    def gather(found: list[Any], value: Any) -> None:
        assert len(found) == SECOND.world
        found[:] = [*before, value, *after]

    with monkeypatch.context() as patched:
        patched.setattr(dist, "all_gather_object", gather)
        yield


def test_an_error_of_ours_is_raised_by_all_the_first_rank_s_first(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, mine = DataError("theirs"), DataError("mine")
    with gathered(monkeypatch, [None], [theirs]), pytest.raises(ShoalError, match="theirs"), SECOND.alike():
        pass
    with gathered(monkeypatch, [None], [theirs]), pytest.raises(ShoalError, match="mine"), SECOND.alike():
        raise mine
    with gathered(monkeypatch, [theirs], [None]), pytest.raises(ShoalError, match="theirs"), SECOND.alike():
        raise mine
    with gathered(monkeypatch, [None], [None]), SECOND.alike():
        pass
    with pytest.raises(ShoalError, match="mine"), ALONE.alike():
        raise mine
    with pytest.raises(ZeroDivisionError), ALONE.alike():
        _ = 1 / 0


class Busy(Ranks):
    """With another rank that is done three exchanges after this one. Who exchanges is noted."""

    told: list[tuple[float, str, bool]]
    left: list[float]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        thread = threading.current_thread()
        self.told.append((float(values), thread.name, thread.daemon))
        if values.item():
            return values + 1
        time.sleep(0.01)  # who does not wait for it is past the block by then
        return values + self.left.pop(0)


def busy(world: int) -> Busy:
    ranks = Busy(0, world, CPU)
    object.__setattr__(ranks, "told", [])
    object.__setattr__(ranks, "left", [1.0, 1.0, 0.0])
    return ranks


def test_what_takes_one_of_them_long_ends_when_the_last_is_done() -> None:
    """In a thread that lets a process end which is interrupted meanwhile; alone there is nobody to wait for."""
    ranks = busy(2)
    with ranks.at_leisure():
        for _ in range(5000):
            if ranks.told:
                break
            time.sleep(0.001)
        assert ranks.told, "nobody exchanges"
    assert [value for value, *_ in ranks.told if value == 0] == [0.0] * 3 and ranks.left == []
    assert {(name, daemon) for _, name, daemon in ranks.told} == {("at-leisure", True)}
    ranks, ran = busy(1), []
    with ranks.at_leisure():
        ran.append(1)
    assert ran == [1] and ranks.told == []


def test_a_rank_that_is_gone_meanwhile_is_told_and_an_error_of_the_block_first() -> None:
    class Gone(Ranks):
        def sum(self, values: torch.Tensor) -> torch.Tensor:
            raise ConnectionError("gone")

    ranks = Gone(0, 2, CPU)
    with pytest.raises(ConnectionError, match="gone"), ranks.at_leisure():
        pass
    with pytest.raises(DataError, match="mine"), ranks.at_leisure():
        raise DataError("mine")
    late = busy(2)
    with pytest.raises(DataError, match="mine"), late.at_leisure():
        raise DataError("mine")
    assert late.left == [], "the others are waited for all the same"
