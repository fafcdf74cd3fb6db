"""`shoal bench quality`: what the engine says of held-out text, worked out once more from the logits of the whole network."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks import peers
from benchmarks.quality import INT8_KV, quality, rows_of, said_of, table_of
from shoal import Model, presets
from shoal.data.shards import token_bytes
from shoal.engine.engine import Engine
from shoal.errors import UsageError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model.cpu import fused
from shoal.model.net import Net
from shoal.open_weights.convert import import_model
from tests.extra import package

OPEN = Path(__file__).parents[2] / "data" / "open"
TEXTS = ["The tide turns. " * 3, "x = 12\n", "\U0001f41f " * 4]
CHAT = [{"role": "user", "content": "What is a reef?"}, {"role": "assistant", "content": "A home of fish."}]
PEER = """
import json, sys
print("ready", flush=True)
for line in sys.stdin:
    ids = json.loads(line)
    print(json.dumps({"nats": [2.0] * (len(ids) - 1), "likeliest": ids[1:]}), flush=True)
"""


def made(dtype: torch.dtype) -> Model:
    config = dataclasses.replace(presets.get("test").model, window=64)
    return Model(config, Net(config).init_(0).to(dtype), Tokenizer.bytes_only())


@pytest.fixture(scope="module")
def model() -> Model:
    """As it is served."""
    return made(torch.float32)


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read of an engine's answers is held here. The loops of a CPU, which compile for half a minute, are held for keys
    and values in int8 in `test_kv_int8` and `test_fused`."""
    monkeypatch.setattr(fused, "usable", lambda x: False)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    rows = [*({"text": text, "group": str(n // 2)} for n, text in enumerate(TEXTS)), {"messages": CHAT}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_exit_is_measured_as_its_logits_say(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, so that what two ways of computing differ by is nothing; keys and values too."""
    monkeypatch.setattr("benchmarks.quality.Engine", lambda model, max_batch, **_: Engine(model, max_batch=max_batch))
    model = made(torch.float64)
    rows = rows_of(model, data)
    answer = len(model.tokenizer.encode("A home of fish.")) + 1
    assert [len(row.places) for row in rows][-1] == answer, "of a chat the answer and its end"
    _, told = table_of(said_of({"fp32": model}, rows, []), rows, token_bytes(model.tokenizer))
    size = sum(int(token_bytes(model.tokenizer)[row.ids[row.places].numpy()].sum()) for row in rows)
    assert len(told) == len(model.config.exit_names) + 1
    for line in (line for line in told if line["depth"] != INT8_KV):
        nats = kl = same = 0.0
        for row in rows:
            full, logs = (
                model.logits(row.ids[:-1], depth).double().log_softmax(-1)[row.places - 1]
                for depth in ("full", line["depth"])
            )
            nats -= float(logs.gather(1, row.ids[row.places][:, None]).sum())
            kl += float((full.exp() * (full - logs)).sum())
            same += float((full.argmax(-1) == logs.argmax(-1)).sum())
        assert line["bits"] == pytest.approx(nats / math.log(2) / size, rel=1e-6), line["depth"]
        assert line["kl"] == pytest.approx(kl / line["places"], rel=1e-4, abs=1e-7)
        assert line["same"] == pytest.approx(same / line["places"])


@pytest.mark.usefixtures("torch_path")
def test_int8_and_keys_and_values_in_int8_are_measured_beside_full_depth(model: Model, data: Path) -> None:
    rows = rows_of(model, data)
    found = said_of({"fp32": model, "INT8": model.quantized()}, rows, [])
    names = [name for name in model.config.exit_names if name != "full"]
    assert [*found] == [(who, depth) for who in ("fp32", "INT8") for depth in ("full", *names, INT8_KV)]
    _, told = table_of(found, rows, token_bytes(model.tokenizer))
    by = {(line["what"], line["depth"]): line for line in told}
    assert by["fp32", "full"]["kl"] == 0 and by["fp32", "full"]["rise"] == 0
    assert 0 < by["fp32", INT8_KV]["kl"] < by["fp32", names[0]]["kl"] and by["INT8", "full"]["kl"] > 0


@pytest.mark.usefixtures("torch_path")
def test_a_peers_own_logprobs_stand_beside(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    monkeypatch.setitem(peers.KINDS, "transformers", (str(script), {}))
    model.save(tmp_path / "model")
    given = {"model": tmp_path / "model", "against": None, "data": data, "gguf": None}
    quality(Console(width=200), peer={"transformers": sys.executable}, **given)  # type: ignore[arg-type]
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    rows = rows_of(model, data)
    size = sum(int(token_bytes(model.tokenizer)[row.ids[row.places].numpy()].sum()) for row in rows)
    places = sum(len(row.places) for row in rows)
    assert told[-1]["what"] == "transformers" and told[-1]["kl"] is None and told[-1]["places"] == places
    assert told[-1]["bits"] == pytest.approx(2 * places / math.log(2) / size) and 0 <= told[-1]["same"] < 1
    for words, more in (
        ("--peer", {"peer": {"vllm": sys.executable}}),
        ("--data", {"peer": {}, "data": tmp_path}),
        ("no --gguf", {"peer": {"llama.cpp": sys.executable}}),
    ):
        with pytest.raises(UsageError, match=words):
            quality(Console(), **{**given, **more})  # type: ignore[arg-type]
    other = Model(model.config, model.net, Tokenizer.train(["fish " * 99], 300))
    other.save(tmp_path / "other")
    with pytest.raises(UsageError, match="of another tokenizer"):
        quality(Console(), peer={}, **{**given, "against": tmp_path / "other"})  # type: ignore[arg-type]


@pytest.mark.drill
def test_transformers_says_the_same_of_an_imported_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The peer as it is, on the export of the weights: bits, chats and greedy answers."""
    package("transformers")
    shutil.copytree(OPEN / "qwen2", tmp_path / "from")
    shutil.copytree(OPEN / "tokenizer", tmp_path / "from", dirs_exist_ok=True)
    import_model(tmp_path / "from", tmp_path / "model", dtype="float32")
    peer = {"transformers": sys.executable}
    quality(Console(width=200), model=tmp_path / "model", against=None, data=data, gguf=None, peer=peer)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    ours, _, theirs = told["rows"]
    assert theirs["bits"] == pytest.approx(ours["bits"], rel=1e-5) and theirs["same"] == 1
    assert told["chats"] == {
        "chats": [16, 16], "chats with spelt control tokens": [0, 4], "greedy answers in fp32": [20, 20],
    }  # fmt: skip


def test_intervals_are_over_documents() -> None:
    """Two documents of one group count as one: of two groups there is none, of six there is."""
    ids = torch.arange(20, 31)
    from benchmarks.quality import Row, Said

    rows = [Row(ids, torch.arange(1, 11), group) for group in (0, 0, 1)]
    said = [Said(np.full(10, nats), ids[1:].numpy(), np.zeros(10)) for nats in (1.0, 2.0, 3.0)]
    _, (line,) = table_of({("fp32", "full"): said}, rows, np.ones(300, dtype=int))
    assert line["bits"] == pytest.approx(2 / math.log(2)) and line["places"] == 30
    assert line["interval"] is None
    rows = [Row(ids, torch.arange(1, 11), group) for group in range(6)]
    said = [Said(np.full(10, nats), ids[1:].numpy(), np.zeros(10)) for nats in (1.0, 2.0, 3.0, 1.5, 2.5, 2.2)]
    _, (line,) = table_of({("fp32", "full"): said}, rows, np.ones(300, dtype=int))
    assert line["interval"][0] < line["bits"] < line["interval"][1]
