"""What training can leave out or add: whole runs with everything on, which are as repeatable as plain ones."""

from pathlib import Path

import pytest

from shoal.errors import ConfigError
from shoal.train import log
from shoal.train.loop import fit
from shoal.train.plan import FitPlan, pretrain_plan

ON = {"layer_dropout": 0.6, "rotate_exits": "on", "distill": 0.5}


def short(data: Path, run: Path, **more: object) -> FitPlan:
    values = {"steps": 6, "eval_every": 0, "eval_rows": 4, "accumulate": 1, **ON, **more}
    return pretrain_plan("test", str(data), str(run), **values)


def steps(run: Path) -> list[log.Record]:
    return [record for record in log.read(run) if record["kind"] == "step"]


def test_an_interrupted_run_ends_to_the_bit_as_if_nothing_had_happened(shards: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(record: log.Record) -> None:
        if record["kind"] == "step" and record["step"] == 4:
            raise Interrupted

    calm = fit(short(shards, tmp_path / "calm"))
    hit = short(shards, tmp_path / "hit", checkpoint_minutes=0.0)
    with pytest.raises(Interrupted):
        fit(hit, interrupt)
    resumed = fit(hit)
    histories = [[(r["loss"], r["grad_norm"]) for r in steps(tmp_path / run)] for run in ("calm", "hit")]
    assert histories[0] == histories[1] and len(histories[0]) == 6
    models = [Path(result.out, "model.safetensors").read_bytes() for result in (resumed, calm)]
    assert models[0] == models[1]


def test_an_exit_that_is_not_its_turn_has_no_loss_to_show(shards: Path, tmp_path: Path, capsys) -> None:
    with log.Console("train", every=1) as console:
        fit(short(shards, tmp_path / "run", steps=2), console)
    first, second = (record["ce"] for record in steps(tmp_path / "run"))
    assert first[1] is None and second[0] is None and None not in (first[0], first[2], second[1], second[2])
    assert "      -" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"layer_dropout": 1.1}, {"distill": -1.0}, {"rotate_exits": "sometimes"}], ids=str)
def test_values_that_cannot_be_are_named(shards: Path, tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"train.{next(iter(change))}"):
        short(shards, tmp_path / "run", **change)
