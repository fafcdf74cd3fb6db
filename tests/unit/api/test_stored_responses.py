"""Stored responses, by the unmodified openai client: gone on from, read, listed and deleted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.api.limits import Limits
from shoal.api.responses.bodies import ResponsesRequest
from shoal.api.responses.calls import responses_call
from shoal.api.responses.items import kept_items, read_items
from shoal.api.served import ServedModel
from shoal.engine.events import Finished
from shoal.errors import GenerationError
from shoal.loop.capture import Capture
from shoal.loop.forget import forget
from shoal.loop.texts import Responses, Texts
from tests.unit.api.test_chat import png
from tests.unit.api.test_responses import LOG
from tests.unit.api.test_tools import CALL

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools
Connect = Callable[..., httpx.AsyncClient]

KEYS = ApiKeys(["shop-key name=shop texts=yes", "other-key name=other texts=yes", "plain-key name=plain"])
ASK: dict[str, Any] = {"model": "fish", "input": "How deep?", "store": True}
URL = "/v1/responses"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "capture"


@pytest.fixture
def client(connect: Connect, folder: Path) -> Callable[[str], openai.AsyncOpenAI]:
    http = connect(capture=CaptureArgs(str(folder), texts=True), api_keys=KEYS)
    return lambda key: openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=http, max_retries=0)


@pytest.fixture
def shop(client: Callable[[str], openai.AsyncOpenAI]) -> openai.AsyncOpenAI:
    return client("shop-key")


async def test_a_turn_goes_on_from_the_items_before_it_and_not_from_their_instructions(
    shop: openai.AsyncOpenAI, engine: Any
) -> None:
    first = await shop.responses.create(**ASK, instructions="Be brief.")
    second = await shop.responses.create(
        model="fish", input="And wide?", previous_response_id=first.id, store=True, instructions="Be kind."
    )
    third = await shop.responses.create(model="fish", input=[{"role": "user", "content": "So?"}], store=True,
                                        previous_response_id=second.id)  # fmt: skip
    said = [{"role": "user", "content": "How deep?"}, {"role": "assistant", "content": engine.reply}]
    said += [{"role": "user", "content": "And wide?"}, {"role": "assistant", "content": engine.reply}]
    said += [{"role": "user", "content": "So?"}]
    chats: list[Any] = [[{"role": "system", "content": "Be kind."}, *said[:3]], said]
    for chat, at in zip(chats, (1, 2), strict=True):
        await shop.chat.completions.create(model="fish", messages=chat)
        assert engine.requests[-1].prompt.ids == engine.requests[at].prompt.ids
    assert [each.previous_response_id for each in (first, second, third)] == [None, first.id, second.id]
    assert all(to_dict(each)["store"] is True for each in (first, second, third))


def to_dict(answer: Any) -> dict[str, Any]:
    return dict(answer.to_dict())


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_answered_is_found_as_soon_as_its_end_is_read(
    shop: openai.AsyncOpenAI, engine: Any, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a second passes between the two."""
    seconds = itertools.count(1_795_780_800)
    monkeypatch.setattr("shoal.api.responses.events.time", SimpleNamespace(time=lambda: next(seconds)))
    engine.reply, fields = f"so {CALL}", {**ASK, "tools": [LOG], "metadata": {"run": "7"}}
    if not stream:
        whole = await shop.responses.create(**fields)
        assert to_dict(await shop.responses.retrieve(whole.id)) == to_dict(whole)
        return
    async for event in await shop.responses.create(**fields, stream=True):
        if event.type == "response.completed":
            found = await shop.responses.retrieve(event.response.id)
            assert to_dict(found) == to_dict(event.response) and to_dict(found)["store"] is True
            return
    pytest.fail("no end")


