"""The weights that `make assistant` fetches, beside transformers: what is asked and what is answered are the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.inputs.chat import encode_chat
from shoal.open_weights.convert import export_model, import_model
from tests.extra import package

# 92.9 MB are fetched, and transformers runs them on one thread
pytestmark = [pytest.mark.drill, pytest.mark.timeout(900)]

TOKENS = 24
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
SAID = (
    "What is the capital of France?", "Give me three tips.\n\n1.", "  leading and trailing  ", "今天天气怎么样?",
    "def f(x):\n\treturn x**2  # square", "emoji 🙂👩‍👩‍👧 and ZWJ", "Ünïcödé — dashes — and “quotes”",
    "<b>html</b> & entities &amp;", '{"json": [1, 2, null]}', "tab\tand\r\nCRLF", "a" * 300, "1234567890 3.14159", "",
    "Why?\nBecause.\n", "مرحبا بالعالم", "Привет, мир!", "e\u0301 decomposed é", "\u200bzero width", "C:\\path\\file",
    "$$\\int_0^1 x\\,dx$$",
)  # fmt: skip


def chats() -> list[list[dict[str, str]]]:
    """Twenty: a question, one with a system message before it, and one that goes on from an answer, in turns."""
    made = []
    for number, text in enumerate(SAID):
        chat = [{"role": "user", "content": text}]
        if number % 3 == 1:
            chat = [SYSTEM, *chat]
        if number % 3 == 2:
            chat += [
                {"role": "assistant", "content": f"I see: {SAID[number - 1]}"},
                {"role": "user", "content": "Go on."},
            ]
        made.append(chat)
    return made


def test_twenty_chats_are_asked_and_answered_as_by_transformers(tmp_path: Path) -> None:
    """In fp32, greedily, together in one batch of the paged engine; transformers is asked one by one."""
    transformers = package("transformers")
    import_model("smollm2-135m-instruct", tmp_path / "model", dtype="float32")
    export_model(tmp_path / "model", tmp_path / "theirs", check=False)
    ours = Model.load(tmp_path / "model", verify=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32).eval()
    asked = [encode_chat(chat, ours.tokenizer, ours.config, template=ours.chat_template).ids for chat in chats()]
    for chat, ids in zip(chats(), asked, strict=True):
        told = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ids == list(told), chat
    how = Sampling(temperature=0, max_tokens=TOKENS)
    done = Engine(ours, max_batch=8).generate([Request(ids, how, depth="full") for ids in asked])
    for ids, answer in zip(asked, done, strict=True):
        with torch.no_grad():
            (row,) = theirs.generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)
        ended = [] if answer.finish_reason == "length" else [ours.tokenizer.ends[0]]  # which transformers tells as well
        assert answer.tokens + ended == row[len(ids) :].tolist()
    assert sum(len(answer.tokens) for answer in done) > 10 * TOKENS, "they are answers"
