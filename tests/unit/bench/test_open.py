"""`shoal bench open`: every part once, on few updates, where what must hold of any model holds of these."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from shoal import presets
from shoal.bench import open_parts
from shoal.bench.open import PARTS, open_bench
from shoal.errors import DataError
from tests.corpus import write_corpus


@pytest.mark.timeout(1200)  # nine parts, on what may be a busy machine
def test_every_part_runs_and_what_is_exact_is_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_parts, "MEASURED", 4)
    for name, small in {"PROMPTS": 80, "BIASES": 2, "BATCH": 2, "TOKENS": 8}.items():
        monkeypatch.setattr(f"shoal.bench.open.{name}", small)
    data = write_corpus(tmp_path / "data", presets.get("test"))
    open_bench(
        Console(file=sys.stderr),
        data=data,
        parts=PARTS,
        seeds=1,
        steps=4,
        python="false",
        keep=tmp_path / "keep",
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    (found,) = told["found"]
    assert told["bench"] == "open" and list(found) == list(PARTS)
    assert found["G"] == {}, "without transformers there is nothing to compare with"
    assert found["B"] == {"logits apart": pytest.approx(0, abs=1e-5), "tensors the same": 1, "engine is naive": 1}
    assert found["C"]["full depth the same"] == found["C"]["sha256 the same"] == 1
    assert found["C"]["bits"]["full"] == pytest.approx(found["A"]["bits"]["full"], rel=1e-6)
    same = [each[f"batch {batch}: same tokens"] for each in found["F"].values() for batch in (1, 2)]
    assert same == [1] * 6
    assert found["H"]["up to the dense length: largest difference"] == 0
    assert found["H"]["layers within the tolerance"] >= 1
    assert {"adapted", "joint"} == set(found["E"]) and found["I"]["same token"] > 0.5


def test_texts_are_cut_and_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards"):
        open_parts.Texts(tmp_path)
    texts = open_parts.Texts(write_corpus(tmp_path / "data", presets.get("test")))
    batch = texts.batch(0, 0, 256)
    assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1]) and batch.tokens.shape == (8, 256)
    assert not torch.equal(texts.batch(0, 1, 256).tokens, batch.tokens)
    assert torch.equal(texts.batch(0, 0, 256).tokens, batch.tokens)
    for held in texts.prompts(0, 4):
        assert held.row.answer.index(True) >= 8 and sum(held.row.answer) == 64
