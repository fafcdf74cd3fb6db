"""`shoal bench tolerance` with a random model and few chats: that the rows are what was asked, and that nothing spends more."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from shoal.bench import tolerance
from shoal.errors import UsageError
from tests.unit.engine.lively import lively


@pytest.fixture
def heldout(tmp_path: Path) -> Path:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"and now of {number}, or of {number * number + 100}?"},
                {"role": "assistant", "content": "yes"},
            ],
            "task": "customer service",
            "group": f"g{number}",
        }
        for number in range(24)
    ]
    (tmp_path / "sft-heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def test_each_way_answers_every_batch_size(
    heldout: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lively().save(heldout / "model")
    said = io.StringIO()
    tolerance.tolerance(
        Console(file=said, width=200), model=heldout / "model", data=heldout, batches=(1, 3), tolerances=(0.0, 1.0), prompts=12,
        rounds=1, temperature=0.0,
    )  # fmt: skip
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    ways = ["full", "shallow", "middle", "verified 0", "verified 1"]
    assert [(row["batch"], row["way"]) for row in rows] == [(batch, way) for batch in (1, 3) for way in ways]
    for row in rows:
        assert row["tokens_per_s"]["customer service"] > 0 and set(row["scores"]) == {"customer service"}
        verified = row["way"].startswith("verified")
        assert (row["spent"] is not None) == verified
        if verified:
            assert 0 <= row["spent"] <= row["most_spent"] <= float(row["way"].split()[1])
        found = row["cached_tokens"]["customer service"]
        assert found == rows[0]["cached_tokens"]["customer service"] > 12 * 8, (
            "each prompt, in every way and batch size"
        )
    depths = {row["way"]: row["mean_depth"] for row in rows if row["batch"] == 1}
    assert (depths["shallow"], depths["middle"], depths["full"]) == (1, 2, 4)
    assert "1 at once, greedy" in said.getvalue()


def test_what_cannot_be_measured_is_said_in_a_line(tmp_path: Path) -> None:
    lively().save(tmp_path / "model")
    with pytest.raises(UsageError, match="--data"):
        tolerance.tolerance(
            Console(), model=tmp_path / "model", data=tmp_path, batches=(1,), tolerances=(0.1,), prompts=4, rounds=1,
            temperature=0.0,
        )  # fmt: skip
