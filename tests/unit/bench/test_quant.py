"""`shoal bench quant` at tiny sizes: that the table holds what was measured."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from shoal import Model
from shoal.bench import quant
from shoal.errors import UsageError


def test_speed_and_size_of_a_shape(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`tests/flows/test_int8_flow.py` starts processes for their memory."""
    asked, said = list[Path](), io.StringIO()
    monkeypatch.setattr(quant, "peak_memory", lambda path: asked.append(path) or 10**9 // len(asked))
    quant.quant(Console(file=said, width=160), preset="tiny", tokens=2, rounds=1, pairs=[], data=None)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["batch"] for row in told["speed"]] == [1, 8]
    assert all(row["ratio"] == row["tokens_per_s"][1] / row["tokens_per_s"][0] for row in told["speed"])
    weights, peak = told["size"]
    assert 3 < weights["ratio"] < 4, "a million parameters, of which those that stay fp32 are a few in a hundred"
    assert (peak["bytes"], peak["ratio"]) == ([10**9, 5 * 10**8], 2) and [path.name for path in asked] == [
        "fp32",
        "int8",
    ]
    assert "tokens/s, batch 8" in said.getvalue() and "120 > 350" in said.getvalue()


def test_pairs_are_two_models_in_their_order(tmp_path: Path) -> None:
    model = Model.from_preset("test")
    model.save(tmp_path / "fp32")
    model.quantized().save(tmp_path / "int8")
    for wrong in ("", f"{tmp_path}/fp32", f"{tmp_path}/fp32={tmp_path}/none"):
        with pytest.raises(UsageError, match="--pair"):
            quant.parse_pair(wrong)
    turned = quant.parse_pair(f"{tmp_path}/int8={tmp_path}/fp32")
    with pytest.raises(UsageError, match="in fp32, then one in INT8"):
        quant._quality([turned], tmp_path)
    with pytest.raises(UsageError, match="--data"):
        quant.quant(Console(), preset="tiny", tokens=2, rounds=1, pairs=[turned], data=None)