async def test_a_tool_is_called_and_its_result_is_all_that_is_sent(shop: openai.AsyncOpenAI, engine: Any) -> None:
    engine.reply = CALL
    first = await shop.responses.create(**ASK, tools=[LOG])  # type: ignore[list-item]
    (call,) = first.output
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    more: dict[str, Any] = {"model": "fish", "tools": [LOG], "store": True}
    second = await shop.responses.create(**more, previous_response_id=first.id, input=[result])
    whole: Any = [{"role": "user", "content": "How deep?"}, call.to_dict(), result]
    await shop.responses.create(**more, input=whole)
    assert engine.requests[1].prompt.ids == engine.requests[2].prompt.ids
    with pytest.raises(openai.BadRequestError) as wrong:
        odd: Any = {**result, "call_id": "c9"}
        await shop.responses.create(**more, previous_response_id=second.id, input=[odd])
    assert wrong.value.param == "input[0].call_id"


async def test_input_items_are_those_of_all_turns_a_page_at_a_time(shop: openai.AsyncOpenAI, engine: Any) -> None:
    engine.reply = CALL
    turn: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "input_image", "image_url": png()}]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c", "id": "same"},
        {"role": "user", "content": "d", "id": "same"},
    ]  # fmt: skip
    first = await shop.responses.create(**{**ASK, "input": turn}, tools=[LOG])  # type: ignore[list-item]
    (call,) = first.output
    assert call.type == "function_call"
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "done"}
    engine.reply = "well"
    second = await shop.responses.create(**{**ASK, "input": [result]}, previous_response_id=first.id)
    third = await shop.responses.create(**ASK, previous_response_id=second.id)
    expected = ["Be brief.", "a[image]", "b", "c", "d", call.call_id, "done", "well", "How deep?"]

    def shown(item: Any) -> str:
        type(item).model_validate(item.model_dump(warnings="error"), strict=False)
        if item.type == "message":
            return "".join(part.text for part in item.content)
        return str(item.call_id if item.type == "function_call" else item.output)

    for limit in (1, 2, 100):
        for order in ("asc", "desc"):
            pages = shop.responses.input_items.list(third.id, order=order, limit=limit)  # type: ignore[arg-type]
            found: list[Any] = []
            async for item in pages:
                found.append(item)
                assert len(found) <= len(expected)  # else a page comes again, and the client asks without end
            assert [shown(item) for item in found] == (expected if order == "asc" else expected[::-1])
            assert len({item.id for item in found}) == len(found)
    newest = await shop.responses.input_items.list(third.id, limit=1)
    assert shown(newest.data[0]) == "How deep?" and newest.has_more and newest.first_id == newest.last_id
    own = [item async for item in shop.responses.input_items.list(first.id, order="asc")]
    assert [shown(item) for item in own] == expected[:5]


async def test_a_deleted_one_is_gone_and_what_went_on_from_it_says_so(shop: openai.AsyncOpenAI, folder: Path) -> None:
    first = await shop.responses.create(**ASK)
    second = await shop.responses.create(**ASK, previous_response_id=first.id)
    await shop.responses.delete(first.id)
    for call in (shop.responses.retrieve(first.id), shop.responses.delete(first.id)):
        with pytest.raises(openai.NotFoundError, match="no such response"):
            await call
    for gone, told in ((first, "no such response"), (second, "a response before it is stored no more")):
        with pytest.raises(openai.BadRequestError, match=told) as wrong:
            await shop.responses.create(**ASK, previous_response_id=gone.id)
        assert (wrong.value.code, wrong.value.param) == ("previous_response_not_found", "previous_response_id")
    assert (await shop.responses.retrieve(second.id)).output_text == second.output_text
    left = [item async for item in shop.responses.input_items.list(second.id)]
    assert len(left) == 1
    ids = Capture(folder).rows()["id"].to_pylist()
    assert first.id not in ids and second.id in ids
    kept = b"".join(path.read_bytes() for path in folder.rglob("*.json"))
    assert kept.count(b"Hello, fish!") == 1  # a text lies in one place


async def test_a_key_sees_what_it_stored_and_nothing_else(client: Any) -> None:
    mine = await client("shop-key").responses.create(**ASK)
    other = client("other-key").responses
    for call in (
        other.retrieve(mine.id),
        other.delete(mine.id),
        other.cancel(mine.id),
        other.input_items.list(mine.id),
    ):
        with pytest.raises(openai.NotFoundError, match="no such response"):
            await call
    with pytest.raises(openai.BadRequestError, match="no such response") as wrong:
        await other.create(**ASK, previous_response_id=mine.id)
    assert wrong.value.code == "previous_response_not_found"
    assert (await client("shop-key").responses.retrieve(mine.id)).id == mine.id


