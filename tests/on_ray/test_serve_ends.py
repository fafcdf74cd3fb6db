"""A service on Ray that is told to stop: streams come to their end, whoever the signal went to, and a second one is obeyed.
(From one process: tests/flows/test_service_ends.py.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from shoal.api.serve_args import ServeArgs
from shoal.on_ray.serve_config import serve_config
from tests.on_ray.test_serve import free_port, until
from tests.unit.engine.lively import lively

pytestmark = [pytest.mark.ray, pytest.mark.drill, pytest.mark.timeout(600)]  # also where a Ray takes minutes to start

STREAMS = 4


@dataclass(frozen=True)
class Service:
    process: subprocess.Popen[str]
    url: str
    folder: Path  # for temporary files
    said: Path  # its stdout

    def ended(self, code: int) -> list[str]:
        """The lines that it wrote to stderr. Nothing of it is left."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        _, err = self.process.communicate(timeout=120)
        out = self.said.read_text()
        assert (self.process.returncode, "Traceback" in err) == (code, False), err
        assert ("The service has stopped." in out) == (code == 0)
        assert psutil.wait_procs(children, timeout=30)[1] == []
        assert list(self.folder.iterdir()) == []
        return err.splitlines()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "lively"
    lively().save(directory)
    return directory


@contextmanager
def service(model: Path, config: Path) -> Iterator[Service]:
    """`shoal serve` of a slow engine, in a process group of its own."""
    port = free_port()
    values = serve_config(ServeArgs(model=str(model), name="fish", cpus=0.5), port=port)
    written: dict[str, Any] = values.model_dump(mode="json", exclude_unset=True)
    written["applications"][0]["import_path"] = "tests.on_ray.breakable:app"
    config.write_text(yaml.safe_dump(written))
    said = config.with_suffix(".out")
    with (
        said.open("w") as out,
        tempfile.TemporaryDirectory(dir="/tmp") as folder,
        subprocess.Popen(
            [sys.executable, "-m", "shoal.cli", "serve", "--config", str(config)],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": folder},
            start_new_session=True,
        ) as process,
    ):
        try:
            until(lambda: "Ctrl-C ends it" in said.read_text(), 400)  # a signal before that interrupts the start
            yield Service(process, f"http://127.0.0.1:{port}", Path(folder), said)
        finally:
            process.kill()


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=10).status_code == 200
    except httpx.HTTPError:
        return False


def stream(service: Service, begun: Callable[[], object]) -> str:
    """The text of a stream, to its end."""
    body = {"model": "fish", "prompt": "abc", "max_tokens": 320, "ignore_eos": True, "stream": True}
    text = ""
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body, timeout=120) as reply:
        assert reply.status_code == 200, reply.read()
        for chunk in reply.iter_text():
            text += chunk
            if text.count("\n\n") >= 3 or not text.startswith("data:"):
                begun()
    return text


@contextmanager
def streaming(service: Service) -> Iterator[list[Any]]:
    """`STREAMS` streams that have begun."""
    begun = [threading.Event() for _ in range(STREAMS)]
    with ThreadPoolExecutor(STREAMS) as pool:
        answers = [pool.submit(stream, service, event.set) for event in begun]
        for event in begun:
            assert event.wait(120)
        yield answers


@pytest.mark.parametrize("to_all", [False, True], ids=["to the process", "to its group"])
def test_streams_come_to_their_end_and_new_work_is_refused(model: Path, tmp_path: Path, to_all: bool) -> None:
    with service(model, tmp_path / "serve.yaml") as found, streaming(found) as answers:
        (os.killpg if to_all else os.kill)(found.process.pid, signal.SIGTERM)
        body = {"model": "fish", "prompt": "abc", "max_tokens": 4}
        while (refused := httpx.post(f"{found.url}/v1/completions", json=body, timeout=60)).status_code == 200:
            pass
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_dead")
        assert "stopping" in refused.json()["error"]["message"]
        assert all(answer.result(120).endswith("data: [DONE]\n\n") for answer in answers)
        assert found.ended(0) == []


def test_a_second_signal_ends_it_at_once_in_one_line(model: Path, tmp_path: Path) -> None:
    with service(model, tmp_path / "serve.yaml") as found, streaming(found):
        found.process.send_signal(signal.SIGTERM)
        while ready(found.url):
            pass
        found.process.send_signal(signal.SIGTERM)
        assert found.ended(130) == ["shoal: interrupted; the service has stopped"]
