"""`shoal evaluate` on a file: an imported model's bits a byte, worked out once more from its logits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal import Model
from shoal.errors import DataError
from shoal.evaluate import texts
from shoal.evaluate.evaluation import Sizes, compare
from shoal.evaluate.rounding import rounded
from shoal.evaluate.texts import TextRows
from shoal.inputs.chat import encode_chat
from shoal.open_weights.convert import import_model
from shoal.train import exits

Make = Callable[[str], Path]
CHAT = [
    {"role": "user", "content": "What is a reef?"},
    {"role": "assistant", "content": "A home of fish."},
    {"role": "user", "content": "And a net?"},
    {"role": "assistant", "content": "A caf\u00e9's end of them."},
]
TEXTS = ["The tide turns. " * 3, "x = 12\n", "\U0001f41f " * 20]


@pytest.fixture
def model(checkpoint: Make, tmp_path: Path) -> Model:
    """With early exits, whose weights are a copy of the last layer's."""
    import_model(checkpoint("qwen2"), tmp_path / "imported", dtype="float32")
    base = Model.load(tmp_path / "imported")
    net = exits.added(base.net, exits.with_exits(base.config))
    made = Model(net.config, net, base.tokenizer, chat_template=base.chat_template, source=base.source)
    made.save(tmp_path / "model")
    return Model.load(tmp_path / "model")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    rows = [{"text": text, "group": str(number // 2)} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": CHAT}]))
    return path


def by_hand(model: Model, layers: int, longest: int) -> float:
    """Bits a byte at an exit: every token of the texts but the first, and the tokens of the answers with their ends."""
    tokenizer, nats, size = model.tokenizer, 0.0, 0
    chat = encode_chat(CHAT, tokenizer, model.config, template=model.chat_template, add_generation_prompt=False)
    rows = [([*tokenizer.prompt(text), tokenizer.ends[0]], None) for text in TEXTS]
    for ids, answer in [*rows, (chat.ids, chat.answer)]:
        for start in range(0, len(ids) - 1, longest):
            piece = ids[start : start + longest + 1]
            logs = model.logits(piece, layers).double().log_softmax(-1)
            for place in range(1, len(piece)):
                if answer is None or answer[start + place]:
                    nats -= float(logs[place - 1, piece[place]])
                    size += len(tokenizer.token_bytes(piece[place]))
    return nats / math.log(2) / size


@pytest.mark.parametrize("longest", [16, pytest.param(1024, marks=pytest.mark.drill)])
def test_bits_a_byte_of_every_exit_are_those_of_the_logits(
    model: Model, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    monkeypatch.setattr(texts, "LONGEST", longest)
    rounded(model).save(tmp_path / "int8")
    sizes = Sizes(decode_tokens=2)
    found = compare({"fp32": tmp_path / "model", "int8": tmp_path / "int8"}, data, sizes=sizes)
    (row,) = [row for row in found["quality"]["rows"] if row["metric"] == "bpb text"]
    cut = min(longest, model.config.context)
    assert row["values"]["fp32"] == pytest.approx(by_hand(model, model.config.layers, cut), rel=1e-5)
    assert row["groups"] == 3, "two texts of a group, one alone, and a chat"
    int8 = Model.load(tmp_path / "int8")
    assert [each["exit"] for each in found["depth"]["rows"]] == ["shallow", "middle", "full"]
    for each in found["depth"]["rows"]:
        assert each["bpb text"] == pytest.approx(by_hand(int8, each["layers"], cut), rel=1e-3)
    (lost,) = found["int8"]
    assert lost["fp32"] == pytest.approx(row["values"]["fp32"]) and 0 < lost["int8_agreement"] <= 1


def test_a_long_file_is_read_in_evenly_spaced_rows(model: Model, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data.write_text("".join(json.dumps({"text": f"{number} " * 30}) + "\n" for number in range(10, 50)))
    every = [batch.tokens.numel() for batch, _ in TextRows(data, model)]
    monkeypatch.setattr(texts, "TOKENS", sum(every) // 4)
    some = [batch.tokens.tolist()[0] for batch, _ in TextRows(data, model)]
    assert len(every) == 40 and 8 <= len(some) <= 10
    assert model.tokenizer.decode(some[0]).startswith("1") and model.tokenizer.decode(some[-1]).startswith("4")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ('{"text": 5}', "line 2"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 2: got 'no answer'"),
        ("{", "line 2: got 'broken JSON'"),
    ],
)
def test_a_row_that_cannot_be_measured_is_named(row: str, says: str, model: Model, data: Path) -> None:
    data.write_text(f'{{"text": "fish"}}\n{row}\n')
    with pytest.raises(DataError, match=says):
        list(TextRows(data, model))
    data.write_text("")
    with pytest.raises(DataError, match="holds no row to measure on"):
        list(TextRows(data, model))


def test_one_exit_is_not_said_to_matter_little(model: Model, data: Path, tmp_path: Path) -> None:
    found = compare({"imported": tmp_path / "imported"}, data, sizes=Sizes(decode_tokens=2))
    assert not [line for line in found["weak"] if "Depth hardly matters" in line]
    assert found["frontier"] == found["tolerance"] == {}
