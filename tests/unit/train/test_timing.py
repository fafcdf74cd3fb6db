"""Where the time of an update goes, and traces of some."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from shoal.errors import ConfigError
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.parallel import Ranks
from shoal.train.plan import FitPlan, pretrain_plan
from shoal.train.timing import PARTS, WARM, Watch


class OfThree(Ranks):
    """Rank 1 of three, of which the others were busy for 5 and 1 seconds."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor([5.0, 0.0, 1.0], dtype=values.dtype)


def plan(shards: Path, run: Path, **more: object) -> FitPlan:
    return pretrain_plan("test", str(shards), str(run), **{"steps": 6, "eval_every": 0, "eval_rows": 4, **more})


def test_the_slowest_rank_is_told_beside_the_median() -> None:
    watch = Watch()
    watch.busy = 2.0
    told = watch.told(OfThree(1, 3, torch.device("cpu")), 3.0)
    assert told["busy"] == {"slowest": 5.0, "median": 2.0, "slowest_rank": 0}
    assert told["parts"]["rest"] == 3.0 and sum(told["parts"].values()) == 3.0


def test_waiting_is_no_work() -> None:
    watch = Watch()
    for part in ("waiting", "compute"):
        with watch(part):
            began = time.thread_time()
            while time.thread_time() - began < 0.02:
                pass
    assert watch.parts["waiting"] >= 0.02 and 0.02 <= watch.busy < 0.04


def test_parts_of_an_update_add_up_to_its_seconds(shards: Path, tmp_path: Path) -> None:
    fit(plan(shards, tmp_path / "run"))
    records = [record for record in log.read(tmp_path / "run") if record["kind"] == "step"]
    assert len(records) == 6
    for record in records:
        assert tuple(record["parts"]) == PARTS and min(record["parts"].values()) >= 0
        assert sum(record["parts"].values()) == pytest.approx(record["seconds"], rel=0.05)
        assert record["parts"]["compute"] > 0 and record["busy"]["slowest_rank"] == 0
    assert not (tmp_path / "run" / "traces").exists()


@pytest.mark.parametrize("updates", [pytest.param(1, marks=pytest.mark.drill), 99])
def test_a_trace_has_the_operators_of_its_updates(shards: Path, tmp_path: Path, updates: int) -> None:
    """In the format that Perfetto opens; of more updates than there are, those that there are. Each
    operator is some lines, so they are of few rows."""
    steps = WARM + 2
    fit(plan(shards, tmp_path / "run", profile=updates, steps=steps, batch_tokens=192, accumulate=1))
    (path,) = (tmp_path / "run" / "traces").iterdir()
    last = min(steps, WARM + updates)
    assert path.name == f"step-{last:08d}-rank-00000.json"
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("ph") == "X"]
    assert sum(name.startswith("Optimizer.step") for name in names) == last - WARM
    assert any("mm" in name for name in names) and all("ts" in event for event in events if event.get("ph") == "X")
    assert [record["path"] for record in log.read(tmp_path / "run") if record["kind"] == "trace"] == [str(path)]


def test_updates_to_trace_are_a_count() -> None:
    with pytest.raises(ConfigError, match="profile: got -1"):
        pretrain_plan("test", "data", "run", steps=1, profile=-1)
