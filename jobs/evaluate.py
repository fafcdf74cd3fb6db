"""Quality, speed and size of one model directory or two, on what neither was trained on, as tables, JSON and a page.

    python jobs/evaluate.py --model runs/finetune/model --data runs/data --json runs/report.json
    python jobs/evaluate.py --model runs/finetune/model --against runs/model-int8 --data runs/data --json runs/report.json
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/evaluate.py --model /shared/model --data /shared/data --json /shared/report.json

--data: folder made by `jobs/prepare.py`, with held-out shards and chats. --run: a folder such as runs/pretrain, so that the
baselines are fitted to what the model read. The page lies beside the JSON.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]], usage=__doc__))
