"""A GGUF against the safetensors of the same weights, its kinds against their definitions, and files that are damaged."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shoal import Model
from shoal.errors import CheckpointError
from shoal.open_weights.convert import export_model, import_model
from shoal.open_weights.gguf import Gguf
from tests.unit.open_weights.conftest import edit

Make = Callable[[str], Path]
U32, F32, STRING, ARRAY, I32, BOOL = 4, 6, 8, 9, 5, 7
NUMBERS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(told: Any) -> bytes:
    if isinstance(told, str):
        return struct.pack("<I", STRING) + text(told)
    if isinstance(told, float):
        return struct.pack("<If", F32, told)
    if isinstance(told, list):
        kind = STRING if isinstance(told[0], str) else F32 if isinstance(told[0], float) else I32
        items = b"".join(text(e) if kind == STRING else struct.pack("<f" if kind == F32 else "<i", e) for e in told)
        return struct.pack("<IIQ", ARRAY, kind, len(told)) + items
    if isinstance(told, bool):
        return struct.pack("<I?", BOOL, told)
    return struct.pack("<Ii", I32, told) if told < 0 else struct.pack("<II", U32, told)


def written(path: Path, meta: Mapping[str, Any], tensors: Mapping[str, tuple[str, list[int], bytes]]) -> Path:
    """A GGUF, by the specification: header, metadata, places of tensors with dims from the innermost, and their bytes."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    head += b"".join(text(key) + value(told) for key, told in meta.items())
    body = b""
    for name, (kind, shape, raw) in tensors.items():
        dims = b"".join(struct.pack("<Q", n) for n in reversed(shape))
        head += text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", NUMBERS[kind], len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + body)
    return path


def rounded(kind: str, x: np.ndarray) -> bytes:
    """The blocks of 32 of `x`, each by the definition of `kind`."""
    out = b""
    for block in x.astype(np.float32).reshape(-1, 32):
        if kind == "Q8_0":
            d = np.float16(np.abs(block).max() / 127)
            out += d.tobytes() + np.rint(block / np.float32(d)).clip(-127, 127).astype(np.int8).tobytes()
            continue
        low = np.float16(block.min() if kind == "Q4_1" else 0)
        d = np.float16((block.max() - block.min()) / 15 if kind == "Q4_1" else np.abs(block).max() / 7)
        q = (
            np.rint((block - np.float32(low)) / np.float32(d) + (0 if kind == "Q4_1" else 8))
            .clip(0, 15)
            .astype(np.uint8)
        )
        out += d.tobytes() + (low.tobytes() if kind == "Q4_1" else b"") + (q[:16] | q[16:] << 4).tobytes()
    return out


def restored(kind: str, raw: bytes) -> list[float]:
    """What blocks stand for, one number after the other."""
    size, numbers = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind], []
    for at in range(0, len(raw), size):
        d = struct.unpack("<e", raw[at : at + 2])[0]
        if kind == "Q8_0":
            numbers += [d * q for q in struct.unpack("<32b", raw[at + 2 : at + 34])]
            continue
        least = struct.unpack("<e", raw[at + 2 : at + 4])[0] if kind == "Q4_1" else 0.0
        packed = raw[at + size - 16 : at + size]
        levels = [byte & 15 for byte in packed] + [byte >> 4 for byte in packed]
        numbers += [d * (level - (8 if kind == "Q4_0" else 0)) + least for level in levels]
    return numbers


THEIRS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_of(source: Path, path: Path, kind: str = "F32", **changes: Any) -> Path:
    """The "smollm2" of tests/data/open as llama.cpp's converter writes a Llama: rows of q and k permuted."""
    tensors: dict[str, tuple[str, list[int], bytes]] = {}
    for name, tensor in load_file(str(source / "model.safetensors")).items():
        x = tensor.float().numpy()
        made = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(name)
        if made is None:
            _, _, layer, *rest = name.split(".")
            made = f"blk.{layer}.{THEIRS['.'.join(rest[:-1])]}.weight"
        if "attn_q" in made or "attn_k" in made:
            x = x.reshape(-1, 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)  # heads, halves, d/2 = 2: its `permute`
        own = kind if x.ndim > 1 and (kind == "F16" or x.shape[-1] % 32 == 0) else "F32"
        raw = rounded(own, x) if own.startswith("Q") else x.astype(np.float16 if own == "F16" else np.float32).tobytes()
        tensors[made] = (own, list(x.shape), raw)
    names = [f"t{n}" for n in range(29)] + ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    alphabet = Model.from_preset("test").tokenizer._core.get_vocab()
    letters = [piece for piece in sorted(alphabet, key=alphabet.__getitem__) if len(piece) == 1]
    tokens = letters + [f"{a}{b}" for a, b in pairwise(letters[:30])] + names[29:]
    meta: dict[str, Any] = {
        "general.architecture": "llama", "general.name": "tiny", "llama.block_count": 6, "llama.embedding_length": 16,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 24,
        "llama.attention.layer_norm_rms_epsilon": 1e-6, "llama.rope.freq_base": 500.0, "llama.context_length": 256,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in pairwise(letters[:30])],
        "tokenizer.ggml.token_type": [1] * 285 + [3] * 3, "tokenizer.ggml.eos_token_id": 286,
        "tokenizer.ggml.bos_token_id": 285, "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }  # fmt: skip
    return written(path, {key: told for key, told in (meta | changes).items() if told is not None}, tensors)


