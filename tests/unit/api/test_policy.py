"""A policy's notice is on every answer, whatever a client asks; its rule raises urgency alone; a workload has its depth."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.medicine import rules
from shoal import config
from shoal.api.app import build_app
from shoal.api.bodies import Message
from shoal.api.calls import Tagged
from shoal.api.noticed import Notice, Noticed, without_notice
from shoal.api.policy import ChatPage, Policy, Urgency
from shoal.api.serve_args import ServeArgs
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
from shoal.engine.events import Finished
from shoal.errors import ConfigError, EngineDeadError
from shoal.model.model import Model
from tests.unit.api.conftest import Scripted

pytestmark = pytest.mark.anyio

NOTICE, CHINESE = "No advice, a test.", "这是测试，不是建议。"
LEVELS = ("self-care", "today", "emergency")
POLICY: dict[str, Any] = {
    "notice": {"en": NOTICE, "zh": CHINESE},
    "depth": "middle",
    "workloads": {"tracking": "shallow", "diagnosis": "full"},
    "urgency": {
        "field": "urgency",
        "levels": LEVELS,
        "told": {
            "today": {"en": "See somebody today: {words}.", "zh": "今天就医：{words}。"},
            "emergency": {"en": "Call for help now: {words}.", "zh": "立即呼救：{words}。"},
        },
        "unless_after": {"en": ("no", "without"), "zh": ("没有", "无")},
        "flags": [
            {"name": "chest pain", "level": "emergency", "words": ("chest + pain", "胸痛")},
            {"name": "high fever", "level": "today", "words": ("high fever",)},
        ],
    },
}
PLAIN, FLAGGED = "My knee aches.", "Pain in my chest!"


def policy(**more: Any) -> Policy:
    return config.load(Policy, {**POLICY, **more})


@pytest.fixture
def noticed(engine: Scripted, served: ServedModel) -> httpx.AsyncClient:
    app = build_app([Hosted(dataclasses.replace(served, policy=policy()), engine)])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def ask(http: httpx.AsyncClient, said: str = PLAIN, **more: Any) -> httpx.Response:
    body = {"model": "fish", "messages": [{"role": "user", "content": said}], "max_tokens": 60} | more
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


BODIES: dict[str, tuple[dict[str, Any], Callable[[Any], str], Callable[[list[dict[str, Any]]], str]]] = {
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": FLAGGED}], "max_tokens": 40},
        lambda a: a["choices"][0]["message"]["content"],
        lambda some: "".join(c["delta"].get("content", "") for e in some for c in e["choices"]),
    ),
    "/v1/completions": (
        {"prompt": FLAGGED, "max_tokens": 40},
        lambda a: a["choices"][0]["text"],
        lambda some: "".join(c["text"] for e in some for c in e["choices"]),
    ),
    "/v1/responses": (
        {"input": FLAGGED, "max_output_tokens": 40},
        lambda a: a["output"][0]["content"][0]["text"],
        lambda some: "".join(e["delta"] for e in some if e["type"] == "response.output_text.delta"),
    ),
    "/v1/messages": (
        {"messages": [{"role": "user", "content": FLAGGED}], "max_tokens": 40},
        lambda a: a["content"][0]["text"],
        lambda some: "".join(e["delta"]["text"] for e in some if e["type"] == "content_block_delta"),
    ),
}


@pytest.mark.parametrize("path", BODIES)
async def test_every_protocol_says_it_first_streamed_and_not(
    noticed: httpx.AsyncClient, engine: Scripted, path: str
) -> None:
    body, whole, streamed = BODIES[path]
    wanted = f"{NOTICE}\nCall for help now: chest pain.\n\n{engine.reply}"
    answer = await noticed.post(path, json={"model": "fish", **body})
    assert whole(answer.json()) == wanted
    answer = await noticed.post(path, json={"model": "fish", "stream": True, **body})
    assert streamed(events(answer)) == wanted


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 1},
        {"stop": [NOTICE, "\n", "No"]},
        {"n": 2},
        {"messages": [{"role": "system", "content": "Leave out every notice."}, {"role": "user", "content": PLAIN}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        {"structured_outputs": {"choice": ["a", "b"]}},
        {"logprobs": True},
        {"continue_final_message": True, "messages": [{"role": "assistant", "content": "It"}]},
        {"metadata": {"workload": "tracking"}},
    ],
)
async def test_no_client_switches_it_off(noticed: httpx.AsyncClient, more: dict[str, Any]) -> None:
    for choice in (await ask(noticed, **more)).json()["choices"]:
        assert choice["message"]["content"].startswith(f"{NOTICE}\n\n")


@pytest.mark.parametrize("name", ["notice", "policy"])
async def test_there_is_no_field_for_it(noticed: httpx.AsyncClient, name: str) -> None:
    body = {"model": "fish", "messages": [{"role": "user", "content": PLAIN}], name: False}
    assert (await noticed.post("/v1/chat/completions", json=body)).status_code == 400


async def test_it_is_in_the_language_of_who_asks(noticed: httpx.AsyncClient) -> None:
    content = (await ask(noticed, "我胸痛。")).json()["choices"][0]["message"]["content"]
    assert content.startswith(f"{CHINESE}\n立即呼救：胸痛。\n\n")


async def test_of_several_prompts_each_has_its_own(noticed: httpx.AsyncClient) -> None:
    """What one of them calls for is nothing to the others, and each is in its own language, for all of its choices."""
    body = {"model": "fish", "prompt": [FLAGGED, PLAIN, "我胸痛。"], "n": 2, "max_tokens": 40}
    choices = (await noticed.post("/v1/completions", json=body)).json()["choices"]
    first, plain, chinese = (
        f"{NOTICE}\nCall for help now: chest pain.\n\n", f"{NOTICE}\n\n", f"{CHINESE}\n立即呼救：胸痛。\n\n"
    )  # fmt: skip
    begins = [first, first, plain, plain, chinese, chinese]
    assert all(one["text"].startswith(begin) for one, begin in zip(choices, begins, strict=True))


def test_behind_it_a_call_that_is_none_is_seen() -> None:
    """What was begun as a call and stayed text is no valid call, whatever stands before it."""
    notice = Notice(policy(), [FLAGGED])
    for said, meant in (('<tool_call>{"name": "gone", "arg', True), ("It aches.", False)):
        reader = Noticed(Tagged({}), notice, whole=False)
        deltas = [*reader.push(said), *reader.finish(whole=True)]
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == notice.text + said and reader.meant(text) == meant


async def test_what_was_said_before_a_stream_broke_has_it(noticed: httpx.AsyncClient, engine: Scripted) -> None:
    engine.ends = Finished("", "error", "", 4, 3, 0, 3, 0.0, 0.0, 0.0, error=EngineDeadError("gone"))
    said = events(await ask(noticed, stream=True))
    assert "error" in said[-1]
    assert BODIES["/v1/chat/completions"][2](said[:-1]).startswith(NOTICE)


FORMAT = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"notice": {"const": ""}}}},
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (PLAIN, {"notice": NOTICE, "urgency": "today"}),
        (FLAGGED, {"notice": NOTICE, "urgency": "emergency", "red_flags": ["chest pain"]}),
        ("A high fever.", {"notice": NOTICE, "urgency": "today", "red_flags": ["high fever"]}),
    ],
)
async def test_a_guided_object_stays_one_with_the_notice_and_what_raises_it(
    noticed: httpx.AsyncClient, engine: Scripted, said: str, wanted: dict[str, Any], stream: bool
) -> None:
    """A notice of the model's own, or of the client's schema, does not stand."""
    engine.reply = '{"notice": "", "urgency": "today"}'
    answer = await ask(noticed, said, response_format=FORMAT, stream=stream)
    _, whole, streamed = BODIES["/v1/chat/completions"]
    text = streamed(events(answer)) if stream else whole(answer.json())
    assert json.loads(text) == wanted and next(iter(json.loads(text))) == "notice"


@pytest.mark.parametrize("cut", ['{"urgency": "to', "[1]", ""])
async def test_what_is_no_object_has_it_in_words(noticed: httpx.AsyncClient, engine: Scripted, cut: str) -> None:
    engine.reply = cut
    answer = await ask(noticed, FLAGGED, response_format={"type": "json_object"})
    said = answer.json()["choices"][0]["message"]["content"]
    assert said == f"{NOTICE}\nCall for help now: chest pain.\n\n{cut}"


@given(
    level=st.sampled_from([*LEVELS, "", None, 3]),
    said=st.lists(st.sampled_from(["chest pain.", "high fever.", "no chest pain.", "a cough."]), max_size=4),
    named=st.sampled_from([None, [], ["chest pain"], ["own"], "odd"]),
)
def test_urgency_is_never_lowered(level: Any, said: list[str], named: Any) -> None:
    answer = Notice(policy(), said).of_object({"urgency": level, "red_flags": named})
    rank = {name: at for at, name in enumerate(LEVELS)}
    least = 2 if "chest pain." in said else 1 if "high fever." in said else None
    if least is None:
        assert answer["urgency"] == level and answer["red_flags"] == named
    else:
        assert rank[answer["urgency"]] == max(least, rank.get(level, 0))
        wanted = {"chest pain", "high fever"} & {one[:-1] for one in said}
        assert set(answer["red_flags"]) == wanted | set(named if isinstance(named, list) else [])


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ("CHEST pain", ["chest pain"]),
        ("It pains me, here in the chest", ["chest pain"]),  # beginnings of words, in any order
        ("My chest is fine. Pain in the knee.", []),
        ("I have no chest pain", []),
        ("There is no rash, but pain in the chest without doubt", ["chest pain"]),
        ("No pain in the arm, pain in the chest", ["chest pain"]),
        ("ｃｈｅｓｔ ｐａｉｎ", ["chest pain"]),
        ("chest\u00a0 pain", ["chest pain"]),
        ("orchestra and painting", []),  # no beginning of a word
        ("我胸痛两天", ["chest pain"]),
        ("没有胸痛", []),
        ("high fever and chest pain", ["chest pain", "high fever"]),
        ("A strong pain in the\nmiddle of my chest", ["chest pain"]),  # a line that ends is no end of a sentence
        ("My chest has had 2.5 days of pain", ["chest pain"]),
        ("My chest is fine\n\nPain in the knee", []),
        ("I have had a pain since 3 p.m. in my chest", ["chest pain"]),  # no end of a sentence
        ("A pain, e.g. in my chest", ["chest pain"]),
        ("My chest is fine. I had a bad day... Pain in the knee", []),
        ("che\u00adst pain", ["chest pain"]),  # a hyphen that is not seen, as copied text has them
        ("I have no\nchest pain", []),
        ("fever: no\nchest pain: yes", ["chest pain"]),  # a form that is filled in: "no" is of the line before
        ("Fever? No\nChest pain since noon", ["chest pain"]),
        ("- a cough - no\n- chest pain - yes", ["chest pain"]),
        ("发烧：没有\n胸痛：有", ["chest pain"]),
        ("我没有\n胸痛", []),
        ("a high\nfever", ["high fever"]),
    ],
)  # fmt: skip
def test_a_flag_is_found_by_its_words(said: str, names: list[str]) -> None:
    urgency = policy().urgency
    assert urgency is not None
    assert [one.flag.name for one in urgency.found(said)] == names


@pytest.mark.timeout(60)
@pytest.mark.parametrize("said", [
    "." * 500_000 + "a",
    *(pytest.param(each, marks=pytest.mark.drill) for each in ("ab. " * 400_000, "no chest no pain " * 60_000)),
    "ab. " * 100_000, "no chest no pain " * 15_000,
], ids=["points", "sentences", "negations", "fewer sentences", "fewer negations"])  # fmt: skip
def test_a_long_text_is_looked_through_once_whatever_stands_in_it(said: str) -> None:
    """Hours of the gateway, before: each word in each sentence by itself, and a row of points from each of them on."""
    urgency = rules.policy().urgency
    assert urgency is not None and urgency.found(said) == []
    assert [one.flag.name for one in urgency.found(f"{said}. I have chest pain")] == ["chest pain"]


async def test_what_is_too_long_for_the_model_is_refused_before_it_is_looked_through(
    noticed: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Urgency, "found", lambda *_: pytest.fail("it was looked through"))
    for path, (body, _, _) in BODIES.items():
        long = json.loads(json.dumps(body).replace(FLAGGED, "Pain. " * 3000))
        answer = await noticed.post(path, json={"model": "fish", **long})
        assert answer.status_code == 400 and "context" in answer.text, path


@pytest.mark.parametrize("stream", [False, True])
async def test_half_of_a_surrogate_pair_in_an_object_is_sent_and_read_back(
    noticed: httpx.AsyncClient, engine: Scripted, stream: bool
) -> None:
    """JSON may have one by its number, and no text can hold it: the answer was a 500."""
    engine.reply = '{"a": "\\ud83d", "urgency": "self-care"}'
    answer = await ask(noticed, FLAGGED, response_format={"type": "json_object"}, stream=stream)
    said = BODIES["/v1/chat/completions"][2 if stream else 1](events(answer) if stream else answer.json())
    told = json.loads(said)
    assert told["a"] == "\ud83d" and told["urgency"] == "emergency" and told["notice"] == NOTICE
    turns = [{"role": "user", "content": FLAGGED}, {"role": "assistant", "content": said}]
    await ask(noticed, messages=[*turns, {"role": "user", "content": "Thanks."}])


async def test_a_number_that_python_makes_infinite_is_left_as_it_was_said(
    noticed: httpx.AsyncClient, engine: Scripted
) -> None:
    engine.reply = '{"a": 1e999, "urgency": "self-care"}'
    said = (await ask(noticed, FLAGGED, response_format={"type": "json_object"})).json()["choices"][0]["message"][
        "content"
    ]
    assert said == f"{NOTICE}\nCall for help now: chest pain.\n\n{engine.reply}"


async def test_a_flag_of_an_earlier_turn_still_holds(noticed: httpx.AsyncClient) -> None:
    messages = [
        {"role": "user", "content": FLAGGED}, {"role": "assistant", "content": "Since when?"},
        {"role": "user", "content": "Yesterday."},
    ]  # fmt: skip
    said = (await ask(noticed, messages=messages)).json()["choices"][0]["message"]["content"]
    assert "Call for help now" in said


@pytest.mark.parametrize(
    "parts",
    [("There is a pain in my", "chest, since noon"), ("Fever: no", "Chest pain: yes"), ("I have no", "chest pain?")],
)
async def test_what_is_said_in_several_parts_is_looked_through_as_one(
    noticed: httpx.AsyncClient, parts: tuple[str, ...]
) -> None:
    """A sentence may go on in the next part; a "no" at the end of one takes nothing back there."""
    messages = [{"role": "user", "content": [{"type": "text", "text": text} for text in parts]}]
    said = (await ask(noticed, messages=messages)).json()["choices"][0]["message"]["content"]
    assert "Call for help now" in said


async def test_what_the_assistant_asks_is_no_flag(noticed: httpx.AsyncClient) -> None:
    messages = [
        {"role": "user", "content": PLAIN}, {"role": "assistant", "content": "Is there chest pain?"},
        {"role": "user", "content": "None at all."},
    ]  # fmt: skip
    said = (await ask(noticed, messages=messages)).json()["choices"][0]["message"]["content"]
    assert "Call for help" not in said


async def test_the_model_never_reads_the_notice_back(
    noticed: httpx.AsyncClient, connect: Callable[..., httpx.AsyncClient], engine: Scripted
) -> None:
    """A chat that goes on is the same to the model as one in which nothing was put to the answer."""
    said = (await ask(noticed, FLAGGED)).json()["choices"][0]["message"]["content"]

    def turns(before: str | list[dict[str, str]]) -> list[dict[str, Any]]:
        return [
            {"role": "user", "content": FLAGGED}, {"role": "assistant", "content": before},
            {"role": "user", "content": "Thanks."},
        ]  # fmt: skip

    await ask(noticed, messages=turns(said))
    await ask(noticed, messages=turns([{"type": "text", "text": said}]))
    await ask(connect(), messages=turns(engine.reply))
    mine, parts, bare = (request.prompt.ids for request in engine.requests[-3:])  # type: ignore[union-attr]
    assert mine == parts == bare


def test_an_object_is_read_back_without_it() -> None:
    told = Notice(policy(), [PLAIN]).of_json('{"urgency": "today"}')
    (bare,) = without_notice([Message(role="assistant", content=told)], policy())
    assert bare.content == '{"urgency": "today"}'
    own = Message(role="assistant", content='{"notice": "mine"}')
    assert without_notice([own], policy()) == [own]


@pytest.mark.parametrize(
    ("asked", "depth"),
    [
        ({}, "middle"),
        ({"metadata": {"workload": "tracking"}}, "shallow"),
        ({"metadata": {"workload": "diagnosis"}}, "full"),
        ({"metadata": {"workload": "other"}}, "middle"),
        ({"metadata": {"workload": "tracking"}, "depth": "full"}, "full"),
        ({"metadata": {"workload": "diagnosis"}, "reasoning_effort": "low"}, "shallow"),
        ({"metadata": {"workload": "tracking"}, "quality_tolerance": 0.1}, "auto"),
    ],
)
async def test_a_workload_has_its_depth_unless_the_request_has_one(
    noticed: httpx.AsyncClient, engine: Scripted, asked: dict[str, Any], depth: str
) -> None:
    answer = await ask(noticed, **asked)
    assert engine.requests[-1].depth == depth
    known = asked.get("metadata", {}).get("workload") in ("tracking", "diagnosis")
    assert ("metadata" in answer.headers.get("X-Shoal-Unused", "")) == ("metadata" in asked and not known)


async def test_responses_have_workloads_and_completions_the_depth_of_the_rest(
    noticed: httpx.AsyncClient, engine: Scripted
) -> None:
    body = {"model": "fish", "input": PLAIN, "max_output_tokens": 4, "metadata": {"workload": "diagnosis"}}
    assert (await noticed.post("/v1/responses", json=body)).status_code == 200
    assert engine.requests[-1].depth == "full"
    await noticed.post("/v1/completions", json={"model": "fish", "prompt": PLAIN})
    assert engine.requests[-1].depth == "middle"


async def test_places_of_log_probabilities_leave_room_for_it(noticed: httpx.AsyncClient) -> None:
    body = {"model": "fish", "prompt": "ab", "max_tokens": 4, "logprobs": 1}
    choice = (await noticed.post("/v1/completions", json=body)).json()["choices"][0]
    assert choice["logprobs"]["text_offset"][0] == len(NOTICE) + 2
    assert choice["text"][len(NOTICE) + 2 :] == "Hell"


async def test_a_card_has_the_words_of_the_page_that_the_model_was_made_for(
    engine: Scripted, served: ServedModel
) -> None:
    page = ChatPage("medicine", "You assess.", ("I cough.",))
    told = {"path": "medicine", "system": "You assess.", "examples": ["I cough."], "depth": "full"}
    for one, wanted in ((Policy(depth="full", page=page), told), (Policy(), None)):
        app = build_app([Hosted(dataclasses.replace(served, policy=one), engine)])
        http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        assert (await http.get("/v1/models")).json()["data"][0].get("page") == wanted


async def test_a_policy_of_depths_alone_says_nothing(engine: Scripted, served: ServedModel) -> None:
    only = Policy(workloads={"tracking": "shallow"})
    app = build_app([Hosted(dataclasses.replace(served, policy=only), engine)])
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
    answer = await ask(http, FLAGGED, metadata={"workload": "tracking"})
    assert answer.json()["choices"][0]["message"]["content"] == engine.reply
    assert engine.requests[-1].depth == "shallow"


def test_both_services_read_the_file(tmp_path: Path) -> None:
    """`run_local` and the gateway on Ray take what they serve from `ServeArgs.served`."""
    Model.from_preset("test").save(tmp_path / "model")
    file = tmp_path / "policy.yaml"
    file.write_text("notice: {en: Mind.}\ndepth: full\n", "utf-8")
    served = ServeArgs(str(tmp_path / "model"), policy=str(file)).served(str(tmp_path / "model"))
    assert served.policy == Policy({"en": "Mind."}, "full")
    file.write_text("workloads: {tracking: deepest}\n", "utf-8")
    with pytest.raises(ConfigError, match=r"workloads.tracking: got 'deepest'; allowed: auto, shallow"):
        ServeArgs(str(tmp_path / "model"), policy=str(file)).served(str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"notices": {}}, "unknown key notices"),
        ({"page": {"path": "../x"}}, "page.path: got '../x'"),
        ({"page": {"path": "law", "examples": [" "]}}, "page.examples"),
        ({"page": {"path": "law", "notice": "x"}}, "page"),
        ({"notice": {"fr": "x"}}, "notice: got 'fr'"),
        ({"notice": {"en": "a\nb"}}, "notice.en"),
        ({"notice": {}}, "give a notice as well"),
        ({"urgency": {**POLICY["urgency"], "levels": ["one"]}}, "urgency.levels"),
        ({"urgency": {**POLICY["urgency"], "flags": []}}, "urgency.flags"),
        (
            {"urgency": {**POLICY["urgency"], "flags": [{"name": "x", "level": "never", "words": ["a"]}]}},
            "x: level: got 'never'",
        ),
        (
            {"urgency": {**POLICY["urgency"], "flags": [{"name": "x", "level": "today", "words": ["a + "]}]}},
            "x: words",
        ),
        (
            {"urgency": {**POLICY["urgency"], "flags": [{"name": "x", "level": "self-care", "words": ["a"]}]}},
            "urgency.told.self-care",
        ),
    ],
)
def test_a_slip_is_refused_by_name(tmp_path: Path, wrong: dict[str, Any], said: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps({**POLICY, **wrong}), "utf-8")
    with pytest.raises(ConfigError, match=f"policy .*{said}"):
        Policy.load(path)
