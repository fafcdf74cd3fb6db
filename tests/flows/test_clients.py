"""The clients that people have, against the running service: the official openai package, langchain, litellm, lm-eval, and
what runs agents."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openai
import pytest
import torch
from pydantic import BaseModel, ConfigDict

from shoal import Model
from shoal.inputs.tokenizer import END_ID
from tests.extra import guidellm, package
from tests.flows.conftest import KEY, Service, running

MESSAGES: list[Any] = [{"role": "user", "content": "How deep is the sea?"}]
CHAT: dict[str, Any] = {"model": "fish", "messages": MESSAGES, "seed": 7, "max_tokens": 12}
TEXT: dict[str, Any] = {"model": "fish", "prompt": "the sea", "seed": 7, "max_tokens": 12}


class Catch(BaseModel):
    """Something that a random model can write to the end: no text, and nothing beside these."""

    model_config = ConfigDict(extra="forbid")
    fish: Literal["cod", "eel"]
    deep: bool


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    """Of a model whose context holds the text of tools."""
    with running(Model.from_preset("tiny", seed=3), max_queue=4, max_batch=4) as started:
        yield started


@pytest.fixture(scope="module")
def client(service: Service) -> openai.OpenAI:
    return service.openai()


class TestOpenAI:
    def test_sync_and_async_whole_and_streamed_say_the_same(self, service: Service, client: openai.OpenAI) -> None:
        async def ask() -> list[str | None]:
            async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as others:
                chat, text = await asyncio.gather(
                    others.chat.completions.create(**CHAT), others.completions.create(**TEXT)
                )
                chat_stream = await others.chat.completions.create(**CHAT, stream=True)
                chat_pieces = [piece.choices[0].delta.content or "" async for piece in chat_stream]
                text_stream = await others.completions.create(**TEXT, stream=True)
                text_pieces = [piece.choices[0].text async for piece in text_stream]
            return [chat.choices[0].message.content, "".join(chat_pieces), text.choices[0].text, "".join(text_pieces)]

        chat = client.chat.completions.create(**CHAT).choices[0].message.content
        chat_pieces = [c.choices[0].delta.content or "" for c in client.chat.completions.create(**CHAT, stream=True)]
        text = client.completions.create(**TEXT).choices[0].text
        text_pieces = [piece.choices[0].text for piece in client.completions.create(**TEXT, stream=True)]
        assert asyncio.run(ask()) == [chat, chat, text, text]
        assert ("".join(chat_pieces), "".join(text_pieces)) == (chat, text)
        assert chat and text

    def test_every_answer_is_of_its_type_to_the_letter(self, client: openai.OpenAI) -> None:
        """The client builds its objects without checking them: pydantic, asked to, does. (Its types know neither the null of an
        echoed prompt's first logprob nor that of a completion's unfinished chunk, which OpenAI sends too.)"""

        def check(answer: Any) -> None:
            type(answer).model_validate(answer.model_dump(warnings="error"), strict=False)

        check(client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2, n=2))
        check(client.completions.create(**TEXT, logprobs=2))
        for chunk in client.chat.completions.create(
            **CHAT, logprobs=True, stream=True, stream_options={"include_usage": True}
        ):
            check(chunk)
        check(client.models.retrieve("fish"))
        check(client.embeddings.create(model="fish", input="the sea", encoding_format="float"))

    def test_the_stream_helper_builds_the_whole_answer(self, client: openai.OpenAI) -> None:
        free = client.chat.completions.create(**CHAT).choices[0].message.content or ""
        fields = {**CHAT, "stop": free[5:8]}  # the helper raises for an answer that its length cuts off
        whole = client.chat.completions.create(**fields)
        with client.chat.completions.stream(**fields, logprobs=True, stream_options={"include_usage": True}) as stream:
            kinds = {event.type for event in stream}
            built = stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done", "logprobs.content.delta"} <= kinds
        assert built.choices[0].message.content == whole.choices[0].message.content
        assert built.usage is not None and whole.usage is not None
        assert built.usage.completion_tokens == whole.usage.completion_tokens

    def test_parse_gives_the_object_of_a_schema(self, client: openai.OpenAI) -> None:
        answer = client.chat.completions.parse(
            model="fish", messages=MESSAGES, seed=1, max_tokens=200, response_format=Catch
        )
        assert isinstance(answer.choices[0].message.parsed, Catch)
        answer = client.chat.completions.create(
            model="fish", messages=MESSAGES, seed=1, max_tokens=60, response_format={"type": "json_object"}
        )
        content = answer.choices[0].message.content or ""
        assert content.lstrip().startswith("{")
        assert answer.choices[0].finish_reason == "length" or json.loads(content) is not None

    def test_a_required_tool_is_called_whole_and_streamed_and_its_result_goes_back(self, client: openai.OpenAI) -> None:
        tool: Any = openai.pydantic_function_tool(Catch, name="log_catch")
        fields: dict[str, Any] = {**CHAT, "max_tokens": 200, "tools": [tool]}
        for choice in ("required", {"type": "function", "function": {"name": "log_catch"}}):
            message = client.chat.completions.parse(**fields, tool_choice=choice).choices[0].message
            assert message.tool_calls
            (call,) = message.tool_calls
            assert call.function.name == "log_catch" and isinstance(call.function.parsed_arguments, Catch)
            with client.chat.completions.stream(**fields, tool_choice=choice) as stream:
                end = stream.get_final_completion().choices[0]
            assert end.finish_reason == "tool_calls" and end.message.tool_calls
            assert end.message.tool_calls[0].function.arguments == call.function.arguments
        message = client.chat.completions.create(**fields, tool_choice="required").choices[0].message
        (call,) = message.tool_calls or ()
        history = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "noted"}]
        answer = client.chat.completions.create(**{**CHAT, "messages": history}, tools=[tool], tool_choice="none")
        assert answer.choices[0].message.tool_calls is None
        assert answer.choices[0].message.content is not None

    def test_embeddings_are_the_model_s_own(self, service: Service, client: openai.OpenAI) -> None:
        answer = client.embeddings.create(model="fish", input=["the sea", "def f(x):"])  # asks for base64
        for item, text in zip(answer.data, ("the sea", "def f(x):"), strict=True):
            np.testing.assert_allclose(item.embedding, service.model.embed(text).numpy(), atol=1e-6)

    def test_raw_answers_have_the_request_id_and_the_depth(self, client: openai.OpenAI) -> None:
        raw = client.chat.completions.with_raw_response.create(
            **CHAT, extra_headers={"X-Request-Id": "mine-1"}, extra_body={"depth": "shallow"}
        )
        assert (raw.request_id, raw.headers["x-shoal-depth"]) == ("mine-1", "shallow")
        assert raw.parse().choices[0].message.content

    @pytest.mark.drill
    def test_it_waits_and_tries_again_when_the_server_is_full(self, service: Service) -> None:
        async def burst() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=8) as many:
                asked = [many.completions.create(**{**TEXT, "seed": i}, timeout=30) for i in range(24)]
                return await asyncio.gather(*asked)

        refused = service.stats()["requests_refused_total"]
        assert len(asyncio.run(burst())) == 24
        assert service.stats()["requests_refused_total"] > refused


RESPONSE: dict[str, Any] = {"model": "fish", "input": "How deep is the sea?", "max_output_tokens": 12, "temperature": 0}


class TestResponses:
    """The same package's newer API."""

    def test_whole_streamed_and_async_say_what_the_chat_does(self, service: Service, client: openai.OpenAI) -> None:
        chat = client.chat.completions.create(model="fish", messages=MESSAGES, max_tokens=12, temperature=0)
        whole = client.responses.create(**RESPONSE)
        events = list(client.responses.create(**RESPONSE, stream=True))
        pieces = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert events[-1].type == "response.incomplete"
        built = events[-1].response

        async def ask() -> str:
            async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0) as others:
                return (await others.responses.create(**RESPONSE)).output_text

        expected = chat.choices[0].message.content
        assert whole.output_text == "".join(pieces) == built.output_text == asyncio.run(ask()) == expected
        assert whole.usage is not None and chat.usage is not None and built.usage is not None
        assert whole.usage.output_tokens == built.usage.output_tokens == chat.usage.completion_tokens
        assert whole.usage.input_tokens == chat.usage.prompt_tokens
        assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"

    def test_every_answer_is_of_its_type_to_the_letter(self, client: openai.OpenAI) -> None:
        tool: Any = {"type": "function", "name": "log", "parameters": Catch.model_json_schema(), "strict": True}
        fields: dict[str, Any] = {**RESPONSE, "max_output_tokens": 200, "tools": [tool], "tool_choice": "required"}
        shaped: dict[str, Any] = {
            "text": {"format": {"type": "json_schema", "name": "x", "schema": Catch.model_json_schema()}}
        }
        answers = [client.responses.create(**RESPONSE, **shaped), client.responses.create(**fields)]
        for given in (RESPONSE, fields):
            answers += client.responses.create(**given, stream=True)
        for answer in answers:
            type(answer).model_validate(answer.model_dump(warnings="error", by_alias=True), strict=False)

    def test_parse_gives_the_object_of_a_schema(self, client: openai.OpenAI) -> None:
        fields: dict[str, Any] = {**RESPONSE, "max_output_tokens": 200}
        answer = client.responses.parse(**fields, text_format=Catch)
        assert isinstance(answer.output_parsed, Catch)
        with client.responses.stream(**fields, text_format=Catch) as stream:
            assert stream.get_final_response().output_parsed == answer.output_parsed

    def test_a_tool_is_called_and_its_result_goes_back(self, client: openai.OpenAI) -> None:
        tool: Any = openai.pydantic_function_tool(Catch, name="log_catch")["function"]
        fields: dict[str, Any] = {**RESPONSE, "max_output_tokens": 200, "tools": [{"type": "function", **tool}]}
        for choice in ("required", {"type": "function", "name": "log_catch"}):
            answer = client.responses.parse(**fields, tool_choice=choice)
            (call,) = answer.output
            assert call.type == "function_call"
            Catch.model_validate(call.parsed_arguments)
            with client.responses.stream(**fields, tool_choice=choice) as stream:
                (again,) = stream.get_final_response().output
            assert again.type == "function_call" and again.arguments == call.arguments
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "noted"}
        history: Any = [*MESSAGES, *(item.to_dict() for item in answer.output), result]
        for item in history:
            item.pop("parsed_arguments", None)  # the helper's own
        last = client.responses.create(**{**fields, "input": history, "max_output_tokens": 12}, tool_choice="none")
        assert last.output[0].type == "message"

    def test_a_stored_answer_is_gone_on_from_read_listed_and_deleted(self, client: openai.OpenAI) -> None:
        """With a real engine: what a chain is told and counted is what the whole talk is."""
        first = client.responses.create(**RESPONSE, store=True)
        second = client.responses.create(
            **{**RESPONSE, "input": "And wide?"}, previous_response_id=first.id, store=True
        )
        talk: Any = [*MESSAGES, *(item.to_dict() for item in first.output), {"role": "user", "content": "And wide?"}]
        whole = client.responses.create(**{**RESPONSE, "input": talk})
        assert second.output_text == whole.output_text and second.usage is not None and whole.usage is not None
        assert second.usage.input_tokens == whole.usage.input_tokens
        assert client.responses.retrieve(second.id).to_dict() == second.to_dict()
        *_, end = client.responses.create(**RESPONSE, previous_response_id=second.id, store=True, stream=True)
        assert end.type == "response.incomplete"
        last = end.response
        items = [*client.responses.input_items.list(last.id, limit=2, order="asc")]
        told = ["How deep is the sea?", first.output_text, "And wide?", second.output_text, "How deep is the sea?"]
        assert [item.content[0].text for item in items if item.type == "message"] == told  # type: ignore[union-attr]
        for answer in (client.responses.retrieve(last.id), *items):
            type(answer).model_validate(answer.model_dump(warnings="error", by_alias=True), strict=False)
        with pytest.raises(openai.BadRequestError, match="cannot cancel a synchronous response"):
            client.responses.cancel(last.id)
        client.responses.delete(first.id)
        with pytest.raises(openai.NotFoundError, match="no such response"):
            client.responses.retrieve(first.id)
        with pytest.raises(openai.BadRequestError, match="a response before it is stored no more"):
            client.responses.create(**RESPONSE, previous_response_id=second.id)


