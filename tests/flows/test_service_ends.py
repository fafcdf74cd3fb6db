"""A service of one process that is told to stop: answers that run come to their end, nobody is left without a word, and a
second signal is obeyed at once. (On Ray: tests/on_ray/test_serve_ends.py.)
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.unit.engine.lively import lively

TOKENS = 30
STEP = 0.1  # seconds: an answer takes three, three times as long as uvicorn would wait (`slow_service.CLOSE`)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "lively"
    lively().save(directory)
    return directory


@contextmanager
def service(model: Path, seconds_to_end: float) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "tests.flows.slow_service", str(STEP), str(seconds_to_end), "serve", "--no-ray"]
    with subprocess.Popen(
        [*command, "--no-ui", "--name", "fish", "--model", str(model), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    ) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[1].removesuffix("/v1")
            assert not url.endswith(":8000"), "port 0 is any that is free, and 8000 the one without --port"
            yield process, url
        finally:
            process.kill()


def ask(url: str, **more: Any) -> httpx.Response:
    body = {"model": "fish", "prompt": "abc", "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def running(url: str, how_many: int) -> None:
    """Waits until so many requests are in the engine."""
    sample = 'shoal:num_requests_running{model_name="fish"}'
    while True:
        lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
        if any(line.startswith(sample) and float(line.split()[-1]) == how_many for line in lines):
            return


def begin(pool: ThreadPoolExecutor, url: str) -> tuple[Future[httpx.Response], Future[httpx.Response]]:
    """A stream and a whole answer, both of which run."""
    stream = pool.submit(ask, url, stream=True)
    whole = pool.submit(ask, url)
    running(url, 2)
    return stream, whole


def ended(process: subprocess.Popen[str], code: int) -> list[str]:
    """What it wrote to stderr, but for its log of requests."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in err
    assert ("The service has stopped." in out) == (code == 0)
    return [line for line in err.splitlines() if not line.startswith("{")]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.drill)])
def test_answers_that_run_come_to_their_end_and_new_work_is_refused(model: Path, number: signal.Signals) -> None:
    with service(model, 60.0) as (process, url), ThreadPoolExecutor(2) as pool:
        stream, whole = begin(pool, url)
        process.send_signal(number)
        while (ready := httpx.get(f"{url}/ready", timeout=30)).status_code == 200:
            pass
        refused = ask(url)
        for reply in (ready, refused):
            assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_dead")
            assert "stopping" in reply.json()["error"]["message"]
            assert int(reply.headers["retry-after"]) >= 1
        assert httpx.get(f"{url}/health", timeout=30).status_code == 200
        assert stream.result(60).text.endswith("data: [DONE]\n\n")
        assert whole.result(60).json()["usage"]["completion_tokens"] == TOKENS
        assert ended(process, 0) == []


@pytest.mark.drill
def test_answers_whose_time_is_over_end_with_an_error_of_ours(model: Path) -> None:
    with service(model, 1.0) as (process, url), ThreadPoolExecutor(2) as pool:
        stream, whole = begin(pool, url)
        process.send_signal(signal.SIGTERM)
        last = [line for line in stream.result(60).text.splitlines() if line][-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_dead"
        assert (whole.result(60).status_code, whole.result(60).json()["error"]["code"]) == (503, "engine_dead")
        assert ended(process, 0) == []


@pytest.mark.drill
def test_a_second_signal_ends_it_at_once_in_one_line(model: Path) -> None:
    with service(model, 60.0) as (process, url), ThreadPoolExecutor(2) as pool:
        answers = begin(pool, url)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/ready", timeout=30).status_code == 200:
            pass
        process.send_signal(signal.SIGTERM)
        assert ended(process, 130) == ["shoal: interrupted; the service has stopped"]
        for answer in answers:
            assert not answer.exception(60) or isinstance(answer.exception(60), httpx.HTTPError)
