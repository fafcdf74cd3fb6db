"""Stage 1: pretrain a model on shards made by `jobs/prepare.py`, on Ray Train.

    python jobs/pretrain.py --preset test --data runs/data --out runs/pretrain --steps 20
    python jobs/pretrain.py --preset tiny --data runs/data --out runs/pretrain --minutes 5 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/pretrain.py --preset tiny --data /shared/data --out /shared/pretrain --tokens 2000000

Leaves checkpoints/, metrics.jsonl and model/ in --out; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import sys

from shoal.errors import exit_code
from shoal.on_ray.train import parse_workers, train
from shoal.train.log import Console
from shoal.train.plan import pretrain_plan
from shoal.train.settings import settings


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", required=True, help="named configuration: test, tiny, mini, small, ...")
    add("--data", required=True, help="folder of shards, or s3://BUCKET/PREFIX of one")
    add("--out", required=True, dest="run", help="folder of the run")
    add("--minutes", type=float, help="end after this much training")
    add("--tokens", type=int, help="end after this many tokens")
    add("--steps", type=int, help="end after this many updates")
    add("--accumulate", type=int, help="micro-batches that a worker merges into an update (default: the preset's)")
    add("--batch-tokens", type=int, help="tokens in an update (default: the preset's)")
    add("--seed", type=int, help="of weights and data order (default 0)")
    add("--resume", choices=("auto", "never"), default="auto", help="never: begin again (default auto)")
    add("--workers", default="1", help="processes that train together: N, or MIN:MAX (default 1)")
    add("--mirror", help="folder or s3://BUCKET/PREFIX that checkpoints are copied to as well, and fetched from")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of TrainConfig or of the run; repeat")
    add("--cpus-per-worker", type=float, default=1.0, help="logical CPUs that each reserves (default 1)")
    options = vars(parser.parse_args())
    workers, cpus, more = (options.pop(key) for key in ("workers", "cpus_per_worker", "set"))

    def work() -> None:
        plan = pretrain_plan(**(options | settings(more)))
        with Console("pretrain") as console:
            train(plan, workers=parse_workers(workers), cpus_per_worker=cpus, on_progress=console)

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
