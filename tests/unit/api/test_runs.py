"""Training runs over HTTP: which there are, their curves, and that nothing else can be read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from shoal.api import runs
from shoal.errors import ConfigError

pytestmark = pytest.mark.anyio

START = {"kind": "start", "name": "fish", "parameters": 7, "mix": {"text": 0.6, "image": 0.2, "code": 0.2}, "step": 0}


def step(n: int, of: int = 1000) -> dict[str, Any]:
    return {"kind": "step", "step": n, "loss": 9 - n / of, "bpb": None, "progress": n / of, "eta": 5.0, "rate": 0.01}


def evaluation(n: int) -> dict[str, Any]:
    return {"kind": "eval", "step": n, "bpb": {"text": {"shallow": 3.0, "full": 2.5}}, "patch": None}


def write(run: Path, *records: dict[str, Any]) -> Path:
    run.mkdir(parents=True)
    path = run / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "secret", START)
    root = tmp_path / "runs"
    write(root / "first" / "pretrain", START, step(1), step(2), {"kind": "end", "step": 2, "steps": 2})
    write(root / "now", START, step(1), evaluation(1), step(2))
    return root


async def test_runs_are_listed_with_how_far_they_are(connect: Callable[..., httpx.AsyncClient], root: Path) -> None:
    os.utime(root / "first" / "pretrain" / "metrics.jsonl", (1e9, 1e9))
    http = connect(runs=root)
    now, first = (await http.get("/v1/shoal/runs")).json()["data"]
    assert (now["name"], now["state"], now["step"], now["progress"], now["eta"]) == ("now", "running", 2, 0.002, 5.0)
    assert (first["name"], first["state"], first["progress"], first["eta"]) == ("first/pretrain", "done", 1.0, None)
    os.utime(root / "now" / "metrics.jsonl", (1e9, 1e9))
    assert {run["state"] for run in (await http.get("/v1/shoal/runs")).json()["data"]} == {"stopped", "done"}


async def test_a_run_has_its_start_curves_evaluations_and_end(
    connect: Callable[..., httpx.AsyncClient], root: Path
) -> None:
    http = connect(runs=root)
    run = (await http.get("/v1/shoal/runs/now")).json()
    assert run["start"] == START and run["end"] is None and run["evals"] == [evaluation(1)]
    assert run["curves"]["step"] == [1, 2] and run["curves"]["loss"] == [8.999, 8.998]
    assert run["curves"]["bpb"] == [None, None]
    assert (await http.get("/v1/shoal/runs/first/pretrain")).json()["end"]["steps"] == 2


@pytest.mark.parametrize(
    "name",
    [
        "no",
        "../secret",
        "%2e%2e/secret",
        "..%2fsecret",
        "now/../../secret",
        "now%00",
        "/etc",
        "link",
        "a/b/c/d",
    ],
)
async def test_nothing_but_a_run_can_be_named(
    connect: Callable[..., httpx.AsyncClient], root: Path, name: str, tmp_path: Path
) -> None:
    (root / "link").symlink_to(tmp_path / "secret")
    answer = await connect(runs=root).get(f"/v1/shoal/runs/{name}")
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "not_found"


async def test_links_are_not_listed(connect: Callable[..., httpx.AsyncClient], root: Path, tmp_path: Path) -> None:
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "file").mkdir()
    (root / "file" / "metrics.jsonl").symlink_to(tmp_path / "secret" / "metrics.jsonl")
    http = connect(runs=root)
    assert {run["name"] for run in (await http.get("/v1/shoal/runs")).json()["data"]} == {"first/pretrain", "now"}
    assert (await http.get("/v1/shoal/runs/file")).status_code == 404


async def test_there_are_no_runs_unless_a_folder_is_given(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/shoal/runs")).status_code == 404


def test_the_folder_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a folder that holds training runs"):
        runs.runs_routes(tmp_path / "none")
