"""Serve a model directory on Ray Serve until the job is stopped: the OpenAI-compatible API, and the chat page.

    python jobs/serve.py --model runs/model-int8
    python jobs/serve.py --model runs/model-int8 --config serve_configs/one_gpu.yaml
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/serve.py --model /shared/model-int8 --config serve_configs/cluster.yaml

Without --config it is served as serve_configs/local.yaml says. Where a cluster is to serve on its own, without a job that
watches over it, use `serve deploy` with the same config.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", "--config", "serve_configs/local.yaml", *sys.argv[1:]], usage=__doc__))
