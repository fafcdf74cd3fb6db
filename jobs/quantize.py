"""INT8: train a model directory briefly with INT8 rounding in its forward pass, and write the INT8 model.

    python jobs/quantize.py --model runs/finetune/model --data runs/data --out runs/model-int8
    python jobs/quantize.py --model runs/finetune/model --data chats.jsonl --out runs/model-int8 --minutes 1 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/quantize.py --model /shared/finetune/model --data chats.jsonl --out /shared/model-int8

--data: shards or chats; what the model was trained on last is best. Checkpoints and metrics go to OUT.run.
"""

from __future__ import annotations

import sys

from shoal.on_ray.job import job_parser, run_training_job
from shoal.train.plan import quantize_plan


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = job_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model directory to start from")
    add("--data", required=True, help="folder of shards, or .jsonl of chats")
    add("--out", required=True, help="model directory to write")
    add("--replay", help="folder of shards to go back to now and then, against forgetting")
    add("--heldout", help="held-out .jsonl of chats: measured on, and the depth router is fitted to it")
    return run_training_job(parser, quantize_plan)


if __name__ == "__main__":
    sys.exit(main())
