"""What a model's folder takes where it is served alone: `shoal serve --no-ray` without the pages, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from shoal.errors import ResourceError

READY_SECONDS, END_SECONDS = 180.0, 30.0  # after which a service that is not ready, or does not end, is killed
ANSWERS, TOKENS = 8, 32  # at once, and in each: what memory is read after
KEYS = "SHOAL_API_KEYS"  # of whoever measures: this service is asked without


@dataclass(frozen=True)
class Alone:
    """A service in a process of its own: its address, which ends in /v1, its process, and seconds until it was ready."""

    url: str
    pid: int
    ready_s: float


@contextmanager
def alone(model: Path, policy: Path | None = None) -> Iterator[Alone]:
    """`model` served until the end of the block. Raises ResourceError for one that does not get ready."""
    command = [sys.executable, "-m", "shoal.cli", "serve", "--no-ray", "--no-ui", "--model", str(model), "--port", "0"]
    command += ["--policy", str(policy)] if policy is not None else []
    environment = {name: value for name, value in os.environ.items() if name != KEYS}
    began = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as service:
        late = threading.Timer(READY_SECONDS, service.kill)
        late.start()
        try:
            assert service.stdout is not None
            words = service.stdout.readline().split()
            late.cancel()
            if len(words) < 2:
                raise ResourceError(f"serving {model}", got="no service", do=f"see what `{' '.join(command[2:])}` says")
            yield Alone(words[1], service.pid, time.monotonic() - began)
        finally:
            late.cancel()
            _end(service)


def footprint(model: Path, policy: Path | None = None) -> dict[str, Any]:
    """``disk_bytes`` of the folder, ``ready_s`` from the start of the process to its first line, and ``resident_bytes`` of it
    and what it started, once it has given `ANSWERS` answers at once. Raises ResourceError for one that does not get ready."""
    with alone(model, policy) as service:
        _ask(service.url)
        return {"disk_bytes": _on_disk(model), "ready_s": service.ready_s, "resident_bytes": _resident(service.pid)}


def _ask(url: str) -> None:
    """As many answers at once as memory is read after. Raises ResourceError for one that does not come."""
    body = {
        "messages": [{"role": "user", "content": "What is this?"}], "n": ANSWERS, "max_tokens": TOKENS, "temperature": 1.0,
    }  # fmt: skip
    try:
        with httpx.Client(base_url=url, timeout=READY_SECONDS) as http:
            name = http.get("models").raise_for_status().json()["data"][0]["id"]
            http.post("chat/completions", json={"model": name, **body}).raise_for_status()
    except httpx.HTTPError as error:
        raise ResourceError(f"the service at {url}", got=str(error), do="see its log") from error


def _resident(pid: int) -> int:
    """Bytes of a process and of those that it started; pages that several share are counted for each. Raises ResourceError for
    one that has ended."""
    try:
        first = psutil.Process(pid)
        return int(sum(one.memory_info().rss for one in (first, *first.children(recursive=True))))
    except psutil.Error as error:
        raise ResourceError("the service's memory", got=str(error), do="see its log") from error


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _end(service: subprocess.Popen[str]) -> None:
    service.terminate()
    try:
        service.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        service.kill()
