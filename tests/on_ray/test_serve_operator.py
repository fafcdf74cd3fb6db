"""No answer is of two models, and a slip of the operator costs no replica: changes of weights while things fail.

The service is that of `test_serve_faults`: two replicas, whose undisturbed answers come first.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ray import serve as ray_serve
from ray._private import worker

from shoal import Model
from shoal.api.serve_args import ENGINE
from tests.on_ray.breakable import BREAKS, SLOW
from tests.on_ray.test_serve import replicas, until
from tests.on_ray.test_serve_faults import LONG, MANY, Service, ask, same, service, under_load, undisturbed

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]  # also where a Ray takes minutes to start

__all__ = ["service", "undisturbed"]  # fixtures


@pytest.fixture(autouse=True)
def as_before(service: Service, undisturbed: list[dict[str, Any]]) -> Iterator[None]:
    """Each drill leaves two replicas of the first model."""
    yield
    service.again()
    until(lambda: ask_in_any_case(service) == undisturbed[0], 120)
    two_of_it(service)


def ask_in_any_case(service: Service) -> object:
    """What `ask` gives, or why it does not: in an update some requests are refused."""
    try:
        return ask(service, 0)
    except (AssertionError, httpx.HTTPError) as error:
        return error


def weights(directory: Path) -> list[dict[str, Any]]:
    return [{"name": ENGINE, "user_config": {"model": str(directory)}}]


def whole_of(directory: Path, number: int) -> str:
    """What the model answers to greedy `ask(service, number)`."""
    model = Model.load(directory)
    return model.tokenizer.decode(
        model.generate_naive(model.tokenizer.encode(f"{number % 3}: abc"), LONG, depth="full")
    )


def two_of_it(service: Service) -> None:
    until(lambda: len(replicas(ENGINE)) == 2 and service.stats().get("num_replicas") == 2, 90)


def test_a_stream_whose_replica_is_lost_goes_on_with_its_own_weights(
    service: Service, undisturbed: list[dict[str, Any]]
) -> None:
    """The other replica has new weights by then, and beside them the old ones, for as long as a stream of its own needs them:
    for the old ones every step is slow until then."""
    before, slow = kinds(service), service.models["first"] / SLOW

    def change_and_kill() -> None:
        service.again(deployments=weights(service.models["second"]))
        until(lambda: len(kinds(service) - before) == 1 == len(kinds(service)), 50)
        replicas(ENGINE)[0].kill()
        slow.unlink()

    slow.touch()
    try:
        answers = under_load(service, change_and_kill)
    finally:
        slow.unlink(missing_ok=True)
    for answer, wanted in zip(answers, undisturbed, strict=True):
        same(answer, wanted)


def new_answer(service: Service) -> str:
    body = {"model": "fish", "prompt": "0: abc", "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    body |= {"depth": "full"}
    text: str = httpx.post(f"{service.url}/v1/completions", json=body, timeout=90).json()["choices"][0]["text"]
    return text


def test_where_no_replica_has_its_weights_any_more_a_stream_ends_and_says_so(
    service: Service, undisturbed: list[dict[str, Any]]
) -> None:
    """Both replicas are killed as soon as new requests get new weights: streams of either kind run then."""
    begun, killed, before = threading.Semaphore(0), threading.Event(), kinds(service)

    def answers(number: int) -> list[dict[str, Any] | str]:
        """One after the other, until one ends that has seen the end of the replicas."""
        found = list[dict[str, Any] | str]()
        while not killed.is_set():
            try:
                found.append(ask(service, number, begun.release))
            except AssertionError as error:
                found.append(str(error))
        return found

    with ThreadPoolExecutor(MANY) as pool:
        talks = [pool.submit(answers, number) for number in range(MANY)]
        for _ in talks:
            assert begun.acquire(timeout=60)
        service.again(deployments=weights(service.models["second"]))
        until(lambda: len(kinds(service) - before) == 1 == len(kinds(service)), 60)
        for process in replicas(ENGINE):
            process.kill()
        killed.set()
        found = [talk.result(timeout=180) for talk in talks]
    two_of_it(service)
    ended = [answer for talk in found for answer in talk if isinstance(answer, str)]
    assert ended
    assert all("served no more" in answer for answer in ended)
    for number, talk in enumerate(found):
        second = ask(service, number)
        for answer in talk:
            assert isinstance(answer, str) or answer["text"] in (undisturbed[number]["text"], second["text"])


def kinds(service: Service) -> set[str]:
    """The weights that the replicas give to new requests."""
    lines = httpx.get(f"{service.url}/metrics", timeout=30).text.splitlines()
    return {
        line.partition('weights="')[2].partition('"')[0] for line in lines if line.startswith("shoal:replica_weights")
    }


def test_a_replica_that_is_stopped_loses_its_streams_to_the_other_and_nothing_else(
    service: Service, undisturbed: list[dict[str, Any]]
) -> None:
    """It keeps its connections, so nothing fails; what it had is answered while it still stands, and so is what is new."""
    resumed = service.stats()["requests_resumed_total"]
    tracebacks = told_of(service)
    victim = replicas(ENGINE)[0]
    stopped, states = threading.Event(), list[int]()

    def probe() -> None:
        while not stopped.wait(0.5):
            states.append(httpx.get(f"{service.url}/ready", timeout=30).status_code)

    prober = threading.Thread(target=probe)
    try:
        found = under_load(service, lambda: (victim.suspend(), prober.start()))
        found += [ask(service, number) for number in range(3)]
        assert victim.status() == psutil.STATUS_STOPPED
    finally:
        stopped.set()
        victim.resume()
        prober.join()
    for answer, wanted in zip(found, [*undisturbed, *undisturbed[:3]], strict=True):
        same(answer, wanted)
    assert service.stats()["requests_resumed_total"] > resumed
    assert set(states) == {200}
    two_of_it(service)
    until(lambda: service.stats()["num_requests_running"] == 0, 60)
    assert told_of(service) - tracebacks <= MANY  # one a stream at most, where Serve tells that it was taken away


def told_of(service: Service) -> int:
    """Tracebacks in Serve's logs."""
    node = worker._global_node
    assert node is not None
    logs = Path(node.get_session_dir_path(), "logs", "serve").glob("*.log")
    return sum(log.read_text(errors="replace").count("Traceback") for log in logs)


