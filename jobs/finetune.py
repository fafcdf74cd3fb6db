"""Stage 2: fine-tune a model directory on chats, loss on the answers only, on Ray Train.

    python jobs/finetune.py --model runs/pretrain/model --data chats.jsonl --out runs/finetune --minutes 2 --workers 2
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/finetune.py --model /shared/pretrain/model --data /shared/chats.jsonl --out /shared/finetune

Rows of --data: {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}, content text or
OpenAI parts. Two passes unless told otherwise; the same command goes on where an interrupted one stopped.
The last line is JSON: where the model is, its bits a byte, its router.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", "--json", *sys.argv[1:]], usage=__doc__))
