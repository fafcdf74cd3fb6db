"""Guided answers: they follow their grammar to the letter, end only where it may end, and a bad one harms nobody else."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import jsonschema
import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.engine import naive
from shoal.engine.events import Completion, Guide
from shoal.engine.guided import GrammarError, Grammars
from shoal.errors import RequestError
from shoal.inputs.tokenizer import END_ID, Tokenizer
from shoal.model.net import Net

MODEL = Model.from_preset("test", seed=1)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "ages": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
        "kind": {"enum": ["fish", "é ü"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}


def bpe() -> Model:
    """A model whose tokens are several bytes long."""
    tokenizer = Tokenizer.train(['{"name": "fish", "ages": [10, 20], "kind": "é ü"} yes no yesterday'] * 50, 290)
    net = Net(MODEL.config).init_(2)
    return Model(MODEL.config, net, tokenizer)


def ask(guide: Guide, seed: int = 0, **more: Any) -> Request:
    return Request([60, 61, 62], Sampling(guided=guide, seed=seed, **({"max_tokens": 80} | more)), depth="full")


def answers(requests: list[Request], model: Model = MODEL, **limits: Any) -> list[Completion]:
    engine = Engine(model, **limits)
    done = engine.generate(requests)
    engine.step()  # idle: checks the books
    assert engine.dead is None
    return done


@pytest.mark.parametrize("model", [MODEL, bpe()], ids=["bytes", "bpe"])
def test_answers_are_what_the_guide_says(model: Model) -> None:
    text = json.dumps(SCHEMA)
    requests = [ask(Guide("json_schema", text), seed, max_tokens=90) for seed in range(8)]
    requests += [ask(Guide("regex", r"(ab?c)+[0-9]{2,4}é"), seed, max_tokens=90) for seed in range(4)]
    requests += [ask(Guide("choice", ("yes", "yesterday", 'a "q" \\ ü')), seed) for seed in range(4)]
    requests += [ask(Guide("choice", [f"c{number}" for number in range(5000)]))]
    requests += [ask(Guide("json_object"), seed, logit_bias={END_ID: 9.0, 134: 6.0}) for seed in range(4)]
    done = answers(requests, model)
    ended = 0
    for request, answer in zip(requests, done, strict=True):
        guide = request.sampling.guided
        assert guide is not None and answer.finish_reason in ("stop", "length")
        if answer.finish_reason == "length":
            continue
        ended += 1
        if guide.kind == "json_schema":
            jsonschema.validate(json.loads(answer.text), SCHEMA)
        elif guide.kind == "regex":
            assert re.fullmatch(guide.spec, answer.text)  # type: ignore[call-overload]
        elif guide.kind == "choice":
            assert answer.text in guide.spec
        else:
            assert isinstance(json.loads(answer.text), dict)
    assert ended >= len(requests) // 2
    assert len({answer.text for answer in done}) > 6


@pytest.mark.parametrize("indent", [None, 1, 4, 8, "\t"])
def test_white_space_in_json_has_an_end_and_what_json_dumps_writes_is_allowed(indent: int | str | None) -> None:
    values = {"name": "ü", "ages": [1, 2], "kind": "fish"}
    for guide in (Guide("json_schema", json.dumps(SCHEMA)), Guide("json_object")):
        grammar = Grammars(MODEL.tokenizer, MODEL.config.vocab).compile(guide)
        for separators in (None, (",", ":"), (" ,", " : ")):
            text = json.dumps(values, indent=indent, separators=separators, ensure_ascii=False)
            assert grammar.allowed(MODEL.tokenizer.encode(text))[END_ID]
        for endless in ("{  ", "{\n\n", "{\n" + " " * 17, "{\r"):
            with pytest.raises(GrammarError):
                grammar.allowed(MODEL.tokenizer.encode(endless))


def test_a_model_that_wants_nothing_but_white_space_still_comes_to_an_end() -> None:
    schema = {"type": "object", "properties": {"deep": {"type": "boolean"}}, "required": ["deep"]}
    asked = json.dumps(schema | {"additionalProperties": False, "x-guidance": {"whitespace_flexible": True}})
    blanks = {token: 100.0 for text in " \n\t" for token in MODEL.tokenizer.encode(text)}
    (answer,) = answers([ask(Guide("json_schema", asked), logit_bias=blanks, max_tokens=200)])
    assert answer.finish_reason == "stop" and isinstance(json.loads(answer.text)["deep"], bool)


def test_the_end_comes_only_where_the_grammar_may_end_and_then_it_must() -> None:
    """Whatever the model wants: it is made to want the end above all, and then never."""
    eager = {END_ID: 100.0}
    (first,) = answers([ask(Guide("regex", "a{3,5}"), logit_bias=eager)])
    assert (first.text, first.finish_reason) == ("aaa", "stop")
    (last,) = answers([ask(Guide("regex", "a{3,5}"), logit_bias={END_ID: -100.0})])
    assert (last.text, last.finish_reason) == ("aaaaa", "stop")
    (cut,) = answers([ask(Guide("regex", "a{3,5}"), max_tokens=2)])
    assert (cut.text, cut.finish_reason) == ("aa", "length")


def test_guided_and_free_requests_share_a_batch_and_a_short_pool() -> None:
    free = Request([70, 71], Sampling(seed=3, max_tokens=40, ignore_eos=True), depth="middle")
    guided = [ask(Guide("regex", "[a-f]{40}"), seed, max_tokens=60) for seed in range(3)]
    (alone,) = answers([free])
    together = answers([free, *guided], units=1 + 4 * 12)
    assert together[0].tokens == alone.tokens
    for request, answer in zip(guided, together[1:], strict=True):
        assert re.fullmatch("[a-f]{40}", answer.text)
        assert answer.tokens == naive.generate(MODEL, request).tokens


@pytest.mark.parametrize(
    "guide",
    [
        Guide("regex", "("),
        Guide("regex", "[z-a]"),
        Guide("json_schema", '{"type": 5}'),
        Guide("json_schema", "{bad"),
        Guide("json_schema", "[]"),
        Guide("json_schema", '{"not": {"type": "string"}}'),
        Guide("json_schema", '{"not": {"type": "string"}, "x-guidance": {"lenient": true}}'),
        Guide("choice", ("\ud800",)),
        Guide("json_schema", '{"$ref": "#"}'),  # nothing follows it
        Guide("regex", r"[^\s\S]"),
        Guide("lark", 'start: <[5]> "a"'),  # a control token, which is never said
    ],
)
def test_a_guide_that_cannot_be_followed_is_refused_at_submission(guide: Guide) -> None:
    engine = Engine(MODEL)
    with pytest.raises(RequestError) as caught:
        engine.submit(ask(guide))
    assert caught.value.param == "guided" and engine.idle
    (answer,) = engine.generate([ask(Guide("choice", ("yes",)))])
    assert answer.text == "yes"


@pytest.mark.parametrize("more", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_what_would_end_elsewhere_than_the_grammar_is_refused(more: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="with guided"):
        Sampling(guided=Guide("json_object"), **more)


def test_a_grammar_that_fails_on_the_way_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL)
    good, bad = (engine.prepare(ask(Guide("regex", "[a-c]{20}"), seed)) for seed in range(2))
    allowed = bad.grammar.allowed  # type: ignore[union-attr]

    def fail(answer: list[int]) -> Any:
        if len(answer) == 5:
            raise GrammarError("too complex")
        return allowed(answer)

    monkeypatch.setattr(bad.grammar, "allowed", fail)
    engine.submit(good)
    engine.submit(bad)
    events = [event for _ in range(40) for event in engine.step()]
    ends = {event.request: event for event in events if hasattr(event, "reason")}
    assert ends[good.id].reason == "stop"
    error = ends[bad.id].error
    assert ends[bad.id].reason == "error" and "too complex" in str(error)
    assert (error.status, error.param) == (400, "guided")  # trying again would not help
    assert engine.idle and engine.stats()["kv_cache_usage_perc"] == 0


def test_a_grammar_that_ends_in_a_control_token_names_the_guide() -> None:
    """What may come next is never said: no fault of the model's, and no 5xx."""
    (answer,) = answers([ask(Guide("lark", 'start: "a" <[5]> "b"'))])
    assert answer.text == "a" and answer.finished is not None and answer.finished.error is not None
    assert (answer.finish_reason, answer.finished.error.status, answer.finished.error.param) == ("error", 400, "guided")