@pytest.fixture(scope="module")
def claude(service: Service) -> Any:
    module = package("anthropic")
    return module.Anthropic(base_url=service.url, api_key=KEY, max_retries=0, timeout=30)


GREEDY = {"extra_body": {"temperature": 0}}  # which this client knows no more
ASKED: dict[str, Any] = {"model": "fish", "max_tokens": 12, "messages": MESSAGES, **GREEDY}
LOG_CATCH = {"name": "log_catch", "description": "Logs one", "input_schema": Catch.model_json_schema()}


class TestAnthropic:
    def test_whole_streamed_and_async_say_what_the_chat_does(
        self, claude: Any, client: openai.OpenAI, service: Service
    ) -> None:
        chat = client.chat.completions.create(model="fish", messages=MESSAGES, max_tokens=12, temperature=0)
        (block,) = claude.messages.create(**ASKED).content
        with claude.messages.stream(**ASKED) as stream:
            pieces = list(stream.text_stream)
            built = stream.get_final_message()

        async def ask() -> str:
            module = package("anthropic")
            async with module.AsyncAnthropic(base_url=service.url, api_key=KEY, max_retries=0) as others:
                return (await others.messages.create(**ASKED)).content[0].text

        expected = chat.choices[0].message.content
        assert block.text == "".join(pieces) == built.content[0].text == asyncio.run(ask()) == expected
        assert chat.usage is not None
        assert built.usage.output_tokens == chat.usage.completion_tokens
        assert built.usage.input_tokens + built.usage.cache_read_input_tokens == chat.usage.prompt_tokens
        assert built.stop_reason == "max_tokens"

    def test_every_answer_is_of_its_type_to_the_letter(self, claude: Any) -> None:
        """As of the openai client's: pydantic checks what the client does not."""
        answers = [claude.messages.create(**ASKED), claude.messages.count_tokens(model="fish", messages=MESSAGES)]
        answers += claude.messages.create(**ASKED, stream=True)
        assert {answer.type for answer in answers[2:]} >= {"message_start", "content_block_delta", "message_stop"}
        for answer in answers:
            type(answer).model_validate(answer.model_dump(warnings="error"), strict=False)

    def test_a_prompt_is_counted_as_it_is_read(self, claude: Any) -> None:
        counted = claude.messages.count_tokens(model="fish", messages=MESSAGES, system="Be brief.", tools=[LOG_CATCH])
        usage = claude.messages.create(**ASKED, system="Be brief.", tools=[LOG_CATCH]).usage
        assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens

    def test_a_tool_is_called_and_its_result_goes_back(self, claude: Any) -> None:
        fields = {**ASKED, "max_tokens": 200, "tools": [LOG_CATCH]}
        for choice in ({"type": "any"}, {"type": "tool", "name": "log_catch"}):
            answer = claude.messages.create(**fields, tool_choice=choice)
            (call,) = answer.content
            assert (answer.stop_reason, call.type, call.name) == ("tool_use", "tool_use", "log_catch")
            Catch.model_validate(call.input)
            with claude.messages.stream(**fields, tool_choice=choice) as stream:
                assert stream.get_final_message().content[0].input == call.input
        result = {"type": "tool_result", "tool_use_id": call.id, "content": "noted"}
        history = [*MESSAGES, {"role": "assistant", "content": answer.content}, {"role": "user", "content": [result]}]
        last = claude.messages.create(**{**ASKED, "messages": history}, tools=[LOG_CATCH], tool_choice={"type": "none"})
        assert last.content[0].type == "text"

    def test_its_tool_runner_runs_a_tool_and_goes_on(self, claude: Any) -> None:
        """It asks for a thread of the server first, and goes on without one where that is refused as it knows it."""
        caught = []

        @package("anthropic").beta_tool
        def log_catch(kind: Literal["cod", "eel"]) -> str:
            """Logs one.

            Args:
                kind: of fish
            """
            caught.append(kind)
            return "noted"

        choice = {"type": "tool", "name": "log_catch"}
        asked = {**ASKED, "max_tokens": 200, "tools": [log_catch], "tool_choice": choice, "max_iterations": 2}
        turns = [message.stop_reason for message in claude.beta.messages.tool_runner(**asked)]
        assert turns == ["tool_use", "tool_use"] and {*caught} <= {"cod", "eel"} and caught

    def test_an_answer_goes_on_stops_and_follows_a_schema(self, claude: Any) -> None:
        free = claude.messages.create(**ASKED).content[0].text
        begun = {**ASKED, "messages": [*MESSAGES, {"role": "assistant", "content": free[:4]}]}
        assert free.startswith(free[:4] + claude.messages.create(**{**begun, "max_tokens": 2}).content[0].text[:1])
        stopped = claude.messages.create(**ASKED, stop_sequences=[free[5:8]])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", free[5:8])
        assert stopped.content[0].text == free[: free.index(free[5:8])]
        shaped = {"format": {"type": "json_schema", "schema": Catch.model_json_schema()}}
        answer = claude.messages.create(**{**ASKED, "max_tokens": 200}, output_config=shaped)
        Catch.model_validate_json(answer.content[0].text)

    def test_errors_keep_their_kind(self, claude: Any, service: Service) -> None:
        module = package("anthropic")
        with pytest.raises(module.AuthenticationError):
            module.Anthropic(base_url=service.url, api_key="wrong", max_retries=0).messages.create(**ASKED)
        with pytest.raises(module.NotFoundError):
            claude.messages.create(**{**ASKED, "model": "shark"})
        with pytest.raises(module.BadRequestError, match="temperature"):
            claude.messages.create(**{**ASKED, "extra_body": {"temperature": -1}})


