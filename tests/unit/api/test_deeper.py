"""What HTTP says of an answer that the router's second look sent deeper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shoal import Engine, Request, Sampling
from shoal.loop.capture import Capture
from tests.unit.api.test_reruns import measured, service, until
from tests.unit.api.test_tolerance import ROUTES
from tests.unit.engine.test_second_look import EXITS, model, to

pytestmark = pytest.mark.anyio

TOKENS = 12


def asked(route: str, **more: Any) -> dict[str, Any]:
    limit = {} if "responses" in route else {"max_tokens": TOKENS}
    return {"model": "fish", "temperature": 0, **ROUTES[route], **limit, **more}


@pytest.mark.parametrize("route", ROUTES)
async def test_usage_says_the_last_depth_and_the_mean(route: str, tmp_path: Path) -> None:
    async with service(model(to(EXITS[0]), to(EXITS[-1]), 5), tmp_path / "capture") as (http, _):
        reply = await http.post(route, json=asked(route))
        assert reply.status_code == 200, reply.text
        usage = reply.json()["usage"]
        assert usage["depth"] == reply.headers["x-shoal-depth"] == "full"
        assert EXITS[0] < usage["mean_depth"] < EXITS[-1] and "quality" not in usage
        fixed = (await http.post(route, json=asked(route, depth="shallow"))).json()["usage"]
        assert fixed["depth"] == "shallow" and "mean_depth" not in fixed


async def test_a_streams_header_says_the_first_depth_and_its_end_the_last(tmp_path: Path) -> None:
    async with service(model(to(EXITS[0]), to(EXITS[-1]), 5), tmp_path / "capture") as (http, _):
        body = asked("/v1/completions", stream=True, stream_options={"include_usage": True})
        reply = await http.post("/v1/completions", json=body)
        lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        assert reply.headers["x-shoal-depth"] == "shallow" and json.loads(lines[-1])["usage"]["depth"] == "full"


async def test_a_rerun_measures_the_exit_that_the_answer_began_with(tmp_path: Path) -> None:
    """The deeper exit lost nothing on the first tokens because it did not say them."""
    routed, folder = model(to(EXITS[0]), to(EXITS[1]), 5), tmp_path / "capture"
    async with service(routed, folder, reruns=1.0) as (http, _):
        (await http.post("/v1/completions", json=asked("/v1/completions"))).raise_for_status()
        await until(lambda: len(measured(folder)) == 1)
    (found,), (row,) = measured(folder), Capture(folder).rows().to_pylist()
    how = Sampling(temperature=0, max_tokens=TOKENS, speculative=0)
    (wanted,) = Engine(routed, units=200).generate([Request("What swims?", how, "full", signals=True, gaps=True)])
    assert wanted.finished is not None and wanted.finished.signals is not None
    assert row["layers"] == EXITS[1]
    assert found["regret"] == pytest.approx(wanted.finished.signals.gaps[0], rel=1e-4)
