"""llama.cpp as a peer of `shoal bench decode`; run by a Python that has llama-cpp-python and gguf (see `peers.py`)."""

import ctypes
import json
import os
import sys
import time
from typing import Any

import gguf
import llama_cpp
import numpy as np

STEP = 256  # tokens whose logits are there at once


def main() -> None:
    told = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    path = os.path.join(told["folder"], "model.gguf")
    llama_cpp.llama_backend_init()
    if told["gguf"] is None:
        write(path, told)
    elif told["weights"] is None:
        path = told["gguf"]
    else:
        requantize(told["gguf"], path, told)
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    print("ready", file=answers)
    for line in sys.stdin:
        if line.startswith("["):
            print(json.dumps(said(model, told, json.loads(line))), file=answers)
        else:
            print(seconds(model, told, *map(int, line.split())), file=answers)


def requantize(given: str, path: str, told: dict[str, Any]) -> None:
    """The weights of a file in another form, head and token table too."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = {"F32": llama_cpp.LLAMA_FTYPE_ALL_F32, "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0}[told["weights"]]
    params.allow_requantize, params.nthread = True, told["threads"]
    if code := llama_cpp.llama_model_quantize(given.encode(), path.encode(), ctypes.byref(params)):
        raise RuntimeError(f"llama_model_quantize gave {code}")


def write(path: str, told: dict[str, Any]) -> None:
    """A Llama-shaped model of random weights with a tied head and no vocabulary."""
    kind = gguf.GGMLQuantizationType[told["weights"]]
    random = np.random.default_rng(0)
    width, ffn, layers = told["width"], told["ffn"], told["layers"]
    kv_width = width * told["kv_heads"] // told["heads"]
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(2048)
    file.add_embedding_length(width)
    file.add_block_count(layers)
    file.add_feed_forward_length(ffn)
    file.add_head_count(told["heads"])
    file.add_head_count_kv(told["kv_heads"])
    file.add_layer_norm_rms_eps(1e-6)
    file.add_rope_dimension_count(width // told["heads"])
    file.add_vocab_size(told["vocab"])
    file.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=np.float32) * 0.02
        if kind == gguf.GGMLQuantizationType.F32:
            file.add_tensor(f"{name}.weight", values)
        else:
            file.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    matrix("token_embd", told["vocab"], width)
    file.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, np.float32))
        for name, rows, columns in (
            ("attn_q", width, width), ("attn_k", kv_width, width), ("attn_v", kv_width, width),
            ("attn_output", width, width), ("ffn_gate", ffn, width), ("ffn_up", ffn, width), ("ffn_down", width, ffn),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{name}", rows, columns)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def seconds(model: Any, told: dict[str, Any], batch: int, prompt: int, tokens: int) -> float:
    """What `batch` sequences take that are decoded together, greedily; their memory is made before the clock starts."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max = (prompt + tokens) * batch, batch
    params.n_batch, params.n_ubatch = max(512, prompt * batch), 512
    params.n_threads = params.n_threads_batch = told["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    rows = llama_cpp.llama_batch_init(prompt * batch, 0, 1)

    def decode(entries: list[tuple[int, int, int, bool]]) -> None:
        rows.n_tokens = len(entries)
        for i, (token, place, sequence, wanted) in enumerate(entries):
            rows.token[i], rows.pos[i], rows.n_seq_id[i], rows.logits[i] = token, place, 1, wanted
            rows.seq_id[i][0] = sequence
        if code := llama_cpp.llama_decode(context, rows):
            raise RuntimeError(f"llama_decode gave {code}")

    def likeliest(row: int) -> int:
        return int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, row), (told["vocab"],)).argmax())

    start = time.perf_counter()
    decode([(20 + (7 * s + i) % 200, i, s, i == prompt - 1) for s in range(batch) for i in range(prompt)])
    last = [likeliest(prompt * s + prompt - 1) for s in range(batch)]
    for place in range(prompt, prompt + tokens - 1):
        decode([(token, place, s, True) for s, token in enumerate(last)])
        last = [likeliest(row) for row in range(batch)]
    found = time.perf_counter() - start
    llama_cpp.llama_batch_free(rows)
    llama_cpp.llama_free(context)
    return found


def said(model: Any, told: dict[str, Any], ids: list[int]) -> dict[str, list[Any]]:
    """Nats of each of `ids` after those before it, and the likeliest id there."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = len(ids), STEP, STEP
    params.n_threads = params.n_threads_batch = told["threads"]
    context = llama_cpp.llama_init_from_model(model, params)
    rows, nats, likeliest = llama_cpp.llama_batch_init(STEP, 0, 1), [], []
    for start in range(0, len(ids) - 1, STEP):
        places = range(start, min(start + STEP, len(ids) - 1))
        rows.n_tokens = len(places)
        for i, place in enumerate(places):
            rows.token[i], rows.pos[i], rows.n_seq_id[i], rows.logits[i] = ids[place], place, 1, True
            rows.seq_id[i][0] = 0
        if code := llama_cpp.llama_decode(context, rows):
            raise RuntimeError(f"llama_decode gave {code}")
        for i, place in enumerate(places):
            found = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, i), (told["vocab"],)).astype(float)
            top = found.max()
            nats.append(float(top + np.log(np.exp(found - top).sum()) - found[ids[place + 1]]))
            likeliest.append(int(found.argmax()))
    llama_cpp.llama_batch_free(rows)
    llama_cpp.llama_free(context)
    return {"nats": nats, "likeliest": likeliest}


if __name__ == "__main__":
    main()
