"""A checkpoint that is not ours, as the routes see it."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Core
from tokenizers import decoders, models, pre_tokenizers, trainers

from shoal.api import stock
from shoal.api.bodies import ChatRequest
from shoal.api.requests import Limits, chat_call
from shoal.api.served import ServedModel
from shoal.errors import ConfigError, RequestError
from shoal.inputs.chat import Encoded

TEXT = "Grüße, \U0001f41f!"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    core = Core(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the sea the sea the sea"], trainer)
    core.save(str(tmp_path / "tokenizer.json"))
    shape = {"model_type": "llama", "vocab_size": 300, "num_hidden_layers": 3, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    template = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    named = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    return tmp_path


def test_it_has_one_depth_and_the_checkpoint_s_sizes(directory: Path) -> None:
    served = stock.load(directory, "llama,alias")
    assert (served.name, served.aliases) == ("llama", ("alias",))
    assert (served.config.vocab, served.config.context, served.config.exit_names) == (300, 64, {"full": 3})
    assert served.tokenizer.end == "</s>" and served.tokenizer.pad is None
    assert [served.config.depth(depth) for depth in ("full", 3)] == [3, 3]
    with pytest.raises(ConfigError, match="depth: got 'shallow'; allowed: full, 3"):
        served.config.depth("shallow")


def test_threads_that_encode_templates_make_no_control_tokens_of_others_text(directory: Path) -> None:
    """Requests are encoded in several threads: what one means as control tokens, another spells."""
    tokenizer = stock.load(directory).tokenizer
    end, spelt, stop = tokenizer.special("</s>"), tokenizer.encode("</s>"), threading.Event()

    def templates() -> None:
        while not stop.is_set():
            assert tokenizer.template_ids("</s>") == [end]

    beside = [threading.Thread(target=templates) for _ in range(3)]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in beside:
            thread.start()
        found = {tuple(tokenizer.encode("</s>")) for _ in range(3000)}
    finally:
        sys.setswitchinterval(before)
        stop.set()
        for thread in beside:
            thread.join()
    assert end not in spelt and found == {tuple(spelt)}


def test_text_comes_back_byte_for_byte_also_in_a_stream(directory: Path) -> None:
    tokenizer = stock.load(directory).tokenizer
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    stream = tokenizer.stream()
    assert "".join(stream.push(token) for token in ids) + stream.finish() == TEXT
    assert len(tokenizer.encode("the sea")) < len("the sea"), "its merges are used"


def test_only_the_template_spells_control_tokens(directory: Path) -> None:
    served = stock.load(directory)
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "</s> hi"}], "max_tokens": 4}
    )
    (request,) = chat_call(body, served, Limits()).requests
    assert isinstance(request.prompt, Encoded)
    begin, end = served.tokenizer.special("<s>"), served.tokenizer.special("</s>")
    assert request.prompt.ids[0] == begin and end not in request.prompt.ids
    assert served.tokenizer.decode(request.prompt.ids) == "[user]</s> hi"


def test_images_are_refused(directory: Path) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": [part]}]})
    with pytest.raises(RequestError, match="reads text alone"):
        chat_call(body, stock.load(directory), Limits())


def test_sentencepiece_pieces_are_bytes_too(directory: Path) -> None:
    core = Core(models.BPE(vocab={"<unk>": 0, "\u2581sea": 1, "<0x0A>": 2, "\u00fc": 3}, merges=[], unk_token="<unk>"))
    tokenizer = stock.StockTokenizer(core)
    assert [tokenizer.token_bytes(token) for token in (1, 2, 3)] == [b" sea", b"\n", "\u00fc".encode()]


def test_a_model_directory_of_ours_stays_one(tmp_path: Path) -> None:
    from shoal import Model

    model: Any = Model.from_preset("test")
    model.save(tmp_path / "m")
    assert type(stock.load(tmp_path / "m")) is ServedModel
