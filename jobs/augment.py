"""More chats to fine-tune on: some rows again in other words, with typing slips, or with other names in their code.

    python jobs/augment.py --data chats.jsonl --out runs/augmented.jsonl --heldout heldout.jsonl
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/augment.py --data /shared/chats.jsonl --out /shared/augmented.jsonl --share 0.5

A copy is marked so, and asks nothing that a row of --heldout asks. The last line is JSON: how many rows and copies there are.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["augment", "--json", *sys.argv[1:]], usage=__doc__))