@pytest.mark.parametrize(("texts", "key"), [(False, "shop-key"), (True, "plain-key")])
async def test_where_operator_or_key_keep_no_texts_it_is_one_clear_line(
    connect: Connect, folder: Path, texts: bool, key: str, engine: Any
) -> None:
    http = connect({"Authorization": f"Bearer {key}"}, capture=CaptureArgs(str(folder), texts=texts), api_keys=KEYS)
    async with http:
        for fields in ({"store": True}, {"previous_response_id": f"resp_{0:032x}"}):
            answer = await http.post(URL, json={"model": "fish", "input": "a", **fields})
            error = answer.json()["error"]
            assert (answer.status_code, error["param"]) == (400, next(iter(fields)))
            assert "texts are not kept here" in error["message"] and "\n" not in error["message"]
    assert engine.requests == [] and not (folder / "texts").exists()


async def test_silence_stores_nothing_and_says_so(shop: openai.AsyncOpenAI, folder: Path) -> None:
    answer = await shop.responses.create(model="fish", input="a")
    assert to_dict(answer)["store"] is False and not (folder / "texts").exists()
    with pytest.raises(openai.BadRequestError, match="each turn that is gone on from needs store: true"):
        await shop.responses.create(**ASK, previous_response_id=answer.id)


async def test_a_turn_that_is_not_stored_goes_on_from_one_that_is(shop: openai.AsyncOpenAI) -> None:
    first = await shop.responses.create(**ASK)
    second = await shop.responses.create(**{**ASK, "store": False}, previous_response_id=first.id)
    assert second.previous_response_id == first.id and to_dict(second)["store"] is False
    with pytest.raises(openai.NotFoundError):
        await shop.responses.retrieve(second.id)


async def test_a_later_turn_sees_what_is_stored_without_personal_data(
    shop: openai.AsyncOpenAI, engine: Any, folder: Path, served: ServedModel
) -> None:
    """Arguments of a call stay JSON: they are read as JSON when they come back."""
    engine.reply = CALL.replace("7", "4111111111111111")
    first = await shop.responses.create(**{**ASK, "input": "I am jo@sea.com"}, instructions="Pay 4111 1111 1111 1111",
                                        tools=[LOG], metadata={"mail": "jo@sea.com"})  # type: ignore[list-item]  # fmt: skip
    (call,) = first.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"n": 4111111111111111}
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "paid by jo@sea.com"}
    engine.reply = "done"
    second = await shop.responses.create(**{**ASK, "input": [result]}, previous_response_id=first.id)
    await shop.responses.create(**ASK, previous_response_id=second.id)
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"jo@sea.com" not in kept and b"1111 1111" not in kept and b"11111111" not in kept
    told = b"".join(map(served.tokenizer.token_bytes, engine.requests[-1].prompt.ids)).decode()
    assert "I am [email]" in told and '"n": "[card]"' in told and "paid by [email]" in told and "1111" not in told
    assert {**first.metadata, **(await shop.responses.retrieve(first.id)).metadata} == {"mail": "[email]"}
    found = next(one for one in Responses(Capture(folder)).all() if one["id"] == first.id)
    assert found["scrubbed"] == {"messages": {"email": 2, "card": 1}, "answer": {"card": 1}}


async def test_any_gateway_finds_what_another_answered(connect: Connect, folder: Path) -> None:
    options: dict[str, Any] = {"capture": CaptureArgs(str(folder), texts=True)}
    async with connect(**options) as one, connect(**options) as other:
        first = (await one.post(URL, json=ASK)).json()
        assert (await other.get(f"{URL}/{first['id']}")).json() == first
        second = await other.post(URL, json={**ASK, "previous_response_id": first["id"]})
        third = await one.post(URL, json={**ASK, "previous_response_id": second.json()["id"]})
        assert third.status_code == 200
        assert (await other.delete(f"{URL}/{first['id']}")).json()["deleted"] is True
        assert (await one.get(f"{URL}/{first['id']}")).status_code == 404


