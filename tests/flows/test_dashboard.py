"""The Grafana dashboard asks for nothing that /metrics does not say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest

from tests.flows.conftest import Service

BOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text())
NAME = r"shoal:\w+(?:\[0-9\]\+\w+)?"  # a metric, or a pattern of those that are one a depth
ASKED = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def said(service: Service) -> set[str]:
    """Names of the samples after a request and an error."""
    for prompt in ("the sea", ""):
        body = {"model": "fish", "prompt": prompt, "max_tokens": 3}
        httpx.post(f"{service.url}/v1/completions", json=body, headers=service.headers, timeout=30)
    lines = httpx.get(f"{service.url}/metrics", timeout=30).text.splitlines()
    return {re.split("[{ ]", line)[0] for line in lines if not line.startswith("#")}


@pytest.mark.parametrize("expression", ASKED)
def test_every_metric_of_the_dashboard_exists(expression: str, said: set[str]) -> None:
    names = re.findall(NAME, expression)
    assert names
    for name in names:
        assert any(re.fullmatch(name, sample) for sample in said), name
    assert len(re.findall(r"[({]", expression)) == len(re.findall(r"[)}]", expression))


def test_every_counter_and_latency_of_the_engine_is_on_it(said: set[str]) -> None:
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in said if not name.endswith("_created")}
    missing = {name for name in families if not any(shown(name, expression) for expression in ASKED)}
    assert missing <= {"shoal:request_time_per_output_token_seconds"}  # the time between tokens says it


def shown(family: str, expression: str) -> bool:
    return any(
        re.fullmatch(f"({name})(_bucket)?", family) or name == f"{family}_bucket"
        for name in re.findall(NAME, expression)
    )
