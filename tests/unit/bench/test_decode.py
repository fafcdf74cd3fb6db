"""`shoal bench decode`, of prompts and of a model: what is counted, and what does not go together."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import peers
from benchmarks.decode import SHAPES, decode
from benchmarks.drafts import QUESTIONS, drafts_of
from benchmarks.speed import Bench, prefill
from shoal import Engine, Model, presets
from shoal.errors import UsageError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.net import Net

PEER = """
import json, sys
told = json.loads(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    print(float(told["threads"]), flush=True)
"""


def bench(**changed: Any) -> Bench:
    config = dataclasses.replace(presets.get("test").model, **changed)
    return Bench(Model(config, Net(config).init_(0), Tokenizer.bytes_only()), (1,), tokens=6, prompt=24, rounds=1)


@pytest.mark.drill
def test_prompts_are_computed_anew_in_each_round() -> None:
    of = bench()
    _, rows = prefill(of)
    assert [(row["what"], row["prompt"]) for row in rows] == [("fp32", 24), ("int8", 24)]
    assert all(row["tokens_per_s"] > 0 and row["ratios"]["fp32"] > 0 for row in rows)
    for engine in of.engines.values():
        assert engine.scheduler.metrics.prefix_hits == 0


def test_drafts_of_a_model_change_no_token_and_are_counted() -> None:
    _, rows = drafts_of(bench())
    assert [(row["what"], row["drafts"]) for row in rows] == [
        (what, n) for what in ("fp32", "int8") for n in (0, 1, 2, 4)
    ]
    assert all(row["same"] and 0 <= row["accepted"] <= 1 for row in rows) and len(QUESTIONS) == 3
    with pytest.raises(UsageError, match="without early exits"):
        drafts_of(bench(early_exits=False))


@pytest.mark.drill
def test_drafts_that_do_not_pay_are_forced_and_left_by_the_switch_in_one_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The switch's answers are longer, and each is of an engine that knew nothing."""
    small = {"layers": 4, "width": 48, "heads": 3, "kv_heads": 3, "head_dim": 16, "ffn": 88, "vocab": 300}
    monkeypatch.setitem(SHAPES, "small", small)
    monkeypatch.setattr("benchmarks.decode._tokenizer", lambda _: Tokenizer.bytes_only())
    monkeypatch.setattr("benchmarks.decode.SWITCHED", 120)
    made = []

    class Counted(Engine):
        def __init__(self, model: Model, **given: Any) -> None:
            super().__init__(model, **given)
            made.append((given["speculative"], given["speculative_max_batch"]))

    monkeypatch.setattr("benchmarks.decode.Engine", Counted)
    decode(Console(width=200), shape="small", batches=(1,), tokens=24, rounds=2, parts=("drafts",), peer={})
    said = capsys.readouterr().out
    rows = {row["drafts"]: row for row in json.loads(said.splitlines()[-1])["drafts"]}
    assert [(label, row["tokens"]) for label, row in rows.items()] == [
        ("all right", 24), ("few right", 24), ("few right, switch", 120),
    ]  # fmt: skip
    assert rows["all right"]["accepted"] > 0.9 and rows["few right"]["accepted"] < 0.5
    assert all(row["off"] > 0 and row["on"] > 0 and len(row["turns"]) == 2 for row in rows.values())
    assert made.count((0, None)) == made.count((4, None)) == 3, "an engine that knows nothing, in each turn"
    assert made.count((0, 1)) == made.count((4, 1)) == 2 and "few right, switch" in said


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    Model.from_preset("test").quantized().save(tmp_path / "int8")
    given = {"shape": "5m", "batches": (1,), "tokens": 1, "rounds": 1, "peer": {}}

    def refused(words: str, parts: tuple[str, ...] = ("prefill",), **told: object) -> None:
        with pytest.raises(UsageError, match=words):
            decode(Console(), parts=parts, **{**given, **told})  # type: ignore[arg-type]

    refused("--parts", parts=("context",), model=tmp_path / "int8")
    refused("--parts", parts=("no such part",))
    refused("in INT8", model=tmp_path / "int8")
    refused("--gguf", peer={"llama.cpp": "python"})
    refused("--gguf", gguf=tmp_path / "no.gguf")
    refused("--prompt", prompt=0)
    refused("--threads", threads=(1, 0))
    config = dataclasses.replace(presets.get("test").model, early_exits=False)
    Model(config, Net(config).init_(0), Tokenizer.bytes_only()).save(tmp_path / "plain")
    refused("without early exits", parts=("speed", "drafts"), model=tmp_path / "plain")


@pytest.mark.drill
def test_each_number_of_threads_has_its_own_peers_and_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A peer that takes as many seconds as it was told to take threads."""
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    monkeypatch.setitem(peers.KINDS, "mine", (str(script), {}))
    Model.from_preset("test").save(tmp_path / "model")
    before, given = torch.get_num_threads(), {"tokens": 2, "rounds": 1, "prompt": 8, "model": tmp_path / "model"}
    try:
        decode(
            Console(width=200), shape="5m", batches=(1,), parts=("speed", "prefill"), peer={"mine": sys.executable},
            threads=(2, 1), **given,  # type: ignore[arg-type]
        )  # fmt: skip
    finally:
        torch.set_num_threads(before)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    mine = [row for row in told["prefill"] if row["what"] == "mine"]
    assert [(row["threads"], row["tokens_per_s"]) for row in mine] == [(2, 4.0), (1, 8.0)]
    assert {row["threads"] for row in told["speed"]} == {1, 2}