async def test_a_text_that_the_disk_does_not_take_costs_nobody_an_answer(connect: Connect, folder: Path) -> None:
    async with connect(capture=CaptureArgs(str(folder), texts=True)) as http:
        (folder / "texts").write_text("not a folder")
        whole = (await http.post(URL, json=ASK)).raise_for_status().json()
        events = (await http.post(URL, json={**ASK, "stream": True})).text
        assert whole["store"] is False and whole["output"]
        first, *_, last = [json.loads(line[6:]) for line in events.splitlines() if line.startswith("data: ")]
        assert (first["response"]["store"], last["response"]["store"]) == (True, False)
        assert 'capture_dropped_total{reason="texts"} 2.0' in (await http.get("/metrics")).text


async def test_what_failed_is_not_stored(shop: openai.AsyncOpenAI, engine: Any, folder: Path) -> None:
    engine.ends = Finished("x", "error", error=GenerationError("it failed"))
    events = [event async for event in await shop.responses.create(**ASK, stream=True)]
    assert events[-1].type == "response.failed" and to_dict(events[-1])["response"]["store"] is False
    assert not (folder / "texts").exists()


async def test_of_who_is_forgotten_nothing_is_left_nor_stored_again(shop: openai.AsyncOpenAI, folder: Path) -> None:
    mine = await shop.responses.create(**ASK, user="ann")
    other = await shop.responses.create(**ASK, user="bob")
    capture = Capture(folder)
    whose = next(one["subject"] for one in Responses(capture).all() if one["id"] == mine.id)
    assert forget(capture, subject=whose).texts == 1
    assert [one["id"] for one in Responses(capture).all()] == [other.id]
    again = await shop.responses.create(**ASK, user="ann")
    assert to_dict(again)["store"] is False and [*Texts(capture).all()] == []
    await shop.chat.completions.create(
        model="fish", messages=[{"role": "user", "content": "a"}], user="ann", store=True
    )
    assert len([*(folder / "texts").rglob("*.json")]) == 1
    assert forget(capture, id_=other.id).texts == 1
    with pytest.raises(openai.NotFoundError):
        await shop.responses.retrieve(other.id)


async def test_what_is_stored_cannot_be_cancelled(shop: openai.AsyncOpenAI) -> None:
    mine = await shop.responses.create(**ASK)
    with pytest.raises(openai.BadRequestError, match="cannot cancel a synchronous response"):
        await shop.responses.cancel(mine.id)
    with pytest.raises(openai.NotFoundError):
        await shop.responses.cancel(f"resp_{0:032x}")


