"""`shoal bench capture` with a random model: that both sides answer the same, and that a row is kept of each of one side's."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from shoal.bench.asking import CLIENTS, REQUESTS, length
from shoal.bench.capture import capture_bench
from shoal.model.model import Model


@pytest.mark.drill
def test_a_row_is_kept_of_each_request_of_one_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Model.from_preset("test", seed=0).save(tmp_path / "model")
    capture_bench(Console(file=io.StringIO(), width=200), model=tmp_path / "model", tokens=4, rounds=2)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["rows"] == 3 * CLIENTS * REQUESTS and found["lost"] == 0, "two rounds, and what is made once"
    assert found["throughput_ratio"]["low"] <= found["throughput_ratio"]["median"] <= found["throughput_ratio"]["high"]
    assert found["cpu_ratio"]["median"] > 0 and set(found["tokens_per_second"]) == {"off", "on"}


@pytest.mark.parametrize("tokens", [16, 64, 100])
def test_answers_end_apart_and_have_in_the_mean_what_is_asked_for(tokens: int) -> None:
    lengths = [length(place, tokens) for place in range(CLIENTS * REQUESTS)]
    assert abs(sum(lengths) / len(lengths) - tokens) < 1
    for step in range(REQUESTS):  # of all clients, what they ask for in one go
        assert len({lengths[client * REQUESTS + step] for client in range(CLIENTS)}) >= CLIENTS / 2
    assert tokens // 2 <= min(lengths) and max(lengths) <= tokens + tokens // 2 + 1
