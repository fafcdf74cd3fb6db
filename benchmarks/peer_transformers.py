"""transformers as a peer of `shoal bench decode`; run by a Python that has transformers and torch (see `peers.py`)."""

import json
import os
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    told = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(told["threads"])
    if told["checkpoint"]:
        model = AutoModelForCausalLM.from_pretrained(told["checkpoint"], dtype=torch.float32)
    else:
        shape = LlamaConfig(
            hidden_size=told["width"], num_hidden_layers=told["layers"], num_attention_heads=told["heads"],
            num_key_value_heads=told["kv_heads"], head_dim=told["head_dim"], intermediate_size=told["ffn"],
            vocab_size=told["vocab"], max_position_embeddings=2048, tie_word_embeddings=True,
        )  # fmt: skip
        model = LlamaForCausalLM(shape).float()
    model.eval()
    print("ready", file=answers)
    for line in sys.stdin:
        if line.startswith("["):
            print(json.dumps(said(model, json.loads(line))), file=answers)
            continue
        if line.startswith("{"):
            print(json.dumps(answered(model, told["checkpoint"], **json.loads(line))), file=answers)
            continue
        batch, prompt, tokens = map(int, line.split())
        ids = torch.tensor([[20 + (7 * s + i) % 200 for i in range(prompt)] for s in range(batch)])
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip
        print(time.perf_counter() - start, file=answers)


def answered(
    model: Any, checkpoint: str, messages: list[dict[str, str]], ids: list[int], tokens: int
) -> dict[str, list[int]]:
    """The ids of a chat by the checkpoint's own template, and the greedy answer to `ids`, its end left out."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    row = torch.tensor([ids])
    with torch.inference_mode():
        found = model.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )  # fmt: skip
    ends = model.generation_config.eos_token_id
    said = found[0, len(ids) :].tolist()
    stop = next(
        (at for at, token in enumerate(said) if token in (ends if isinstance(ends, list) else [ends])), len(said)
    )
    return {"chat": list(chat), "answer": said[:stop]}


def said(model: Any, ids: list[int]) -> dict[str, list[Any]]:
    """Nats of each of `ids` after those before it, and the likeliest id there."""
    row = torch.tensor([ids])
    with torch.inference_mode():
        logits = model(row[:, :-1]).logits[0].float()
    nats = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="none")
    return {"nats": nats.tolist(), "likeliest": logits.argmax(-1).tolist()}


if __name__ == "__main__":
    main()