@pytest.fixture(scope="module")
def chat(service: Service) -> Any:
    langchain = importlib.import_module("langchain_openai")
    return langchain.ChatOpenAI(
        model="fish", base_url=f"{service.url}/v1", api_key=KEY, max_tokens=12, seed=7, temperature=1, max_retries=0,
        stream_usage=True,
    )  # fmt: skip


@pytest.mark.drill
class TestLangchain:
    def test_invoke_and_stream_are_the_openai_client_s_answer(self, chat: Any, client: openai.OpenAI) -> None:
        expected = client.chat.completions.create(**CHAT, temperature=1)
        question = MESSAGES[0]["content"]

        async def ask() -> tuple[Any, Any]:
            pieces = [piece async for piece in chat.astream(question)]
            answer = await chat.ainvoke(question)
            await chat.root_async_client.close()  # once collected it would close itself, in the loop of another test
            return answer, sum(pieces[1:], pieces[0])

        pieces = list(chat.stream(question))
        for answer in (chat.invoke(question), sum(pieces[1:], pieces[0]), *asyncio.run(ask())):
            assert answer.content == expected.choices[0].message.content
            assert expected.usage is not None
            assert answer.usage_metadata["output_tokens"] == expected.usage.completion_tokens
            assert answer.response_metadata["finish_reason"] == expected.choices[0].finish_reason

    def test_structured_output_tools_and_depth(self, chat: Any) -> None:
        long = chat.model_copy(update={"max_tokens": 250})
        for method in ("json_schema", "function_calling"):
            assert isinstance(long.with_structured_output(Catch, method=method).invoke("what was caught?"), Catch)
        answer = long.bind_tools([Catch], tool_choice="required").invoke("log the catch")
        (call,) = answer.tool_calls
        assert call["name"] == "Catch" and Catch(**call["args"])
        deep = chat.bind(extra_body={"depth": "shallow"}).invoke("hello")
        assert deep.response_metadata["token_usage"]["depth"] == "shallow"

    def test_embeddings_and_plain_completions(self, service: Service) -> None:
        langchain = importlib.import_module("langchain_openai")
        at: dict[str, Any] = {"model": "fish", "base_url": f"{service.url}/v1", "api_key": KEY}
        vector = langchain.OpenAIEmbeddings(**at, check_embedding_ctx_length=False).embed_query("the sea")
        np.testing.assert_allclose(vector, service.model.embed("the sea").numpy(), atol=1e-6)
        assert langchain.OpenAI(**at, max_tokens=5).invoke("the sea")


