"""What one process can be asked to serve, and what only Ray Serve can follow."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from shoal.api.limits import Limits
from shoal.api.serve_args import ServeArgs
from shoal.api.server import run_local
from shoal.errors import ConfigError


@pytest.mark.parametrize(
    "given",
    [
        {"min_replicas": 0},
        {"max_replicas": 2},
        {"max_queue": 7},
        {"cpus": 2.0},
        {"gpus": 1.0},
        {"engine": "vllm", "vllm": {"seed": 1}},
        {"models": {"a": "b"}, "model": None},
    ],
    ids=lambda given: next(iter(given)),
)
def test_one_process_refuses_by_name_what_only_ray_can_follow(given: dict[str, Any], tmp_path: Path) -> None:
    args = dataclasses.replace(ServeArgs(), **{"model": str(tmp_path), **given})
    with pytest.raises(ConfigError, match=rf"args\.{next(iter(given))}.*serve it on Ray"):
        run_local(args)


def test_one_process_needs_a_model() -> None:
    with pytest.raises(ConfigError, match=r"args\.model"):
        run_local(ServeArgs())


def test_a_request_has_as_long_with_ray_and_without() -> None:
    assert ServeArgs().seconds == Limits().seconds