def test_a_gguf_of_plain_numbers_is_the_checkpoint_that_it_was_made_from(checkpoint: Make, tmp_path: Path) -> None:
    source = checkpoint("smollm2")
    import_model(source, tmp_path / "one", dtype="float32")
    import_model(gguf_of(source, tmp_path / "tiny.gguf"), tmp_path / "two")
    one, two = Model.load(tmp_path / "one"), Model.load(tmp_path / "two")
    assert one.config == two.config and two.name == "tiny"
    for name, tensor in one.net.state_dict().items():
        assert torch.equal(two.net.state_dict()[name], tensor), name
    half = import_model(gguf_of(source, tmp_path / "half.gguf", "F16"), tmp_path / "half")
    assert half.dtype == "float16", "as it lies there"
    for name, tensor in Model.load(tmp_path / "half").net.state_dict().items():
        assert torch.equal(tensor, one.net.state_dict()[name].half()), name


def test_biases_of_q_and_k_lie_as_their_rows_do(checkpoint: Make, tmp_path: Path) -> None:
    """llama.cpp's converter moves both; a bias left as it lay belonged to other rows."""
    path = gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf")
    x = np.arange(16, dtype=np.float32)
    moved = x.reshape(-1, 2, 2).swapaxes(1, 2).reshape(-1)  # heads, halves, d/2 = 2
    tensors = {f"blk.0.attn_{name}.bias": ("F32", [16], moved.tobytes()) for name in "qkv"}
    it = Gguf(written(path, Gguf(path)._meta, tensors))
    for name, told in (("q", x), ("k", x), ("v", moved)):
        assert it.read(f"model.layers.0.self_attn.{name}_proj.bias").tolist() == told.tolist()


def with_factors(source: Path, path: Path, factors: np.ndarray, **changes: Any) -> Path:
    """The "smollm2" of tests/data/open with a tensor of `factors` by which each pair turns slower."""
    it = Gguf(gguf_of(source, path, **changes))
    kinds = {0: "F32"}
    tensors = {
        name: (kinds[place.kind], list(place.shape), it._numbers(name).numpy().tobytes())
        for name, place in it._places.items()
    }
    tensors["rope_freqs.weight"] = ("F32", [len(factors)], factors.astype(np.float32).tobytes())
    return written(path, it._meta, tensors)


