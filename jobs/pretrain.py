"""Stage 1: pretrain a model on shards made by `jobs/prepare.py`, on Ray Train.

    python jobs/pretrain.py --preset test --data runs/data --out runs/pretrain --steps 20
    python jobs/pretrain.py --preset tiny --data runs/data --out runs/pretrain --minutes 5 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/pretrain.py --preset tiny --data /shared/data --out /shared/pretrain --tokens 2000000

Leaves checkpoints/, metrics.jsonl and model/ in --out, the model with a depth router that is fitted on held-out rows of the
shards; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import sys

from shoal.on_ray.job import job_parser, run_training_job
from shoal.train.plan import pretrain_plan


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = job_parser(__doc__)
    add = parser.add_argument
    add("--preset", required=True, help="named configuration: test, tiny, mini, small, ...")
    add("--data", required=True, help="folder of shards, or s3://BUCKET/PREFIX of one")
    add("--out", required=True, dest="run", help="folder of the run")
    return run_training_job(parser, pretrain_plan)


if __name__ == "__main__":
    sys.exit(main())
