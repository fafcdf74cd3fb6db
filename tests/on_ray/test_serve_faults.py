"""What dies under load, and what the clients see of it: nothing. A service of two replicas, each fault while streams run.

The answers of streams that nothing disturbs come first: texts, ends, counts and logprobs must be those.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import ray
from ray import serve as ray_serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from shoal import Model
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.engine.engine import MAX_FAILURES
from shoal.on_ray import serve
from shoal.on_ray.serve_config import check_serve_config, serve_config
from tests.on_ray.test_serve import free_port, replicas, samples, until
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill]

LONG = 320  # tokens: long enough that a fault meets every stream in the middle
MANY = 12  # streams at once
QUEUE = 2  # requests that may wait
BODIES: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1, "seed": 5, "n": 2},
    {"temperature": 0.8, "seed": 6, "frequency_penalty": 0.5, "presence_penalty": 0.2, "repetition_penalty": 1.1},
    {"temperature": 1, "seed": 7, "logprobs": 2},
    {"temperature": 1, "seed": 8, "stop": ["qqq", "zx"], "depth": "middle"},
    {"temperature": 1, "seed": 9, "structured_outputs": {"regex": "[a-f]{300,310}"}, "ignore_eos": False},
    {"temperature": 1, "seed": 10, "speculative": 3, "depth": "full"},
]


@dataclass(frozen=True)
class Service:
    url: str
    deploy: ServeDeploySchema
    models: dict[str, Path]

    def again(self, **changed: Any) -> None:
        """What ``serve deploy`` does with a changed file."""
        values = self.deploy.model_dump(mode="json", exclude_unset=True)
        values["applications"][0] |= changed
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(check_serve_config(values, "again"))

    def stats(self) -> dict[str, float]:
        return samples(self.url)


@pytest.fixture(scope="module")
def service(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("models")
    models = {"first": lively(), "second": Model.from_preset("test", seed=11)}
    for name, model in models.items():
        model.save(root / name)
    args = ServeArgs(model=str(root / "first"), name="fish", min_replicas=2, max_replicas=2, cpus=0.5, max_queue=QUEUE)
    values = serve_config(args, port=free_port()).model_dump(mode="json", exclude_unset=True)
    values["applications"][0]["import_path"] = "tests.on_ray.breakable:app"
    deploy = check_serve_config(values, "faults")
    try:
        service = Service(serve.run(deploy, blocking=False), deploy, {name: root / name for name in models})
        until(lambda: httpx.get(f"{service.url}/ready").status_code == 200)
        yield service
    finally:
        serve.stop()


@pytest.fixture(autouse=True)
def whole(service: Service) -> None:
    """Each test begins with two replicas that answer, whatever the one before it left."""
    until(lambda: len(replicas(ENGINE)) == 2 and service.stats().get("num_replicas") == 2, 90)


def ask(service: Service, number: int, begun: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """The answer to one of `BODIES`, put together from its stream; `begun` is called at its third chunk, which all have."""
    body = {"model": "fish", "prompt": f"{number % 3}: abc", "max_tokens": LONG, "ignore_eos": True, "stream": True}
    body |= {"stream_options": {"include_usage": True}} | BODIES[number % len(BODIES)]
    texts: dict[int, str] = {}
    found: dict[str, Any] = {"text": texts, "reasons": {}, "logprobs": [], "usage": None}
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=90) as reply:
        assert reply.status_code == 200, reply.read()
        for count, line in enumerate(line for line in reply.iter_lines() if line):
            if count == 2:
                begun()
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return found
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
                if choice["finish_reason"]:
                    found["reasons"][choice["index"]] = choice["finish_reason"]
                if choice.get("logprobs"):
                    found["logprobs"] += choice["logprobs"]["token_logprobs"]
            found["usage"] = chunk.get("usage") or found["usage"]
    raise AssertionError("the stream ended without [DONE]")


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> list[dict[str, Any]]:
    return under_load(service, lambda: None)


def same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert (got["text"], got["reasons"]) == (wanted["text"], wanted["reasons"])
    assert got["logprobs"] == pytest.approx(wanted["logprobs"], abs=1e-5)
    for name in ("prompt_tokens", "completion_tokens", "depth"):
        assert got["usage"][name] == wanted["usage"][name]


def under_load(service: Service, fault: Callable[[], object]) -> list[dict[str, Any]]:
    """The answers of `MANY` streams; `fault` happens when all of them have begun."""
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(MANY) as pool:
        answers = [pool.submit(ask, service, number, begun.release) for number in range(MANY)]
        for _ in answers:
            assert begun.acquire(timeout=60)
        fault()
        return [answer.result(timeout=120) for answer in answers]


def test_a_conversation_finds_its_beginning_cached(service: Service) -> None:
    """Each goes on where it was: with a router that knows no prompts, half of the turns would miss."""
    for talk in range(4):
        prompt, cached = f"{talk}: how deep is the sea? ", list[int]()
        for _ in range(4):
            body = {"model": "fish", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
            answer = httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).json()
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            prompt += "and the next one? "
        assert cached[0] == 0
        assert all(later > before for before, later in pairwise(cached))


def test_ten_times_too_many_clients_are_answered_or_told_to_come_again(service: Service) -> None:
    """Each replica's bound changes in place; the processes stay. A burst that the replicas have room for is no overload,
    however short the queue is."""
    before = {process.pid for process in replicas(ENGINE)}
    service.again(deployments=[{"name": ENGINE, "max_ongoing_requests": 1}])

    def one(number: int) -> httpx.Response:
        body = {"model": "fish", "prompt": f"{number}: abc", "max_tokens": 64, "ignore_eos": True}
        return httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)

    def overload() -> list[httpx.Response]:
        with ThreadPoolExecutor(40) as pool:
            return list(pool.map(one, range(40)))

    until(lambda: {reply.status_code for reply in overload()} == {200, 429})
    replies = overload()
    assert sum(reply.status_code == 200 for reply in replies) >= 2 + QUEUE
    for reply in replies:
        assert reply.status_code in (200, 429)
        if reply.status_code == 429:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["type"] == "rate_limit_error"
    service.again()
    until(lambda: {reply.status_code for reply in overload()} == {200})
    for _ in range(3):
        assert {reply.status_code for reply in overload()} == {200}
    assert {process.pid for process in replicas(ENGINE)} == before


@pytest.mark.smoke
def test_a_killed_replica_takes_no_stream_with_it(service: Service, undisturbed: list[dict[str, Any]]) -> None:
    before = service.stats()["requests_resumed_total"]
    (victim, other) = replicas(ENGINE)

    def kill() -> None:
        victim.kill()
        until(lambda: service.stats().get("num_replicas_starting") == 1, 60)  # the one that takes its place

    for answer, wanted in zip(under_load(service, kill), undisturbed, strict=True):
        same(answer, wanted)
    assert service.stats()["requests_resumed_total"] > before
    until(lambda: len(replicas(ENGINE)) == 2 and service.stats().get("num_replicas") == 2, 60)
    until(lambda: service.stats().get("num_replicas_starting") == 0, 60)
    assert other.pid in [process.pid for process in replicas(ENGINE)]


def test_a_stream_may_lose_the_replica_that_took_it_over_as_well(
    service: Service, undisturbed: list[dict[str, Any]]
) -> None:
    """More go on than ran: some twice. On a busy machine many end between the two kills, so it is played up to three times."""

    def went_on_twice() -> bool:
        before = service.stats()["requests_resumed_total"]
        running = 0.0

        def kill_both() -> None:
            nonlocal running
            running = service.stats()["num_requests_running"]
            (first, second) = replicas(ENGINE)
            first.kill()
            until(lambda: service.stats()["requests_resumed_total"] > before)
            second.kill()

        for answer, wanted in zip(under_load(service, kill_both), undisturbed, strict=True):
            same(answer, wanted)
        resumed = service.stats()["requests_resumed_total"] - before
        until(lambda: len(replicas(ENGINE)) == 2 and service.stats().get("num_replicas") == 2, 60)
        return resumed > running

    assert any(went_on_twice() for _ in range(3))


def test_an_engine_that_raises_is_replaced(service: Service, undisturbed: list[dict[str, Any]]) -> None:
    """Requests of a step that fails end with it, since they may be what makes it fail. After the last of `MAX_FAILURES` the
    engine is dead for everybody: its requests go on at the other replica, until Serve has put a new one in its place."""
    before = {process.pid for process in replicas(ENGINE)}
    ray_serve.get_deployment_handle(ENGINE, "shoal").break_.remote().result()
    statuses = Counter[int]()
    deadline = time.monotonic() + 90
    while len({process.pid for process in replicas(ENGINE)} - before) < 1 or service.stats().get("num_replicas") != 2:
        assert time.monotonic() < deadline
        body = {"model": "fish", "prompt": f"{sum(statuses.values())}: abc", "max_tokens": 4}
        statuses[httpx.post(f"{service.url}/v1/completions", json=body, timeout=60).status_code] += 1
    assert statuses[500] == MAX_FAILURES - 1
    assert statuses.keys() == {200, 500}
    for number in range(3):
        same(ask(service, number), undisturbed[number])


def test_a_killed_controller_stops_nothing(service: Service, undisturbed: list[dict[str, Any]]) -> None:
    def kill() -> None:
        ray.kill(ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE), no_restart=False)

    for answer, wanted in zip(under_load(service, kill), undisturbed, strict=True):
        same(answer, wanted)
    same(ask(service, 0), undisturbed[0])  # meanwhile Ray starts it anew


def test_weights_change_while_streams_run(service: Service, undisturbed: list[dict[str, Any]]) -> None:
    """Streams end on the weights that they began with; what comes later gets the new ones, from the same processes."""
    processes = {process.pid for process in replicas(ENGINE)}
    new = {"name": ENGINE, "user_config": {"model": str(service.models["second"])}}
    for answer, wanted in zip(under_load(service, lambda: service.again(deployments=[new])), undisturbed, strict=True):
        same(answer, wanted)
    wanted = Model.load(service.models["second"])
    tokens = wanted.generate_naive(wanted.tokenizer.encode("0: abc"), LONG, depth="full")
    until(lambda: ask(service, 0)["text"][0] == wanted.tokenizer.decode(tokens), 60)
    assert {process.pid for process in replicas(ENGINE)} == processes
    wrong = {"name": ENGINE, "user_config": {"model": str(service.models["second"] / "missing")}}
    service.again(deployments=[wrong])
    until(lambda: service.stats().get("weights_update_refused") == 2, 60)  # and both go on with what they have
    assert ask(service, 0)["text"][0] == wanted.tokenizer.decode(tokens)
    service.again(deployments=[{**new, "user_config": {"model": str(service.models["first"])}}])
    until(lambda: ask(service, 0) == undisturbed[0], 60)


def test_replicas_that_are_too_many_leave_when_their_streams_have_ended(
    service: Service, undisturbed: list[dict[str, Any]]
) -> None:
    resumed = service.stats()["requests_resumed_total"]
    fewer = [{"name": ENGINE, "num_replicas": 1}]
    for answer, wanted in zip(under_load(service, lambda: service.again(deployments=fewer)), undisturbed, strict=True):
        same(answer, wanted)
    until(lambda: len(replicas(ENGINE)) == 1, 60)
    assert service.stats()["requests_resumed_total"] == resumed  # each ended where it was
    service.again()
    until(lambda: service.stats().get("num_replicas") == 2, 60)


def test_a_rolling_update_answers_every_request(service: Service, undisturbed: list[dict[str, Any]]) -> None:
    """Gateway and both replicas are replaced, one after the other, while requests come without a pause."""
    before = {process.pid for process in [*replicas(ENGINE), *replicas("Gateway")]}
    args = {**service.deploy.applications[0].args, "max_queue": 64}
    service.again(args=args)
    deadline = time.monotonic() + 120
    with ThreadPoolExecutor(4) as pool:
        while {process.pid for process in [*replicas(ENGINE), *replicas("Gateway")]} & before:
            assert time.monotonic() < deadline
            for number, answer in enumerate(pool.map(lambda number: ask(service, number), range(4))):
                same(answer, undisturbed[number])
    same(ask(service, 0), undisturbed[0])


def test_a_killed_proxy_is_back_in_seconds(service: Service, undisturbed: list[dict[str, Any]]) -> None:
    """Its connections end with it; the engines are rid of their requests, and the next ones are answered."""
    (proxy,) = [
        child
        for child in psutil.Process().children(recursive=True)
        if child.status() != psutil.STATUS_ZOMBIE and "ray::ProxyActor" in " ".join(child.cmdline())
    ]

    def answers() -> bool:
        try:
            return httpx.get(f"{service.url}/ready", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    with httpx.stream(
        "POST", f"{service.url}/v1/completions", timeout=60,
        json={"model": "fish", "prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": True},
    ) as reply:  # fmt: skip
        lines = reply.iter_lines()
        next(lines)
        proxy.send_signal(signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            list(lines)
    until(answers, 60)
    same(ask(service, 1), undisturbed[1])
    until(lambda: service.stats()["num_requests_running"] == 0, 10)