def test_closed_tokens_stay_closed_under_a_grammar() -> None:
    guide = Guide("regex", "(.|\n)*")
    mask = Grammars(MODEL.tokenizer, MODEL.config.vocab).compile(guide).allowed([])
    allowed = torch.from_numpy(mask) & ~MODEL.forbidden()
    assert allowed.sum() > 100 and not mask[len(MODEL.tokenizer) :].any()
    quiet = dataclasses.replace(ask(guide).sampling, max_tokens=30)
    (answer,) = answers([Request([60], quiet)])
    assert all(token >= 9 for token in answer.tokens)


def test_an_answer_ends_with_its_frame_where_the_grammar_would_go_on() -> None:
    """As the oracle does; the grammar would have more."""
    said = '<c>{"a": "</c>"}</c>'
    sampling = Sampling(max_tokens=60, guided=Guide("choice", [said + " and <c></c>"]), frame=("<c>", "</c>"))
    request, engine = Request([60, 61, 62], sampling, depth="full"), Engine(MODEL)
    (done,) = engine.generate([request])
    assert (done.text, done.finish_reason) == (said, "stop") and naive.generate(MODEL, request).text == said
    begun = dataclasses.replace(request, id="other", answer=tuple(done.tokens[:9]))
    assert engine.generate([begun])[0].text == said[9:]
    with pytest.raises(RequestError, match="nothing can follow"):
        engine.submit(dataclasses.replace(begun, answer=(*done.tokens, *done.tokens)))
