"""vLLM's extensions of chat and completions that its users rely on: what each does, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest

from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import Guide
from shoal.inputs.tokenizer import END_ID
from tests.unit.api.conftest import Scripted
from tests.unit.api.test_chat import BODY, URL, events, png

pytestmark = pytest.mark.anyio

TEXT_URL = "/v1/completions"
TEXT: dict[str, Any] = {"model": "fish", "prompt": "ab"}
BEGUN = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the sea"}]


async def asked(http: httpx.AsyncClient, url: str, body: dict[str, Any]) -> Any:
    reply = await http.post(url, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


class TestTheTemplate:
    TEMPLATE = (
        "{% if thinking %}<|system|>think {{ how }}<|end|>{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )

    @pytest.fixture
    def http(self, served: ServedModel, engine: Scripted) -> httpx.AsyncClient:
        app = build_app([Hosted(replace(served, chat_template=self.TEMPLATE), engine)])
        return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")

    async def test_reads_its_settings_and_the_rest_is_named(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel
    ) -> None:
        given = {"thinking": True, "how": "deep", "enable_magic": 1}
        reply = await http.post(URL, json={**BODY, "chat_template_kwargs": given})
        assert (reply.status_code, reply.headers["x-shoal-unused"]) == (200, "chat_template_kwargs.enable_magic")
        assert "think deep" in served.tokenizer.decode(engine.requests[0].prompt.ids)
        reply = await http.post(URL, json={**BODY, "chat_template_kwargs": {"thinking": False}})
        assert "think" not in served.tokenizer.decode(engine.requests[1].prompt.ids)
        assert "x-shoal-unused" not in reply.headers

    @pytest.mark.parametrize(
        "given",
        [
            {"messages": []}, {"add_generation_prompt": False}, {"how": "<|end|>"}, {"how": ["a", {"<|user|>": 1}]},
            {"how": "\ue0000\ue001"}, {"how": "x" * 4097}, "thinking",
        ],
    )  # fmt: skip
    async def test_settings_cannot_spell_a_control_token_or_take_the_place_of_others(
        self, http: httpx.AsyncClient, engine: Any, given: Any
    ) -> None:
        reply = await http.post(URL, json={**BODY, "chat_template_kwargs": given})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "chat_template_kwargs")
        assert engine.requests == []

    async def test_a_turn_is_opened_or_not(self, http: httpx.AsyncClient, engine: Any) -> None:
        for fields in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": False}):
            await asked(http, URL, {**BODY, **fields})
        with_, same, without = (request.prompt.ids for request in engine.requests)
        assert with_ == same == [*without, with_[-1]]

    async def test_an_answer_goes_on_with_the_last_message(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel
    ) -> None:
        for fields in ({}, {"add_generation_prompt": False}):
            await asked(http, URL, {**BODY, "messages": BEGUN, "continue_final_message": True, **fields})
            assert engine.requests[-1].prompt.ids[-7:] == served.tokenizer.encode("the sea")
        await asked(http, URL, {**BODY, "messages": BEGUN, "add_generation_prompt": False})
        assert engine.requests[-1].prompt.ids == [*engine.requests[0].prompt.ids, END_ID]

    @pytest.mark.parametrize(
        "fields",
        [
            {"messages": BEGUN[:1]},
            {"messages": BEGUN, "add_generation_prompt": True},
            {"messages": [BEGUN[0], {"role": "assistant", "content": ""}]},
        ],
    )
    async def test_there_must_be_something_to_go_on_with(self, http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
        reply = await http.post(URL, json={**BODY, "continue_final_message": True, **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "continue_final_message")


class TestTokenIds:
    @pytest.mark.parametrize("at_once", [1, 4])
    async def test_of_prompt_and_answer_whole_and_streamed(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel, at_once: int
    ) -> None:
        engine.at_once = at_once
        wanted = served.tokenizer.encode(engine.reply)[:16]
        for url, body in ((URL, BODY), (TEXT_URL, TEXT)):
            body = {**body, "return_token_ids": True, "max_tokens": 16}
            whole = await asked(http, url, body)
            prompt = engine.requests[-1].prompt.ids
            holder = whole if url == URL else whole["choices"][0]
            assert (holder["prompt_token_ids"], whole["choices"][0]["token_ids"]) == (prompt, wanted)
            chunks = events((await http.post(url, json={**body, "stream": True})).text)[:-1]
            choices = [chunk["choices"][0] for chunk in chunks]
            assert [token for choice in choices for token in choice.get("token_ids", ())] == wanted
            first = chunks[0] if url == URL else choices[0]
            assert first["prompt_token_ids"] == prompt
            assert not any("prompt_token_ids" in (*chunk, *chunk["choices"][0]) for chunk in chunks[1:])


class TestPromptLogprobs:
    async def test_each_token_of_the_prompt_by_its_id(self, http: httpx.AsyncClient, served: ServedModel) -> None:
        b = served.tokenizer.encode("b")[0]
        choice = (await asked(http, TEXT_URL, {**TEXT, "prompt_logprobs": 1}))["choices"][0]
        assert choice["prompt_logprobs"] == [None, {str(b): {"logprob": -0.25, "rank": 1, "decoded_token": "b"}}]
        choice = (await asked(http, TEXT_URL, {**TEXT, "prompt_logprobs": 0}))["choices"][0]
        assert choice["prompt_logprobs"][1][str(b)]["rank"] is None  # nobody knows how many are likelier
        chat = await asked(http, URL, {**BODY, "prompt_logprobs": 1, "n": 2})
        assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
        assert chat["prompt_logprobs"][0] is None and all(chat["prompt_logprobs"][1:])

    @pytest.mark.parametrize(
        ("url", "fields"),
        [
            (URL, {"stream": True, "prompt_logprobs": 1}), (TEXT_URL, {"stream": True, "prompt_logprobs": 0}),
            (URL, {"prompt_logprobs": 21}), (TEXT_URL, {"prompt_logprobs": -1}),
            (TEXT_URL, {"prompt_logprobs": 1, "echo": True, "logprobs": 2}),
        ],
    )  # fmt: skip
    async def test_what_cannot_be_is_a_400(self, http: httpx.AsyncClient, url: str, fields: dict[str, Any]) -> None:
        reply = await http.post(url, json={**(BODY if url == URL else TEXT), **fields})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt_logprobs")


class TestTruncation:
    async def test_the_end_of_a_prompt_is_read(self, http: httpx.AsyncClient, engine: Any, served: ServedModel) -> None:
        context = served.config.context
        for prompt in ("x" * 3000 + "end", served.tokenizer.encode("x" * 3000 + "end")):
            for most, fields, count in (
                (5, {}, 5),
                (-1, {"max_tokens": 9}, context - 9),
                (-1, {"max_tokens": 1}, context - 1),
            ):
                body = {**TEXT, "prompt": prompt, "truncate_prompt_tokens": most, **fields}
                answer = await asked(http, TEXT_URL, body)
                read = engine.requests[-1].prompt.ids
                assert (len(read), served.tokenizer.decode(read)[-3:]) == (count, "end")
                assert answer["usage"]["prompt_tokens"] == count
        answer = await asked(http, TEXT_URL, {**TEXT, "prompt": "abcdef", "truncate_prompt_tokens": 2, "echo": True})
        assert answer["choices"][0]["text"].startswith("efH")
        messages = [{"role": "user", "content": "x" * 3000}]
        await asked(http, URL, {**BODY, "messages": messages, "truncate_prompt_tokens": 7})
        assert len(engine.requests[-1].prompt.ids) == 7

    @pytest.mark.parametrize("most", [0, -2, 10**9])
    async def test_a_length_that_is_none_is_a_400(self, http: httpx.AsyncClient, most: int) -> None:
        for url, body in ((URL, BODY), (TEXT_URL, TEXT)):
            reply = await http.post(url, json={**body, "truncate_prompt_tokens": most})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "truncate_prompt_tokens")

    async def test_an_image_is_never_cut(self, http: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": png()}}]}]
        reply = await http.post(URL, json={**BODY, "messages": messages, "truncate_prompt_tokens": 3})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "truncate_prompt_tokens")


class TestTheOthers:
    async def test_a_completion_may_have_a_format(self, http: httpx.AsyncClient, engine: Any) -> None:
        await asked(http, TEXT_URL, {**TEXT, "response_format": {"type": "json_object"}})
        assert engine.requests[-1].sampling.guided == Guide("json_object")
        both = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}
        reply = await http.post(TEXT_URL, json={**TEXT, **both})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "response_format")

    async def test_the_stop_and_the_banned_words_reach_the_engine(
        self, http: httpx.AsyncClient, engine: Any, served: ServedModel
    ) -> None:
        for url, body in ((URL, BODY), (TEXT_URL, TEXT)):
            await asked(http, url, {**body, "stop": "x", "include_stop_str_in_output": True, "bad_words": ["cod"]})
            sampling = engine.requests[-1].sampling
            assert sampling.include_stop
            assert sampling.banned == tuple(tuple(served.tokenizer.encode(text)) for text in ("cod", " cod"))
