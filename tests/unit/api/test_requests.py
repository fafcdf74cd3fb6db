"""A body as engine requests, to the last of what is allowed; and what several choices are counted as."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from shoal.api.answers import Answer, Choice, measured
from shoal.api.bodies import ChatRequest, CompletionRequest, EmbeddingRequest
from shoal.api.calls import Plain
from shoal.api.limits import Limits
from shoal.api.noticed import Noticed
from shoal.api.policy import Policy
from shoal.api.requests import EngineCall, chat_call, completion_call, derived_seed, embedding_ids
from shoal.api.served import ServedModel
from shoal.engine.events import Finished, Guide, Request, Token
from shoal.errors import ContextLengthError, RequestError
from shoal.inputs.chat import Encoded

LIMITS = Limits()
SAID = [{"role": "user", "content": "hi"}]
MANY: dict[str, tuple[Any, Any]] = {  # field: as much as may be, and more
    "n": (64, 65),
    "stop": (["x"] * 16, ["x"] * 17),
    "stop_token_ids": ([80] * 1024, [80] * 1025),
    "bad_words": (["x"] * 128, ["x"] * 129),
    "logit_bias": ({"80": 100, "0" * 18 + "81": -100}, {"80": 100.5}),
}
LONG: dict[str, tuple[Any, Any]] = {
    "stop": (["y", "x" * 1024], ["y", "x" * 1025]),
    "bad_words": (["y", "x" * 1024], ["y", "x" * 1025]),
    "logit_bias": ({"0" * 18 + "80": 1}, {"0" * 19 + "80": 1}),
}


@pytest.mark.parametrize(("name", "values"), [*MANY.items(), *LONG.items()])
def test_as_much_is_taken_as_may_be_and_no_more(served: ServedModel, name: str, values: tuple[Any, Any]) -> None:
    def call(value: Any) -> EngineCall:
        body = CompletionRequest.model_validate({"model": "fish", "prompt": "ab", "max_tokens": 2, name: value})
        return completion_call(body, served, LIMITS)

    assert len(call(values[0]).requests) == (64 if name == "n" else 1)
    with pytest.raises(RequestError) as caught:
        call(values[1])
    assert caught.value.param == name


def test_a_bias_reaches_the_engine_by_its_token(served: ServedModel) -> None:
    body = {"model": "fish", "prompt": "ab", "logit_bias": {"80": 100, "081": -100}}
    (request,) = completion_call(CompletionRequest.model_validate(body), served, LIMITS).requests
    assert request.sampling.logit_bias == {80: 100, 81: -100}
    for bias in (100.5, -100.5):
        body["logit_bias"] = {"80": bias}
        with pytest.raises(
            RequestError, match=rf"^logit_bias: got {{'80': {bias}}}; allowed: token id -> number from -100"
        ):
            completion_call(CompletionRequest.model_validate(body), served, LIMITS)


@pytest.mark.parametrize(("prompts", "n", "fits"), [(16, 4, True), (13, 5, False), (65, 1, False), (64, 1, True)])
def test_prompts_times_choices_are_bounded(served: ServedModel, prompts: int, n: int, fits: bool) -> None:
    body = CompletionRequest.model_validate({"model": "fish", "prompt": ["ab"] * prompts, "n": n, "max_tokens": 1})
    if fits:
        assert len(completion_call(body, served, LIMITS).requests) == prompts * n
        return
    with pytest.raises(RequestError) as caught:
        completion_call(body, served, LIMITS)
    assert caught.value.param == "prompt" and f"got {prompts * n}" in caught.value.message


def test_inputs_are_bounded_in_number_and_length(served: ServedModel) -> None:
    context = served.config.context

    def ids(inputs: list[list[int]], most: int = 3) -> list[list[int]]:
        body = EmbeddingRequest.model_validate({"model": "fish", "input": inputs})
        return embedding_ids(body, served, Limits(inputs=most))

    whole = [[70], [80] * context, [90]]
    assert ids(whole) == whole
    with pytest.raises(RequestError, match=r"too many input.*got 3; allowed: at most 2"):
        ids(whole, 2)
    with pytest.raises(ContextLengthError, match=rf"got {context + 1}"):
        ids([[70], [80] * (context + 1)])


def test_the_first_choice_has_the_seed_itself_and_each_other_one_of_its_own() -> None:
    assert derived_seed(None, 0) is None and derived_seed(None, 3) is None
    assert [derived_seed(seed, 0) for seed in (0, 5, 2**63 - 1, 2**63, -1)] == [0, 5, 2**63 - 1, 0, 2**63 - 1]
    for seed, choice in ((5, 1), (5, 2), (6, 1)):
        digest = hashlib.sha256(f"{seed}:{choice}".encode()).hexdigest()
        assert derived_seed(seed, choice) == int(digest[:16], 16) // 2 < 2**63


def test_a_chat_asks_for_what_its_body_says(served: ServedModel) -> None:
    def call(**fields: Any) -> EngineCall:
        body = {"model": "fish", "messages": SAID, **fields}
        return chat_call(ChatRequest.model_validate(body), served, LIMITS)

    plain = call()
    (request,) = plain.requests
    assert (plain.n, plain.echo, plain.silent, plain.guided_by, plain.offered, plain.unused) == (
        1, [""], False, "guided", (), (),
    )  # fmt: skip
    assert (plain.token_ids, plain.prompt_logprobs) == (False, False)
    assert (request.depth, request.deadline, request.sampling.logprobs, request.sampling.guided) == (
        "auto",
        600.0,
        None,
        None,
    )
    assert isinstance(request.prompt, Encoded)
    assert request.sampling.max_tokens == served.config.context - len(request.prompt.ids)
    assert call(logprobs=True).requests[0].sampling.logprobs == 0
    assert call(logprobs=True, top_logprobs=3).requests[0].sampling.logprobs == 3
    with pytest.raises(RequestError, match=r"^top_logprobs: set logprobs to true as well"):
        call(top_logprobs=3)
    assert call(top_k=-1).requests[0].sampling.top_k == 0 and call(top_k=1).requests[0].sampling.top_k == 1
    asked = call(response_format={"type": "json_object"}, return_token_ids=True, prompt_logprobs=2)
    assert (asked.guided_by, asked.token_ids, asked.prompt_logprobs) == ("response_format", True, True)
    assert asked.requests[0].sampling.guided == Guide("json_object") and asked.requests[0].sampling.prompt_logprobs == 2
    assert call(response_format={"type": "text"}).requests[0].sampling.guided is None
    for outputs, guide in (
        ({"regex": "a+"}, Guide("regex", "a+")),
        ({"choice": ["a", "b"]}, Guide("choice", ["a", "b"])),
        ({"json": {}}, Guide("json_schema", "{}")),
        ({"json_object": True}, Guide("json_object")),
    ):
        found = call(structured_outputs=outputs)
        assert (found.requests[0].sampling.guided, found.guided_by) == (guide, "structured_outputs")
    for outputs in ({}, {"regex": "a", "choice": ["a"]}):
        with pytest.raises(RequestError, match="structured_outputs: allowed: one of json, regex, choice, json_object"):
            call(structured_outputs=outputs)
    for format_ in ({"type": "json_schema"}, {"type": "text", "json_schema": {"name": "a", "schema": {}}}):
        with pytest.raises(RequestError, match=r"response_format\.json_schema: give it with type json_schema"):
            call(response_format=format_)
    told = call(
        response_format={"type": "json_schema", "json_schema": {"name": "a", "description": "Odd!", "schema": {}}}
    )
    assert isinstance(told.requests[0].prompt, Encoded)
    assert "The answer is JSON, a: Odd!" in served.tokenizer.decode(told.requests[0].prompt.ids)


def test_a_prompt_of_several_choices_is_counted_once(served: ServedModel) -> None:
    body = CompletionRequest.model_validate({"model": "fish", "prompt": ["abc", "abcd"], "n": 2, "max_tokens": 1})
    call = completion_call(body, served, LIMITS)
    assert (call.prompt_tokens, call.n, call.echo) == (7, 2, [""] * 4)
    for prompt, texts in ((["ab", "c"], ["ab", "ab", "c", "c"]), ([[80, 81]], [served.tokenizer.decode([80, 81])] * 2)):
        told = {"model": "fish", "prompt": prompt, "n": 2, "echo": True, "max_tokens": 0}
        call = completion_call(CompletionRequest.model_validate(told), served, LIMITS)
        assert call.silent and call.echo == texts
        assert {request.sampling.max_tokens for request in call.requests} == {1}


def test_the_choices_of_one_answer_have_seeds_of_their_own_and_a_name_together(served: ServedModel) -> None:
    def requests(n: int, prompts: int) -> list[Request]:
        told = {"model": "fish", "prompt": ["ab"] * prompts, "n": n, "seed": 5, "max_tokens": 1}
        return completion_call(CompletionRequest.model_validate(told), served, LIMITS).requests

    for n, prompts in ((2, 1), (1, 2), (3, 2)):
        asked = requests(n, prompts)
        assert [request.sampling.seed for request in asked] == [
            derived_seed(5, choice) for choice in range(n)
        ] * prompts
        assert len({request.beside for request in asked}) == 1 and len(asked[0].beside) == 32
    (alone,) = requests(1, 1)
    assert (alone.sampling.seed, alone.beside) == (5, "")


class Told(Answer):
    """An answer of which nobody asks for a form."""

    def chunks(self, events: Any) -> Any:
        raise NotImplementedError

    def _whole(self) -> dict[str, Any]:
        return {"usage": self.usage()}


def answer(served: ServedModel, n: int, prompts: int = 1, tolerance: float | None = None, silent: bool = False) -> Told:
    requests = [Request(Encoded([70, 71, 72]), quality_tolerance=tolerance) for _ in range(n * prompts)]
    return Told(EngineCall(requests, n, [""] * len(requests), silent=silent), served)


def end(tokens: int, **more: Any) -> Finished:
    return Finished("x", "stop", completion_tokens=tokens, **more)


def test_what_was_cached_is_told_at_the_ends_of_all_prompts(served: ServedModel) -> None:
    found = answer(served, n=2, prompts=2)
    found.choices[0].take(end(5, depth=4, cached_tokens=1))
    assert "prompt_tokens_details" not in found.usage()
    found.choices[2].take(end(0, depth=1, cached_tokens=2))
    assert found.usage() == {
        "prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11, "depth": "shallow,full",
        "prompt_tokens_details": {"cached_tokens": 3},
    }  # fmt: skip
    found = answer(served, n=1, silent=True)
    found.choices[0].take(end(1, depth=2))
    assert (found.usage()["completion_tokens"], found.usage()["total_tokens"]) == (0, 3), (
        "it was made to run the prompt"
    )


def test_what_a_tolerance_cost_is_told_a_token_and_where_it_was_measured(served: ServedModel) -> None:
    assert "quality" not in answer(served, 1).usage()
    found = answer(served, n=2, tolerance=0.0)
    assert found.usage()["quality"] == {"spent": None, "allowed": 0.0}, "nobody has looked yet"
    found = answer(served, n=2, tolerance=0.5)
    found.choices[0].take(Token("x", 80, "a", depth=4, spent=0.75))
    assert found.usage()["quality"] == {"spent": None, "allowed": 0.5}
    found.choices[1].take(Token("x", 80, "a", depth=4, spent=0.0))
    assert found.usage()["quality"] == {"spent": 0.375, "allowed": 0.5} and "mean_depth" not in found.usage()
    found.choices[0].take(end(3, depth=4, spent=0.75, mean_depth=2.0))
    assert "mean_depth" not in found.usage()
    found.choices[1].take(end(0, depth=4, spent=0.0, mean_depth=4.0))
    usage = found.usage()
    assert usage["quality"] == {"spent": 0.25, "allowed": 0.5}
    assert usage["mean_depth"] == (3 * 2.0 + 1 * 4.0) / 4, "an end took its time, too"
    assert measured(usage) == {"mean_depth": 2.5, "quality": usage["quality"]}
    found.choices[1].finished = end(0, depth=4)  # where no engine counts layers
    assert "mean_depth" not in found.usage()


def test_a_depth_is_known_at_once_where_it_was_asked_for(served: ServedModel) -> None:
    for asked, early in ((1, "shallow"), ("full", "full"), ("auto", None)):
        call = EngineCall([Request(Encoded([70]), depth=asked)], 1, [""])
        found = Told(call, served)
        assert found.early_depth() == early and found.depth() == "" and found.served is served
        found.choices[0].take(Token("x", 80, "a", depth=2))
        assert found.early_depth() == (early or "middle") and found.depth() == "middle"


@pytest.mark.anyio
async def test_an_answer_is_stored_once_when_all_of_it_has_come(served: ServedModel) -> None:
    kept: list[Answer] = []

    async def store(given: Answer) -> bool:
        kept.append(given)
        return True

    found = answer(served, n=2)
    await found.ended()
    found.store = store
    found.choices[0].take(end(1))
    await found.ended()
    assert kept == [] and not found.stored
    found.choices[1].take(end(1))
    for _ in range(2):
        await found.ended()
    assert kept == [found] and found.stored
    assert found.complete() == {"usage": found.usage()} and found.failed({"error": 1}) == b'data: {"error":1}\n\n'


def test_calls_come_in_pieces(served: ServedModel) -> None:
    class Pieces:
        calls, cut = True, False

        def __init__(self) -> None:
            self.left = [
                [{"content": "a", "tool_calls": [{"index": 0, "id": "c", "type": "function",
                                                  "function": {"name": "f", "arguments": "{"}}]}],
                [{"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}, {"content": "b"}],
            ]  # fmt: skip

        def push(self, text: str) -> list[Any]:
            return self.left.pop(0) if self.left else []

        def finish(self, *, whole: bool) -> list[Any]:
            return [{"content": str(whole)}]

    for reason, told, whole in (("stop", "tool_calls", "True"), ("length", "length", "False")):
        choice = Choice(Pieces(), False, served.tokenizer.stream())  # type: ignore[arg-type]
        for text in "xy":
            choice.take(Token("x", 80, text))
        choice.take(Finished("x", reason))  # type: ignore[arg-type]
        assert (choice.text, choice.content, choice.reason) == ("xy", f"ab{whole}", told)
        assert choice.calls == [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def test_calls_are_valid_where_each_names_a_tool_with_an_object_and_no_other_was_begun(served: ServedModel) -> None:
    class Begun(Plain):
        opens = "<call>"

    def call(name: str, arguments: str) -> dict[str, Any]:
        return {"function": {"name": name, "arguments": arguments}}

    def valid(
        *calls: list[dict[str, Any]], texts: Sequence[str] = ("", ""), offered: tuple[str, ...] = ("f", "g")
    ) -> Any:
        requests = [Request(Encoded([70])) for _ in calls]
        found = Told(EngineCall(requests, 2, ["", ""], offered=offered, reader=Begun), served)
        for choice, some, text in zip(found.choices, calls, texts, strict=True):
            choice.calls, choice.content = some, text
        return found.calls_valid()

    good, other = call("f", "{}"), call("g", '{"a": [1]}')
    assert valid([], []) is None and valid([], [], texts=("yes", "no")) is None, "there is none"
    assert valid([good], []) is valid([other], [good, other]) is valid([good], [], texts=("a", "b")) is True
    for bad in (call("h", "{}"), call("f", "[]"), call("f", "{"), call("f", '{"a":' * 100_000)):
        assert valid([good], [bad]) is valid([bad, good], []) is valid([], [bad]) is False
    for texts in (("a <call>", ""), ("", "<call> b"), ("<call>", "<call>")):
        assert valid([], [], texts=texts) is valid([good], [good], texts=texts) is False
        assert valid([good], [], texts=texts, offered=()) is None, "nothing was offered"


def test_the_layers_of_an_answer_are_told_where_a_choice_went_deeper(served: ServedModel) -> None:
    """Both choices are at full depth, one by a second look: the mean is of both. Without one no layers are told."""
    for first, told in ((4, False), (0, False), (2, True)):
        found = answer(served, n=2)
        found.choices[0].take(end(3, depth=4, first_depth=first, mean_depth=3.0))
        assert "mean_depth" not in found.usage()
        found.choices[1].take(end(1, depth=4, first_depth=4, mean_depth=4.0))
        assert found.usage().get("mean_depth") == (3.25 if told else None)


@pytest.mark.anyio
async def test_a_whole_answer_has_every_event_and_is_stored_before_it_is_told(served: ServedModel) -> None:
    kept, closed = list[Answer](), list[bool]()

    async def events() -> AsyncGenerator[tuple[int, list[Any]]]:
        try:
            yield 0, [Token("x", 80, "a", depth=4), Token("x", 81, "b", depth=4)]
            yield 1, [end(1, depth=4)]
            yield 0, [end(2, depth=4)]
        finally:
            closed.append(True)

    async def store(given: Answer) -> bool:
        kept.append(given)
        return True

    found = answer(served, n=2)
    found.store = store
    whole = await found.whole(events())  # type: ignore[arg-type]
    assert whole == {"usage": found.usage()} and whole["usage"]["completion_tokens"] == 3
    assert (kept, closed, found.stored) == ([found], [True], True)
    assert [(choice.text, choice.tokens) for choice in found.choices] == [("ab", [80, 81]), ("", [])]


def test_at_the_depth_that_was_asked_for_nothing_is_lost_and_at_full_depth_where_none_was(served: ServedModel) -> None:
    for asked, depth, lost in ((1, 1, 0.0), (1, 4, None), ("auto", 4, 0.0), ("auto", 1, None), ("full", 4, 0.0)):
        found = Told(EngineCall([Request(Encoded([70]), depth=asked)], 1, [""]), served)
        found.choices[0].take(Token("x", 80, "a", depth=depth))
        assert found.choices[0].spent == lost
    empty = answer(served, n=1, tolerance=0.5)
    empty.choices[0].take(end(0, depth=4))
    assert empty.usage()["quality"] == {"spent": 0.0, "allowed": 0.5}


def test_a_depth_of_several_choices_is_known_when_each_has_begun(served: ServedModel) -> None:
    found = Told(EngineCall([Request(Encoded([70]), depth="auto")] * 2, 2, ["", ""]), served)
    found.choices[0].take(Token("x", 80, "a", depth=2))
    assert found.early_depth() is None and found.depth() == "middle"
    found.choices[1].take(Token("x", 80, "a", depth=1))
    assert found.early_depth() == found.depth() == "shallow,middle"


def test_who_reads_a_choice_is_of_its_prompt(served: ServedModel) -> None:
    class First(Plain):
        pass

    requests = [Request(Encoded([70]))] * 4
    call = EngineCall(requests, 2, [""] * 4, readers=(First, Plain))
    assert [type(call.read_by(choice)) for choice in range(4)] == [First, First, Plain, Plain]
    assert type(EngineCall(requests, 2, [""] * 4, reader=First).read_by(3)) is First


def test_a_notice_is_read_to_each_prompt_but_to_none_of_which_nothing_is_shown(served: ServedModel) -> None:
    minded = replace(served, policy=Policy({"en": "Mind."}))

    def readers(model: ServedModel, **fields: Any) -> int:
        body = {"model": "fish", "prompt": ["ab", "c"], "max_tokens": 2, **fields}
        return len(completion_call(CompletionRequest.model_validate(body), model, LIMITS).readers)

    assert (readers(minded), readers(served)) == (2, 0)
    assert readers(minded, echo=True) == 2 and readers(minded, echo=True, max_tokens=0) == 0


def test_a_notice_is_put_into_an_answer_that_is_an_object_and_before_one_that_is_a_call_or_text(
    served: ServedModel,
) -> None:
    minded = replace(served, policy=Policy({"en": "Mind."}))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}

    def whole(**fields: Any) -> bool:
        body = {"model": "fish", "messages": SAID, **fields}
        reader = chat_call(ChatRequest.model_validate(body), minded, LIMITS).reader()
        assert isinstance(reader, Noticed)
        return reader._whole

    assert not whole() and whole(response_format={"type": "json_object"}) and whole(structured_outputs={"json": {}})
    assert not whole(structured_outputs={"regex": "a+"})
    assert not whole(tools=[tool]) and not whole(tools=[tool], tool_choice="required")
