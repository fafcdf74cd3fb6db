"""Fine-tuning rows: what each recipe makes, what does not fit, and no row on both sides."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import xxhash

from shoal.config import ModelConfig
from shoal.data.chats import customer_service, recipes
from shoal.data.chats.recipes import Chat, ChatFiles, chats_of, fits, turns, write_chats
from shoal.data.chats.rows import read_chats
from shoal.data.sources.pysource import functions
from shoal.inputs.tokenizer import Tokenizer

SOURCE = '''
class Net:
    def mend(self, hole):
        """Close a hole. It holds
        for a season.

        More words.
        """
        self.holes.remove(hole)
        return self

    def bare(self):
        return 1

    @property
    def named(self):
        """Decorated: left out, its decorator would be missing."""
        return 2


async def cast(net, *, at: float = 1.0) -> int:
    """Throw the net"""
    return await net.go(at)
'''


def test_functions_are_told_apart_from_their_docstrings() -> None:
    mend, cast = functions(SOURCE)
    assert (mend.signature, mend.summary) == ("def mend(self, hole):", "Close a hole. It holds for a season.")
    assert mend.code == "def mend(self, hole):\n    self.holes.remove(hole)\n    return self"
    assert cast.signature == "async def cast(net, *, at: float=1.0) -> int:"
    assert "Throw" not in cast.code and ast.parse(cast.code)


def test_a_function_gives_code_and_summary(document) -> None:
    net = document(SOURCE, "code", origin="net.py")
    made = list(chats_of(net, "train"))
    assert [chat.task for chat in made] == ["code", "summarisation"] * 2
    code, summary = made[:2]
    assert code.messages[0]["content"] == "Write this function: Close a hole.\ndef mend(self, hole):"
    assert code.messages[1]["content"] == functions(SOURCE)[0].code
    assert summary.messages[1]["content"] == "Close a hole."
    assert json.loads(code.json) == {
        "messages": code.messages, "task": "code", "source": "s", "license": "MIT", "group": net.group,
        "synthetic": False,
    }  # fmt: skip


def test_other_code_and_prose_give_none(document) -> None:
    assert not list(chats_of(document(SOURCE, "code", origin="net.js"), "train"))
    assert not list(chats_of(document(SOURCE, "text", origin="net.py"), "train"))


def test_questions_are_asked_in_turn_in_training_and_alone_when_held_out(document, png, config, tmp_path) -> None:
    asked = document("", "image", image=png(), questions=(("colour?", "red"), ("shape?", "box")))
    (together,) = chats_of(asked, "train")
    assert [m["role"] for m in together.messages] == ["user", "assistant"] * 2
    alone = list(chats_of(asked, "heldout"))
    assert [chat.messages[1]["content"] for chat in alone] == ["red", "box"]
    assert all(
        chat.task == "image question" and chat.messages[0]["content"][0]["type"] == "image_url" for chat in alone
    )
    path = tmp_path / "c.jsonl"
    path.write_text("".join(chat.json + "\n" for chat in [together, *alone]))
    rows = read_chats(path, Tokenizer.bytes_only(), config)  # the reader that training uses takes them all
    assert len(rows) == 3 and len(rows.row(1)[2]) == 9


def test_what_is_longer_than_a_row_or_unreadable_does_not_fit(config: ModelConfig) -> None:
    tokenizer = Tokenizer.bytes_only()
    exact = config.train_length - 5  # a role and an end for each of two messages, and one letter of an answer
    assert fits(Chat(turns("x" * exact, "y"), "t", "s", "l", "g"), tokenizer, config)
    assert not fits(Chat(turns("x" * (exact + 1), "y"), "t", "s", "l", "g"), tokenizer, config)
    half = config.train_length // 2 - 1  # and an end
    assert fits(Chat(turns("x", "y" * half), "t", "s", "l", "g"), tokenizer, config)
    assert not fits(Chat(turns("x", "y" * (half + 1)), "t", "s", "l", "g"), tokenizer, config)
    image = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert not fits(Chat(turns(image, "y"), "t", "s", "l", "g"), tokenizer, config)


def test_customer_service_asks_what_training_never_asked() -> None:
    train, heldout = (
        {c.messages[0]["content"]: c for c in customer_service.chats(split)} for split in ("train", "heldout")
    )
    assert not train.keys() & heldout.keys()
    assert len(customer_service.INTENTS) >= 12 and len(train) > 2000 < len(train) + len(heldout)
    assert all(chat.synthetic and chat.task == "customer service" for chat in heldout.values())
    assert len({chat.group for chat in heldout.values()}) == sum(
        len(intent.heldout) for intent in customer_service.INTENTS
    )
    answers = [{chat.messages[1]["content"] for chat in side.values()} for side in (train, heldout)]
    assert answers[0] == answers[1]
    for intent in customer_service.INTENTS:
        assert len(set(intent.phrasings)) == len(intent.phrasings) >= 8


def chat(question: str, task: str = "t") -> Chat:
    return Chat(turns(question, "yes"), task, "s", "MIT", "g")


def saved(folder: Path, *some: dict[str, list[Chat]], seed: int = 0) -> list[Path]:
    """Parts with these chats by split."""
    paths = [folder / f"{number}.part" for number in range(len(some))]
    for path, of in zip(paths, some, strict=True):
        files = ChatFiles(seed)
        for split, chats in of.items():
            files.add(split, chats)
        files.save(path)
    return paths


def test_equal_rows_are_kept_once_and_never_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    one = {"heldout": [chat("a"), chat("b"), chat("d")], "train": [chat("a"), chat("a")]}
    paths = saved(tmp_path, one, {"train": [chat("a"), chat("c", "u"), chat("d")]})
    assert write_chats(paths, tmp_path / "out") == {"train": {"t": 2, "u": 1}, "heldout": {"t": 1}}
    (row,) = (tmp_path / "out" / "sft-heldout.jsonl").read_text().splitlines()
    assert json.loads(row)["messages"][0]["content"] == "b"


@pytest.mark.parametrize("count", [1, 2, 5])
def test_of_too_many_rows_some_are_drawn_whatever_part_they_came_in(tmp_path: Path, monkeypatch, count: int) -> None:
    """Those whose draws are smallest, in the order of their draws; of equal ones the first."""
    monkeypatch.setitem(recipes.MOST, "train", 10)
    monkeypatch.setattr(recipes, "OPENED", 2)
    (tmp_path / "out").mkdir()
    some = [chat(f"question {n % 40}") for n in range(50)]
    given = [{"train": some[50 * n // count : 50 * (n + 1) // count]} for n in range(count)]
    assert write_chats(saved(tmp_path, *given, seed=3), tmp_path / "out") == {"train": {"t": 10}}
    draws = sorted((xxhash.xxh3_64_intdigest(json.dumps(c.messages).encode(), seed=3), c.json) for c in some[:40])
    assert (tmp_path / "out" / "sft-train.jsonl").read_text().splitlines() == [row for _, row in draws[:10]]


def test_a_heldout_row_that_training_asks_is_left_out_though_training_draws_others(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(recipes.MOST, "train", 1)
    (tmp_path / "out").mkdir()
    asked = [chat(f"question {n}") for n in range(6)]
    paths = saved(tmp_path, {"heldout": asked}, {"train": asked[:3]}, {"train": asked[3:5]})
    assert write_chats(paths, tmp_path / "out") == {"train": {"t": 1}, "heldout": {"t": 1}}


def test_no_rows_no_file_not_even_an_older_one(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sft-train.jsonl").write_text("of an interrupted run\n")
    assert write_chats(saved(tmp_path, {}), tmp_path / "out") == {} and not list((tmp_path / "out").iterdir())
