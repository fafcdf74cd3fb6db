"""A service of one replica changes its weights under load: nobody is refused, and no stream breaks."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from ray.serve.context import _get_global_client

from shoal import Model
from shoal.api.serve_args import ENGINE, ServeArgs
from shoal.on_ray import serve
from shoal.on_ray.serve_config import check_serve_config, serve_config
from tests.on_ray.test_serve import free_port, until
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill]

STREAMS, QUEUE = 8, 2
BODY = {"model": "fish", "prompt": "abc", "max_tokens": 48, "ignore_eos": True, "temperature": 0, "stream": True}
CHANGES = ("second", "first", "second")

Answer = tuple[int, str, bool]  # status, text, whether it ended as it should


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, model in (("first", lively()), ("second", Model.from_preset("test", seed=11))):
        model.save(root / name)
    return {name: root / name for name in ("first", "second")}


def ask(url: str) -> Answer:
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY, timeout=120) as reply:
        if reply.status_code != 200:
            return reply.status_code, reply.read().decode(), False
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    whole = lines[-1] == "[DONE]" and not any("error" in chunk for chunk in chunks)
    return 200, "".join(choice["text"] for chunk in chunks for choice in chunk.get("choices", ())), whole


class Load:
    """So many clients, each with one request after the other until the block ends."""

    def __init__(self, url: str, streams: int = STREAMS) -> None:
        self._url, self._over = url, threading.Event()
        self.answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._client) for _ in range(streams)]

    def _client(self) -> None:
        while not self._over.is_set():
            try:
                self.answers.append(ask(self._url))
            except httpx.HTTPError as error:
                self.answers.append((0, repr(error), False))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)


def another(url: str, texts: set[str]) -> str:
    """The text that the model answers, once it is none of these."""
    found = list[str]()

    def answers() -> bool:
        status, text, _ = ask(url)
        found.append(text)
        return status == 200 and text not in texts

    until(answers, 120)
    return found[-1]


@pytest.fixture
def service(shared_ray: None, models: dict[str, Path]) -> Iterator[tuple[str, ServeArgs, int]]:
    args, port = ServeArgs(model=str(models["first"]), name="fish", cpus=0.5, max_batch=4, max_queue=QUEUE), free_port()
    try:
        yield serve.run(serve_config(args, port=port), blocking=False), args, port
    finally:
        serve.stop()


def test_one_replica_changes_its_weights_under_load_and_nobody_is_refused(
    service: tuple[str, ServeArgs, int], models: dict[str, Path]
) -> None:
    url, args, port = service
    texts = {"first": ask(url)[1]}
    with Load(url) as load:
        for name in CHANGES:
            values = serve_config(args, port=port).model_dump(mode="json", exclude_unset=True)
            values["applications"][0]["deployments"] = [{"name": ENGINE, "user_config": {"model": str(models[name])}}]
            client = _get_global_client()
            assert client is not None
            before = texts.get(name)
            client.deploy_apps(check_serve_config(values, "again"))
            texts[name] = another(url, {text for other, text in texts.items() if other != name})
            assert before in (None, texts[name])
    assert Counter((status, whole) for status, _, whole in load.answers).keys() == {(200, True)}, load.answers
    assert {text for _, text, _ in load.answers} == {*texts.values()}, "each answer is one model's"