@pytest.fixture(scope="module")
def litellm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the internet for prices
        yield package("litellm")


@pytest.mark.drill
class TestLitellm:
    def test_whole_streamed_and_async(self, litellm: Any, service: Service, client: openai.OpenAI) -> None:
        expected = client.chat.completions.create(**CHAT).choices[0].message.content
        at = {**CHAT, "model": "openai/fish", "api_base": f"{service.url}/v1", "api_key": KEY}
        assert litellm.completion(**at).choices[0].message.content == expected
        pieces = list(litellm.completion(**at, stream=True))
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected
        assert pieces[-1].choices[0].finish_reason in ("stop", "length")

        async def ask() -> tuple[str, str]:
            whole = await litellm.acompletion(**at)
            stream = await litellm.acompletion(**at, stream=True)
            pieces = [piece.choices[0].delta.content or "" async for piece in stream]
            await litellm.close_litellm_async_clients()  # as above
            return whole.choices[0].message.content, "".join(pieces)

        assert asyncio.run(ask()) == (expected, expected)

    def test_completions_embeddings_and_depth(self, litellm: Any, service: Service, client: openai.OpenAI) -> None:
        at: dict[str, Any] = {"api_base": f"{service.url}/v1", "api_key": KEY}
        text = litellm.text_completion(**{**TEXT, "model": "text-completion-openai/fish"}, **at).choices[0].text
        assert text == client.completions.create(**TEXT).choices[0].text
        vector = litellm.embedding(model="openai/fish", input=["the sea"], encoding_format="float", **at).data[0]
        np.testing.assert_allclose(vector["embedding"], service.model.embed("the sea").numpy(), atol=1e-6)
        answer = litellm.completion(**{**CHAT, "model": "openai/fish"}, **at, extra_body={"depth": "shallow"})
        assert answer.usage.depth == "shallow"

    def test_errors_keep_their_kind(self, litellm: Any, service: Service) -> None:
        at: dict[str, Any] = {"model": "openai/fish", "messages": MESSAGES, "api_base": f"{service.url}/v1"}
        with pytest.raises(litellm.AuthenticationError):
            litellm.completion(**at, api_key="wrong")
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**at, api_key=KEY, max_tokens=9999)


