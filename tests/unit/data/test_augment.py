"""Augmentation: what is changed means the same, what cannot be changed stays, and nothing measured is ever touched."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.data.batches import ChatBatches
from shoal.data.chats import customer_service
from shoal.data.chats.augment import Augmenter, asked, augment, questions
from shoal.data.chats.recipes import turns
from shoal.data.chats.rename import renamed
from shoal.data.chats.rows import read_chats
from shoal.data.chats.wording import paraphrased, read_synonyms, with_typos
from shoal.data.sources import pysource
from shoal.errors import DataError, UsageError
from shoal.inputs.tokenizer import Tokenizer

DRAWS = st.integers(0, 2**64 - 1)
CODE = '''def total_weight(boxes, limit=3):
    # boxes that are too heavy are left out
    """Weight of all boxes."""
    heavy = 0
    for box in boxes:
        heavy += box.weight if box.heavy else 0
    return [round(x, limit) for x in (heavy, f"{heavy}")]
'''


def names(source: str) -> set[str]:
    tree = ast.parse(source)
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return found | {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}


@given(DRAWS)
def test_renamed_code_does_the_same_under_other_names(draw: int) -> None:
    source = "def f(n):\n    kept = []\n    for i in range(n):  # go on\n        kept.append(i * n)\n    return kept\n"
    (new,) = renamed([source], draw)
    assert names(new) & {"n", "kept", "i"} == set() and "# go on" in new and "range" in names(new)
    spaces: list[dict] = [{}, {}]
    for code, space in zip((source, new), spaces, strict=True):
        exec(code, space)
    assert spaces[0]["f"](5) == spaces[1]["f"](5) == [0, 5, 10, 15, 20]


def test_a_name_that_is_spelt_elsewhere_is_kept() -> None:
    new = renamed([f"Explain this function:\n{CODE}"], 7)
    assert new is not None
    code = new[0].split("\n", 1)[1]
    # boxes: in a comment; heavy: an attribute too; box, limit and x are free to go
    assert names(code) & {"boxes", "heavy", "box", "limit", "x"} == {"boxes", "heavy"}
    assert '"""Weight of all boxes."""' in code and "# boxes that are too heavy" in code


def test_a_name_is_exchanged_alike_in_question_and_answer() -> None:
    code = "def area(w, h):\n    square = w * h\n    return square\n"
    new = renamed([f"What does this do?\n{code}", f"It is the same as this:\n{code}", "No code here."], 3)
    assert new is not None and new[2] == "No code here."
    assert new[0].split("\n", 1)[1] == new[1].split("\n", 1)[1] != code
    assert renamed([f"Set square first.\n{code}"], 3)[0].count("square") == 3, "spelt in the text as well"
    assert renamed(["No code.", "def broken(:\n  pass"], 3) is None


@pytest.mark.parametrize(
    "source",
    [
        "x = 1\n\ndef f():\n    return x\n",  # global
        "def f():\n    global count\n    count = 1\n",
        "class A:\n    size = 3\n\n    def f(self):\n        return self.size\n",
        "def f(n):\n    return g(n=n)\n",  # by keyword
        "def f():\n    import os\n    return os.name\n",
        "def f():\n    return [len, print]\n",
    ],
)
def test_names_that_others_rely_on_are_kept(source: str) -> None:
    assert renamed([source], 1) is None


def test_real_code_still_parses_and_most_of_it_can_be_renamed() -> None:
    changed = 0
    functions = [f for module in (json, re, ast) for f in pysource.functions(Path(module.__file__).read_text("utf-8"))]
    for number, function in enumerate(functions):
        new = renamed([function.code], number * 7919)
        if new:
            changed += 1
            assert [type(n) for n in ast.walk(ast.parse(new[0]))] == [
                type(n) for n in ast.walk(ast.parse(function.code))
            ]
    assert changed > len(functions) / 3 > 10


@given(DRAWS)
def test_a_paraphrase_asks_the_same_in_other_words(draw: int) -> None:
    new = paraphrased("How do I send the lamp back?", draw)
    assert new and new != "How do I send the lamp back?" and "the lamp back" in new and new[0].isupper()
    assert paraphrased("Explain tides.", draw) in ("Can you explain tides.", "Please explain tides.")
    assert paraphrased("zzz qqq", draw) is None
    assert paraphrased('Say "send" with `send` to x_send.', draw) is None, "quotes, code and names stay"


@given(st.text(max_size=80), DRAWS)
def test_slips_change_few_letters_and_no_code(text: str, draw: int) -> None:
    new = with_typos(text, draw)
    # one word of eight, of four letters or more
    assert new is None or 0 <= abs(len(new) - len(text)) <= 1 + len(text) // 32
    kept = " `function(argument)` 12345 http://example.org/path"
    assert with_typos(f"call{kept}", draw) in {f"{word}{kept}" for word in ("clal", "cll", "cal", "caall", "calll")}


@given(DRAWS)
def test_code_in_a_question_is_left_alone(draw: int) -> None:
    for code in (CODE, "def send(parcel, start):", "int start = begin;", "```\nsend the parcel to start\n```"):
        for change in (paraphrased, with_typos):
            new = change(f"Explain how to start this function:\n{code}", draw)
            assert (
                new is not None
                and new.endswith(f"\n{code}")
                and not new.startswith("Explain how to start this function:")
            )
            assert change(code, draw) is None


def chat(question: str, answer: str = "An answer.", **fields: object) -> dict:
    return {"messages": turns(question, answer), **fields}


def test_a_copy_says_what_it_is_and_answers_are_left_alone() -> None:
    for number in range(60):
        row = chat(f"How do I return the lamp of order {number}?", "Send the wrong lamp back.", task="t", license="MIT")
        copy = Augmenter(1.0).copy(row)
        assert copy is not None and copy["augmented"] in ("paraphrase", "typos")
        assert copy["messages"][1] == row["messages"][1] and copy["messages"][0] != row["messages"][0]
        assert {k: v for k, v in copy.items() if k not in ("messages", "augmented")} == {"task": "t", "license": "MIT"}
        assert Augmenter(1.0).copy(copy) is None, "a copy of a copy drifts"


def test_a_line_that_an_answer_quotes_is_left_alone_and_the_question_is_not() -> None:
    """Else a copy teaches a quote of words that are not there."""
    clauses = ["You may send copies of the work to anybody.", "Nobody shall be liable for any damage that it does."]
    for number in range(60):
        asks = [*clauses, f"How do I get the right to send copy {number}?"]
        row = chat("\n".join(asks), f"Not permitted: {clauses[1]}")
        copy = Augmenter(1.0, number).copy(row)
        assert copy is not None and clauses[1] in (said := copy["messages"][0]["content"].split("\n"))
        assert len(said) == 3 and said != asks
    echo = "Say again what you were told."
    assert Augmenter(1.0).copy(chat(echo, echo)) is None


def test_pictures_stay_where_they_are(data_url: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url}}
    row = {"messages": turns([picture, {"type": "text", "text": "What is the colour of the shape?"}], "Red")}
    copy = Augmenter(1.0).copy(row)
    assert copy is not None and copy["messages"][0]["content"][0] == picture
    assert copy["messages"][0]["content"][1]["text"] != "What is the colour of the shape?"


def test_rows_to_measure_on_are_never_changed() -> None:
    asks = "How do I return the lamp?"
    assert Augmenter(1.0).copy(chat(asks)) is not None
    for split in ("heldout", "test", "validation"):
        assert Augmenter(1.0).copy(chat(asks, split=split)) is None
    assert Augmenter(1.0, heldout=frozenset({asked(turns("how do I return  the lamp", "x"))})).copy(chat(asks)) is None


@pytest.mark.parametrize("mark", [None, False])
def test_a_row_whose_mark_says_nothing_is_as_it_was(mark: object, tmp_path: Path, config: ModelConfig) -> None:
    """Training and measuring take it for one that nobody changed; augmenting did not."""
    row = chat("How do I return the lamp?", augmented=mark)
    copy = Augmenter(1.0).copy(row)
    assert copy is not None and copy["augmented"] in ("paraphrase", "typos", "rename")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    assert len(read_chats(tmp_path / "a.jsonl", Tokenizer.bytes_only(), config, heldout=True)) == 1


def test_no_copy_asks_what_a_heldout_row_asks() -> None:
    rows = [row.__dict__ for row in customer_service.chats("train")][:1500]
    copies = [copy for row in rows if (copy := Augmenter(1.0).copy(row))]
    taken = frozenset(asked(copy["messages"]) for copy in copies[::2])  # as if they were held out
    again = [copy for row in rows if (copy := Augmenter(1.0, heldout=taken).copy(row))]
    assert len(copies) > 1000 and len(again) > 500
    assert not taken & {asked(copy["messages"]) for copy in again}


def test_a_file_keeps_its_rows_and_gains_copies_by_the_seed(tmp_path: Path) -> None:
    rows = [chat(f"Where is my parcel number {n}?") for n in range(200)] + [chat("?")]
    lines = [json.dumps(row) for row in rows] + ["{broken"]
    data = tmp_path / "a.jsonl"
    data.write_text("\n".join(lines) + "\n")
    result = augment(data, tmp_path / "b.jsonl", Augmenter(0.3, seed=1))
    written = (tmp_path / "b.jsonl").read_text().splitlines()
    assert [line for line in written if '"augmented"' not in line] == lines
    assert 40 < result["copies"] < 80 and len(written) == len(lines) + result["copies"]
    assert result["rows"] == len(lines) and sum(result["by_way"].values()) == result["copies"]
    augment(data, tmp_path / "c.jsonl", Augmenter(0.3, seed=1))
    augment(data, tmp_path / "d.jsonl", Augmenter(0.3, seed=2))
    assert (
        (tmp_path / "c.jsonl").read_bytes()
        == (tmp_path / "b.jsonl").read_bytes()
        != (tmp_path / "d.jsonl").read_bytes()
    )
    data.write_text("\n".join(lines[100:]) + "\n")  # a row's copy does not depend on the others
    augment(data, tmp_path / "e.jsonl", Augmenter(0.3, seed=1))
    assert set((tmp_path / "e.jsonl").read_text().splitlines()) <= set(written)
    with pytest.raises(DataError, match="is the file that is read"):
        augment(data, data, Augmenter(0.3))
    with pytest.raises(UsageError, match="--share"):
        Augmenter(1.5)


def test_augmented_rows_are_trained_on_and_refused_for_measuring(tmp_path: Path, config: ModelConfig) -> None:
    data, tokenizer = tmp_path / "a.jsonl", Tokenizer.bytes_only()
    data.write_text("\n".join(json.dumps(chat(f"Where is {n}?", "Here.")) for n in range(8)))
    result = augment(data, tmp_path / "b.jsonl", Augmenter(1.0))
    assert len(read_chats(tmp_path / "b.jsonl", tokenizer, config)) == 8 + result["copies"] > 8
    with pytest.raises(DataError, match=r"holds \d augmented row"):
        ChatBatches(tmp_path / "b.jsonl", tokenizer, config, batch_tokens=400, parts=1, heldout=True)
    assert len(questions(data)) == 8


def test_a_domain_brings_its_own_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("# medicine\nheart attack = myocardial infarction, MI\n\n")
    words = read_synonyms(path)
    assert paraphrased("Is it a heart attack?", 1, words) in ("Is it a myocardial infarction?", "Is it a MI?")
    path.write_text("heart attack\n")
    with pytest.raises(DataError, match="line 1: got 'heart attack'"):
        read_synonyms(path)
    with pytest.raises(DataError, match="cannot read synonyms"):
        read_synonyms(tmp_path / "none")


def test_in_a_script_without_spaces_a_word_begins_and_ends_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("发烧 = 体温升高，发起烧\n腹痛 = 肚子疼\n小腹痛 = 小腹疼\nGPL = 通用许可证\n", encoding="utf-8")
    words = read_synonyms(path)
    assert words["发烧"] == ("体温升高", "发起烧")
    assert paraphrased("我发烧了", 1, words) in ("我体温升高了", "我发起烧了")
    assert paraphrased("我小腹痛", 1, words) == "我小腹疼", "the longest"
    assert paraphrased("它用GPL吗", 1, words) is None, "a word of spaced letters ends where they do"
    assert paraphrased("它用 GPL 吗", 1, words) == "它用 通用许可证 吗"


@pytest.mark.parametrize("draw", range(20))
def test_a_number_keeps_itself_and_not_the_sentence_around_it(draw: int) -> None:
    text = "我今年35岁，头痛，体温38.5度，订单A1234的“头痛药”没有到货呢。"
    said = [paraphrased(text, draw, {"头痛": ("脑袋疼",)}), with_typos(text, draw)]
    assert said[0] == text.replace("头痛，", "脑袋疼，")
    for one in said:
        assert one is not None and one != text
        assert all(kept in one for kept in ("35", "38.5", "A1234", "“头痛药”"))


HOSTILE: list[dict[str, object]] = [
    {"role": "user", "content": "def f(a, a):\n    return a\n"},  # parses, but is no program
    {"role": "user", "content": "def f():\n    x = 1\n    global x\n"},
    {"role": "user", "content": "\u017ftart the \u0130mage, \u0131llness"},  # equal to other letters without their case
    {"role": "user", "content": "How do I \ud800 the lamp?"},
    {"role": "user", "content": "a\x00b \u202egnorw si siht\u202c \u0926\u0947\u0935\u0928\u093e\u0917\u0930\u0940"},
    {"role": "user", "content": "def f(x):\n    return " + "-" * 5000 + "x"},
    {"role": "user", "content": "How do I " + "a" * 300_000 + "?"},
    {"role": "user", "content": "word 1 " * 40_000},
    {"role": "user", "content": "begin" * 40_000 + " begin" * 40_000},
    {"role": None, "content": [[], {"text": 1}, {"type": "text", "text": "What is the fish?"}, 7]},
]


@pytest.mark.parametrize("way", ["paraphrase", "typos", "rename", "any"])
def test_no_row_ends_the_run_and_none_is_lost(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The long rows would not come back where the work grows with the square of their length."""
    if way != "any":
        monkeypatch.setattr("shoal.data.chats.augment.WAYS", (way,))
    rows = [json.dumps({"messages": [message, {"role": "assistant", "content": "yes"}]}) for message in HOSTILE]
    rows += [json.dumps({"messages": turns("Where is it?", "Here."), "split": ["test"]})]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    result = augment(tmp_path / "a.jsonl", tmp_path / "b.jsonl", Augmenter(1.0))
    written = (tmp_path / "b.jsonl").read_text(errors="replace").splitlines()
    assert [line for line in written if '"augmented"' not in line] == rows
    assert result["rows"] == len(rows) and result["failed"] == 1, "the row whose split is a list"
    assert len(written) == len(rows) + result["copies"]


def test_code_that_parses_and_is_too_deep_to_be_compared_keeps_its_names() -> None:
    """torch raises the limit of recursion to 2,000 for whoever compiles: there alone the row was counted as failed."""
    limit = sys.getrecursionlimit()
    try:
        for more in (1000, 2000, 3000):
            sys.setrecursionlimit(more)
            deep = "def f(x):\n    return " + "-" * 5000 + "x"
            assert renamed([deep, "yes"], 3) is None
    finally:
        sys.setrecursionlimit(limit)


def test_a_letter_that_only_looks_alike_is_another_word() -> None:
    assert paraphrased("\u017ftart", 1) is None and paraphrased("start", 1) == "begin"
    assert paraphrased("\u017ftart the error", 1) == "\u017ftart the fault"


@given(st.text("ab1 _`\"=\n/:'", max_size=60), DRAWS)
def test_what_is_kept_is_left_by_slips_and_synonyms(text: str, draw: int) -> None:
    for new in (with_typos(f"word {text} illness", draw), paraphrased(f"word {text} illness", draw, {"ab": ("xyz",)})):
        kept = re.findall(r"`[^`]*`", text)
        assert new is None or all(piece in new for piece in kept)
