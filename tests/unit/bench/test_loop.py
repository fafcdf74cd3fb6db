"""The loop's benchmark: its streams are what they are called, and its figures count what was missed."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shoal import Model
from shoal.bench import loop
from shoal.bench.loop_shop import NEW_ITEMS, questions
from shoal.cli import main


def pool(count: int, up: float, seed: int) -> pa.Table:
    """Rows whose signal is up by so many standard deviations."""
    rng = np.random.default_rng(seed)
    return pa.table(
        {
            "at": np.zeros(count, dtype=np.int64),
            "prompt_nll": 3 + up + rng.normal(size=count),
            "prompt_tokens": rng.integers(5, 40, count),
            "weights": [f"{up}"] * count,
        }
    )


def test_the_domains_ask_different_things_and_each_once() -> None:
    asked = {domain: questions(domain) for domain in loop.DOMAINS}
    assert all(len(set(some)) == len(some) >= 400 for some in asked.values()) and len(asked["old"]) >= 7_000
    assert not set(asked["old"]) & set(asked["catalogue"]) and not set(asked["old"]) & set(asked["german"])
    assert not any(item in text.split() for item in NEW_ITEMS for text in asked["old"])


def test_a_drift_is_counted_from_its_first_request_and_a_missed_one_as_the_latest() -> None:
    pools = {"old": pool(5_000, 0, 0), "catalogue": pool(500, 1.5, 1), "german": pool(500, 0.0, 2)}
    found = loop.detection(pools, 6)
    assert found["no drift"]["alarms"] <= 1 and found["no drift"]["requests"] == 3_000
    new = found["new catalogue"]
    assert new["alarms"] == 6 and 10 <= new["median"] <= 80 and new["signals"] == {"prompt_nll": 6}
    assert new["p95"] == max(new["numbers"]) and found["10 % new catalogue"]["median"] != new["median"]
    assert found["German"]["alarms"] <= 1 and found["German"]["p95"] is None, "they ask as the old ones do"
    assert loop.detection(pools, 2)["new catalogue"]["numbers"] == new["numbers"][:2], "a seed is a stream"


def test_the_command_answers_keeps_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model that knows nothing, and short streams."""
    Model.from_preset("test").save(tmp_path / "model")
    for name, value in (("LEARNED", 220), ("LATE", 60), ("ANSWER", 2)):
        monkeypatch.setattr(f"shoal.bench.loop.{name}", value)
    words = ["bench", "loop", "--model", str(tmp_path / "model"), "--seeds", "2", "--keep", str(tmp_path / "kept")]
    assert main([*words, "--requests", "300"]) == 2
    monkeypatch.setattr("shoal.bench.loop.LEAST", 20)
    assert main([*words, "--requests", "300"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["rows"] == {"old": 300, "catalogue": 60, "german": 60} and told["seeds"] == 2
    assert set(told["detection"]) == {"no drift", *loop.DRIFTS} and told["detection"]["no drift"]["requests"] == 80
    assert main([*words, "--requests", "300"]) == 0
    again = capsys.readouterr().out
    assert "answering" not in again and json.loads(again.splitlines()[-1])["detection"] == told["detection"]
    assert main([*words, "--requests", "200"]) == 2 and main([*words, "--seeds", "0"]) == 2
