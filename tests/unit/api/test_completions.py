"""POST /v1/completions and the tokenizer routes, as lm-eval and the openai client use them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from shoal.api.served import ServedModel
from shoal.engine.events import Guide, TokenLogprob
from shoal.inputs.tokenizer import END_ID, PAD_ID, PATCH_ID

pytestmark = pytest.mark.anyio

URL = "/v1/completions"
NUMBER = 10**4300 - 1  # the longest that JSON is read with


async def complete(http: httpx.AsyncClient, **fields: Any) -> Any:
    reply = await http.post(URL, json={"model": "fish", "prompt": "ab", **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_every_form_of_prompt_reaches_the_engine_as_ids(
    http: httpx.AsyncClient, engine: Any, served: ServedModel
) -> None:
    a, b = served.tokenizer.encode("a"), served.tokenizer.encode("bc")
    for prompt, expected in (("a", [a]), (["a", "bc"], [a, b]), (a, [a]), ([a, b], [a, b])):
        engine.requests.clear()
        answer = await complete(http, prompt=prompt)
        assert sorted(request.prompt.ids for request in engine.requests) == sorted(expected)
        assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
        assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))


async def test_logprobs_have_the_legacy_shape(http: httpx.AsyncClient) -> None:
    assert (await complete(http, logprobs=2, max_tokens=2))["choices"][0]["logprobs"] == {
        "tokens": ["H", "e"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"H": -0.5, "I": -1.5}, {"e": -0.5, "f": -1.5}],
        "text_offset": [0, 1],
    }


async def test_echo_with_logprobs_is_what_lm_eval_reads(http: httpx.AsyncClient, engine: Any) -> None:
    """The prompt's tokens first, the first of them without a logprob; lm-eval drops the last, which is the answer's."""
    engine.reply = "zz"
    for max_tokens in (1, 0):
        answer = await complete(http, prompt=[75, 76, 77], echo=True, logprobs=1, max_tokens=max_tokens, temperature=0)
        (choice,), more = answer["choices"], ["z"] * max_tokens
        logprobs = choice["logprobs"]
        assert choice["text"] == "".join(logprobs["tokens"]) == "cde" + "z" * max_tokens
        assert logprobs["token_logprobs"] == [None, -0.25, -0.25] + [-0.5 for _ in more]
        assert logprobs["top_logprobs"][:3] == [None, {"d": -0.25}, {"e": -0.25}]
        assert logprobs["text_offset"] == list(range(3 + max_tokens))
        assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", max_tokens)
    assert [request.sampling.prompt_logprobs for request in engine.requests] == [1, 1]


async def test_a_sampled_token_is_among_the_likeliest_in_any_case(http: httpx.AsyncClient, engine: Any) -> None:
    """As OpenAI's: one more entry where it is none of them."""
    likeliest = {"x": -0.1, "y": -0.2}
    ids = {name: engine.tokenizer.encode(name)[0] for name in likeliest}
    rare = TokenLogprob(engine.tokenizer.encode("H")[0], -7.0, tuple((ids[n], v) for n, v in likeliest.items()))
    engine._logprob = lambda request, token: replace(rare, top=rare.top[: request.sampling.logprobs])
    for count in (0, 1, 2):
        entry = (await complete(http, logprobs=count, max_tokens=1))["choices"][0]["logprobs"]
        assert entry["top_logprobs"] == [{**dict([*likeliest.items()][:count]), "H": -7.0}]


