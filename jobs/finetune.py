"""Stage 2: fine-tune a model directory on chats, loss on the answers only, on Ray Train.

    python jobs/finetune.py --model runs/pretrain/model --data chats.jsonl --out runs/finetune --minutes 2 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/finetune.py --model /shared/pretrain/model --data /shared/chats.jsonl --out /shared/finetune

Rows of --data: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, content text or
OpenAI parts. Two passes unless told otherwise; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import sys

from shoal.errors import exit_code
from shoal.on_ray.train import parse_workers, train
from shoal.train import routing
from shoal.train.log import Console
from shoal.train.plan import finetune_plan
from shoal.train.settings import settings


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="model directory to start from")
    add("--data", required=True, help=".jsonl of chats")
    add("--out", required=True, dest="run", help="folder of the run")
    add("--minutes", type=float, help="end after this much training")
    add("--epochs", type=float, help="end after this many passes over the data")
    add("--steps", type=int, help="end after this many updates")
    add("--accumulate", type=int, help="micro-batches that a worker merges into an update")
    add("--batch-tokens", type=int, help="tokens in an update")
    add("--learning-rate", type=float, help="highest learning rate (default: a third of the preset's)")
    add("--seed", type=int, help="of the data order (default 0)")
    add("--resume", choices=("auto", "never"), default="auto", help="never: begin again (default auto)")
    add("--workers", default="1", help="processes that train together: N, or MIN:MAX (default 1)")
    add("--mirror", help="folder or s3://BUCKET/PREFIX that checkpoints are copied to as well, and fetched from")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="of TrainConfig or of the run; repeat")
    add("--cpus-per-worker", type=float, default=1.0, help="logical CPUs that each reserves (default 1)")
    add("--replay", help="folder of shards to go back to now and then, against forgetting")
    add("--heldout", help="held-out .jsonl of chats: measured on, and the depth router is fitted to it")
    options = vars(parser.parse_args())
    workers, cpus, more = (options.pop(key) for key in ("workers", "cpus_per_worker", "set"))

    def work() -> None:
        plan = finetune_plan(**(options | settings(more)))
        with Console("finetune") as console:
            result = train(plan, workers=parse_workers(workers), cpus_per_worker=cpus, on_progress=console)
        if options["heldout"]:
            routing.refit(result.out, options["heldout"])

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
