"""What a run's records say as metrics."""

from __future__ import annotations

import math
from pathlib import Path

from shoal.train import log
from shoal.train.loop import fit
from shoal.train.metrics import FAMILIES, Sample, samples
from shoal.train.plan import pretrain_plan


def test_a_run_tells_every_metric_with_the_labels_of_its_row(shards: Path, tmp_path: Path) -> None:
    """But for warnings, of which it has none."""
    fit(pretrain_plan("test", str(shards), str(tmp_path / "run"), steps=4, eval_every=2, checkpoint_minutes=0.0))
    told = [sample for record in log.read(tmp_path / "run") for sample in samples(record)]
    assert {sample.name for sample in told} == FAMILIES.keys() - {"warnings"}
    for sample in told:
        assert tuple(sample.labels) == FAMILIES[sample.name].labels and math.isfinite(sample.value)
    last = {(sample.name, *sample.labels.values()): sample.value for sample in told}
    records = log.read(tmp_path / "run")
    steps = [record for record in records if record["kind"] == "step"]
    assert last["step",] == 4 and last["loss",] == steps[-1]["loss"] and last["ended",] == 1
    assert last["part_seconds", "data"] == steps[-1]["parts"]["data"]
    grown = {name: sum(s.value for s in told if s.name == name) for name in ("tokens", "checkpoints", "starts")}
    assert grown == {"tokens": records[-1]["tokens"], "checkpoints": 4, "starts": 1}


def test_what_is_not_a_number_is_left_out() -> None:
    step = {"kind": "step", "step": 3, "loss": None, "bpb": math.nan, "tokens": 5}
    assert list(samples(step)) == [Sample("step", 3.0, {}), Sample("tokens", 5.0, {})]
    assert list(samples({"kind": "warning", "step": 1, "text": "x"})) == [Sample("warnings", 1.0, {})]
    assert list(samples({"kind": "chats", "step": 0})) == []
