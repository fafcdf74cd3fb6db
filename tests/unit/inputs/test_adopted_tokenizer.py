"""A tokenizer that the user brings: ours as it is, any byte-level BPE behind our control tokens, anything else refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.tokenizer import END_ID, SPECIAL, Tokenizer

TEXTS = ["the shoal swims as one, the shoal dives as one; 42 fish, café"] * 5


def foreign(path: Path, model: object = None, trainer: object = None, **parts: object) -> Path:
    """A byte-level BPE as other tools make it: one control token of its own, at the end or in front."""
    core = tokenizers.Tokenizer(model or models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(core, name, part)
    core.train_from_iterator(TEXTS, trainer or trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    ))  # fmt: skip
    core.save(str(path))
    return path


def test_ours_is_taken_as_it_is(tmp_path: Path) -> None:
    ours = Tokenizer.train(TEXTS, 300)
    ours.save(tmp_path / "t.json")
    assert Tokenizer.adopt(tmp_path / "t.json", 300).sha256 == ours.sha256


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    path = foreign(tmp_path_factory.mktemp("t") / "t.json")
    return Tokenizer.adopt(path, 512), tokenizers.Tokenizer.from_file(str(path))


@given(st.text(max_size=60))
def test_another_bpe_cuts_text_as_before_behind_our_control_tokens(pair, text: str) -> None:
    adopted, other = pair
    text = text.encode("utf-8", "replace").decode()
    ids = adopted.encode(text)
    assert adopted.decode(ids) == text and all(i >= len(SPECIAL) for i in ids)
    theirs = [other.id_to_token(i) for i in other.encode(text, add_special_tokens=False).ids]
    assert [adopted._core.id_to_token(i) for i in ids] == theirs or "<|endoftext|>" in text


@pytest.mark.parametrize("name", SPECIAL)
def test_pieces_that_spell_a_control_token_of_ours_are_refused(name: str, tmp_path: Path) -> None:
    """Ours takes the place of a piece of that name, and a user's text was cut into it."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator([name] * 9, trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet))
    core.save(str(tmp_path / "t.json"))
    assert len(core.encode(name).ids) == 1
    with pytest.raises(CheckpointError, match="leaves text as it is"):
        Tokenizer.adopt(tmp_path / "t.json", 512)


def test_control_tokens_are_ours_alone(pair) -> None:
    adopted, other = pair
    assert [adopted.special(name) for name in SPECIAL] == list(range(9)) and adopted.token_bytes(END_ID) == b""
    assert len(adopted) == other.get_vocab_size() - 1 + len(SPECIAL)
    assert adopted.decode(adopted.encode("<|endoftext|><|user|>")) == "<|endoftext|><|user|>"
    again = Tokenizer.from_json(adopted.json)
    assert again.sha256 == adopted.sha256 and again.encode("the shoal") == adopted.encode("the shoal")


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"normalizer": normalizers.NFC()}, "changed"),
        ({"normalizer": normalizers.Lowercase()}, "changed"),
        ({"pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=True)}, "changed"),
        ({"pre_tokenizer": pre_tokenizers.Whitespace(), "trainer": trainers.BpeTrainer(show_progress=False)}, "missing"),
        ({"model": models.WordLevel(unk_token="?"), "trainer": trainers.WordLevelTrainer(show_progress=False)}, "WordLevel"),
    ],
)  # fmt: skip
def test_what_does_not_give_text_back_is_refused(tmp_path: Path, parts: dict, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        Tokenizer.adopt(foreign(tmp_path / "t.json", **parts), 512)


def test_too_many_tokens_and_no_tokenizer_are_one_line(tmp_path: Path) -> None:
    path = foreign(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="control tokens included'; allowed: at most 270"):
        Tokenizer.adopt(path, 270)
    (tmp_path / "bad.json").write_text("{}")
    for gone in (tmp_path / "none.json", tmp_path / "bad.json", tmp_path):
        with pytest.raises(CheckpointError, match="cannot read tokenizer") as caught:
            Tokenizer.adopt(gone, 300)
        assert "\n" not in str(caught.value)
