"""Quality, speed and size of one model directory or two, on what neither was trained on, as tables, JSON and a page.

    python jobs/evaluate.py --model runs/finetune/model --data runs/data --json runs/report.json
    python jobs/evaluate.py --model runs/finetune/model --against runs/model-int8 --data runs/data --json runs/report.json
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/evaluate.py --model /shared/model --data /shared/data --json /shared/report.json

--data: folder made by `jobs/prepare.py`, with held-out shards and chats. The page lies beside the JSON.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from shoal.errors import exit_code
from shoal.evaluation import compare, leave_a_core
from shoal.progress import progress
from shoal.quickstart import print_tables, write_report


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="model directory")
    add("--against", type=Path, help="a second model directory, shown beside the first")
    add("--data", required=True, type=Path, help="folder of shards with held-out rows")
    add("--json", type=Path, help="file to write the report to")
    options = parser.parse_args()
    models = {options.model.name: options.model}
    if options.against is not None:
        same = options.against.name == options.model.name
        models[str(options.against) if same else options.against.name] = options.against
    leave_a_core()

    def work() -> None:
        with progress("evaluate") as tell:
            report = compare(models, options.data, on_progress=tell)
        print_tables(report, Console())
        if options.json is not None:
            write_report(options.json, {"title": " and ".join(models), "corpus": {}, "stages": [], **report})

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