@pytest.mark.parametrize("max_tokens", [0, 3])
async def test_echo_with_logprobs_in_a_stream_says_the_same_as_the_whole(
    http: httpx.AsyncClient, max_tokens: int
) -> None:
    fields = {"model": "fish", "prompt": ["ab", "é"], "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    whole = (await complete(http, **fields))["choices"]
    text = (await http.post(URL, json={**fields, "stream": True})).text
    *chunks, _ = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    pieces = [json.loads(chunk)["choices"][0] for chunk in chunks]
    for index, expected in enumerate(whole):
        mine = [piece for piece in pieces if piece["index"] == index]
        assert "".join(piece["text"] for piece in mine) == expected["text"]
        assert mine[-1]["finish_reason"] == expected["finish_reason"]
        for column, values in expected["logprobs"].items():
            assert [v for piece in mine if piece["logprobs"] for v in piece["logprobs"][column]] == values


@pytest.mark.parametrize(
    ("given", "guide"),
    [
        ({"regex": "a+"}, Guide("regex", "a+")),
        ({"choice": ["a", "b"]}, Guide("choice", ["a", "b"])),
        ({"json": {"type": "object"}}, Guide("json_schema", '{"type": "object"}')),
        ({"json_object": True}, Guide("json_object")),
    ],
)
async def test_structured_outputs_guide_the_engine(
    http: httpx.AsyncClient, engine: Any, given: dict[str, Any], guide: Guide
) -> None:
    await complete(http, structured_outputs=given, speculative=4)
    assert engine.requests[0].sampling.guided == guide
    assert engine.requests[0].sampling.speculative == 4
    reply = await http.post(URL, json={"model": "fish", "prompt": "a", "structured_outputs": {**given, "regex": "b"}})
    assert reply.status_code == (200 if "regex" in given else 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [PATCH_ID]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 33, "n": 2}, "prompt"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": "x" * 385}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"n": 0}, "n"),
        ({"n": 65}, "n"),
        *(({name: NUMBER}, name) for name in ("n", "max_tokens", "top_k", "min_tokens", "depth", "temperature")),
        ({"prompt": ["a", "b", "c"], "n": NUMBER}, "n"),
        ({"messages": []}, "messages"),
    ],
)
async def test_what_cannot_be_served_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, engine: Any, fields: dict[str, Any], param: str
) -> None:
    reply = await http.post(URL, json={"model": "fish", "prompt": "ab", **fields})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
    assert engine.requests == [] and len(reply.content) < 1000


async def test_one_failing_prompt_fails_all_and_leaves_nothing_running(http: httpx.AsyncClient, engine: Any) -> None:
    calls = 0
    batches = engine.batches

    def second_fails(request: Any) -> Any:
        nonlocal calls
        calls += 1
        engine.raises = ZeroDivisionError() if calls == 2 else None
        return batches(request)

    engine.hangs_after, engine.batches = 2, second_fails
    reply = await http.post(URL, json={"model": "fish", "prompt": ["a", "b", "c"]})
    assert (reply.status_code, engine.open) == (500, 0)


async def test_tokenize_and_back(http: httpx.AsyncClient, served: ServedModel) -> None:
    text = "Grüße <|user|>"
    tokens = (await http.post("/tokenize", json={"prompt": text, "add_special_tokens": False})).json()
    assert tokens == {"count": len(tokens["tokens"]), "max_model_len": 384, "tokens": served.tokenizer.encode(text)}
    back = await http.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": text}


async def test_the_ids_of_the_tokens_in_tokenizer_info_can_be_looked_up(http: httpx.AsyncClient) -> None:
    """So lm-eval finds the token that it puts before a text without a context."""
    info = (await http.get("/tokenizer_info")).json()
    for name, token in ((info["eos_token"], END_ID), (info["pad_token"], PAD_ID)):
        assert (await http.post("/tokenize", json={"prompt": name})).json()["tokens"] == [token]
    inside = (await http.post("/tokenize", json={"prompt": f"x{info['eos_token']}"})).json()
    assert inside["count"] == 1 + len(info["eos_token"])  # in a text it is characters, as everywhere


async def test_tokenize_a_chat_as_the_model_reads_it(http: httpx.AsyncClient, engine: Any) -> None:
    messages = [{"role": "user", "content": "hi"}]
    tokens = (await http.post("/tokenize", json={"messages": messages})).json()["tokens"]
    await http.post("/v1/chat/completions", json={"model": "fish", "messages": messages})
    assert tokens == engine.requests[0].prompt.ids


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}),
        ("/detokenize", {"tokens": [300]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {}),
        ("/tokenize", {"prompt": "a" * (2**20 + 1)}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a" * 2**19}] * 3}),
        ("/detokenize", {"tokens": [80] * (2**20 + 1)}),
    ],
)
async def test_bad_tokenizer_bodies(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> None:
    assert (await http.post(path, json=body)).status_code == 400


async def test_tokenizer_info(http: httpx.AsyncClient, served: ServedModel) -> None:
    info = (await http.get("/tokenizer_info")).json()
    assert info == {
        "eos_token": "<|end|>", "bos_token": None, "pad_token": "<|pad|>", "chat_template": served.chat_template,
    }  # fmt: skip
