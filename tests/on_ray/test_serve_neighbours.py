"""Crowds and neighbours on Ray: who comes at a cold start, many at once, a key that takes all there is, and a gateway that dies
under them. One service that has no replica while nobody asks, with the pages, and engines that take their time."""

from __future__ import annotations

import json
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from shoal.api.serve_args import ServeArgs
from shoal.on_ray import serve
from shoal.on_ray.serve_config import check_serve_config, serve_config
from tests.on_ray.test_serve import free_port, samples, until
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]  # also where a Ray takes minutes to start

FEW, MANY = "sk-few", "sk-many"  # keys
BATCH, QUEUE = 8, 384  # the replica holds two batches and the queue: 400


@dataclass(frozen=True)
class Service:
    url: str

    def post(self, number: int, key: str = FEW, **more: Any) -> httpx.Response:
        body = {"model": "fish", "prompt": f"{number}: abc", "max_tokens": 4, "ignore_eos": True, **more}
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=300)

    def stats(self) -> dict[str, float]:
        return samples(self.url)

    def streams(self, count: int, buffer: int = 2**16, **more: Any) -> Iterator[socket.socket]:
        """So many streams of `MANY` that nobody reads; the kernel keeps `buffer` bytes of each."""
        body = {"model": "fish", "prompt": "abc", "max_tokens": 350, "ignore_eos": True, "stream": True, **more}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: t\r\nAuthorization: Bearer {MANY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        for _ in range(count):
            raw = socket.socket()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            raw.connect(("127.0.0.1", httpx.URL(self.url).port))
            raw.sendall(head.encode() + data)
            yield raw

    def idle(self) -> bool:
        found = self.stats()
        return found.get("num_requests_running", 0) + found.get("num_requests_waiting", 0) == 0


@pytest.fixture(scope="module")
def service(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("crowds")
    lively().save(root / "model")
    (root / "keys").write_text(f"{FEW} name=few\n{MANY} name=many\n")
    args = ServeArgs(
        model=str(root / "model"), name="fish", min_replicas=0, max_replicas=1, cpus=0.5, max_batch=BATCH,
        max_queue=QUEUE, api_keys=str(root / "keys"), ui=True,
    )  # fmt: skip
    values = serve_config(args, port=free_port()).model_dump(mode="json", exclude_unset=True)
    values["applications"][0]["import_path"] = "tests.on_ray.breakable:app"
    try:
        service = Service(serve.run(check_serve_config(values, "crowds"), blocking=False))
        until(lambda: httpx.get(f"{service.url}/ready").status_code == 200)
        yield service
    finally:
        serve.stop()


def crowd(service: Service, count: int) -> Counter[int]:
    with ThreadPoolExecutor(count) as pool:
        return Counter(reply.status_code for reply in pool.map(service.post, range(count)))


def test_fifty_clients_at_a_cold_start_are_all_answered(service: Service) -> None:
    assert service.stats()["num_replicas"] == 0
    assert crowd(service, 50) == {200: 50}


def test_four_hundred_at_once_are_all_answered(service: Service) -> None:
    assert crowd(service, 400) == {200: 400}
    until(service.idle)


def test_a_key_that_has_all_places_holds_up_no_other(service: Service) -> None:
    """Some 400 long answers run and wait, for a minute and more, and more come. Another key's requests are answered
    meanwhile, in places of those that have waited."""
    enough, streams = threading.Event(), list[socket.socket]()

    def fill() -> None:
        for raw in service.streams(QUEUE // 64, n=64):
            streams.append(raw)
        for raw in service.streams(400):
            streams.append(raw)
            if enough.wait(0.05):
                return

    # there is a replica: while there is none, only the queue may wait for one
    assert service.post(0).status_code == 200
    filler = threading.Thread(target=fill)
    filler.start()
    try:
        until(lambda: service.stats().get("requests_refused_total", 0) > 0, 150)
        for number in range(3):
            assert service.post(number).status_code == 200
        found = service.stats()
        assert found["num_requests_running"] == BATCH and found["num_requests_waiting"] >= QUEUE / 2
    finally:
        enough.set()
        filler.join()
        heads = [_head(raw) for raw in streams]
        for raw in streams:
            raw.close()
    assert b"HTTP/1.1 429 Too Many Requests" in heads
    until(service.idle, 120)


def _head(raw: socket.socket) -> bytes:
    """The first line of an answer that has begun."""
    raw.setblocking(False)
    with suppress(BlockingIOError):
        return raw.recv(256).partition(b"\r\n")[0]
    return b""


def test_forty_streams_that_nobody_reads_hold_up_no_other(service: Service) -> None:
    assert service.post(0).status_code == 200
    with ExitStack() as stack:
        for raw in service.streams(40, 4096, logprobs=5):
            stack.enter_context(raw)
        until(lambda: service.stats().get("num_requests_running") == BATCH, 120)
        assert [service.post(number).status_code for number in range(3)] == [200] * 3
    until(service.idle, 60)
