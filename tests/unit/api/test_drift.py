"""What `shoal watch` saw, over HTTP: who may see it, how often its file is read, and what Prometheus is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.api.auth import ApiKeys
from shoal.api.capture import CaptureArgs
from shoal.loop.looked import FOLDER, STATE
from tests.unit.loop.test_watch import Service, watch

pytestmark = pytest.mark.anyio
Connect = Callable[..., httpx.AsyncClient]

KEYS = ApiKeys(["reader name=reader", "secret name=ann admin=yes"])


@pytest.fixture
def service(tmp_path: Path) -> Service:
    return Service(tmp_path / "capture")


def given(service: Service) -> CaptureArgs:
    return CaptureArgs(str(service.folder))


async def drift(http: httpx.AsyncClient) -> dict[str, Any]:
    told: dict[str, Any] = (await http.get("/v1/shoal/drift")).raise_for_status().json()
    return told


async def test_where_nothing_is_captured_it_says_so(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/shoal/drift")
    assert answer.status_code == 404 and "--capture" in answer.json()["error"]["message"]


async def test_from_nobody_who_looks_to_an_alarm(connect: Connect, service: Service) -> None:
    async with connect(capture=given(service)) as http:
        told = await drift(http)
        assert told["look"] is None and told["fault"] is None and told["capture"]["keep_days"] == 90
        service.serve(300)
        watch(service).look(service.now)
        assert (await drift(http))["look"]["report"]["state"] == "learning"
        service.serve(700)
        watch(service).look(service.now)
        service.serve(300, up=1.2)
        watch(service).look(service.now)
        found = (await drift(http))["look"]
    assert found["report"]["state"] == "alarm" and found["report"]["signals"][0]["signal"] == "prompt_surprisal"
    assert [seen for _, seen, _ in found["evidence"]] == [500, 800]
    surprisal = dict(map(tuple, found["signals"]["prompt_surprisal"]))
    assert max(surprisal) == 800 and surprisal[800] > 0.8 > abs(surprisal[500])


async def test_a_key_that_may_not_change_releases_sees_no_drift(connect: Connect, service: Service) -> None:
    for key, status in (("reader", 403), ("secret", 200)):
        async with connect({"Authorization": f"Bearer {key}"}, capture=given(service), api_keys=KEYS) as http:
            assert (await http.get("/v1/shoal/drift")).status_code == status


def of_report(saved: str, **fields: object) -> str:
    """A file with other fields in its report."""
    told = json.loads(saved)
    return json.dumps(told | {"report": told["report"] | fields})


@pytest.mark.parametrize(
    "write",
    [
        lambda saved: "{",
        lambda saved: "[" * 200_000,
        lambda saved: json.dumps(json.loads(saved) | {"report": {}}),
        lambda saved: of_report(saved, state="asleep"),
    ],
)
async def test_a_file_that_cannot_be_read_is_told_and_breaks_nothing_else(
    connect: Connect, service: Service, write: Callable[[str], str]
) -> None:
    watch(service).look(service.now)
    path = service.folder / FOLDER / STATE
    path.write_text(write(path.read_text()))
    async with connect(capture=given(service)) as http:
        for _ in range(2):
            told = await drift(http)
            assert told["look"] is None and "cannot be read" in told["fault"]
        scraped = (await http.get("/metrics")).raise_for_status().text
    assert "drift_state" not in scraped and "shoal:capture_rows" in scraped
