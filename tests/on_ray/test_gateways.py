"""One service, two gateways: limits and pages are one, and what goes takes nothing along that it need not."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve as ray_serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from shoal.api.serve_args import ServeArgs
from shoal.on_ray import quotas, serve
from shoal.on_ray.loaded import NAMESPACE
from shoal.on_ray.pages import IMPORT_PATH
from shoal.on_ray.serve_config import GATEWAY, check_serve_config, serve_config
from tests.on_ray.breakable import SLOW
from tests.on_ray.test_serve import free_port, replicas, told, until
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill]

LONG = 240  # tokens, at 10 ms each: while a step is slow, some 48 s
AT_ONCE = 3
FREE, FEW = "sk-free", "sk-few"


class Service:
    def __init__(self, deploy: ServeDeploySchema, model: Path) -> None:
        self.deploy, self.model, self.url = deploy, model, serve.run(deploy, blocking=False)

    def gateways(self, number: int) -> None:
        """Waits for so many, which all answer."""
        until(lambda: len(replicas(GATEWAY)) == number, 120)
        until(lambda: len({line for line in told(self.url) if "gateway=" in line and "resumed" in line}) == number, 120)

    def again(self, number: int) -> None:
        """What ``serve deploy`` does with a file that asks for so many gateways."""
        values = self.deploy.model_dump(mode="json", exclude_unset=True)
        values["applications"][0]["deployments"] = [{"name": GATEWAY, "num_replicas": number}]
        client = _get_global_client()
        assert client is not None
        client.deploy_apps(check_serve_config(values, "again"))
        self.gateways(number)

    def ask(self, number: int, key: str, begun: Callable[[], object] = lambda: None) -> tuple[int, str]:
        """Status and text of a stream; "broken" in its place where that has no end. `begun` is called at its third line, and
        where there is none."""
        body = {
            "model": "fish", "prompt": f"{number}: abc", "max_tokens": LONG, "ignore_eos": True, "stream": True,
            "temperature": 0,
        }  # fmt: skip
        text, status, lines = "", 0, 0
        try:
            url, headers = f"{self.url}/v1/completions", {"Authorization": f"Bearer {key}"}
            with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as reply:
                status = reply.status_code
                for line in reply.iter_lines():
                    lines += 1
                    if lines == 3:
                        begun()
                    data = line.removeprefix("data: ")
                    if status != 200 or data == "[DONE]":
                        return status, text
                    text += json.loads(data)["choices"][0]["text"] if data else ""
        except httpx.TransportError:
            pass
        finally:
            if lines < 3:
                begun()
        return status, "broken"

    def round(self, streams: int = 12) -> Counter[int]:
        """Statuses of so many streams at once, of the key that may have a few: each has begun or was refused before any may
        end, for until then every step is slow."""
        begun, slow = threading.Semaphore(0), self.model / SLOW
        slow.touch()
        with ThreadPoolExecutor(streams) as pool:
            asked = [pool.submit(self.ask, number, FEW, begun.release) for number in range(streams)]
            try:
                for _ in asked:
                    assert begun.acquire(timeout=60)
            finally:
                slow.unlink()
            return Counter(status for status, _ in (stream.result() for stream in asked))

    def counters(self) -> dict[str, float]:
        pairs = [line.rpartition(" ") for line in told(self.url) if line.startswith("shoal:") and "_total" in line]
        return {name: float(value) for name, _, value in pairs}


@pytest.fixture(scope="module")
def service(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("service")
    lively().save(root / "model")
    (root / "keys").write_text(f"{FREE}\n{FEW} at_once={AT_ONCE}\n")
    args = ServeArgs(
        model=str(root / "model"), name="fish", api_keys=str(root / "keys"), min_gateways=2, max_gateways=2, ui=True
    )
    values = serve_config(args, port=(port := free_port())).model_dump(mode="json", exclude_unset=True)
    values["applications"][0]["import_path"] = "tests.on_ray.breakable:app"
    pages = {"name": "pages", "route_prefix": "/ui", "import_path": IMPORT_PATH}
    values["applications"].append({**pages, "args": {"api": f"http://127.0.0.1:{port}/v1"}})  # as a file says it
    try:
        service = Service(check_serve_config(values, "gateways"), root / "model")
        service.gateways(2)
        yield service
    finally:
        serve.stop()


EXACT = {200: AT_ONCE, 429: 12 - AT_ONCE}


def test_a_key_has_its_places_once_and_not_at_each_gateway(service: Service) -> None:
    """All streams of a round run at once, so of twelve as many are answered as a key may have, by both gateways together: also
    once what counts them has died."""
    assert [service.round() for _ in range(3)] == [EXACT] * 3
    assert len({name for name in service.counters() if 'code="rate_limit_exceeded"' in name}) == 2, "each refused some"
    ray.kill(ray.get_actor(f"{quotas.PREFIX}shoal", namespace=NAMESPACE), no_restart=False)
    statuses = service.round()
    assert AT_ONCE <= statuses[200] <= 2 * AT_ONCE and statuses.keys() <= {200, 429}, "meanwhile each by itself"
    until(lambda: service.round() == EXACT, 90)


def test_the_pages_are_one_process_below_the_same_address(service: Service) -> None:
    home = httpx.get(f"{service.url}/", follow_redirects=True, timeout=60)
    assert home.status_code == 200 and str(home.url).startswith(f"{service.url}/ui/") and "gradio" in home.text
    assert httpx.get(f"{service.url}/ui/gradio_api/info", timeout=60).status_code == 200
    pages = ray_serve.status().applications["pages"].deployments["Pages"]
    assert pages.replica_states == {"RUNNING": 1}


def test_a_killed_gateway_takes_its_own_streams_along_and_no_place_of_a_key(service: Service) -> None:
    """Those streams break, others go on to the same end, and later ones find the other at once."""
    wanted = [service.ask(number, FREE) for number in range(4)]
    begun = threading.Semaphore(0)
    with ThreadPoolExecutor(12) as pool:
        streams = [
            pool.submit(service.ask, number % 4, FEW if number < AT_ONCE else FREE, begun.release)
            for number in range(12)
        ]
        for _ in streams:
            assert begun.acquire(timeout=60)
        replicas(GATEWAY)[0].kill()
        found = [stream.result(timeout=120) for stream in streams]
    whole = sum(answer == wanted[number % 4] for number, answer in enumerate(found))
    assert 0 < whole < 12
    assert all(answer == wanted[n % 4] or answer[1] == "broken" or answer[0] >= 500 for n, answer in enumerate(found))
    service.gateways(2)
    assert service.ask(0, FREE) == wanted[0]
    until(lambda: service.round() == EXACT, 90)


def test_a_gateway_that_goes_loses_no_request_and_no_counter_drops(service: Service) -> None:
    wanted = [service.ask(number, FREE) for number in range(4)]
    before = service.counters()
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(service.ask, number % 4, FREE) for number in range(40)]
        service.again(1)
        between = service.counters()
        service.again(2)
        for number, answer in enumerate(answers):
            assert answer.result(timeout=180) == wanted[number % 4]
    after = service.counters()
    for earlier, later in ((before, between), (between, after)):
        assert all(later[name] >= value for name, value in earlier.items() if name in later)
        assert all("gateway=" in name for name in earlier if name not in later), "only of who is gone nothing is told"
    assert any(name not in between for name in before)