async def test_a_chain_longer_than_may_be_read_is_one_clear_line(
    connect: Connect, folder: Path, engine: Any, served: ServedModel
) -> None:
    for limits, told in ((Limits(messages=3), "too many items with those of the turns before"),
                         (Limits(body_bytes=3000), "the turns before are too long"),
                         (Limits(), "tokens")):  # fmt: skip
        async with connect(capture=CaptureArgs(str(folder), texts=True), limits=limits) as http:
            body, id_ = {**ASK, "input": "a" * (300 if limits.messages > 3 else 3)}, None
            for _ in range(served.config.context):
                answer = await http.post(URL, json={**body, "previous_response_id": id_})
                if answer.status_code != 200:
                    break
                id_ = answer.json()["id"]
            error = answer.json()["error"]
            assert answer.status_code == 400 and told in error["message"], error
            assert error["param"] in ("input", "previous_response_id") and id_ is not None


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?stream=true", "stream"),
        ("?colour=red", "colour"),
        ("?starting_after=3", "starting_after"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_1", "after"),
        ("/input_items?before=msg_1", "before"),
    ],
)
async def test_a_wrong_query_is_refused_by_name(connect: Connect, folder: Path, path: str, param: str) -> None:
    async with connect(capture=CaptureArgs(str(folder), texts=True)) as http:
        id_ = (await http.post(URL, json=ASK)).json()["id"]
        answer = await http.get(f"{URL}/{id_}{path}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


async def test_what_is_asked_for_in_vain_is_named(shop: openai.AsyncOpenAI) -> None:
    mine = await shop.responses.create(**ASK)
    include: Any = ["message.input_image.image_url"]
    for raw in (
        await shop.responses.with_raw_response.retrieve(mine.id, include=include, stream=False),
        await shop.responses.input_items.with_raw_response.list(mine.id, include=include),
    ):
        assert raw.headers["x-shoal-unused"] == "include"


# ---- any items ------------------------------------------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=6)
PARTS = st.lists(st.builds(lambda text: {"type": "input_text", "text": text}, WORDS), max_size=2)
SAID = st.lists(st.builds(lambda text: {"type": "output_text", "text": text}, WORDS), max_size=2)
MESSAGE = st.builds(
    lambda role, content: {"role": role, "content": content},
    st.sampled_from(["user", "system", "developer"]),
    WORDS | PARTS,
) | st.builds(lambda content: {"role": "assistant", "content": content}, WORDS | SAID)
CALLED = st.builds(
    lambda id_, n: {"type": "function_call", "call_id": f"c{id_}", "name": "log", "arguments": json.dumps({"n": n})},
    st.integers(0, 2),
    st.integers(0, 99),
)
GIVEN = st.builds(
    lambda id_, output: {"type": "function_call_output", "call_id": f"c{id_}", "output": output},
    st.integers(0, 2),
    WORDS | PARTS,
)


OPENED = [{"type": "function_call", "call_id": f"c{at}", "name": "log", "arguments": "{}"} for at in range(3)]


@given(st.lists(MESSAGE | CALLED | GIVEN, max_size=8), st.lists(MESSAGE | CALLED | GIVEN, min_size=1, max_size=4))
def test_items_in_two_turns_are_read_as_the_same_in_one(
    served: ServedModel, first: list[Any], second: list[Any]
) -> None:
    """Whatever they are; all calls have been made, so that any may be answered."""

    def body(items: list[Any]) -> ResponsesRequest:
        return ResponsesRequest.model_validate({"model": "fish", "input": items})

    first = [*OPENED, *first]
    before = read_items(json.loads(json.dumps(kept_items(body(first), "resp_1"))))
    whole = responses_call(body([*first, *second]), served, Limits())
    split = responses_call(body(second), served, Limits(), before)
    assert split.requests[0].prompt == whole.requests[0].prompt


async def test_a_reference_to_a_stored_item_is_read_as_the_item(client: Any, engine: Any) -> None:
    """As clients send, that take what they have stored for known."""
    shop, other = client("shop-key"), client("other-key")
    first = await shop.responses.create(**ASK, top_logprobs=1)
    asked = await shop.responses.input_items.list(first.id)
    items: list[Any] = [{"type": "item_reference", "id": item.id} for item in (*asked.data, *first.output)]
    items.append({"role": "user", "content": "And wide?"})
    second = await shop.responses.create(model="fish", input=items, store=True)
    await shop.responses.create(model="fish", input="And wide?", previous_response_id=first.id)
    assert engine.requests[1].prompt.ids == engine.requests[2].prompt.ids
    copied = await shop.responses.input_items.list(second.id, order="asc")
    assert [item.content[0].text for item in copied.data] == ["How deep?", engine.reply, "And wide?"]
    for who, id_ in ((other, items[0]["id"]), (shop, "msg_" + "0" * 34), (shop, "rs_1")):
        with pytest.raises(openai.BadRequestError) as wrong:
            await who.responses.create(model="fish", input=[{"type": "item_reference", "id": id_}])
        assert wrong.value.param == "input[0]"


async def test_log_probabilities_are_not_stored_since_they_spell_what_was_scrubbed(
    shop: openai.AsyncOpenAI, engine: Any, folder: Path
) -> None:
    engine.reply = "Write to ann@example.com."
    first = await shop.responses.create(**ASK, top_logprobs=1)
    assert to_dict(first)["output"][0]["content"][0]["logprobs"]
    assert to_dict(await shop.responses.retrieve(first.id))["output"][0]["content"][0]["logprobs"] == []
