"""`shoal bench decode --device cuda` without a GPU: what a step must read in closed form, and that it says what it lacks."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import device, peers
from benchmarks.commands import bench
from benchmarks.device import Steps, bytes_of_step, model_of, plain_bytes, plain_gpt, step_seconds, steps
from benchmarks.plain import PlainDecoder
from shoal import presets
from shoal.config import ModelConfig
from shoal.errors import ResourceError, UsageError
from shoal.model.net import Net

# w 32, S 4, K 3, two KV heads of 16 numbers; summaries are the means of keys
SHAPE = ModelConfig(
    vocab=300, layers=4, width=64, heads=4, kv_heads=2, head_dim=16, ffn=128, train_length=4096, window=32, block=4, page=16,
    top_k=3, patch=4, image_size=12,
)  # fmt: skip
PAIR = 2 * 16  # numbers of a key and its value


def attention(config: ModelConfig, length: int, each: int) -> int:
    """Bytes a request, beside the weights."""
    return bytes_of_step(config, 1, length, each) - bytes_of_step(config, 0, length, each)


def test_each_weight_of_layers_and_head_is_read_once() -> None:
    """Of a table that is not tied the head alone; nothing of images, nor of other exits."""
    for tied in (True, False):
        config = dataclasses.replace(SHAPE, tied=tied)
        net = Net(config)
        layers = sum(p.numel() for name, p in net.named_parameters() if name.startswith("groups."))
        assert bytes_of_step(config, 0, 100, 2) == 2 * (layers + 300 * 64 + 64)
        assert bytes_of_step(config, 7, 100, 2) - bytes_of_step(config, 0, 100, 2) == 7 * attention(config, 100, 2)


@pytest.mark.parametrize("each", [2, 4])
def test_attention_reads_what_its_layers_read(each: int) -> None:
    """Four layers of each kind, two KV heads, by hand."""
    heads = 4 * 2
    kind = {name: dataclasses.replace(SHAPE, attn_pattern=name, dense_length=64 * (name == "S")) for name in "LDHS"}
    assert attention(kind["L"], 20, each) == heads * 20 * PAIR * each
    assert attention(kind["L"], 4000, each) == heads * 32 * PAIR * each
    assert attention(kind["D"], 4000, each) == heads * 4000 * PAIR * each
    # 10 tokens: two blocks, no more than are read, so that no summary is; each token counts once
    assert attention(kind["H"], 10, each) == heads * 10 * PAIR * each
    # 4,001 tokens: the window, three blocks, a tail of one; 1,000 means of 16 numbers in fp32
    assert attention(kind["H"], 4001, each) == heads * ((32 + 12 + 1) * PAIR * each + 1000 * 16 * 4)
    variance = dataclasses.replace(kind["H"], summary="mean_var")
    assert attention(variance, 4001, each) == heads * ((32 + 12 + 1) * PAIR * each + 1000 * 32 * 4)
    assert attention(kind["S"], 64, each) == heads * 64 * PAIR * each
    # of 4,000 tokens 3,968 stand before the window, in 992 blocks
    assert attention(kind["S"], 4000, each) == heads * ((32 + 12) * PAIR * each + 992 * 16 * 4)


def test_a_context_of_32k_reads_little_more_than_one_of_1k() -> None:
    """What the aim of 1.3 times rests on: at batch 1, and of the 1b preset."""
    config = presets.get("1b").model
    assert bytes_of_step(config, 1, 32768) < 1.02 * bytes_of_step(config, 1, 1024)


def test_a_step_is_taken_as_an_engine_takes_it() -> None:
    model = model_of(presets.get("test").model, torch.device("cpu"))
    assert step_seconds(model, 2, 40, rounds=1) > 0


CPU = torch.device("cpu")
TEST = presets.get("test").model
PEER = """
import json, os, sys
told = json.loads(sys.argv[1])
model = told["folder"] + "/model"
told["files"] = sorted(os.listdir(model)) if os.path.exists(model) else []
open(os.environ["SEEN"], "w").write(json.dumps(told))
print("ready", flush=True)
for line in sys.stdin:
    batch, prompt, tokens = map(int, line.split())
    assert prompt + tokens <= told["length"]
    print("nan" if prompt > 200 else prompt / 64 + tokens * batch / 128, flush=True)
