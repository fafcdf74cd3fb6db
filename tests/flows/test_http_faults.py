"""What clients and the engine do wrong, over real sockets. Each test ends by itself; the units are back within a second."""

from __future__ import annotations

import asyncio
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
import uvicorn

from shoal import Engine, Model
from shoal.api.fresh import EVERY_SECONDS
from shoal.api.limits import Limits
from shoal.engine.runner import Runner
from tests.flows.conftest import Service, running

pytestmark = pytest.mark.alone
STEP_SECONDS = 0.01  # least time of an engine step here, so that an answer of 300 tokens runs for seconds
CHAT = "/v1/chat/completions"
LONG: dict[str, Any] = {
    "model": "fish", "messages": [{"role": "user", "content": "x"}], "max_tokens": 300, "ignore_eos": True,
}  # fmt: skip
SHORT = {"model": "fish", "prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def slow() -> Iterator[Service]:
    """A service that takes its time."""
    step = Engine.step

    def slowly(engine: Engine) -> Any:
        time.sleep(STEP_SECONDS)
        return step(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "step", slowly)
        small_buffers(patch)
        model = Model.from_preset("test", seed=3)
        with running(model, max_queue=256, max_batch=4, max_batch_tokens=64, backlog=16) as started:
            yield started


def small_buffers(patch: pytest.MonkeyPatch) -> None:
    """The kernel keeps little of what a server sends; else it takes megabytes for a client that never reads."""
    bind = uvicorn.Config.bind_socket

    def bound(config: uvicorn.Config) -> socket.socket:
        server = bind(config)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # connections inherit it
        return server

    patch.setattr(uvicorn.Config, "bind_socket", bound)


def until(true: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def answers(service: Service) -> None:
    """The next request is answered within 5 s."""
    reply = httpx.post(f"{service.url}/v1/completions", json=SHORT, headers=service.headers, timeout=5)
    assert reply.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_gone_before_the_first_token_leaves_nothing(slow: Service, stream: bool) -> None:
    """One that waits in the queue, behind four that run; its connection breaks without a word."""
    with httpx.Client(base_url=slow.url, headers=slow.headers) as http:
        running_now = [http.build_request("POST", CHAT, json={**LONG, "stream": True}) for _ in range(4)]
        streams = [http.send(request, stream=True) for request in running_now]
        leaver = post(slow, {**LONG, "stream": stream})
        until(lambda: slow.stats()["num_requests_waiting"] == 1)
        leaver.close()
        until(lambda: slow.stats()["num_requests_waiting"] == 0, 1.0)
        assert slow.stats()["num_requests_running"] == 4
        for reply in streams:
            reply.close()
    slow.until_idle(1.0)
    answers(slow)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_gone_after_the_first_token_gives_its_units_back_within_a_second(slow: Service, stream: bool) -> None:
    cancelled, tokens = slow.stats()["requests_cancelled_total"], slow.stats()["generation_tokens_total"]
    leaver = post(slow, {**LONG, "stream": stream, "n": 2})
    until(lambda: slow.stats()["generation_tokens_total"] >= tokens + 4)
    assert slow.stats()["kv_cache_usage_perc"] > 0
    leaver.close()
    slow.until_idle(1.0)
    assert slow.stats()["requests_cancelled_total"] == cancelled + 2


def test_two_hundred_clients_time_out_at_once_and_the_next_is_answered(slow: Service) -> None:
    async def impatient() -> set[type]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=slow.url, headers=slow.headers, timeout=60, limits=limits) as http:

            async def ask() -> type:
                try:
                    async with asyncio.timeout(1):
                        return type(await http.post(CHAT, json=LONG))
                except TimeoutError:
                    return TimeoutError

            return set(await asyncio.gather(*[ask() for _ in range(200)]))

    assert asyncio.run(impatient()) == {TimeoutError}
    answers(slow)
    slow.until_idle(1.0)


class TestSlowReader:
    def test_it_holds_up_nobody_else_and_its_request_waits_for_it(self, slow: Service) -> None:
        # 1 MB of events
        body = {**LONG, "max_tokens": 150, "stream": True, "n": 3, "logprobs": True, "top_logprobs": 20}
        reader = post(slow, body, receive=4096)
        until(lambda: slow.stats()["num_requests_running"] == 3)
        tokens = [-1.0, 0.0]
        while tokens[-1] != tokens[-2]:  # until the buffers in between are full
            time.sleep(0.3)
            tokens.append(slow.stats()["generation_tokens_total"])
        assert slow.stats()["num_requests_running"] == 3, "the buffers took it all"
        answers(slow)
        reader.settimeout(5)
        read = b""
        while not read.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):  # it reads again, and misses nothing
            read += reader.recv(2**16)
        events = [line for line in read.split(b"\n") if line.startswith(b"data: {")]
        reasons = [json.loads(event[6:])["choices"][0]["finish_reason"] for event in events]
        assert reasons.count("length") == 3
        reader.close()
        slow.until_idle(1.0)

    def test_it_does_not_hold_units_beyond_its_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor its connection: when nothing could be sent for a while, that is closed."""
        monkeypatch.setattr("shoal.api.sent.SEND_SECONDS", 1.0)
        small_buffers(monkeypatch)
        model = Model.from_preset("test", seed=3)
        with running(model, max_batch=4, backlog=4, limits=Limits(seconds=1.0)) as service:
            answers(service)
            before = tasks(service)
            body = {**LONG, "stream": True, "n": 3, "logprobs": True, "top_logprobs": 20}
            reader = post(service, body, receive=4096)
            until(lambda: service.stats()["num_requests_running"] == 3)
            service.until_idle(3.0)
            assert service.stats()["requests_deadline_total"] == 3
            assert tasks(service) > before
            until(lambda: tasks(service) == before)
            reader.close()


class TestBrokenEngine:
    @pytest.fixture
    def service(self) -> Iterator[Service]:
        with running(Model.from_preset("test", seed=3), max_batch=4) as started:
            yield started

    def test_one_step_that_raises_ends_its_requests_and_the_next_are_served(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with httpx.Client(base_url=service.url, headers=service.headers, timeout=10) as http:
            with http.stream("POST", CHAT, json={**LONG, "stream": True}) as reply:
                lines = reply.iter_lines()
                next(lines)
                self.fail(monkeypatch, service, times=1)
                *_, last = [line for line in lines if line]
            assert reply.status_code == 200
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generation_failed"
            self.fail(monkeypatch, service, times=1)
            whole = http.post(CHAT, json=LONG)
            assert (whole.status_code, whole.json()["error"]["type"]) == (500, "server_error")
            assert [http.get(path).status_code for path in ("/health", "/ready")] == [200, 200]
        answers(service)
        service.until_idle(1.0)

    def test_an_engine_that_keeps_raising_is_dead_and_says_so(
        self, service: Service, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.fail(monkeypatch, service, times=1000)
        with httpx.Client(base_url=service.url, headers=service.headers, timeout=10) as http:
            statuses = [http.post(CHAT, json=LONG).status_code for _ in range(6)]
            assert statuses[:2] == [500, 500] and statuses[3:] == [503, 503, 503]
            dead = http.post(CHAT, json={**LONG, "stream": True})
            assert (dead.status_code, dead.json()["error"]["code"]) == (503, "engine_dead")
            assert 1 <= int(dead.headers["retry-after"]) <= 60
            time.sleep(EVERY_SECONDS)  # what these say is as old as that
            assert [http.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [503, 503, 200]

    def fail(self, monkeypatch: pytest.MonkeyPatch, service: Service, times: int) -> None:
        left, run = [times], Runner.run

        def raises(runner: Runner, plan: Any) -> Any:
            if left[0]:
                left[0] -= 1
                raise RuntimeError("boom")
            return run(runner, plan)

        monkeypatch.setattr(Runner, "run", raises)


@pytest.mark.parametrize("announced", [True, False])
def test_fifty_megabytes_are_413_and_the_connection_ends_well(slow: Service, announced: bool) -> None:
    piece = b" " * 2**20
    length = {"Content-Length": str(50 * 2**20)} if announced else {}
    headers = {**slow.headers, "Content-Type": "application/json", **length}
    reply = httpx.post(slow.url + CHAT, content=(piece for _ in range(50)), headers=headers, timeout=20)
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")
    answers(slow)


def test_a_body_that_does_not_come_is_408(slow: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shoal.api.service.BODY_SECONDS", 0.3)
    with connection(slow) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
        raw.sendall((head + f"Authorization: {slow.headers['Authorization']}\r\n\r\n{{").encode())
        raw.settimeout(5)
        reply = raw.recv(4096)
        while b"}" not in reply and (more := raw.recv(4096)):
            reply += more
    assert b" 408 " in reply and b'"deadline_exceeded"' in reply
    answers(slow)


def test_what_is_no_http_is_400_and_no_harm(slow: Service) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/nine\r\n\r\n", b"POST " + b"x" * 100_000 + b"\r\n"):
        with connection(slow) as raw:
            raw.sendall(nonsense)
            raw.settimeout(5)
            assert b" 400 " in raw.recv(4096)
    answers(slow)


@pytest.mark.parametrize("head", [b"GET /health HTTP/1.1\r\nHost: t\r\nX-Long: ", b"GET /"])
def test_headers_without_an_end_are_400_before_they_fill_the_memory(slow: Service, head: bytes) -> None:
    with connection(slow) as raw:
        raw.sendall(head)
        raw.settimeout(5)
        reply, sent = b"", 0
        while not reply and sent < 2**22:
            with suppress(ConnectionError):  # it has been closed, and the answer is there
                raw.sendall(b"x" * 2**14)
            sent += 2**14
            readable, _, _ = select.select([raw], [], [], 0.005)
            reply = raw.recv(4096) if readable else b""
    assert b" 400 " in reply and sent < 2**20
    answers(slow)


def test_a_body_too_large_is_refused_before_it_is_sent_where_the_client_asks_first(slow: Service) -> None:
    """As curl does; it would wait for the whole time that a refused body is read."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nContent-Length: {50 * 2**20}\r\n"
    with connection(slow) as raw:
        raw.settimeout(5)
        raw.sendall((head + f"Authorization: {slow.headers['Authorization']}\r\nExpect: 100-continue\r\n\r\n").encode())
        assert raw.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_without_an_end_is_refused_and_its_connection_closed(
    slow: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal.api.middleware.DISCARD_SECONDS", 0.5)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: t\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connection(slow) as raw:
        raw.settimeout(5)
        raw.sendall(head.encode())
        assert b" 401 " in raw.recv(4096)  # no key: its body is read for a while
        with pytest.raises(ConnectionError):
            for _ in range(100):
                raw.sendall(b"10\r\n" + b" " * 16 + b"\r\n")
                time.sleep(0.01)


def test_a_body_that_nobody_reads_does_not_end_its_connection(slow: Service) -> None:
    with httpx.Client(base_url=slow.url, headers=slow.headers, timeout=5) as http:
        for path, status in (("/nothing", 404), ("/health", 405), (CHAT, 415)):
            reply = http.post(path, content=b"x" * 2**20)
            assert (reply.status_code, reply.headers.get("connection")) == (status, None)


def test_a_client_that_offers_http_2_is_answered_in_http_1(slow: Service) -> None:
    """As Java's does, with every request in clear text."""
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAAP__"}
    reply = httpx.post(f"{slow.url}/v1/completions", json=SHORT, headers=slow.headers | upgrade, timeout=5)
    assert reply.status_code == 200


def tasks(service: Service) -> int:
    """How many tasks the server's loop holds."""

    async def count() -> int:
        return len(asyncio.all_tasks())

    return service.thread.run(count())


def connection(service: Service, receive: int | None = None) -> socket.socket:
    """A socket to the service; `receive`: bytes that the kernel may keep of what it does not read."""
    host, _, port = service.url.removeprefix("http://").partition(":")
    raw = socket.socket()
    if receive:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
    raw.connect((host, int(port)))
    return raw


def post(service: Service, body: dict[str, Any], receive: int | None = None) -> socket.socket:
    """Sends a chat request, and reads nothing."""
    data = json.dumps(body).encode()
    head = [f"POST {CHAT} HTTP/1.1", "Host: t", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    head += [f"{name}: {value}" for name, value in service.headers.items()]
    raw = connection(service, receive)
    raw.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + data)
    return raw
