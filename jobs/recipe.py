"""An application whole: made-up data, a model that learns it, INT8, and what both are worth beside simple rules.

    python jobs/recipe.py --out runs/customer-service customer-service
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/recipe.py --out /shared/customer-service --minutes 20 customer-service

The same command goes on where an interrupted one stopped. The last line is JSON: the report.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["recipe", "--json", *sys.argv[1:]], usage=__doc__))