"""


def peer(monkeypatch: pytest.MonkeyPatch, folder: Path, which: str, text: str) -> Path:
    """In place of a kind of peer; returns where it writes what it was told."""
    script = folder / "peer.py"
    script.write_text(text)
    monkeypatch.setitem(peers.KINDS, which, (str(script), {"shoal": which == "vllm-shoal"}))
    monkeypatch.setenv("SEEN", str(folder / "seen.json"))
    return folder / "seen.json"


def test_the_plain_gpt_decodes_what_it_reads_at_once() -> None:
    model = plain_gpt(TEST, CPU, 12)
    tokens = torch.randint(20, TEST.vocab, (3, 12), generator=torch.Generator().manual_seed(0))
    decoder = PlainDecoder(model, 3, 12)
    found = torch.stack([decoder.step(tokens[:, place], place) for place in range(12)], 1)
    torch.testing.assert_close(found, model(tokens).detach(), atol=1e-5, rtol=1e-5)


def test_the_plain_gpt_reads_its_weights_once_and_all_keys_and_values() -> None:
    model = plain_gpt(TEST, CPU, 12)
    read = sum(p.numel() for name, p in model.named_parameters() if name != "positions.weight")
    memory = sum(each.numel() for pair in PlainDecoder(model, 3, 12).kv for each in pair)
    assert plain_bytes(TEST, 3, 12) == 2 * (read + memory)


@pytest.mark.parametrize("which", ["vllm", "vllm-shoal"])
def test_steps_of_a_peer_are_what_tokens_take_beyond_the_first(
    which: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It has the shape and the longest context, in bf16; a Llama reads all of it, and our model is one that is written."""
    seen = peer(monkeypatch, tmp_path, which, PEER)
    first, second = steps(which, TEST, 4, (128, 256), CPU, python=sys.executable)
    reads = TEST if which == "vllm-shoal" else dataclasses.replace(TEST, attn_pattern="D", max_length=512)
    assert first == Steps(which, 4, 128, bytes_of_step(reads, 4, 128), 4 / 128)
    assert (second.length, second.seconds) == (256, None)
    told = json.loads(seen.read_text())
    assert (told["length"], told["dtype"], told["steps"], told["layers"]) == (256, "bfloat16", True, TEST.layers)
    assert ("model.safetensors" in told["files"]) == (which == "vllm-shoal")


VLLM = """
import json, os, types
class SamplingParams:
    def __init__(self, **told): self.__dict__.update(told)
class LLM:
    def __init__(self, **told):
        open(os.environ["SEEN"], "w").write(json.dumps(told))
        cache = types.SimpleNamespace(kv_cache_size_tokens=300)
        self.llm_engine = types.SimpleNamespace(vllm_config=types.SimpleNamespace(cache_config=cache))
    def generate(self, prompts, sampling, use_tqdm):
        assert len({p["prompt_token_ids"][0] for p in prompts}) == len(prompts), "none is found in another's memory"
        answer = types.SimpleNamespace(token_ids=[0] * sampling.max_tokens)
        return [types.SimpleNamespace(outputs=[answer]) for _ in prompts]
"""


@pytest.mark.parametrize("asked", [True, False])
def test_vllm_is_told_how_steps_are_timed(asked: bool, tmp_path: Path) -> None:
    """A vLLM of a few lines. Steps: prompts stay in its memory, a part of the device is left, what does not fit is said."""
    (tmp_path / "vllm.py").write_text(VLLM)
    told = {name: getattr(TEST, name) for name in ("layers", "width", "heads", "kv_heads", "head_dim", "ffn", "vocab")}
    told |= {"threads": 1, "folder": str(tmp_path), "checkpoint": None, "eager": False, "length": 64}
    told |= {"steps": True, "dtype": "bfloat16"} if asked else {}
    script = Path(peers.__file__).with_name("peer_vllm.py")
    told_by = os.environ | {"PYTHONPATH": str(tmp_path), "SEEN": str(tmp_path / "seen.json")}
    done = subprocess.run([sys.executable, str(script), json.dumps(told)], input="2 8 4\n256 2 1\n", env=told_by,
                          capture_output=True, text=True, timeout=60, check=True)  # fmt: skip
    ready, fits, large = done.stdout.split()
    assert ready == "ready" and float(fits) >= 0 and (large == "nan") == asked
    options = json.loads((tmp_path / "seen.json").read_text())
    assert options["enable_prefix_caching"] == asked and ("gpu_memory_utilization" in options) == asked
    assert (options["dtype"], options["max_model_len"]) == ("bfloat16" if asked else "float32", 64)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == TEST.head_dim


def test_models_take_turns_and_a_peer_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    peer(monkeypatch, tmp_path, "vllm", "raise SystemExit('no [such] kernel')")
    monkeypatch.setattr(device, "need_cuda", torch.device)
    monkeypatch.setattr(device, "bandwidth", lambda there: 1e9)
    monkeypatch.setattr(device, "step_seconds", lambda *_: 0.5)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda there: "a GPU")
    rows = device.on_device(Console(width=120), device="cpu", shape="test", batches=(1, 2), rounds=1,
                            peer={"vllm": sys.executable}, contexts=(16, 40))  # fmt: skip
    assert [(row["batch"], row["model"], row["length"]) for row in rows] == [
        (batch, model, length) for batch in (1, 2) for model in ("ours", "plain") for length in (16, 40)
    ]
    assert rows[0]["share"] == pytest.approx(rows[0]["bytes"] / 1e9 / 0.5)
    said = capsys.readouterr().out
    assert said.count("no [such] kernel") == 2 and said.count("failed  ") == 1, "a line, and the JSON"
    assert "no [such] kernel" in json.loads(said.splitlines()[-1])["failed"]["vllm"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so() -> None:
    lacking = CliRunner().invoke(bench, ["decode", "--device", "cuda"]).exception
    assert isinstance(lacking, ResourceError)
    said = str(lacking)
    assert "no CUDA device here" in said and said.endswith("run it on a machine with a GPU, or with --device cpu")
    assert said.count("\n") == 0
    wrong = CliRunner().invoke(bench, ["decode", "--device", "tpu"]).exception
    assert isinstance(wrong, UsageError) and "cpu" in str(wrong)
