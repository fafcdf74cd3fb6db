"""Synthetic fine-tuning rows: a served model (a teacher) answers the questions of a .jsonl of chats, over a Ray Dataset.

    python jobs/teach.py --data questions.jsonl --out runs/taught.jsonl --url http://127.0.0.1:8000/v1 --model llama
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/teach.py --data /shared/questions.jsonl --out /shared/taught.jsonl --url http://host:8000/v1 --model llama

Each row says in "teacher" which model answered, how it was asked, and when. $SHOAL_TEACHER_KEY is the server's API key, if it
wants one. The same command goes on where an interrupted one stopped. The last line is JSON: how many rows were answered, kept,
refused or left out.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["teach", "--json", *sys.argv[1:]], usage=__doc__))
