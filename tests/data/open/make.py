"""Makes what lies beside it, with transformers: for each family a tiny checkpoint of random weights, what it says to some
tokens, and 64 tokens that it goes on with, of those that the tokenizer has; two tokenizers with the ids of some chats; and
what chat templates in the manner of the families', in tools/, make of chats with tools. `python tests/data/open/make.py`, with
`tools` behind it for the last alone.

The weights are drawn wider than a real model's, so that every part of the network shows in the logits; they lie in bfloat16,
and the logits are those of the same numbers in fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = Path(__file__).parent
VOCAB, LENGTH, ANSWER = 288, 96, 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_theta": 500.0, "bos_token_id": None, "eos_token_id": None,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500.0,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 4.0], "rope_theta": 500.0,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True, "head_dim": 8, "rope_parameters": LLAMA3}),
    "smollm2": ("Llama", {"tie_word_embeddings": True, "num_hidden_layers": 6}),
    "mistral": ("Mistral", {"sliding_window": 12, "tie_word_embeddings": False, "head_dim": 8}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 12}),
    "olmo2": ("Olmo2", {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}),
    "phi3": ("Phi3", {"tie_word_embeddings": False, "partial_rotary_factor": 0.5, "hidden_size": 32}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True, "num_hidden_layers": 5}),
    "qwen3-yarn": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 12, "rope_parameters": YARN}),
    "phi3-longrope": (
        "Phi3",
        {
            "tie_word_embeddings": False,
            "partial_rotary_factor": 0.5,
            "hidden_size": 32,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 192,
        },
    ),
}
TEMPLATE = """\
{%- if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content | trim %}
    {%- if message.role == 'assistant' %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""
CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "  What is 12345 + 67?\n\n"}],
    [
        {"role": "user", "content": "caf\u00e9 cafe\u0301 \U0001f41f"},
        {"role": "assistant", "content": "<think>hm</think> A fish.\n"},
        {"role": "user", "content": "\tdef f(x):\n    return x  # it's"},
    ],
    [{"role": "user", "content": ""}],
    [{"role": "user", "content": "x = {'a': [1, 2]};  y"}, {"role": "assistant", "content": "ok"}],
]
LICENCE = "The weights beside this are random numbers: do with them what you like.\n"


def tokenizer() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=278, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([TEMPLATE, *(message["content"] for chat in CHATS for message in chat)] * 3, trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    core.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>")])
    start = core.token_to_id("<|endoftext|>")
    core.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", start)]
    )
    return core


SPACED = """\
{{- bos_token }}{% for message in messages %}
    {%- if message.role == 'assistant' %}{{ ' ' + message.content + ' ' + eos_token }}
    {%- else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}
{%- endfor %}
"""
FIRST: dict[str, Any] = {  # the newer of the two ways of putting a space in front of a text
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False},
}


def spaced() -> dict[str, Any]:
    """The tokenizer.json of one as Llama 2 has it: of sentencepiece's alphabet, with tokens for bytes."""
    core = tokenizers.Tokenizer(models.BPE())
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    trainer = trainers.BpeTrainer(vocab_size=29, limit_alphabet=20, show_progress=False)
    core.train_from_iterator([SPACED, *(message["content"] for chat in CHATS for message in chat)] * 3, trainer)
    values = json.loads(core.to_str())
    pieces = sorted(values["model"]["vocab"], key=values["model"]["vocab"].__getitem__)
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    values["model"] |= {"vocab": {name: number for number, name in enumerate(names)}, "unk_token": "<unk>"}
    values["model"] |= {"fuse_unk": True, "byte_fallback": True}
    whole = tokenizers.Tokenizer.from_str(json.dumps(values))
    whole.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    whole.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    found: dict[str, Any] = json.loads(whole.to_str())
    return found