@pytest.fixture(scope="module")
def lm(service: Service, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(tmp_path_factory.mktemp("hub")))  # it reads these when it is imported
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OPENAI_API_KEY", KEY)
        package("lm_eval")
        models = importlib.import_module("lm_eval.models.openai_completions")
        yield models.LocalCompletionsAPI(
            model="fish", base_url=f"{service.url}/v1/completions", auth_token=KEY, batch_size=2, max_gen_toks=8,
            max_length=service.model.config.context,
        )  # fmt: skip


class TestLmEval:
    """``lm_eval --model local-completions``, which is as exact as the service: its numbers are the model's own."""

    def requests(self, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
        instance = importlib.import_module("lm_eval.api.instance").Instance
        return [instance(kind, {}, given, number) for number, given in enumerate(arguments)]

    def test_log_likelihoods_are_the_model_s(self, lm: Any, service: Service) -> None:
        assert lm.tokenizer_backend == "remote"  # it found /tokenizer_info, /tokenize and /detokenize by itself
        assert lm.prefix_token_id == END_ID
        model = service.model
        pairs = [("the deep", " sea"), ("def f(x):", " return x"), ("Grüße", " 😀!"), ("", "sea")]
        told = lm.loglikelihood(self.requests("loglikelihood", *pairs))
        for (context, answer), (total, greedy) in zip(pairs, told, strict=True):
            before = model.tokenizer.encode(context) or [END_ID]
            expected, likeliest = scored(model, before, model.tokenizer.encode(answer))
            assert (total, greedy) == (pytest.approx(expected, abs=1e-3), likeliest)
        greedy_text = model.generate_naive(model.tokenizer.encode("the deep"), 3)
        sure = ("the deep", model.tokenizer.decode(greedy_text))
        if model.tokenizer.encode(sure[1]) == greedy_text:  # not half a character
            ((_, greedy),) = lm.loglikelihood(self.requests("loglikelihood", sure))
            assert greedy

    def test_rolling_and_generation(self, lm: Any, service: Service) -> None:
        model = service.model
        ids = model.tokenizer.encode("The sea is deep. " * 3)
        (rolled,) = lm.loglikelihood_rolling(self.requests("loglikelihood_rolling", ("The sea is deep. " * 3,)))
        assert rolled == pytest.approx(scored(model, [END_ID], ids)[0], abs=1e-3)
        (text,) = lm.generate_until(
            self.requests("generate_until", ("the sea", {"until": ["\n\n"], "max_gen_toks": 8}))
        )
        assert (
            text == model.tokenizer.decode(model.generate_naive(model.tokenizer.encode("the sea"), 8)).split("\n\n")[0]
        )

    @pytest.mark.drill
    def test_a_task_is_evaluated_from_end_to_end(self, lm: Any, tmp_path: Path) -> None:
        rows = [{"text": f"{a} and {b} are", "word": " fish"} for a, b in (("cod", "eel"), ("tuna", "shark"))]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "task": "fishes", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
            "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{text}}", "doc_to_target": "{{word}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        }  # fmt: skip
        evaluated = importlib.import_module("lm_eval").simple_evaluate(lm, tasks=[task], bootstrap_iters=0)
        found = evaluated["results"]["fishes"]
        assert found["perplexity,none"] > 1 and 0 <= found["acc,none"] <= 1


def scored(model: Model, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """Log-probability, in nats, of `answer` after `context`, and whether it is what greedy decoding would say."""
    logits = model.logits([context + answer])[0].double()
    logits[:, model.forbidden()] = -torch.inf  # control tokens, which no answer holds
    rows = logits[len(context) - 1 : -1].log_softmax(-1)
    chosen = rows[range(len(answer)), answer]
    return float(chosen.sum()), bool((rows.argmax(-1).tolist()) == answer)


@pytest.mark.drill
class TestAgents:
    """OpenAI's Agents SDK, over the Responses API, which is its default, and over chats."""

    @pytest.fixture(params=["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
    def agent(self, request: pytest.FixtureRequest, service: Service) -> Any:
        """``agent(**settings)`` -> (an agent, its client, which is to be closed in the loop that used it)."""
        agents = package("agents")
        agents.set_tracing_disabled(True)

        def make(**given: Any) -> tuple[Any, Any]:
            others = openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=0, timeout=30)
            model = getattr(agents, request.param)("fish", others)
            settings = agents.ModelSettings(temperature=0, max_tokens=given.pop("tokens", 200), **given.pop("more", {}))
            return agents.Agent(
                "sailor", instructions="Be brief.", model=model, model_settings=settings, **given
            ), others

        return make

    def run(self, made: tuple[Any, Any], turns: int = 3) -> Any:
        async def ask() -> Any:
            async with made[1]:
                return await package("agents").Runner.run(made[0], MESSAGES[0]["content"], max_turns=turns)

        return asyncio.run(ask())

    def test_it_answers_whole_and_streamed_and_by_a_schema(self, agent: Any, client: openai.OpenAI) -> None:
        system = {"role": "system", "content": "Be brief."}
        asked: list[Any] = [system, *MESSAGES]
        chat = client.chat.completions.create(model="fish", messages=asked, max_tokens=12, temperature=0)
        expected = chat.choices[0].message.content
        made = agent(tokens=12)
        # by Responses an answer that its length cuts off is an error to the client
        if "Responses" in type(made[0].model).__name__:
            with pytest.raises(package("agents").exceptions.ModelBehaviorError, match="max_output_tokens"):
                self.run(made)
        else:
            assert self.run(made).final_output == expected

        async def streamed() -> Any:
            made, others = agent(output_type=Catch)
            async with others:
                result = package("agents").Runner.run_streamed(made, MESSAGES[0]["content"])
                async for _ in result.stream_events():
                    pass
            return result.final_output

        whole = self.run(agent(output_type=Catch)).final_output
        assert isinstance(whole, Catch) and asyncio.run(streamed()) == whole

    def test_a_tool_is_run_and_what_it_gives_goes_back(self, agent: Any) -> None:
        caught: list[Catch] = []

        def log_catch(fish: Literal["cod", "eel"], deep: bool) -> str:
            """Logs one."""
            caught.append(Catch(fish=fish, deep=deep))
            return "noted"

        tool = package("agents").function_tool(log_catch)
        more = {"tool_choice": "required"}
        made = agent(tools=[tool], more=more, tool_use_behavior="stop_on_first_tool", tokens=100)
        assert self.run(made).final_output == "noted"
        result = self.run(agent(tools=[tool], more=more, tokens=100, output_type=Catch))
        kinds = [type(item).__name__ for item in result.new_items]
        assert kinds[:2] == ["ToolCallItem", "ToolCallOutputItem"] and len(caught) == 2
        assert isinstance(result.final_output, Catch)

    @pytest.mark.parametrize("agent", ["OpenAIResponsesModel"], indirect=True)
    def test_turns_go_on_from_stored_answers_as_from_the_whole_talk(self, agent: Any) -> None:
        """Each turn sends what is new in it, the result of a tool too; the prompt is that of who sends all."""

        def log_catch(fish: Literal["cod", "eel"], deep: bool) -> str:
            """Logs one."""
            return "noted"

        def talk(**chained: Any) -> list[tuple[Any, int]]:
            run = package("agents").Runner.run
            tool = package("agents").function_tool(log_catch)
            more = {"tool_choice": "required", "store": bool(chained)}
            made, others = agent(tools=[tool], more=more, tokens=100, output_type=Catch)

            async def turns() -> list[Any]:
                async with others:
                    one = await run(made, "A cod?", max_turns=3, **chained)
                    if chained:
                        return [one, await run(made, "An eel?", previous_response_id=one.last_response_id)]
                    asked = [*one.to_input_list(), {"role": "user", "content": "An eel?"}]
                    return [one, await run(made, asked, max_turns=3)]

            return [(turn.final_output, turn.context_wrapper.usage.input_tokens) for turn in asyncio.run(turns())]

        assert talk(auto_previous_response_id=True) == talk()


@pytest.mark.drill
class TestPydanticAi:
    @pytest.fixture
    def agent(self, service: Service) -> Any:
        ai = package("pydantic_ai")
        models = importlib.import_module("pydantic_ai.models.openai")
        providers = importlib.import_module("pydantic_ai.providers.openai")

        def make(**given: Any) -> Any:
            provider = providers.OpenAIProvider(base_url=f"{service.url}/v1", api_key=KEY)
            settings = {"temperature": 0, "max_tokens": given.pop("tokens", 200)}
            return ai.Agent(models.OpenAIChatModel("fish", provider=provider), model_settings=settings, **given)

        return make

    def test_it_answers_and_gives_objects(self, agent: Any, client: openai.OpenAI) -> None:
        ai = package("pydantic_ai")
        question = MESSAGES[0]["content"]
        expected = client.chat.completions.create(model="fish", messages=MESSAGES, max_tokens=12, temperature=0)

        async def ask() -> tuple[Any, str, list[Any]]:
            whole = (await agent(tokens=12).run(question)).output
            async with agent(tokens=12).run_stream(question) as stream:
                streamed = await stream.get_output()
            kinds = (ai.ToolOutput(Catch), ai.NativeOutput(Catch))
            return whole, streamed, [(await agent(output_type=kind).run(question)).output for kind in kinds]

        whole, streamed, objects = asyncio.run(ask())
        assert whole == streamed == expected.choices[0].message.content
        assert all(isinstance(each, Catch) for each in objects) and len(objects) == 2


@pytest.mark.drill
def test_guidellm_measures_every_request(service: Service, tmp_path: Path) -> None:
    """It asks for the usage in each chunk of a stream, and counts tokens by it. Answers end at 8 tokens and not before: drawn
    of a random model, one in 200 has no word, and what has neither word nor token it counts as an error."""
    service.until_idle()  # what a test before has left would fill the queue
    command, data, out = guidellm(), tmp_path / "data.jsonl", tmp_path / "out.json"
    data.write_text("".join(json.dumps({"prompt": f"How deep is sea {number}?"}) + "\n" for number in range(4)))
    backend = f"kind=openai_http,target={service.url},model=fish,api_key={KEY},max_tokens=8,extras.body.ignore_eos=true"
    words = [command, "run", "--backend", backend, "--profile", "kind=concurrent,streams=2"]
    words += ["--constraint", "kind=max_requests,count=4", "--data", f"kind=json_file,path={data}"]
    words += ["--output", f"kind=json,path={out}", "--disable-console"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=170, env=env, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (told,) = json.loads(out.read_text())["benchmarks"]
    wrong = [request["info"] for kind in ("errored", "incomplete") for request in told["requests"][kind]]
    assert told["metrics"]["request_totals"] == {"successful": 4, "errored": 0, "incomplete": 0, "total": 4}, wrong
    for request in told["requests"]["successful"]:
        assert (
            '"continuous_usage_stats":true' in request["request_args"]
            and '"ignore_eos":true' in request["request_args"]
        )
        assert request["output_metrics"]["text_tokens"] == 8
