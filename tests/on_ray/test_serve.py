"""The service on Ray Serve, over its HTTP proxy: an fp32 and an INT8 model side by side in one application, below a path."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import openai
import psutil
import pytest
import torch

from shoal import Engine, Model, Request, Sampling
from shoal.api.chunks import token_name
from shoal.api.fresh import EVERY_SECONDS, PATIENCE_SECONDS
from shoal.api.serve_args import ServeArgs
from shoal.errors import CheckpointError, ResourceError
from shoal.loop.capture import Capture
from shoal.model.cost import kv_bytes_stored
from shoal.on_ray import serve
from shoal.on_ray.serve_config import check_serve_config, serve_config

pytestmark = pytest.mark.ray

NAMES = ("fp32", "int8")
MESSAGES: list[Any] = [{"role": "user", "content": "How deep is the sea?"}]


@dataclass(frozen=True)
class Service:
    url: str
    directories: dict[str, Path]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def metrics(self, name: str) -> dict[str, float]:
        """The values of the model's metrics now."""
        found = defaultdict[str, float](float)
        for line in told(self.url):
            if line.startswith("shoal:") and f'model_name="{name}"' in line:
                found[line.removeprefix("shoal:").partition("{")[0]] += float(line.split()[-1])
        return found

    def metric(self, name: str, metric: str) -> float:
        """One of them."""
        return self.metrics(name)[metric]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    model = Model.from_preset("test", seed=3)
    model.save(root / "fp32")
    model.quantized().save(root / "int8")
    return {name: root / name for name in NAMES}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("captured") / "rows"


@pytest.fixture(scope="module")
def service(shared_ray: None, models: dict[str, Path], captured: Path) -> Iterator[Service]:
    served = {name: str(directory) for name, directory in models.items()}
    args = ServeArgs(models=served, capture=str(captured), capture_texts=True)
    values = serve_config(args, port=free_port()).model_dump(mode="json", exclude_unset=True)
    values["applications"][0]["route_prefix"] = "/sea"
    deploy = check_serve_config(values, "below a path")
    try:
        yield Service(serve.run(deploy, blocking=False), models)
    finally:
        serve.stop()


