"""Stage 1: pretrain a model on shards made by `jobs/prepare.py`, on Ray Train.

    python jobs/pretrain.py --preset test --data runs/data --out runs/pretrain --steps 20
    python jobs/pretrain.py --preset tiny --data runs/data --out runs/pretrain --minutes 5 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/pretrain.py --preset tiny --data /shared/data --out /shared/pretrain --tokens 2000000

Leaves checkpoints/, metrics.jsonl and model/ in --out, the model with a depth router that is fitted on held-out rows of the
shards; the same command goes on where an interrupted one stopped.
The last line is JSON: where the model is, its bits a byte, its router.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["pretrain", "--json", *sys.argv[1:]], usage=__doc__))
