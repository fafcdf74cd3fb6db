"""`shoal serve --capture` as an operator starts it: a real process over a real engine, killed while it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path

import httpx
import pytest

from shoal.loop.capture import Capture
from shoal.loop.parts import adopt
from tests.unit.engine.lively import lively

pytestmark = pytest.mark.drill
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "lively"
    lively().save(directory)
    return directory


@contextmanager
def service(model: Path, *options: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-m", "shoal.cli", "serve", "--no-ray", "--no-ui", "--port", "0"]
    with subprocess.Popen(
        [*command, "--name", "fish", "--model", str(model), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("API "), process.communicate()
            yield process, said.split()[1].removesuffix("/v1")
        finally:
            process.kill()


@pytest.mark.smoke
def test_a_service_that_is_killed_loses_no_row_of_a_request_that_had_ended(model: Path, tmp_path: Path) -> None:
    """Nor of one whose answer somebody has read to its end. Some run when the kill comes; their clients are cut off. The log
    ends when the scribe has ended too, which has made a part by then."""
    folder = tmp_path / "capture"

    def ask(url: str, number: int) -> None:
        body = {
            "model": "fish",
            "prompt": f"{number} fish",
            "max_tokens": 4,
            "ignore_eos": True,
            "stream": number % 2 > 0,
        }
        with suppress(httpx.TransportError):  # of those that the kill cuts off
            answered.append(httpx.post(f"{url}/v1/completions", json=body, timeout=120).raise_for_status())

    answered: list[httpx.Response] = []
    with service(model, "--capture", folder) as (process, url), ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, url, number) for number in range(60)]
        assert process.stderr is not None
        lines = [*islice((line for line in process.stderr if line.startswith("{")), 40)]
        process.kill()
        for one in asked:
            one.result()
        lines += process.stderr.readlines()
    ended = {json.loads(line)["id"] for line in lines if line.startswith("{") and line.endswith("}\n")}
    found = Capture(folder).rows()
    read = {answer.headers["x-request-id"] for answer in answered}
    assert len(answered) >= 36 and read <= set(found["request_id"].to_pylist())  # four may have ended and not arrived
    assert len(ended) >= 40 and ended <= set(found["request_id"].to_pylist())
    assert found.num_rows == len(set(found["id"].to_pylist())) <= len(ended) + 4
    assert adopt(Capture(folder)) == 0 and len(Capture(folder).parts()) == 1
