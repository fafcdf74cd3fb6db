"""What a served model should learn from what it was asked: kept texts, with labels of people or of a teacher, as a cut.

    python jobs/curate.py --capture runs/capture --out runs/cut-1 --replay runs/data/sft-train.jsonl --suites runs/suites
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/curate.py --capture /shared/capture --out /shared/cut-1 --import /shared/labels.json

--capture: folder of a service that keeps texts. Corrections of people come first, then imports, then a teacher's answers, then
a few answers that people liked; what the model said and nobody rated is never learned.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["curate", *sys.argv[1:]], usage=__doc__))
