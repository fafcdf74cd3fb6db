"""Adapters on Ray Serve: every replica has one before it is listed, one that starts later too, and a stream that loses its
replica goes on with the same one."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal import Engine, Model, Request, Sampling
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.on_ray import serve
from shoal.on_ray.serve_config import GATEWAY, serve_config
from tests.adapters import merged, write
from tests.on_ray.test_serve import free_port, replicas, scraped, until
from tests.unit.engine.lively import lively

# each replica may have to compile, on what may be a busy machine
pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]

LONG = 200  # tokens: so many that a replica is lost in the middle of them
FIRST = range(20, 24)  # token that each prompt begins with: they go to both replicas


@dataclass
class Served:
    http: httpx.Client
    folder: Path
    model: Model
    wants: dict[str, list[list[int]]]  # the answer to each prompt

    def names(self) -> list[str]:
        with suppress(httpx.HTTPError):
            answer = self.http.get("/v1/models")
            return [card["id"] for card in answer.json()["data"]] if answer.status_code == 200 else []
        return []

    def change(self, do: str, **body: str) -> int:
        return self.http.post(f"/v1/{do}_lora_adapter", json=body).status_code

    def make(self, name: str, seed: int, folder: Path) -> Path:
        place = write(folder / name, self.model, seed)
        sampling = Sampling(temperature=0, max_tokens=LONG, ignore_eos=True)
        engine = Engine(merged(self.model, place), units=600)
        answers = engine.generate([Request(prompt(first), sampling, depth="full") for first in FIRST])
        self.wants[name] = [answer.tokens for answer in answers]
        return place

    def all_say(self, name: str, fault: Callable[[], object] = lambda: None) -> None:
        """The merged model's tokens; `fault` happens when all streams have begun."""
        begun = threading.Semaphore(0)
        with ThreadPoolExecutor(len(FIRST)) as pool:
            answers = [pool.submit(self._said, name, first, begun.release) for first in FIRST]
            for _ in answers:
                assert begun.acquire(timeout=180)
            fault()
            assert [answer.result(timeout=120) for answer in answers] == self.wants[name]

    def _said(self, name: str, first: int, begun: Callable[[], object]) -> list[int]:
        body: dict[str, Any] = {
            "model": name, "prompt": prompt(first), "max_tokens": LONG, "temperature": 0, "ignore_eos": True,
            "depth": "full", "stream": True, "return_token_ids": True,
        }  # fmt: skip
        tokens: list[int] = []
        with self.http.stream("POST", "/v1/completions", json=body) as reply:
            assert reply.status_code == 200, reply.read()
            for count, line in enumerate(line for line in reply.iter_lines() if line.startswith("data: {")):
                if count == 1:
                    begun()
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                tokens += [token for choice in chunk["choices"] for token in choice.get("token_ids") or ()]
        return tokens


def prompt(first: int) -> list[int]:
    return [first, *range(30, 50)]


@pytest.fixture(scope="module")
def served(shared_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two replicas, with an adapter "a" from the start."""
    root, model = tmp_path_factory.mktemp("adapters"), lively()
    model.save(root / "model")
    (root / "open").mkdir()
    held = Served(httpx.Client(timeout=180), root / "open", model, {})
    args = ServeArgs(
        model=str(root / "model"), name="fish", min_replicas=2, max_replicas=2, cpus=0.5,
        adapters={"a": str(held.make("a", 1, root))}, adapters_from=str(held.folder),
    )  # fmt: skip
    try:
        held.http.base_url = serve.run(serve_config(args, port=free_port()), blocking=False)  # type: ignore[assignment]
        until(lambda: held.http.get("/ready").status_code == 200 and len(replicas(ENGINE)) == 2, 180)
        yield held
    finally:
        held.http.close()
        serve.stop()


def test_both_replicas_have_an_adapter_before_it_is_listed(served: Served) -> None:
    assert served.names() == ["fish", "a"]
    served.all_say("a")
    served.make("b", 2, served.folder)
    assert served.change("load", lora_name="b", lora_path="b") == 200
    assert served.names() == ["fish", "a", "b"]
    shutil.rmtree(served.folder / "b")  # nobody can load it any more
    served.all_say("b")
    assert served.change("load", lora_name="c", lora_path="b") == 400
    assert served.change("unload", lora_name="b") == 200
    assert served.names() == ["fish", "a"]
    answer = served.http.post("/v1/completions", json={"model": "b", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_a_lost_replica_or_gateway_takes_no_adapter_with_it(served: Served) -> None:
    place = served.make("d", 3, served.folder)
    assert served.change("load", lora_name="d", lora_path="d") == 200
    before = {process.pid for process in replicas(ENGINE)}
    served.all_say("d", replicas(ENGINE)[0].kill)
    until(lambda: len({process.pid for process in replicas(ENGINE)} - before) == 1, 180)
    until(lambda: scraped(served.http.base_url.port or 0)["num_replicas"] == 2, 180)  # it serves, too
    served.all_say("d")
    write(place, served.model, 4)  # other weights in its place: who has started has the right ones
    served.all_say("d", next(process for process in replicas(ENGINE) if process.pid in before).kill)
    replicas(GATEWAY)[0].kill()
    until(lambda: served.names() == ["fish", "a", "d"], 180)
    served.all_say("a")
