"""What one process can be asked to serve, and what only Ray Serve can follow."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from shoal.api.serve_args import ServeArgs
from shoal.api.server import run_local
from shoal.errors import ConfigError


@pytest.mark.parametrize(
    "given",
    [
        {"min_replicas": 0},
        {"max_replicas": 2},
        {"max_gateways": 2},
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


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"min_gateways": 0}, "args.min_gateways: got 0; allowed: 1 or more"),
        ({"min_gateways": 3, "max_gateways": 2}, r"args.max_gateways: got 2; allowed: min_gateways \(3\) up"),
    ],
)
def test_what_several_gateways_cannot_do_is_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ServeArgs(**given)


@pytest.mark.parametrize(
    ("given", "share"),
    [
        ({}, 0.9),
        ({"gpus": 1.0}, 0.9),
        ({"gpus": 2.0}, 0.9),
        ({"gpus": 0.5}, 0.45),
        ({"gpus": 1.0, "release": "r"}, 0.45),
        ({"gpus": 0.5, "release": "r"}, 0.225),
        ({"gpus": 0.5, "release": "r", "gpu_share": 0.8}, 0.8),
    ],
)
def test_engines_of_one_gpu_share_nine_tenths_of_it(given: dict[str, Any], share: float) -> None:
    """Replicas that reserve a part each, and two versions of a release in each of them."""
    assert ServeArgs(**given).engine_share == pytest.approx(share)


@pytest.mark.parametrize("name", ["release", "runs", "batches"])
def test_what_is_not_kept_in_s3_is_refused_there(name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"args\.{name}: got 's3://sea/x'; allowed: a path.*not kept in S3"
    ) as caught:
        ServeArgs(**{name: "s3://sea/x"})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