def test_a_failed_update_leaves_gateway_and_engines_as_they_were(
    service: Service, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """They go over to a model of another template together, or not at all."""
    other = Model.load(service.models["second"])
    other.chat_template = "{{ messages[0]['content'] }}"
    other.save(tmp_path / "other")
    (tmp_path / "other" / BREAKS).touch()
    before = {process.pid for process in [*replicas(ENGINE), *replicas("Gateway")]}
    changed = {**service.deploy.applications[0].args, "model": str(tmp_path / "other")}
    service.again(args=changed)
    until(lambda: ray_serve.status().applications["shoal"].status == "DEPLOY_FAILED", 120)
    assert before <= {process.pid for process in [*replicas(ENGINE), *replicas("Gateway")]}
    assert httpx.get(f"{service.url}/ready", timeout=30).status_code == 200
    for number in range(3):
        same(ask(service, number), undisturbed[number])
    service.again()
    until(lambda: ray_serve.status().applications["shoal"].status == "RUNNING", 120)
    same(ask(service, 0), undisturbed[0])
    (tmp_path / "other" / BREAKS).unlink()
    service.again(args=changed)
    second = whole_of(service.models["second"], 0)
    until(lambda: answered(service) == second, 120)


def answered(service: Service) -> str:
    """What `new_answer` gives, or what is said instead while gateways change over."""
    try:
        return new_answer(service)
    except (httpx.HTTPError, KeyError) as error:
        return str(error)
