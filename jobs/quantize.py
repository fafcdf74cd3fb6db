"""INT8: train a model directory briefly with INT8 rounding in its forward pass, and write the INT8 model.

    python jobs/quantize.py --model runs/finetune/model --data runs/data --out runs/model-int8
    python jobs/quantize.py --model runs/finetune/model --data chats.jsonl --out runs/model-int8 --minutes 1 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/quantize.py --model /shared/finetune/model --data chats.jsonl --out /shared/model-int8

--data: shards or chats; what the model was trained on last is best. Checkpoints and metrics go to OUT.run.
"""

from __future__ import annotations

import argparse
import sys

from shoal.errors import exit_code
from shoal.on_ray.train import train
from shoal.train import routing
from shoal.train.log import Console
from shoal.train.plan import quantize_plan


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, help="model directory to start from")
    add("--data", required=True, help="folder of shards, or .jsonl of chats")
    add("--out", required=True, help="model directory to write")
    add("--minutes", type=float, help="end after this much training")
    add("--epochs", type=float, help="end after this many passes over the data")
    add("--steps", type=int, help="end after this many updates")
    add("--accumulate", type=int, help="micro-batches that a worker merges into an update")
    add("--batch-tokens", type=int, help="tokens in an update")
    add("--learning-rate", type=float, help="highest learning rate (default: a tenth of the preset's)")
    add("--resume", choices=("auto", "never"), default="auto", help="never: begin again (default auto)")
    add("--workers", type=int, default=1, help="processes that train together (default 1)")
    add("--cpus-per-worker", type=float, default=1.0, help="logical CPUs that each reserves (default 1)")
    add("--replay", help="folder of shards to go back to now and then, against forgetting")
    add("--heldout", help="held-out .jsonl of chats: measured on, and the depth router is fitted to it")
    options = vars(parser.parse_args())
    workers, cpus = options.pop("workers"), options.pop("cpus_per_worker")

    def work() -> None:
        with Console("quantize") as console:
            result = train(quantize_plan(**options), workers=workers, cpus_per_worker=cpus, on_progress=console)
        if options["heldout"]:
            routing.refit(result.out, options["heldout"])

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
