"""Synthetic fine-tuning rows: a served model (a teacher) answers the questions of a .jsonl of chats, over a Ray Dataset.

    python jobs/teach.py --data questions.jsonl --out runs/taught.jsonl --url http://127.0.0.1:8000/v1 --model llama
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/teach.py --data /shared/questions.jsonl --out /shared/taught.jsonl --url http://host:8000/v1 --model llama

Each row says in "teacher" which model answered, how it was asked, and when. $SHOAL_TEACHER_KEY is the server's API key, if it
wants one. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys

from shoal.api.teacher import Ask
from shoal.errors import exit_code
from shoal.on_ray.resources import local_ray
from shoal.on_ray.teach import teach
from shoal.progress import progress


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--data", required=True, dest="source", help=".jsonl of chats; what follows the user's last message is left out"
    )
    add("--out", required=True, help=".jsonl to write")
    add("--url", required=True, help="the teacher's API, ending in /v1")
    add("--model", required=True, help="name of the model there")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default 0)")
    add("--max-tokens", type=int, default=512, help="longest answer in tokens (default 512)")
    add("--seed", type=int, default=0, help="of sampled answers (default 0)")
    add("--depth", help="exit of a Shoal teacher, such as full (default: its own choice)")
    add("--concurrency", type=int, default=8, help="questions asked at once (default 8)")
    options = vars(parser.parse_args())
    source, out, concurrency = (options.pop(name) for name in ("source", "out", "concurrency"))

    def work() -> None:
        ask = Ask(**options)
        with local_ray(), progress("teach") as show:
            counts = teach(
                source, out, ask, concurrency=concurrency, on_progress=lambda done, total: show("answers", done, total)
            )
        print(json.dumps({"out": out, **counts}))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
