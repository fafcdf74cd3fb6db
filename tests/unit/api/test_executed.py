"""Tools that a service of the operator's executes: their list, a call, its refusal, and a service that is not there."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from recipes.customer_service.service import serving
from recipes.customer_service.shop import TOOLS, Shop
from recipes.splits import SUITE
from shoal.api.executed import checked
from shoal.errors import ConfigError

PATH = "/v1/shoal/tools"
pytestmark = pytest.mark.anyio


@pytest.fixture
def shop() -> Iterator[str]:
    with serving() as url:
        yield url


async def test_they_are_listed_with_what_a_model_is_told(connect: Callable[..., httpx.AsyncClient], shop: str) -> None:
    told = (await connect(tools=f"{shop}/").get(PATH)).json()
    order, item = Shop(SUITE, "en").orders("on the way")[0]
    assert told["data"] == TOOLS and told["system"].endswith(f"Orders: {order} {item}.")
    order, item = Shop(SUITE, "zh").orders("on the way")[0]
    assert told["systems"]["zh"].endswith(f"Orders: {order} {item}.") and told["systems"]["en"] == told["system"]
    assert (await connect().get(PATH)).status_code == 404, "without the option there are none"


async def test_a_call_is_made_in_the_chats_own_place(connect: Callable[..., httpx.AsyncClient], shop: str) -> None:
    http = connect(tools=shop)
    order = Shop(SUITE, "en").orders("packed")[0][0]
    first, again, other = [
        (await http.post(f"{PATH}/{chat}/cancel_order", json={"arguments": {"order": order}})).json()
        for chat in ("chat-1", "chat-1", "chat-2")
    ]
    assert first["given"]["refund"] and again["given"] == {"error": "already cancelled"}
    assert other["given"] == first["given"]


async def test_a_chat_that_is_named_after_a_language_is_in_that_shop(
    connect: Callable[..., httpx.AsyncClient], shop: str
) -> None:
    order, item = Shop(SUITE, "zh").orders("on the way")[0]
    body = {"arguments": {"order": order}}
    found = (await connect(tools=shop).post(f"{PATH}/zh-chat-1/track_order", json=body)).json()
    assert found["given"]["item"] == item


async def test_what_is_no_call_is_refused(connect: Callable[..., httpx.AsyncClient], shop: str) -> None:
    http = connect(tools=shop)
    wrong = await http.post(f"{PATH}/chat/track_order", json={"arguments": {"number": "1"}})
    assert wrong.status_code == 400 and "track_order.number" in wrong.json()["error"]["message"]
    for path, body in (
        ("chat/track_order", {"args": {}}), ("chat/track_order", {"arguments": "x"}), ("..%2Fx/track_order", {"arguments": {}}),
        ("chat/a b", {"arguments": {}}),
    ):  # fmt: skip
        assert (await http.post(f"{PATH}/{path}", json=body)).status_code in (400, 404)


async def test_a_service_that_does_not_answer_is_said_in_a_line(connect: Callable[..., httpx.AsyncClient]) -> None:
    told = await connect(tools="http://127.0.0.1:9").get(PATH)
    assert told.status_code == 503 and "--tools" in told.json()["error"]["message"]


@contextmanager
def giving(body: bytes) -> Iterator[str]:
    """A service that gives this, whatever it is asked."""

    class Gives(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gives)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    "body", [b"{", b'{"day": NaN}', b'{"price": 1e999}', rb'"\ud800"', b"[" * 50_000 + b"]" * 50_000, b" " * 100_001]
)
async def test_what_no_answer_could_repeat_is_the_service_s_fault(
    connect: Callable[..., httpx.AsyncClient], body: bytes
) -> None:
    """A number that is none, half of a surrogate pair and JSON that is nested too deeply were a 500."""
    with giving(body) as url:
        told = await connect(tools=url).post(f"{PATH}/chat/track_order", json={"arguments": {}})
    assert told.status_code == 503 and "service of tools" in told.json()["error"]["message"]


async def test_what_is_nested_deeply_is_given_as_it_is(connect: Callable[..., httpx.AsyncClient]) -> None:
    with giving(b"[" * 400 + b"]" * 400) as url:
        told = await connect(tools=url).post(f"{PATH}/chat/track_order", json={"arguments": {}})
    assert told.status_code == 200 and json.dumps(told.json()["given"]) == "[" * 400 + "]" * 400


@pytest.mark.parametrize("arguments", [rb'{"order": "\ud800"}', b'{"order": NaN}', b'{"order": 1e999}'])
async def test_arguments_that_cannot_be_sent_are_the_client_s_fault(
    connect: Callable[..., httpx.AsyncClient], shop: str, arguments: bytes
) -> None:
    content = b'{"arguments": ' + arguments + b"}"
    told = await connect(tools=shop).post(
        f"{PATH}/chat/track_order", content=content, headers={"Content-Type": "application/json"}
    )
    assert told.status_code == 400


@pytest.mark.parametrize("url", ["shop", "127.0.0.1:80", "ftp://x", "http://", "http://a b"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"args\.tools"):
        checked(url)
