"""The Grafana dashboard and the alerts ask for nothing that /metrics does not say, and each alert says what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from shoal.api.metrics import OF_FILES, PREFIX
from shoal.engine.metrics import FAMILIES
from shoal.on_ray import train_metrics
from shoal.train.metrics import FAMILIES as TRAINING
from tests.flows.conftest import Service

DOCS = Path(__file__).parents[2] / "docs"
BOARD = json.loads((DOCS / "grafana.json").read_text())
RULES = [rule for group in yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
NAME = r"(?:shoal:|ray_shoal_train_)\w+(?:\[0-9\]\+\w+)?"  # a metric, or a pattern of those that are one a depth
# what Ray says of a run: that it does is shown where one runs on it (`test_train.py`)
OF_TRAINING = {
    f"ray_{train_metrics.PREFIX}{name}" + "_total" * (family.kind == "counter"): family.labels
    for name, family in TRAINING.items()
}
ASKED = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def said(service: Service) -> set[str]:
    """Names of the samples after a request and an error, and of those that only a release and a watch have: that these are
    told is shown where they are (`test_split.py`, `test_drift.py`)."""
    for prompt in ("the sea", ""):
        body = {"model": "fish", "prompt": prompt, "max_tokens": 3}
        httpx.post(f"{service.url}/v1/completions", json=body, headers=service.headers, timeout=30)
    lines = httpx.get(f"{service.url}/metrics", timeout=30).text.splitlines()
    others = OF_FILES.keys() | {
        name for name in FAMILIES if name.startswith(("drift_", "regret_", "release_", "version_"))
    }
    found = {
        PREFIX + name + ("_total" if name in FAMILIES and FAMILIES[name].kind == "counter" else "") for name in others
    }
    return found | OF_TRAINING.keys() | {re.split("[{ ]", line)[0] for line in lines if not line.startswith("#")}


def test_every_metric_of_the_dashboard_exists(said: set[str]) -> None:
    for expression in ASKED:
        names = re.findall(NAME, expression)
        assert names, expression
        for name in names:
            assert any(re.fullmatch(name, sample) for sample in said), f"{name} of {expression}"
        assert len(re.findall(r"[({]", expression)) == len(re.findall(r"[)}]", expression)), expression


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_can_ring_and_says_what_to_do(rule: dict[str, Any], said: set[str]) -> None:
    names = re.findall(NAME, rule["expr"])
    assert (
        names
        and set(names) <= said
        and len(re.findall(r"[({]", rule["expr"])) == len(re.findall(r"[)}]", rule["expr"]))
    )
    assert rule["labels"]["severity"] in ("info", "warning", "page") and rule["annotations"]["summary"]
    sections = dict(
        re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", (DOCS / "alerts.md").read_text(), re.MULTILINE | re.DOTALL)
    )
    assert set(sections) == {each["alert"] for each in RULES}, "a section an alert, and none for none"
    for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
        labels = {PREFIX + name: family.labels for name, family in {**FAMILIES, **OF_FILES}.items()}
        labels |= {name: (*known, train_metrics.RUN) for name, known in OF_TRAINING.items()}
        assert any(label in known for name, known in labels.items() if name in names[0]), label


def shown(family: str, expression: str) -> bool:
    return any(
        re.fullmatch(f"({name})(_bucket)?", family) or name == f"{family}_bucket"
        for name in re.findall(NAME, expression)
    )
