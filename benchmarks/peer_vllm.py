"""vLLM on this machine as a peer of `shoal bench decode`; run by a Python that has vLLM 0.32 (see `peers.py`)."""

import json
import math
import os
import sys
import time
from pathlib import Path


def main() -> None:
    told = json.loads(sys.argv[1])
    dtype, length = told.get("dtype", "float32"), told.get("length", 2048)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM prints to stdout
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, which can be put to sleep
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{told['threads'] - 1}"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "2"  # GiB
    os.environ["HF_HUB_OFFLINE"] = os.environ["VLLM_NO_USAGE_STATS"] = "1"
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": told["width"],
        "num_hidden_layers": told["layers"],
        "num_attention_heads": told["heads"],
        "num_key_value_heads": told["kv_heads"],
        "head_dim": told["head_dim"],
        "intermediate_size": told["ffn"],
        "vocab_size": told["vocab"],
        "max_position_embeddings": length,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "torch_dtype": dtype,
    }
    model = Path(told["folder"])
    (model / "config.json").write_text(json.dumps(config))
    options = {"model": str(model), "load_format": "dummy", "skip_tokenizer_init": True}
    if told["checkpoint"]:
        options = {"model": told["checkpoint"], "skip_tokenizer_init": True}
    if told.get("shoal"):  # a model directory, which the plugin of its environment's own Shoal loads
        options = {"model": str(model / "model")}

    from vllm import LLM, SamplingParams

    steps = told.get("steps", False)
    if steps:  # a part of the device's memory is left: summaries of a Shoal model's blocks lie beside vLLM's own
        options["gpu_memory_utilization"] = 0.85
    llm = LLM(
        **options, dtype=dtype, max_model_len=length, enforce_eager=told["eager"], enable_prefix_caching=steps
    )  # fmt: skip
    room = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens if steps else math.inf
    print("ready", file=answers)
    for line in sys.stdin:
        batch, prompt, tokens = map(int, line.split())
        if batch * (prompt + tokens) > room:
            print("nan", file=answers)
            continue
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": [20 + (7 * i + j) % 257 for j in range(prompt)]} for i in range(batch)]
        start = time.perf_counter()
        done = llm.generate(prompts, sampling, use_tqdm=False)
        spent = time.perf_counter() - start
        assert all(len(o.outputs[0].token_ids) == tokens for o in done)
        print(spent, file=answers)


if __name__ == "__main__":
    main()
