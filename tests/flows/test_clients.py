"""The clients that people have, against the running service: the official openai package, langchain, litellm, lm-eval."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
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
from tests.flows.conftest import KEY, Service, running

MESSAGES: list[Any] = [{"role": "user", "content": "How deep is the sea?"}]
CHAT: dict[str, Any] = {"model": "fish", "messages": MESSAGES, "seed": 7, "max_tokens": 12}
TEXT: dict[str, Any] = {"model": "fish", "prompt": "the sea", "seed": 7, "max_tokens": 12}


class Catch(BaseModel):
    """Something that a random model can write to the end: no text, and nothing beside these."""

    model_config = ConfigDict(extra="forbid")
    fish: Literal["cod", "eel"]
    deep: bool


def package(name: str) -> Any:
    """A client of the extra `clients`; the test is skipped where that is not installed, but never in CI."""
    if "CI_CLIENTS_REQUIRED" in os.environ:
        return importlib.import_module(name)
    return pytest.importorskip(name, reason="`make clients` installs it")


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

    def test_it_waits_and_tries_again_when_the_server_is_full(self, service: Service) -> None:
        async def burst() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key=KEY, max_retries=8) as many:
                asked = [many.completions.create(**{**TEXT, "seed": i}, timeout=30) for i in range(24)]
                return await asyncio.gather(*asked)

        refused = service.stats()["requests_refused_total"]
        assert len(asyncio.run(burst())) == 24
        assert service.stats()["requests_refused_total"] > refused


@pytest.fixture(scope="module")
def chat(service: Service) -> Any:
    langchain = importlib.import_module("langchain_openai")
    return langchain.ChatOpenAI(
        model="fish", base_url=f"{service.url}/v1", api_key=KEY, max_tokens=12, seed=7, temperature=1, max_retries=0,
        stream_usage=True,
    )  # fmt: skip


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