def test_strangers_can_call_none_of_the_ports(service: Service) -> None:
    """Replicas take pickled requests on a port of every interface, so a call without Ray's token must be refused there."""
    ours = {process.pid for process in psutil.Process().children(recursive=True)}
    listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.pid in ours]
    loopback = ("127.0.0.1", "::1", "::ffff:127.0.0.1")
    exposed = {c.laddr.port for c in listening if c.laddr.ip not in loopback}
    assert len(exposed) == 1 + len(NAMES)  # the gateway and an engine of each model
    for port in exposed:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_stream("/ray.serve.ASGIService/HandleRequestStreaming")
            with pytest.raises(grpc.RpcError, match="UNAUTHENTICATED"):
                list(call(b"", timeout=30))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(true: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def told(url: str) -> list[str]:
    """The lines of /metrics, no older than this call. They are asked for anew after `EVERY_SECONDS`; where engines have not
    answered within `PATIENCE_SECONDS`, what they said before is told once more."""
    for _ in range(3):
        time.sleep(EVERY_SECONDS)
        reply = httpx.get(f"{url}/metrics", timeout=120)
        if reply.elapsed.total_seconds() < PATIENCE_SECONDS:
            break
    return reply.text.splitlines()


def samples(url: str) -> dict[str, float]:
    """What /metrics says now of the one model that is served at `url`."""
    found = defaultdict[str, float](float)
    for name, _, value in [line.rpartition(" ") for line in told(url) if line.startswith("shoal:")]:
        found[name.removeprefix("shoal:").partition("{")[0]] += float(value)  # of all replicas and gateways
    return dict(found)


def scraped(port: int) -> dict[str, float]:
    """As `samples`, by its port."""
    return samples(f"http://127.0.0.1:{port}")


@pytest.mark.usefixtures("shared_ray")  # beside it, as long as nothing is served there
@pytest.mark.parametrize(("how", "at_first"), [(["--replicas", "0:2"], 0), (["--no-ray"], 1)], ids=["ray", "no-ray"])
@pytest.mark.drill
def test_shoal_serve_answers_until_ctrl_c_and_leaves_nothing(
    models: dict[str, Path], how: list[str], at_first: int, tmp_path: Path
) -> None:
    """On Ray from no replica at all: the first request brings one, and waits for it. The engine is as the command says. Logs
    are where it says."""
    port = free_port()
    how = [*how, "--logs", str(tmp_path / "logs")] if "--no-ray" not in how else how
    command = [sys.executable, "-m", "shoal.cli", "serve", "--model", str(models["int8"]), "--kv-cache-dtype", "int8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, "--name", "fish", "--port", str(port), "--no-ui", *how],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            assert process.stdout is not None
            assert f"http://127.0.0.1:{port}/v1" in process.stdout.readline()
            assert scraped(port)["num_replicas"] == at_first
            client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
            stream = client.chat.completions.create(model="fish", messages=MESSAGES, max_tokens=8, stream=True)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] in ("length", "stop")
            config = Model.load(models["int8"]).config
            unit = kv_bytes_stored(config, 1, config.group_layers, torch.int8)
            said = scraped(port)
            assert said["kv_cache_bytes"] / said["kv_units"] == unit
            assert said["num_replicas"] == 1
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            assert process.wait(120) == 0
            _, left = psutil.wait_procs(children, timeout=120)
            assert left == []
            said_last = process.stdout.read().splitlines()
            assert said_last[-1] == "The service has stopped."
            assert [line for line in said_last if "raylet" in line] == []
            logs = [path for path in tmp_path.glob("logs/*/*") if path.name.startswith("worker-")]
            told = [line for path in logs for line in path.read_text().splitlines()]
            assert "--no-ray" in how or any('"path": "/v1/chat/completions", "status": 200' in line for line in told)
        finally:
            process.kill()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", ["shallow", "middle", "full"])
def test_greedy_tokens_over_http_are_the_model_s_own(service: Service, name: str, depth: str) -> None:
    model = Model.load(service.directories[name])
    prompt = model.tokenizer.encode("def f(x):")
    naive = model.generate_naive(prompt, 24, depth=depth)
    (offline,) = Engine(model).generate([Request(prompt, Sampling(temperature=0, max_tokens=24), depth=depth)])
    answer = service.client.completions.create(
        model=name, prompt=prompt, temperature=0, max_tokens=24, logprobs=0, extra_body={"depth": depth}
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert offline.tokens == naive
    assert logprobs.tokens == [token_name(model.tokenizer, token) for token in naive]
    assert answer.choices[0].text == model.tokenizer.decode(naive)


def test_each_request_leaves_a_captured_row_with_what_its_replica_said(service: Service, captured: Path) -> None:
    answer = service.client.completions.create(model=NAMES[0], prompt="the deep sea", max_tokens=9, temperature=0)
    until(lambda: answer.id in Capture(captured).rows()["id"].to_pylist())
    row = next(row for row in Capture(captured).rows().to_pylist() if row["id"] == answer.id)
    assert answer.usage is not None and row["model"] == NAMES[0] and row["status"] == 200
    assert row["answer_tokens"] == answer.usage.completion_tokens and row["weights"] and row["layers"]
    assert row["answer_nll"] > 0 and row["answer_nll_max"] >= row["answer_nll"]


def test_a_stored_response_is_gone_on_from_and_what_was_deleted_is_not(service: Service) -> None:
    ask: dict[str, Any] = {"model": NAMES[0], "temperature": 0, "max_output_tokens": 9, "store": True}
    first = service.client.responses.create(**ask, input="the deep sea")
    *_, end = service.client.responses.create(**ask, input="so", previous_response_id=first.id, stream=True)
    assert end.type in ("response.incomplete", "response.completed")
    second = end.response
    talk: Any = [{"role": "user", "content": "the deep sea"}, *(item.to_dict() for item in first.output)]
    whole = service.client.responses.create(**ask, input=[*talk, {"role": "user", "content": "so"}])
    assert second.output_text == whole.output_text
    assert service.client.responses.retrieve(second.id).to_dict() == second.to_dict()
    assert len([*service.client.responses.input_items.list(second.id)]) == 3
    service.client.responses.delete(first.id)
    with pytest.raises(openai.BadRequestError, match="is stored no more"):
        service.client.responses.create(**ask, input="so", previous_response_id=second.id)


@pytest.mark.drill
def test_a_client_that_leaves_frees_the_engine(service: Service) -> None:
    before = service.metrics("fp32")
    body = {"model": "fp32", "messages": MESSAGES, "max_tokens": 350, "ignore_eos": True, "stream": True}
    for _ in range(3):
        with httpx.stream("POST", f"{service.url}/v1/chat/completions", json=body, timeout=120) as reply:
            next(reply.iter_lines())

    def freed() -> bool:
        now = service.metrics("fp32")
        assert now["requests_resumed_total"] == 0, "who leaves is not taken for a lost replica"
        cancelled = now["requests_cancelled_total"] - before["requests_cancelled_total"]
        return cancelled == 3 and now["num_requests_running"] == now["kv_cache_usage_perc"] == 0

    until(freed)


def test_status_routes(service: Service) -> None:
    base = service.url
    names = [card["id"] for card in httpx.get(f"{base}/v1/models").json()["data"]]
    assert names == list(NAMES)
    assert base.endswith("/sea")
    assert httpx.get(f"{base}/ready").json() == {"status": "ready"}
    assert httpx.get(f"{base}/health").json() == {"status": "ok"}
    for path in ("/health", "/ready"):
        head = httpx.head(f"{base}{path}")
        assert (head.status_code, head.content) == (200, b"")
    assert httpx.post(f"{base}/tokenize/", json={"prompt": "sea"}).status_code == 404  # Serve does not redirect either
    assert httpx.get(f"{base}/version").json()["model"] == "fp32"  # the first is meant where no name is given
    card = httpx.get(f"{base}/v1/models/int8").json()
    assert card["depths"] == {"shallow": 1, "middle": 2, "full": 4}
    tokens = httpx.post(f"{base}/tokenize", json={"prompt": "sea"}).json()["tokens"]
    assert httpx.post(f"{base}/detokenize", json={"tokens": tokens}).json() == {"prompt": "sea"}


def test_a_port_in_use_is_one_line(service: Service) -> None:
    deploy = serve_config(ServeArgs(model=str(service.directories["fp32"])), port=httpx.URL(service.url).port or 0)
    with pytest.raises(ResourceError, match="port") as caught:
        serve.run(deploy, blocking=False)
    assert "\n" not in str(caught.value)
    assert httpx.get(f"{service.url}/ready").status_code == 200  # and what runs there goes on


def test_a_second_service_on_one_ray_is_refused(service: Service) -> None:
    with pytest.raises(ResourceError, match="already running"):
        serve.run(serve_config(ServeArgs(model=str(service.directories["fp32"])), port=free_port()), blocking=False)


@pytest.mark.drill
def test_a_stream_outlives_the_only_replica(service: Service) -> None:
    """It goes on at the replica that Serve starts in its place, from where it was: no error, no text twice or left out."""
    (before,), resumed = replicas("EngineReplica-fp32"), service.metric("fp32", "requests_resumed_total")
    body: dict[str, Any] = {"model": "fp32", "prompt": "x", "max_tokens": 300, "seed": 7}
    whole = service.client.completions.create(**body, extra_body={"ignore_eos": True})
    stream = service.client.completions.create(**body, stream=True, extra_body={"ignore_eos": True})
    pieces = [next(stream)]
    before.send_signal(signal.SIGKILL)
    pieces += list(stream)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "length"
    assert [process.pid for process in replicas("EngineReplica-fp32")] != [before.pid]
    assert service.metric("fp32", "requests_resumed_total") == resumed + 1
    assert httpx.get(f"{service.url}/ready").status_code == 200


def replicas(deployment: str) -> list[psutil.Process]:
    """The processes of the deployment's replicas; Ray names them."""
    name = f"ray::ServeReplica:shoal:{deployment}"
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended since it was listed
            if child.status() != psutil.STATUS_ZOMBIE and name in " ".join(child.cmdline()):
                found.append(child)
    return found


def test_a_directory_that_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^.* is not a model directory: got .no config\.json.; .*$"):
        serve.run(serve_config(ServeArgs(model=str(tmp_path)), port=free_port()), blocking=False)
