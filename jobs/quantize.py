"""INT8: train a model directory briefly with INT8 rounding in its forward pass, and write the INT8 model.

    python jobs/quantize.py --model runs/finetune/model --data runs/data --out runs/model-int8
    python jobs/quantize.py --model runs/finetune/model --data chats.jsonl --out runs/model-int8 --minutes 1 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/quantize.py --model /shared/finetune/model --data chats.jsonl --out /shared/model-int8

--data: shards or chats; what the model was trained on last is best. Checkpoints and metrics go to OUT.run.
The last line is JSON: where the model is, its bits a byte, its router.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", "--json", *sys.argv[1:]], usage=__doc__))
