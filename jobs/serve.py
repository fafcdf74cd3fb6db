"""Serve a model directory on Ray Serve until the job is stopped: the OpenAI-compatible API, and the chat page.

    python jobs/serve.py --model runs/model-int8
    python jobs/serve.py --model runs/model-int8 --config serve_configs/one_gpu.yaml
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/serve.py --model /shared/model-int8 --config serve_configs/cluster.yaml

Where a cluster is to serve on its own, without a job that watches over it, use `serve deploy` with the same config.
"""

from __future__ import annotations

import argparse
import sys

from shoal.errors import exit_code
from shoal.on_ray.resources import local_ray, need_free_port
from shoal.on_ray.serve import run
from shoal.on_ray.serve_config import load_serve_config


def main() -> int:
    """Exit code: 0 stopped, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="model directory, the same path on every node")
    add("--config", default="serve_configs/local.yaml", help="Serve config (default serve_configs/local.yaml)")
    add("--host", help="address to listen on (default: the config's)")
    add("--port", type=int, help="HTTP port (default: the config's)")
    options = parser.parse_args()

    def work() -> None:
        deploy = load_serve_config(options.config, host=options.host, port=options.port, model=options.model)
        need_free_port(deploy.http_options.host, deploy.http_options.port)
        with local_ray():
            run(deploy, on_ready=lambda url: print(f"API {url}/v1", flush=True))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
