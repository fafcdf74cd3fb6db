"""Stored completions and votes, by the unmodified openai client where it has a call for them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.loop.capture import Capture
from shoal.loop.texts import Texts
from shoal.loop.votes import Votes
from shoal.loop.writer import Bounds

pytestmark = pytest.mark.anyio
PRESET = "small"  # of the model: its context holds a chat and tools
Connect = Callable[..., httpx.AsyncClient]

KEYS = ApiKeys(["shop-key name=shop texts=yes", "other-key name=other texts=yes", "plain-key name=plain"])
CHAT: dict[str, Any] = {
    "model": "fish",
    "messages": [{"role": "user", "content": "I am jo@sea.com, card 4111 1111 1111 1111. Where is it?"}],
    "max_tokens": 40,
    "store": True,
    "metadata": {"workload": "orders"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "capture"


@pytest.fixture
def client(connect: Connect, folder: Path) -> Callable[[str], openai.AsyncOpenAI]:
    http = connect(capture=CaptureArgs(str(folder), texts=True), api_keys=KEYS)
    return lambda key: openai.AsyncOpenAI(base_url="http://test/v1", api_key=key, http_client=http, max_retries=0)


async def test_a_completion_is_stored_listed_tagged_and_deleted(client: Any, folder: Path) -> None:
    shop = client("shop-key")
    one = await shop.chat.completions.create(**CHAT)
    other = await shop.chat.completions.create(**{**CHAT, "metadata": {"workload": "returns"}})
    await shop.chat.completions.create(**{**CHAT, "store": False})
    assert [each.id async for each in shop.chat.completions.list()] == [one.id, other.id]
    assert [each.id async for each in shop.chat.completions.list(limit=1, order="desc")] == [other.id, one.id]
    assert [each.id async for each in shop.chat.completions.list(metadata={"workload": "returns"})] == [other.id]
    assert [each.id async for each in shop.chat.completions.list(model="whale")] == []
    found = await shop.chat.completions.retrieve(one.id)
    assert found.choices[0].message.content == one.choices[0].message.content == "Hello, fish! ¿ok?"
    (asked,) = [each async for each in shop.chat.completions.messages.list(one.id)]
    assert asked.content == "I am [email], card [card]. Where is it?"
    tagged = await shop.chat.completions.update(one.id, metadata={"rating": "down"})
    assert tagged.metadata == {"rating": "down"} and Votes(Capture(folder)).all()[0].rating == "down"
    gone = await shop.chat.completions.delete(one.id)
    assert gone.deleted and gone.id == one.id
    with pytest.raises(openai.NotFoundError, match="no such completion"):
        await shop.chat.completions.retrieve(one.id)
    assert [each.id async for each in shop.chat.completions.list()] == [other.id]
    rows = Capture(folder).rows().to_pylist()
    assert one.id not in [row["id"] for row in rows] and [row["stored"] for row in rows] == [True, None]
    assert Votes(Capture(folder)).all() == []


async def test_a_stream_is_stored_before_its_end(client: Any) -> None:
    shop = client("shop-key")
    async for chunk in await shop.chat.completions.create(**CHAT, stream=True):
        if chunk.choices and chunk.choices[0].finish_reason:
            found = await shop.chat.completions.retrieve(chunk.id)
            assert found.choices[0].message.content == "Hello, fish! ¿ok?"


async def test_no_text_that_is_personal_reaches_the_disk(client: Any, folder: Path, engine: Any) -> None:
    engine.reply = "Write to jo@sea.com, sk-proj-abcdefghijklmnop1234."
    answer = await client("shop-key").chat.completions.create(**{**CHAT, "max_tokens": 90})
    assert "jo@sea.com" in answer.choices[0].message.content
    kept = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert not any(
        word in kept for word in (b"jo@sea.com", b"1111 1111", b"11111111", b"abcdefghijklmnop", b"shop-key")
    )
    (one,) = Texts(Capture(folder)).all()
    assert one["scrubbed"] == {"messages": {"email": 1, "card": 1}, "answer": {"email": 1, "secret": 1}}


async def test_a_key_sees_what_it_stored_and_nothing_else(client: Any) -> None:
    mine = await client("shop-key").chat.completions.create(**CHAT)
    other = client("other-key").chat.completions
    assert [each async for each in other.list()] == []
    for call in (other.retrieve(mine.id), other.delete(mine.id), other.update(mine.id, metadata={})):
        with pytest.raises(openai.NotFoundError):
            await call
    await client("shop-key").chat.completions.retrieve(mine.id)


@pytest.mark.parametrize(("texts", "key"), [(False, "shop-key"), (True, "plain-key")])
async def test_texts_are_kept_only_where_operator_and_key_allow_it(
    connect: Connect, folder: Path, texts: bool, key: str
) -> None:
    """The answer says that `store` changed nothing, as it does where nothing is captured."""
    headers = {"Authorization": f"Bearer {key}"}
    async with connect(headers, capture=CaptureArgs(str(folder), texts=texts), api_keys=KEYS) as http:
        answer = (await http.post("/v1/chat/completions", json=CHAT)).raise_for_status()
        assert "store" in answer.headers["x-shoal-unused"]
        body = {"id": answer.json()["id"], "correction": "In the harbour."}
        refused = await http.post("/v1/shoal/feedback", json=body)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "correction"
    assert not (folder / "texts").exists() and not (folder / "feedback").exists()


@pytest.mark.parametrize(
    ("texts", "key", "days"), [(True, "shop-key", 7), (True, "plain-key", None), (False, "shop-key", None)]
)
async def test_a_key_is_told_what_it_may_say_of_answers(
    connect: Connect, folder: Path, texts: bool, key: str, days: int | None
) -> None:
    given = CaptureArgs(str(folder), texts=texts, texts_days=7)
    async with connect({"Authorization": f"Bearer {key}"}, capture=given, api_keys=KEYS) as http:
        told = (await http.get("/v1/shoal/feedback")).raise_for_status().json()
    assert (told["captured"], told["texts"], told["texts_days"]) == (True, days is not None, days)


async def test_where_nothing_is_captured_each_route_says_so(http: httpx.AsyncClient) -> None:
    for answer in (
        await http.get("/v1/chat/completions"),
        await http.get("/v1/chat/completions/chatcmpl-1"),
        await http.post("/v1/shoal/feedback", json={"id": "chatcmpl-1", "rating": "up"}),
    ):
        assert answer.status_code == 404 and "nothing is captured" in answer.json()["error"]["message"]


async def test_votes_count_once_the_newest_wins_and_none_withdraws(connect: Connect, folder: Path) -> None:
    async with connect(capture=CaptureArgs(str(folder), texts=True)) as http:
        id_ = (await http.post("/v1/completions", json={"model": "fish", "prompt": "a", "max_tokens": 3})).json()["id"]

        async def vote(**said: Any) -> None:
            (await http.post("/v1/shoal/feedback", json={"id": id_, **said})).raise_for_status()

        def known() -> list[tuple[Any, ...]]:
            return sorted((v.rating, v.score, v.correction) for v in Votes(Capture(folder)).all())

        for _ in range(2):
            await vote(rating="up", user="a")
        assert known() == [("up", None, None)]
        await vote(rating="down", score=-0.5, correction="Ask jo@sea.com.", user="a")
        await vote(rating="up", user="b")
        assert known() == [("down", -0.5, "Ask [email]."), ("up", None, None)]
        await vote(user="a")
        assert known() == [("up", None, None)]
        told = (await http.get("/metrics")).text
    assert 'shoal:feedback_total{rating="up"} 3.0' in told and 'shoal:feedback_total{rating="none"} 1.0' in told


async def test_a_vote_for_an_answer_that_nobody_gave_is_404(connect: Connect, folder: Path) -> None:
    async with connect(capture=CaptureArgs(str(folder))) as http:
        answer = await http.post("/v1/shoal/feedback", json={"id": "chatcmpl-nobody", "rating": "up"})
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "id"
    assert not (folder / "feedback").exists()


async def test_an_answer_of_before_a_restart_can_be_voted_on(connect: Connect, folder: Path) -> None:
    async with connect(capture=CaptureArgs(str(folder))) as http:
        id_ = (await http.post("/v1/chat/completions", json={**CHAT, "store": False})).json()["id"]
    assert Votes(Capture(folder)).knows(id_)
    async with connect(capture=CaptureArgs(str(folder))) as http:
        (await http.post("/v1/shoal/feedback", json={"id": id_, "rating": "up"})).raise_for_status()
    assert [vote.id for vote in Votes(Capture(folder)).all()] == [id_]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"id": "x", "rating": "great"}, "rating"),
        ({"id": "x", "score": 2}, "score"),
        ({"id": ""}, "id"),
        ({"id": "x", "stars": 5}, "stars"),
    ],
)
async def test_a_vote_that_means_nothing_is_refused_by_name(
    connect: Connect, folder: Path, body: Any, param: str
) -> None:
    async with connect(capture=CaptureArgs(str(folder))) as http:
        answer = await http.post("/v1/shoal/feedback", json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "order=up", "colour=red"])
async def test_a_list_that_cannot_be_given_is_refused_by_name(connect: Connect, folder: Path, query: str) -> None:
    async with connect(capture=CaptureArgs(str(folder))) as http:
        answer = await http.get(f"/v1/chat/completions?{query}")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == query.partition("=")[0]


async def test_texts_and_votes_end_where_as_much_is_kept_as_may_be(
    connect: Connect, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.api.capture.Bounds", partial(Bounds, max_bytes=600))
    async with connect(capture=CaptureArgs(str(folder), texts=True)) as http:
        first, second = [(await http.post("/v1/chat/completions", json=CHAT)).raise_for_status() for _ in range(2)]
        assert [path.stem for path in folder.glob("texts/*/*.json")] == [first.json()["id"]] and second.json()[
            "choices"
        ]
        assert 'capture_dropped_total{reason="bound"} 1.0' in (await http.get("/metrics")).text
        vote = await http.post("/v1/shoal/feedback", json={"id": first.json()["id"], "rating": "up"})
    assert vote.status_code == 507 and vote.json()["error"]["code"] == "no_room" and not (folder / "feedback").exists()


async def test_of_an_answer_whose_text_is_stored_its_own_key_alone_says_what_is_right(
    client: Any, folder: Path
) -> None:
    """A model may be trained on it."""
    one = await client("shop-key").chat.completions.create(**CHAT)
    for key, status in (("other-key", 404), ("plain-key", 404), ("shop-key", 200)):
        for said in ({"rating": "up"}, {"correction": f"by {key}"}):
            if key == "plain-key" and "correction" in said:
                continue  # which may say nothing in words anyway
            answer = await client(key)._client.post(
                "/v1/shoal/feedback", json={"id": one.id, **said}, headers={"Authorization": f"Bearer {key}"}
            )
            assert answer.status_code == status
    assert [vote.correction for vote in Votes(Capture(folder)).all()] == ["by shop-key"]