def spaced_ids(values: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """What transformers makes of `CHATS` and a text with it; saved in `folder` where there is one."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(values)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    fast.chat_template = SPACED
    if folder is not None:
        fast.save_pretrained(folder)
    told = [
        {"messages": chat, "ids": list(fast.apply_chat_template(chat, tokenize=True, return_dict=False))}
        for chat in CHATS
    ]
    return {"chats": told, "text": fast(" Hello, 12 fish").input_ids}


def write_spaced() -> None:
    values = spaced()
    told = {"prepended": spaced_ids(values, HERE / "spaced"), "first": spaced_ids({**values, **FIRST}, None)}
    (HERE / "spaced.json").write_text(json.dumps({**told, "changes": FIRST}, indent=1) + "\n")


CHATML = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
FRAMES = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TAUGHT: dict[str, dict[str, Any]] = {  # by template: how it calls control tokens; those; tokens that are none, as in its family
    "qwen2": {"names": CHATML, "special": [], "added": FRAMES},
    "qwen3": {"names": CHATML, "special": [], "added": FRAMES},
    "smollm3": {"names": CHATML, "special": [], "added": []},
    "llama3": {
        "names": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        "special": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
        "added": [],
    },
    "mistral": {
        "names": {"bos_token": "<s>", "eos_token": "</s>"},
        "special": ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
                    "[/TOOL_RESULTS]", "[TOOL_CALLS]"],
        "added": [],
    },
    "phi4": {
        "names": {"bos_token": "<|endoftext|>", "eos_token": "<|end|>"},
        "special": ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        "added": ["<|tool|>", "<|/tool|>", "<|tool_call|>", "<|/tool_call|>", "<|tool_response|>"],
    },
}  # fmt: skip
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {
        "name": "add_fish", "description": "Adds \u201cfish\u201d & <more>.",
        "parameters": {"type": "object", "properties": {
            "n": {"type": "integer", "description": "how many"},
            "where": {"type": "object", "properties": {"sea": {"enum": ["a b", 1, None, True, 2.5]}}},
        }, "required": ["n"]},
    }},
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}},
]  # fmt: skip


def called(number: int, name: str, arguments: Any) -> dict[str, Any]:
    return {"id": f"call0000{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def gave(number: int, content: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": content}


NESTED = {"n": 3, "where": {"sea": '\u6f6e \U0001f41f "q"\n', "list": [[], {}, None, True, -1.5e-3]}}
ASK = {"role": "user", "content": "How many fish?"}
FIRST_CALL = {"role": "assistant", "content": "", "tool_calls": [called(1, "add_fish", NESTED)]}
WITH_TOOLS: list[list[dict[str, Any]]] = [
    [ASK],
    [{"role": "system", "content": "Be short."}, ASK],
    [ASK, FIRST_CALL, gave(1, '{"fish": [1, "caf\u00e9"]}')],
    [{"role": "system", "content": "Be short."}, ASK, FIRST_CALL, gave(1, "four"), {"role": "assistant", "content": "Four."},
     {"role": "user", "content": "Look again!"}],
    [ASK, {"role": "assistant", "content": "Let me look.",
           "tool_calls": [called(1, "look", {}), called(2, "add_fish", {"n": 1})]},
     gave(1, "a"), gave(2, "b\n"), {"role": "assistant", "content": "Done."}],
]  # fmt: skip


def in_text(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A chat for a template that shows no calls: with them in the texts."""
    shown = []
    for message in chat:
        calls = [
            f"<tool_call>\n{json.dumps({k: c['function'][k] for k in ('name', 'arguments')}, ensure_ascii=False)}\n</tool_call>"
            for c in message.get("tool_calls", ())
        ]
        text = "\n".join([*([message["content"]] if message["content"] else []), *calls])
        shown.append({**{k: v for k, v in message.items() if k != "tool_calls"}, "content": text})
    return shown


def write_tools() -> None:
    """What transformers makes of `WITH_TOOLS` with each template in tools/; chats that a template refuses are left out."""
    found: dict[str, Any] = {"tools": TOOLS}
    for family, told in TAUGHT.items():
        core = tokenizers.Tokenizer.from_file(str(HERE / "tokenizer" / "tokenizer.json"))
        core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in told["special"]])
        core.add_tokens([AddedToken(name, special=False, normalized=False) for name in told["added"]])
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **told["names"])
        fast.chat_template = (HERE / "tools" / f"{family}.jinja").read_text()
        chats = []
        for chat in WITH_TOOLS:
            given = in_text(chat) if family == "smollm3" else chat
            for tools in (TOOLS, None):
                more = {"tools": tools, "add_generation_prompt": chat[-1]["role"] != "assistant"}
                try:
                    text = fast.apply_chat_template(given, tokenize=False, **more)
                except Exception:  # of the template's own
                    continue
                ids = fast.apply_chat_template(given, tokenize=True, return_dict=False, **more)
                chats.append({"messages": chat, "with_tools": tools is not None, "text": text, "ids": list(ids)})
        found[family] = {**told, "chats": chats}
    lines = (f"{json.dumps(name)}: {json.dumps(each)}" for name, each in found.items())
    (HERE / "tools" / "chats.json").write_text("{" + ",\n".join(lines) + "}\n")


def weights(model: torch.nn.Module, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.empty(p.shape).normal_(generator=draw)
        scale = 0.2 if p.dim() < 2 else (0.4 if "lm_head" in name else 1.2) / p.shape[1] ** 0.5
        offset = 1.0 if p.dim() < 2 else 0.0
        p.data.copy_((offset + scale * noise).bfloat16().float())


def main() -> None:
    core = tokenizer()
    folder = HERE / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    told = []
    for chat in CHATS:
        for opened in (True, False):
            ids = fast.apply_chat_template(chat, add_generation_prompt=opened, tokenize=True, return_dict=False)
            told.append({"messages": chat, "add_generation_prompt": opened, "ids": list(ids)})
    (folder / "LICENSE").write_text(LICENCE)
    (HERE / "chats.json").write_text(
        json.dumps({"chats": told, "text": fast("Hello, 12 fish").input_ids}, indent=1) + "\n"
    )
    write_spaced()
    write_tools()
    for name in FAMILIES:
        write_family(name, core)


def write_family(name: str, core: tokenizers.Tokenizer) -> None:
    """The checkpoint of a family, and what it says."""
    end, number = core.token_to_id("<|im_end|>"), list(FAMILIES).index(name)
    kind, changes = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**{**SHAPE, **changes})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().float()
    weights(model, number)
    model.tie_weights()
    tokens = torch.randint(0, VOCAB, (1, LENGTH), generator=torch.Generator().manual_seed(number))
    with torch.no_grad():
        logits = model(tokens).logits[0]
        prompt = tokens[:, :16]
        model.generation_config.eos_token_id = None
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=ANSWER,
            pad_token_id=0,
            suppress_tokens=list(range(core.get_vocab_size(), VOCAB)),
        )[0, 16:]
    out = HERE / name
    model.bfloat16().save_pretrained(out)
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": [end], "temperature": 0.7}) + "\n")
    expected = {"tokens": tokens[0], "logits": logits[:, ::8].contiguous(), "answer": answer.contiguous()}
    save_file(expected, str(HERE / f"{name}.safetensors"))
    print(name, answer.tolist()[:12], float(logits.abs().max()))


if __name__ == "__main__":
    write_tools() if sys.argv[1:] == ["tools"] else main()
