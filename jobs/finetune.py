"""Stage 2: fine-tune a model directory on chats, loss on the answers only, on Ray Train.

    python jobs/finetune.py --model runs/pretrain/model --data chats.jsonl --out runs/finetune --minutes 2 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/finetune.py --model /shared/pretrain/model --data /shared/chats.jsonl --out /shared/finetune

Rows of --data: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, content text or
OpenAI parts. Two passes unless told otherwise; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import sys

from shoal.on_ray.job import job_parser, run_training_job
from shoal.train.plan import finetune_plan


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = job_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model directory to start from")
    add("--data", required=True, help=".jsonl of chats")
    add("--out", required=True, dest="run", help="folder of the run")
    add("--replay", help="folder of shards to go back to now and then, against forgetting")
    add("--heldout", help="held-out .jsonl of chats: measured on, and the depth router is fitted to it")
    return run_training_job(parser, finetune_plan)


if __name__ == "__main__":
    sys.exit(main())
