"""Early exits for a model that has none, such as an imported one: they learn what full depth says, which stays as it is.

    python jobs/adapt.py --model models/smol --data chats.jsonl --heldout heldout.jsonl --out models/smol-exits
    python jobs/adapt.py --model models/smol --data texts.jsonl --out models/smol-exits --minutes 60 --workers 2
    python jobs/adapt.py --model models/smol --sparse --data long-texts.jsonl --out models/smol-long
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/adapt.py --model /shared/smol --data /shared/chats.jsonl --out /shared/smol-exits --minutes 60

--data: chats, or texts, a line each, like what will be served. Checkpoints and metrics go to OUT.run.
The last line is JSON: where the model is, bits a byte of its exits before and after, the sha256 of the rest, its router.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["adapt", "--json", *sys.argv[1:]], usage=__doc__))
