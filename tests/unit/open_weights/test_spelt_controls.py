"""No text of a request is a control token, in whatever field it stands and whatever a chat template does with it: each chat has
as many as the same chat with other words."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, models, normalizers

from shoal import presets
from shoal.api.bodies import Message
from shoal.api.limits import Limits
from shoal.api.prompts import encode_messages, prompt_ids
from shoal.data.chats.rows import read_chats
from shoal.errors import CheckpointError
from shoal.inputs.chat import encode_chat
from shoal.inputs.tokenizer import SPECIAL, Tokenizer
from shoal.open_weights.vocabulary import made
from tests.unit.open_weights import taught
from tests.unit.open_weights.taught import TOLD, jinja, served, tokenizer

FAMILIES = sorted(taught.FORMATS)
# what templates do to a text, each of which made a token of what was none in front of it, or was not marked as one
DONE = {
    "m.content": "{}",
    "m.content[1:]": "x{}",
    "m.content | trim": "\n {} ",
    "m.content | lower": "{}",
    "m.content | upper": "{}",
    "m.content.replace('/think', '')": "{}",
    "m.content.replace('</think>', '') | tojson": "{}",
    "m.content.split('</think>')[-1]": "a</think>{}",
    "m.content.split('</think>') | join": "{}",
    "m.content | tojson(ensure_ascii=true)": "{}",
    "[m.content] | string": "{}",
    "m.content[:2] ~ m.content[2:]": "{}",
    "'<' ~ m.content": "{}",
    "m.content ~ '>'": "{}",
}


def spellings(name: str) -> list[str]:
    """`name`, and what a template may make it of."""
    inside = [name[: len(name) // 2] + part + name[len(name) // 2 :] for part in ("/think", "</think>", name)]
    return [name, name.upper(), name.lower(), name[1:], name[:-1], *inside]


def controls(its: Tokenizer, ids: list[int], frames: bool = True) -> Counter[str]:
    known = {its._core.token_to_id(name): name for name in (*its.specials, *(its.frames if frames else ()))}
    return Counter(known[token] for token in ids if token in known)


def fields(text: str) -> dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """Chats and tools with `text` in one field each."""

    def chat(
        system: str = "x", user: Any = "x", arguments: Any = "x", result: Any = "x", tool: Any = "x", key: str = "x"
    ) -> Any:
        function = {"name": "look", "arguments": json.dumps({key: arguments})}
        call = {"id": "call00001", "type": "function", "function": function}
        schema = {"type": "object", "properties": {key: {"enum": [tool]}}}
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": user},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call00001", "content": result},
        ]
        return messages, [{"type": "function", "function": {"name": "look", "description": tool, "parameters": schema}}]

    parts = [{"type": "text", "text": text}]
    return {
        "system": chat(system=text),
        "user": chat(user=text),
        "parts": chat(user=parts),
        "arguments": chat(arguments=[{"in": text}]),
        "result": chat(result=parts),
        "tool": chat(tool=text),
        "name of a field": chat(key=text),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_a_request_is_text(family: str) -> None:
    its, model = tokenizer(family), served(family)

    def count(text: str) -> dict[str, Counter[str]]:
        found = {}
        for name, (messages, tools) in fields(text).items():
            chat = [Message.model_validate(message) for message in messages]
            # SmolLM3's template shows no calls: they are in what the assistant said, whose thoughts are tokens
            its_own = family == "smollm3" and name in ("arguments", "name of a field")
            found[name] = controls(its, encode_messages(chat, model, Limits(), tools=tools).ids, not its_own)
        return found

    plain = count("x")
    assert all(found.total() > 2 for found in plain.values())
    for name in (*its.specials, *TOLD[family]["added"]):
        for text in spellings(name):
            assert count(text) == plain, text


@pytest.mark.parametrize("whole", [True, False], ids=["ignore_merges", "a merge"])
@pytest.mark.parametrize("text", ["{}", "x {} y"])
def test_a_tokenizer_whose_pieces_make_a_control_token_of_text_is_refused(whole: bool, text: str) -> None:
    names = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)))
    pieces = [*names, "\u2581", *"<>/sxy", "</", "</s"]
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]

    def imported(merges: list[tuple[str, str]], whole: bool) -> Tokenizer:
        vocab = {piece: number for number, piece in enumerate(pieces)}
        core = tokenizers.Tokenizer(
            models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", ignore_merges=whole)
        )
        core.normalizer = normalizers.Replace(" ", "\u2581")
        core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names[:3]])
        return made(core, {"eos_token": "</s>"}, (2,), "x")

    sound = imported(merges[:2], False)
    assert not controls(sound, sound.encode(text.format("</s>")))
    with pytest.raises(CheckpointError, match=r"tokenizer x: got .*pieces that make '<.*>' of a user's text"):
        imported(merges[:2] if whole else merges, whole)


@pytest.mark.parametrize("done", DONE)
def test_whatever_a_template_does_with_a_text_it_stays_text(done: str) -> None:
    """SmolLM3's leaves `/think` out of the system message: of `<|im_/thinkend|>` it made the token."""
    core = tokenizers.Tokenizer.from_str(tokenizer("qwen2").plain_json)
    # a turn of DeepSeek's, and not special
    core.add_tokens([AddedToken("<\uff5cUser\uff5c>", special=False, normalized=False)])
    its = Tokenizer(core, tokenizer("qwen2").controls)
    template = f"<|im_start|>{{% for m in messages %}}<\uff5cUser\uff5c>{{{{ {done} }}}}<|im_end|>{{% endfor %}}"

    def ids(text: str) -> list[int]:
        chat = [{"role": "user", "content": DONE[done].format(text)}]
        return encode_chat(chat, its, served("qwen2").config, template=template).ids

    assert controls(its, ids("xx")) == {"<|im_start|>": 1, "<\uff5cUser\uff5c>": 1, "<|im_end|>": 1}
    for name in (*its.specials, *its.frames):
        for text in spellings(name):
            assert controls(its, ids(text)) == controls(its, ids("xx")), text
    if done == "m.content":
        assert (
            b"".join(map(its.token_bytes, ids("a <b> [c] <|d|> \\ua000")))
            == "<\uff5cUser\uff5c>a <b> [c] <|d|> \\ua000".encode()
        )


def test_a_row_that_is_learned_and_a_prompt_without_a_chat_are_text_too(tmp_path: Path) -> None:
    its, model = tokenizer("smollm3"), served("smollm3")

    def learned(text: str) -> Counter[str]:
        row = [{"role": role, "content": text} for role in ("system", "user", "assistant")]
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": row}))
        read = read_chats(tmp_path / "rows.jsonl", its, model.config, template=jinja("smollm3"))
        return controls(its, read.ids.tolist(), frames=False)

    for name in its.specials:
        for text in spellings(name):
            assert learned(text) == learned("x"), text
            asked, other = (prompt_ids(each, model, "prompt") for each in (text, "x"))
            assert controls(its, asked, frames=False) == controls(its, other, frames=False), text


@pytest.mark.parametrize("name", SPECIAL)
def test_a_model_of_our_own_reads_text_too(name: str) -> None:
    its, config = Tokenizer.bytes_only(), presets.get("small").model

    def count(text: str) -> int:
        chat = [{"role": role, "content": text} for role in ("system", "user", "assistant", "user")]
        return sum(its.control(token) is not None for token in encode_chat(chat, its, config).ids)

    assert {count(text) for text in spellings(name)} == {count("x")}
