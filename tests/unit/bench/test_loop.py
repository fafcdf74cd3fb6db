"""The loop's benchmark: its streams are what they are called, and its figures count what was missed."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from shoal import Model
from shoal.bench import loop_detect
from shoal.bench.loop_detect import Pool
from shoal.bench.loop_shop import NEW_ITEMS, questions
from shoal.cli import main


def pool(count: int, up: float, seed: int, words: range = range(4)) -> Pool:
    """Rows whose signal is up by so many standard deviations, of prompts of such words."""
    rng = np.random.default_rng(seed)
    rows = pa.table(
        {
            "at": np.zeros(count, dtype=np.int64),
            "prompt_nll": 3 + up + rng.normal(size=count),
            "prompt_tokens": rng.integers(5, 40, count),
            "prompt_surprisal": pa.nulls(count, pa.float32()),
            "weights": [f"{up}"] * count,
        }
    )
    return Pool(rows, rng.choice(words, (count, 6)).tolist())


def test_the_domains_ask_different_things_and_each_once() -> None:
    asked = {domain: questions(domain) for domain in loop_detect.DOMAINS}
    assert all(len(set(some)) == len(some) >= 400 for some in asked.values()) and len(asked["old"]) >= 7_000
    assert not set(asked["old"]) & set(asked["catalogue"]) and not set(asked["old"]) & set(asked["german"])
    assert not any(item in text.split() for item in NEW_ITEMS for text in asked["old"])


@pytest.mark.drill
def test_a_drift_is_counted_from_its_first_request_and_a_missed_one_as_the_latest() -> None:
    pools = {"old": pool(5_000, 0, 0), "catalogue": pool(500, 1.5, 1), "german": pool(500, 0.0, 2)}
    found = loop_detect.detection(pools, 6, 10)
    assert found["no drift"]["alarms"] <= 1 and found["no drift"]["requests"] == 3_000
    new = found["new catalogue"]
    assert new["alarms"] == 6 and 10 <= new["median"] <= 80 and new["signals"] == {"prompt_nll": 6}
    assert new["p95"] == max(new["numbers"]) and found["10 % new catalogue"]["median"] != new["median"]
    assert found["German"]["alarms"] <= 1 and found["German"]["p95"] is None, "they ask as the old ones do"
    assert loop_detect.detection(pools, 2, 10)["new catalogue"]["numbers"] == new["numbers"][:2], "a seed is a stream"


@pytest.mark.drill
def test_what_is_asked_in_new_words_is_noticed_though_no_signal_of_the_model_moves() -> None:
    """By a table of the first thousand prompts, which are of the stream itself; one request in ten is enough."""
    pools = {"old": pool(5_000, 0, 0), "catalogue": pool(500, 0, 1, range(6, 8)), "german": pool(500, 0, 2)}
    found = loop_detect.detection(pools, 4, 10)
    for name, most in (("new catalogue", 40), ("10 % new catalogue", 1_500)):
        assert found[name]["alarms"] == 4 and found[name]["p95"] <= most, found[name]
        assert found[name]["signals"] == {"prompt_surprisal": 4}
    assert found["no drift"]["alarms"] == found["German"]["alarms"] == 0


@pytest.mark.drill
def test_the_command_answers_keeps_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a model that knows nothing, and short streams."""
    Model.from_preset("test").save(tmp_path / "model")
    for name, value in (("LEARNED", 220), ("LATE", 60), ("ANSWER", 2)):
        monkeypatch.setattr(f"shoal.bench.loop_detect.{name}", value)
    words = ["bench", "loop", "--model", str(tmp_path / "model"), "--seeds", "2", "--keep", str(tmp_path / "kept")]
    assert main([*words, "--requests", "300"]) == 2
    monkeypatch.setattr("shoal.bench.loop_detect.LEAST", 20)
    assert main([*words, "--requests", "300"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["rows"] == {"old": 300, "catalogue": 60, "german": 60} and told["seeds"] == 2
    assert (
        set(told["detection"]) == {"no drift", *loop_detect.DRIFTS} and told["detection"]["no drift"]["requests"] == 80
    )
    assert main([*words, "--requests", "300"]) == 0
    again = capsys.readouterr().out
    assert "answering" not in again and json.loads(again.splitlines()[-1])["detection"] == told["detection"]
    assert main([*words, "--requests", "200"]) == 2 and main([*words, "--seeds", "0"]) == 2
