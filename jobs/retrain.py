"""A candidate for a release, made from its stable version and a cut of new rows, on Ray Train.

    python jobs/retrain.py --release models/support --cut cuts/7 --replay data/shards
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/retrain.py --release /shared/models/support --cut /shared/cuts/7

The router alone (--kind router), or a fine-tuning of the fp32 parent of what is served, rounded again as that is. Two at once
are refused, and so is one within --cooldown of the last, or beyond the --budget of a day. The last line is JSON: the version.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["retrain", "--json", *sys.argv[1:]], usage=__doc__))
