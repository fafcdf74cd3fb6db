"""Whether a candidate may take the place of the stable version: asked the same questions, compared one by one.

    python jobs/gate.py --suites runs/suites --freeze
    python jobs/gate.py --suites runs/suites --model runs/candidate --against runs/model-int8 --data runs/data
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/gate.py --suites /shared/suites --model /shared/candidate --against /shared/stable --out /shared/gate.json

--suites: folder of held-out chats, frozen once. Exits with 1 where the candidate may not, which includes that nobody can say.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["gate", *sys.argv[1:]], usage=__doc__))
