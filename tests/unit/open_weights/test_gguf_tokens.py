"""A GGUF whose vocabulary is sentencepiece's: the ids of the same vocabulary as Hugging Face has it, and transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from shoal import Model
from shoal.errors import CheckpointError
from shoal.inputs.chat import encode_chat
from shoal.inputs.tokenizer import Tokenizer
from shoal.open_weights import gguf_tokens
from shoal.open_weights.convert import import_model
from shoal.open_weights.gguf import Gguf
from tests.extra import package
from tests.unit.open_weights.conftest import DATA
from tests.unit.open_weights.test_gguf import gguf_of

Make = Callable[[str], Path]
SPACED = json.loads((DATA / "spaced.json").read_text())
TEMPLATE = (DATA / "spaced" / "chat_template.jinja").read_text()
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def vocabulary(tokens: list[str], scores: list[float], kinds: list[int], **more: Any) -> dict[str, Any]:
    """What a GGUF says of it; ids 0, 1, 2 are unknown, begin and end."""
    told = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores, "token_type": kinds, "merges": None}
    told |= {"unknown_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {f"tokenizer.ggml.{key}": value for key, value in (told | more).items()} | {
        "tokenizer.chat_template": TEMPLATE
    }


def small() -> dict[str, Any]:
    """That of tests/data/open/spaced, whose merges came first and letters last."""
    model = json.loads((DATA / "spaced" / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    order = {"".join(pair): -float(number) for number, pair in enumerate(model["merges"])}
    scores = [order.get(token, -100.0) for token in tokens]
    return vocabulary(tokens, scores, [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * (len(tokens) - 259)])


def large() -> dict[str, Any]:
    """One of long pieces, which can be made of two in several ways; with a token of the vocabulary that letters spell, too."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    words = DATA.parents[2].joinpath("README.md").read_text()[:6000]
    core.train_from_iterator([words], trainers.BpeTrainer(vocab_size=600, show_progress=False, max_token_length=12))
    pieces = core.get_vocab()
    known = ["<", "s>", "/s>", "</", "s", "/", ">", "<0x4", "1>"]
    texts = [*sorted(pieces, key=pieces.__getitem__), *(text for text in known if text not in pieces)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<fish>", *texts]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, *[NORMAL] * len(texts)]
    scores = [0.0] * 260 + [-float(len(texts) - len(text) * 40 + number) for number, text in enumerate(texts)]
    return vocabulary(tokens, scores, kinds)


def read(path: Path) -> Tokenizer:
    return Gguf(path).vocabulary(None)[0]


def test_it_gives_the_ids_of_the_same_vocabulary_as_hugging_face_keeps_it(checkpoint: Make, tmp_path: Path) -> None:
    import_model(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf", **small()), tmp_path / "model")
    model = Model.load(tmp_path / "model")
    assert (model.tokenizer.ends, model.tokenizer.prompt(""), model.tokenizer.specials) == (
        (2,), [1], ("<unk>", "<s>", "</s>"),
    )  # fmt: skip
    for told in SPACED["first"]["chats"]:
        ids = encode_chat(
            told["messages"], model.tokenizer, model.config, template=TEMPLATE, add_generation_prompt=False
        ).ids
        assert ids == told["ids"], told["messages"]
    assert model.encode(" Hello, 12 fish").ids == SPACED["first"]["text"]
    for text in ("  two  spaces\n\n", "caf\u00e9 \U0001f41f\u200d", "<0x41> <unk>"):
        ids = model.tokenizer.encode(text)
        assert model.tokenizer.decode(ids).removeprefix(" ") == text.removeprefix(" ")
    assert len(model.tokenizer.encode("\U0001f41f")) == 5, "a space, and four bytes"


def test_a_control_token_that_a_user_spells_is_not_made_of_its_letters(checkpoint: Make, tmp_path: Path) -> None:
    tokenizer = read(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf", **large()))
    ids = tokenizer.encode("</s> <s> <0x41> <unk>")
    assert not {0, 1, 2} & {*ids} and 3 + 0x41 not in ids and tokenizer.decode(ids) == " </s> <s> <0x41> <unk>"
    assert tokenizer.token_bytes(259) == b"<fish>" and 259 in tokenizer.encode("a <fish>"), (
        "one of the user's own is whole"
    )


def test_no_space_is_put_in_front_where_the_file_says_so(checkpoint: Make, tmp_path: Path) -> None:
    told = small() | {"tokenizer.ggml.add_space_prefix": 0, "tokenizer.ggml.add_bos_token": 0}
    tokenizer = read(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf", **told))
    assert tokenizer.decode(tokenizer.encode("fish")) == "fish" and tokenizer.prompt("") == []


def test_a_token_too_long_to_be_made_of_two_is_refused(checkpoint: Make, tmp_path: Path) -> None:
    """Each of its places is tried: of a token of a megabyte that was a trillion characters."""
    told = small()
    told["tokenizer.ggml.tokens"][-1] = "x" * 10**6
    with pytest.raises(CheckpointError, match="got 'a token of 1000000 characters'; allowed: 512"):
        read(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf", **told))


def test_more_ways_to_join_tokens_than_any_vocabulary_has_are_refused(
    checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter 1 to 512 times is 130,816 ways: a file of 26 MB took gigabytes."""
    told = small()
    path = gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf", **told)
    monkeypatch.setattr(gguf_tokens, "_MOST_MERGES", 2)
    with pytest.raises(
        CheckpointError, match=r"tokenizer of .*tiny\.gguf: got '[34] ways to join tokens, or more'; allowed: 2"
    ):
        read(path)


def test_transformers_reads_the_same_ids_of_the_same_file(checkpoint: Make, tmp_path: Path) -> None:
    transformers = package("transformers")
    for name, told in (("small", small()), ("large", large())):
        path = gguf_of(
            checkpoint("smollm2") if name == "small" else tmp_path / "smollm2-source", tmp_path / f"{name}.gguf", **told
        )
        ours, theirs = (
            read(path),
            transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path), gguf_file=path.name),
        )
        words = DATA.parents[2].joinpath("README.md").read_text()

        @settings(max_examples=150, deadline=None, database=None)
        @given(st.one_of(st.text(max_size=40), st.integers(0, 8000).map(lambda at: words[at : at + 60])))
        def same(text: str) -> None:
            spelt = ("<s>", "</s>", "<unk>", "<fish>")  # which theirs takes for control tokens
            if any(name in text for name in spelt):
                return
            assert ours.prompt(text) == theirs(text).input_ids, text  # noqa: B023

        same()


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("scores", None, "tokenizer.ggml.scores: got 'none'"),
        ("scores", [0.0, 1.0], "tokenizer.ggml.scores: got '2 numbers for 288 tokens'"),
        ("scores", [float("nan")] * 288, "some that are not finite"),
        ("token_type", [1, 2, 3], "tokenizer.ggml.token_type: got '3 numbers for 288 tokens'"),
        ("tokens", ["<unk>", "<s>", "</s>", *["a"] * 285], "token 'a' twice"),
        ("tokens", ["<unk>", "<s>", "</s>", *(f"t{n}" for n in range(285))], "no token for some bytes"),
        ("eos_token_id", None, "no token that ends an answer"),
    ],
)
def test_what_it_lacks_is_named(key: str, value: Any, says: str, checkpoint: Make, tmp_path: Path) -> None:
    told = small() | {f"tokenizer.ggml.{key}": value}
    with pytest.raises(CheckpointError, match=says):
        import_model(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf", **told), tmp_path / "model")
    assert not (tmp_path / "model").exists()
