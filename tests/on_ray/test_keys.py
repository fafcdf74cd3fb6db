"""API keys on a Ray that runs already: the processes that answer are not children of who gives the keys."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve as ray_serve
from ray.serve.context import _get_global_client

from shoal import Model
from shoal.api.serve_args import ServeArgs
from shoal.on_ray.serve_config import check_serve_config, serve_config
from tests.on_ray.test_serve import free_port, replicas, until

pytestmark = [pytest.mark.ray, pytest.mark.drill]


def status(url: str, key: str | None = None) -> int:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(f"{url}/v1/models", headers=headers, timeout=60).status_code


@pytest.mark.usefixtures("shared_ray")
def test_keys_hold_on_a_ray_that_runs_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a gateway that is started anew, when the variable is long gone; and nobody can read them in Serve's status. A
    deployment that asks for keys where there are none does not start."""
    monkeypatch.delenv("SHOAL_API_KEYS", raising=False)
    Model.from_preset("test", seed=3).save(tmp_path / "model")
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "shoal.cli", "serve", "--model", str(tmp_path / "model"), "--no-ui"]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "SHOAL_API_KEYS": "sk-sea"}
    with subprocess.Popen(
        [*command, "--port", str(port)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            assert process.stdout is not None and url in process.stdout.readline()
            assert [status(url, key) for key in (None, "sk-wrong", "sk-sea")] == [401, 401, 200]
            client = _get_global_client()
            assert client is not None
            told = repr(client.get_serve_details())
            assert "api_keys" in told and "sk-sea" not in told
            (gateway,) = replicas("Gateway")
            gateway.kill()
            until(lambda: [p.pid for p in replicas("Gateway")] not in ([], [gateway.pid]), 60)
            until(lambda: status(url, "sk-sea") == 200, 60)
            assert [status(url, key) for key in (None, "sk-wrong")] == [401, 401]

            args = ServeArgs(model=str(tmp_path / "model"), api_keys="$SHOAL_API_KEYS")
            values = serve_config(args, port=port).model_dump(mode="json", exclude_unset=True)
            values["applications"][0] |= {"name": "other", "route_prefix": "/other"}
            client.deploy_apps(check_serve_config(values, "as serve deploy does"))
            until(lambda: ray_serve.status().applications["other"].status == "DEPLOY_FAILED", 60)
            assert "SHOAL_API_KEYS" in ray_serve.status().applications["other"].message
            assert status(f"{url}/other") == 404
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
        finally:
            process.kill()
            process.wait(60)
