"""Programs over HTTP: only where the service was told to run them, in the sandbox, and few at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from shoal.api import programs
from shoal.api.serve_args import ServeArgs
from shoal.errors import ResourceError
from shoal.sandbox import Ran

pytestmark = pytest.mark.anyio
PATH = "/v1/shoal/programs"
Connect = Callable[..., httpx.AsyncClient]


async def test_a_program_runs_and_what_it_printed_and_how_it_ended_is_said(connect: Connect) -> None:
    http = connect(run_code=True)
    assert (await http.get(PATH)).json()["object"] == "shoal.programs"
    good = (await http.post(PATH, json={"program": "print(6 * 7)"})).json()
    assert (good["how"], good["code"], good["out"], good["err"]) == ("ended", 0, "42\n", "")
    bad = (await http.post(PATH, json={"program": "print(open('/etc/passwd').read())"})).json()
    assert (bad["how"], bad["out"]) == ("failed", "") and "PermissionError" in bad["err"]


async def test_nothing_is_run_unless_it_is_asked_for(connect: Connect) -> None:
    assert ServeArgs().run_code is False
    http = connect()
    assert (await http.post(PATH, json={"program": "print(1)"})).status_code == 404
    assert (await http.get(PATH)).status_code == 404


@pytest.mark.parametrize(
    "body", [{}, {"program": ""}, {"program": 1}, {"program": "1", "x": 1}, {"program": "x" * 100_001}]
)
async def test_a_wrong_body_is_a_400(connect: Connect, body: dict[str, Any]) -> None:
    assert (await connect(run_code=True).post(PATH, json=body)).status_code == 400


async def test_beyond_a_few_at_once_a_program_is_told_to_come_back(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, began = threading.Event(), list[object]()

    def slow(*_: object) -> Ran:
        began.append(1)
        assert go.wait(60)
        return Ran("ended", 0, "", "", (), 0.0)

    monkeypatch.setattr(programs, "run", slow)
    http = connect(run_code=True)
    begun = [asyncio.create_task(http.post(PATH, json={"program": "x"})) for _ in range(programs.AT_ONCE)]
    while len(began) < programs.AT_ONCE:
        await asyncio.sleep(0.01)
    refused = await http.post(PATH, json={"program": "y"})
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "queue_full" and int(refused.headers["Retry-After"]) > 0
    begun[0].cancel()
    assert isinstance((await asyncio.gather(begun[0], return_exceptions=True))[0], asyncio.CancelledError)
    assert (await http.post(PATH, json={"program": "y"})).status_code == 429, "it runs on when its client has left"
    go.set()
    assert (await begun[1]).status_code == 200
    async with asyncio.timeout(60):
        while (await http.post(PATH, json={"program": "z"})).status_code != 200:  # places are given back
            await asyncio.sleep(0.01)


async def test_without_a_sandbox_the_service_does_not_start(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "no_sandbox", lambda: "programs are not run without a sandbox: got 'Darwin arm64'")
    with pytest.raises(ResourceError, match="--run-code: programs are not run without a sandbox"):
        connect(run_code=True)