def test_factors_of_llama_3_are_its_scaling_again_and_others_stay_rates(checkpoint: Make, tmp_path: Path) -> None:
    """Transformers knows the scheme and no list of rates: what was imported of a Llama 3 can be exported, of others not."""
    theta, factor = 1e9, 8.0
    turn = 2 * math.pi * theta ** (np.arange(0, 4, 2) / 4)  # tokens of a turn of each pair
    share = np.clip((8192 / turn - 1) / 3, 0, 1)
    made = 1 / ((1 - share) / factor + share)
    assert made[-1] == factor
    source = checkpoint("smollm2")
    more = {"llama.rope.freq_base": theta, "llama.context_length": 16384}
    import_model(with_factors(source, tmp_path / "three.gguf", made, **more), tmp_path / "three")
    told = json.loads((tmp_path / "three" / "source.json").read_text())["config"]["rope_scaling"]
    assert told == {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    export_model(tmp_path / "three", tmp_path / "back")
    plain = 1 / theta ** (np.arange(0, 4, 2) / 4)
    for name, factors in (("three", made), ("odd", np.array([1.5, 3.0]))):
        if name == "odd":
            import_model(with_factors(source, tmp_path / "odd.gguf", factors, **more), tmp_path / "odd")
        assert Model.load(tmp_path / name).config.rope_rates == pytest.approx(plain / factors, rel=1e-6)
    with pytest.raises(CheckpointError, match=r"damaged: got 'tensor rope_freqs\.weight of \[1\], and not of 2'"):
        Gguf(with_factors(source, tmp_path / "one.gguf", np.array([2.0]), **more))
    with pytest.raises(CheckpointError, match="rates of a GGUF that no scheme"):
        export_model(tmp_path / "odd", tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_blocks_stand_for_what_their_definition_says(kind: str, checkpoint: Make, tmp_path: Path) -> None:
    x = np.random.default_rng(3).normal(size=(6, 64)).astype(np.float32)
    raw = rounded(kind, x)
    path = gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf")
    tensors = {"blk.0.attn_v.weight": (kind, [6, 64], raw)}
    it = Gguf(written(path, Gguf(path)._meta | {"general.name": "blocks"}, tensors))
    made = it.read("model.layers.0.self_attn.v_proj.weight")
    assert made.dtype == torch.float32 and made.shape == (6, 64)
    assert made.flatten().tolist() == pytest.approx(restored(kind, raw), rel=1e-6)
    assert np.abs(made.numpy() - x).max() < (0.02 if kind == "Q8_0" else 0.3)


def test_its_tokenizer_knows_controls_and_ends(checkpoint: Make, tmp_path: Path) -> None:
    import_model(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf"), tmp_path / "model")
    tokenizer = Model.load(tmp_path / "model").tokenizer
    assert tokenizer.specials == ("<|im_start|>", "<|im_end|>", "<|endoftext|>") and tokenizer.ends == (286,)
    assert tokenizer.decode(tokenizer.encode("12 fish<|im_end|>")) == "12 fish<|im_end|>"
    assert tokenizer.encode("12") == [tokenizer.encode("1")[0], tokenizer.encode("2")[0]], "digits one by one"


def test_an_export_says_what_ends_an_answer(checkpoint: Make, tmp_path: Path) -> None:
    """Others read generation_config.json where there is one, and never stopped: beside a GGUF it said a temperature alone, and
    of a base model the end of a text."""
    import_model(gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf"), tmp_path / "model")
    edit(tmp_path / "model" / "source.json", generation_config={"temperature": 0.2})
    (tmp_path / "model" / "manifest.json").unlink()
    export_model(tmp_path / "model", tmp_path / "back", check=False)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text())["eos_token_id"] == [286]
    source = checkpoint("qwen2")
    edit(source / "generation_config.json", eos_token_id=278, temperature=0.7)
    import_model(source, tmp_path / "base")
    ends = Model.load(tmp_path / "base").tokenizer.ends
    export_model(tmp_path / "base", tmp_path / "again", check=False)
    told = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert len(ends) == 2 and told == {"temperature": 0.7, "eos_token_id": list(ends)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": "mamba"}, "architecture: got 'mamba'; allowed: llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "a mixture of experts"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type: got 'yarn'"),
        ({"tokenizer.ggml.model": "t5"}, "tokenizer of .*: got 't5'; allowed: llama, gpt2 smollm"),
        ({"llama.rope.dimension_count": 2}, "llama.rope.dimension_count: got 2; allowed: 4"),
        ({"llama.attention.sliding_window": 16}, "llama.attention.sliding_window: got 16; allowed: 0"),
        ({"llama.final_logit_softcapping": 30.0}, "llama.final_logit_softcapping: got 30.0; allowed: 0"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale: got 0.5; allowed: 1"),
        ({"llama.attention.value_length": 8}, "llama.attention.value_length: got 8; allowed: 4"),
        ({"tokenizer.ggml.tokens": None}, "vocab_size"),
        ({"tokenizer.chat_template": None}, "has no chat template"),
        ({"tokenizer.chat_template": 5}, "has no chat template"),
        (
            {"llama.attention.head_count": [4, 4]},
            r"tiny.gguf: llama.attention.head_count: got \[4, 4\]; allowed: a whole",
        ),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count: got 0; allowed: a whole number above 0"),
        ({"llama.embedding_length": "16"}, "llama.embedding_length: got '16'; allowed: a whole number above 0"),
        (
            {"llama.attention.key_length": 2**31 - 1},
            "head_dim: got 2147483647; allowed: a whole number above 0, at most",
        ),
        ({"llama.rope.freq_base": "x"}, "llama.rope.freq_base: got 'x'; allowed: a number above 0"),
        ({"llama.rope.freq_base": True}, "llama.rope.freq_base: got True; allowed: a number above 0"),
        (
            {"llama.attention.layer_norm_rms_epsilon": math.nan},
            "layer_norm_rms_epsilon: got nan; allowed: a number above",
        ),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0},
            "scaling.factor: got 0.0; allowed: a num",
        ),
        ({"general.architecture": ["llama"]}, r"architecture: got \['llama'\]; allowed: llama, qwen2, qwen3"),
        ({"tokenizer.ggml.pre": ["smollm"]}, "tokenizer of .*; allowed: llama, gpt2 smollm"),
        ({"tokenizer.ggml.tokens": "abc"}, "tokenizer.ggml.tokens: got 'abc'; allowed: a list of texts"),
        ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens: got 1; allowed: a list of texts"),
        (
            {"tokenizer.ggml.token_type": ["a"] * 288},
            "tokenizer.ggml.token_type: got 'a'; allowed: a number for each token",
        ),
        ({"tokenizer.ggml.token_type": 5}, "tokenizer.ggml.token_type: got 5; allowed: a number for each token"),
        ({"tokenizer.ggml.eos_token_id": 286.0}, "ggml.eos_token_id: got 286.0; allowed: a token's number"),
        ({"tokenizer.ggml.bos_token_id": "286"}, "ggml.bos_token_id: got '286'; allowed: a token's number"),
        ({"tokenizer.ggml.eot_token_id": True}, "ggml.eot_token_id: got True; allowed: a token's number"),
        ({"general.alignment": 0}, "tiny.gguf: general.alignment: got 0; allowed: a power of two"),
        ({"general.alignment": -32}, "general.alignment: got -32"),  # began within the header
        ({"general.alignment": 48}, "general.alignment: got 48"),
        ({"general.alignment": True}, "general.alignment: got True"),
        (
            {"tokenizer.ggml.merges": ["no such"]},
            "tokenizer.ggml.merges: got 'no such'; allowed: two tokens, which together",
        ),
        ({"tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges: got 'a b c'; allowed: two tokens"),
        ({"tokenizer.ggml.eos_token_id": 288}, "no token that ends an answer"),
        ({"llama.block_count": 5}, r"tensor model.layers.5.input_layernorm.weight is not used"),
    ],
)
def test_a_gguf_that_cannot_be_imported_says_why(
    changes: dict[str, Any], says: str, checkpoint: Make, tmp_path: Path
) -> None:
    path = gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf", **changes)
    with pytest.raises(CheckpointError, match=says):
        import_model(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_gguf_cut_anywhere_is_one_line(checkpoint: Make, tmp_path: Path) -> None:
    path = gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    for size in (*range(0, 64, 3), *range(64, len(whole), 997), len(whole) - 1000):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"was cut short|format|cannot read"):
            import_model(path, tmp_path / "model")
    path.write_bytes(whole[:16] + b"\xff" * 8 + whole[24:])
    with pytest.raises(CheckpointError, match="is damaged"):
        import_model(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_text_that_is_not_utf_8_is_damage(checkpoint: Make, tmp_path: Path) -> None:
    """A letter stood in its place, in a chat template too, and nobody was told."""
    path = gguf_of(checkpoint("smollm2"), tmp_path / "tiny.gguf")
    whole = path.read_bytes()
    assert whole.count(b"messages[0].content") == 1
    path.write_bytes(whole.replace(b"messages[0].content", b"messages[0].conten\xff"))
    with pytest.raises(CheckpointError, match=r"tiny.gguf is damaged: got \"a text that is not UTF-8: b'"):
        import_model(path, tmp_path / "model")


def test_a_header_that_says_too_much_is_damage(tmp_path: Path) -> None:
    """A hundred thousand dims, whose product took minutes; and a key twice, of which the last was taken."""
    path = tmp_path / "tiny.gguf"
    dims = struct.pack("<I", 100_000) + struct.pack("<Q", 2**63) * 100_000
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + text("a") + dims + struct.pack("<IQ", 0, 0) + b"\0" * 64)
    with pytest.raises(CheckpointError, match="is damaged: got 'tensor a of 100000 dims'"):
        Gguf(path)
    for count, says in ((2**24 + 1, "is damaged: got 'a list of 16777217'"), (2**24, "was cut short")):
        told = text("a") + struct.pack("<IIQ", ARRAY, 0, count)  # one by one 60 MB took 20 s
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + told)
        with pytest.raises(CheckpointError, match=says):
            Gguf(path)
    keys = b"".join(text("general.architecture") + value(name) for name in ("llama", "mamba"))
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + keys + b"\0" * 64)
    with pytest.raises(CheckpointError, match=r"is damaged: got 'general\.architecture twice'"):
        Gguf(path)
