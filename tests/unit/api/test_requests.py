"""A body as engine requests, to the last of what is allowed; and what several choices are counted as."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.api.answers import Answer
from shoal.api.bodies import CompletionRequest, EmbeddingRequest
from shoal.api.limits import Limits
from shoal.api.requests import EngineCall, completion_call, embedding_ids
from shoal.api.served import ServedModel
from shoal.engine.events import Finished, Request
from shoal.errors import ContextLengthError, RequestError
from shoal.inputs.chat import Encoded

LIMITS = Limits()
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
