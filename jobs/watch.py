"""Say when the requests to a served model are no longer what they were: which numbers moved, since when, and how far.

    python jobs/watch.py --capture runs/capture --once
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/watch.py --capture /shared/capture

--capture: folder of a service that was started with it. Without --once it looks again and again, and prints what has changed.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["watch", *sys.argv[1:]], usage=__doc__))
