"""A ``.gguf`` as a source: its numbers, its names and its tokenizer under those of Hugging Face.

Weights in blocks of 32 come out as fp32:   Q4_0 d (q - 8)   Q4_1 d q + m   Q8_0 d q     d, m in fp16, q of 4 or 8 bits
For its Llamas llama.cpp turns neighbouring dims, so there the rows of q and k lie in another order (`_unpermuted`).
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import files
from shoal.open_weights import gguf_tokens, rope
from shoal.open_weights.families import EMBEDDING, HEAD, LAST_NORM, MOST
from shoal.open_weights.sources import Seen
from shoal.open_weights.told import is_whole, positive, texts, whole
from shoal.open_weights.vocabulary import made

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_LIMIT = 2**24  # things in one list, or bytes of a text, sixteen times the most that are known: more is a damaged file
_DIMS = 4  # of a tensor, as llama.cpp has it

# what a file holds under its number: name, numbers in a block, bytes of a block
_KINDS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34),
}  # fmt: skip
_OTHERS = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}

_OUTSIDE = {"token_embd.weight": EMBEDDING, "output_norm.weight": LAST_NORM, "output.weight": HEAD}
_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_FACTORS = "rope_freqs.weight"  # by which each pair turns slower


@dataclass(frozen=True)
class _Place:
    kind: int
    shape: tuple[int, ...]  # as torch's: the last dim lies together
    start: int  # byte in the file


class Gguf:
    def __init__(self, path: Path) -> None:
        """Raises CheckpointError for a file that is cut short, of another version, or of an architecture that is not known."""
        self._path, self._at, self._seen = path, 0, Seen([path])
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}", got=str(error)) from error
        magic, version = self._bytes[:4], self._number("<I", at=4) if len(self._bytes) >= 8 else 0
        if magic != _MAGIC or version not in _VERSIONS:
            raise CheckpointError(f"{path}: format", got=f"{magic!r} version {version}", allowed="GGUF version 2 or 3")
        self._at = 8
        count, pairs = self._number("<Q"), self._number("<Q")
        self._meta: dict[str, Any] = {}
        for _ in range(self._sane(pairs)):
            key = self._text()
            if key in self._meta:
                raise self._damaged(f"{key} twice")
            self._meta[key] = self._value(self._number("<I"))
        self._places = self._tensor_places(self._sane(count))
        self.name = path.stem
        self.generation: Mapping[str, Any] = {}
        names = {"tokenizer_class": "PreTrainedTokenizerFast", **self._token_names()}
        self.extra: Mapping[str, Any] = {"licence": self._meta.get("general.license"), "tokenizer_config": names}
        self.config: Mapping[str, Any] = self._config()

    # --- the file -----------------------------------------------------------------------------------------------------

    def _take(self, size: int) -> bytes:
        if self._at + size > len(self._bytes):
            raise self._cut()
        found = self._bytes[self._at : self._at + size]
        self._at += size
        return found

    def _cut(self) -> CheckpointError:
        return CheckpointError(f"{self._path} was cut short", got=f"{len(self._bytes)} bytes", do="fetch it again")

    def _damaged(self, got: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged", got=got, do="fetch it again")

    def _number(self, form: str, at: int | None = None) -> Any:
        if at is not None:
            self._at = at
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _sane(self, count: int) -> int:
        if count > _LIMIT:
            raise self._damaged(f"a list of {count}")
        return count

    def _text(self) -> str:
        raw = self._take(self._sane(self._number("<Q")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:  # a letter in its place would be another token, or another template
            raise self._damaged(f"a text that is not UTF-8: {raw[:40]!r}") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            inner, count = self._number("<I"), self._sane(self._number("<Q"))
            if inner in _SCALARS:  # all at once: one by one a vocabulary's take a second
                form = f"<{count}{_SCALARS[inner][1]}"
                return list(struct.unpack(form, self._take(struct.calcsize(form))))
            return [self._value(inner) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._damaged(f"a value of kind {kind}")
        return self._number(_SCALARS[kind])

    def _tensor_places(self, count: int) -> dict[str, _Place]:
        told = []
        for _ in range(count):
            name = self._text()
            if (dims := self._number("<I")) > _DIMS:
                raise self._damaged(f"tensor {name} of {dims} dims")
            shape = tuple(self._number("<Q") for _ in range(dims))[::-1]
            told.append((name, shape, self._number("<I"), self._number("<Q")))
        align = self._meta.get("general.alignment", 32)
        if isinstance(align, bool) or not isinstance(align, int) or align < 1 or align & (align - 1):
            raise CheckpointError(f"{self._path}: general.alignment", got=align, allowed="a power of two")
        begin = -(-self._at // align) * align
        found = {}
        for name, shape, kind, offset in told:
            if kind not in _KINDS:
                got = _OTHERS.get(kind, f"kind {kind}")
                do = "take the file in one of these, or the checkpoint that it was quantised from"
                allowed = [each for each, _, _ in _KINDS.values()]
                raise CheckpointError(f"tensor {name}", got=got, allowed=allowed, do=do)
            if name in found or (shape[-1] if shape else 1) % _KINDS[kind][1]:  # a row is whole blocks
                raise self._damaged(f"tensor {name} {'twice' if name in found else f'of {list(shape)}, in blocks'}")
            found[name] = _Place(kind, shape, begin + offset)
            if begin + offset + self._size(found[name]) > len(self._bytes):
                raise self._cut()
            if offset % align:
                raise self._damaged(f"tensor {name} at byte {offset} of the tensors, which lie at multiples of {align}")
        self._need_apart(found)
        return found

    def _need_apart(self, places: Mapping[str, _Place]) -> None:
        """Raises CheckpointError for two tensors that have bytes in common: one of them would be read out of the other."""
        end, before = 0, ""
        for name, place in sorted(places.items(), key=lambda each: each[1].start):
            if place.start < end:
                raise self._damaged(f"tensors {before} and {name} at the same bytes")
            end, before = place.start + self._size(place), name

    @staticmethod
    def _size(place: _Place) -> int:
        _, block, size = _KINDS[place.kind]
        return math.prod(place.shape) // block * size

    def _numbers(self, name: str) -> Tensor:
        """A tensor of the file in fp32, F16 or BF16 as it lies there."""
        place = self._places[name]
        kind, block, size = _KINDS[place.kind]
        raw = np.frombuffer(self._bytes, np.uint8, self._size(place), place.start).copy()
        if block == 1:
            dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
            return torch.from_numpy(raw).view(dtype).view(place.shape)
        blocks = torch.from_numpy(raw).view(-1, size)
        scale = blocks[:, :2].contiguous().view(torch.float16).float()
        if kind == "Q8_0":
            return (blocks[:, 2:].contiguous().view(torch.int8).float() * scale).view(place.shape)
        packed = blocks[:, -16:]
        levels = torch.cat([packed & 15, packed >> 4], dim=1).float()
        if kind == "Q4_0":
            return ((levels - 8) * scale).view(place.shape)
        least = blocks[:, 2:4].contiguous().view(torch.float16).float()
        return (levels * scale + least).view(place.shape)

    # --- under Hugging Face's names -----------------------------------------------------------------------------------

    def _config(self) -> dict[str, Any]:
        arch = self._meta.get("general.architecture")
        if arch not in list(_ARCHITECTURES):
            raise CheckpointError(f"{self._path}: architecture", got=arch, allowed=list(_ARCHITECTURES))

        def told(key: str, default: Any = None) -> Any:
            found = self._meta.get(f"{arch}.{key}", default)
            if found is None:
                raise CheckpointError(f"{self._path}: {arch}.{key} is missing")
            return found

        def above(key: str, default: Any = None) -> float:
            return positive(f"{self._path}: {arch}.{key}", told(key, default))

        def size(key: str, default: Any = None) -> int:
            return whole(f"{self._path}: {arch}.{key}", told(key, default), MOST)

        heads, width = size("attention.head_count"), size("embedding_length")
        if told("expert_count", 0):
            raise CheckpointError(f"{self._path}: expert_count", got="a mixture of experts", do="choose a dense model")
        head_dim, context = size("attention.key_length", width // heads), size("context_length")
        for key, plain in _plain(head_dim, context).items():
            if (found := told(key, plain[0])) not in plain:
                raise CheckpointError(f"{self._path}: {arch}.{key}", got=found, allowed=plain[0])
        config = {
            "architectures": [_ARCHITECTURES[arch]], "model_type": arch, "hidden_act": "silu", "hidden_size": width,
            "num_attention_heads": heads,
            "num_hidden_layers": size("block_count"), "num_key_value_heads": size("attention.head_count_kv", heads),
            "head_dim": head_dim, "intermediate_size": size("feed_forward_length"),
            "rms_norm_eps": _short(above("attention.layer_norm_rms_epsilon")),
            "rope_theta": above("rope.freq_base", 10_000.0),
            "max_position_embeddings": context, "vocab_size": len(self._tokens),
            "tie_word_embeddings": "output.weight" not in self._places,
            "eos_token_id": self._special("eos"), "bos_token_id": self._special("bos"),
        }  # fmt: skip
        kind = told("rope.scaling.type", "none")
        if kind == "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": above("rope.scaling.factor")}
        elif kind not in ("none", "", None):
            raise CheckpointError(f"{self._path}: rope.scaling.type", got=kind, allowed=["none", "linear"])
        if _FACTORS in self._places:
            if (shape := self._places[_FACTORS].shape) != (head_dim // 2,):  # one number would be taken for all
                raise self._damaged(f"tensor {_FACTORS} of {list(shape)}, and not of {head_dim // 2}")
            factors, given = self._numbers(_FACTORS).float(), (config["head_dim"], config["rope_theta"])
            known = rope.as_llama3(factors, config, *given) if kind != "linear" else None
            made = torch.tensor(rope.rates(config, *given)[0]) / factors
            config["rope_scaling"] = known or {"rope_type": rope.RATES, "rates": made.tolist()}
        return config

    @cached_property
    def _theirs(self) -> dict[str, str]:
        """Hugging Face's name of each tensor -> the file's. What is not known keeps its own, and is then refused by it."""
        found = {}
        for name in self._places:
            made = _OUTSIDE.get(name, name)
            parts = name.split(".")
            if parts[0] == "blk" and len(parts) == 4 and parts[2] in _LAYER:
                made = f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
            if name != _FACTORS:
                found[made] = name
        return found

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        whole = {"F16": torch.float16, "BF16": torch.bfloat16}
        return {
            made: (whole.get(_KINDS[self._places[name].kind][0], torch.float32), self._places[name].shape)
            for made, name in self._theirs.items()
        }

    def need_same(self) -> None:
        self._seen.need_same()

    def read(self, name: str) -> Tensor:
        self.need_same()
        found = self._numbers(self._theirs[name])
        permuted = self._meta["general.architecture"] == "llama" and name.split(".")[-2] in ("q_proj", "k_proj")
        return _unpermuted(found, self.config["head_dim"]) if permuted else found

    # --- the tokenizer ------------------------------------------------------------------------------------------------

    def _token_names(self) -> dict[str, str]:
        """Control tokens as Hugging Face calls them."""
        found = {}
        for short, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            token = self._special(key)
            if token is not None and 0 <= token < len(self._tokens):
                found[f"{short}_token"] = self._tokens[token]
        return found

    def _special(self, key: str) -> int | None:
        """The number of a control token, where the file has it. Raises CheckpointError for what is none."""
        found = self._meta.get(f"tokenizer.ggml.{key}_token_id")
        if found is not None and not is_whole(found):
            raise CheckpointError(f"{self._path}: tokenizer.ggml.{key}_token_id", got=found, allowed="a token's number")
        return found

    @cached_property
    def _tokens(self) -> list[str]:
        return texts(f"{self._path}: tokenizer.ggml.tokens", self._meta.get("tokenizer.ggml.tokens", []))

    def vocabulary(self, template: str | None) -> tuple[Tokenizer, str]:
        names = self._token_names()
        core = gguf_tokens.core_of(self._meta, names, self._path)
        chat = template or self._meta.get("tokenizer.chat_template")
        if not isinstance(chat, str) or not chat:
            raise CheckpointError(f"{self._path} has no chat template", do="give one with --chat-template FILE")
        told = map(self._special, ("eos", "eot"))
        return made(core, names, tuple(dict.fromkeys(end for end in told if end is not None)), self._path), chat

    def licences(self) -> Sequence[Path]:
        return files.licences(self._path.parent) or files.licences(*self._path.parent.parent.glob("*.dist-info"))


def _plain(head_dim: int, context: int) -> dict[str, tuple[float, ...]]:
    """Keys that say that a model computes something else than ours does, and their values that say nothing."""
    scales = ("logit_scale", "residual_scale", "embedding_scale", "rope.scale_linear")
    none = ("attn_logit_softcapping", "final_logit_softcapping", "attention.clamp_kqv", "attention.max_alibi_bias")
    dims = ("rope.dimension_count", "attention.value_length")
    usual = head_dim**-0.5, struct.unpack("<f", struct.pack("<f", head_dim**-0.5))[0], 0
    return {
        **dict.fromkeys(dims, (head_dim,)), **dict.fromkeys(scales, (1, 0)), **dict.fromkeys(none, (0,)),
        "attention.scale": usual, "attention.causal": (True,), "attention.sliding_window": (0, context),
    }  # fmt: skip


def _unpermuted(weight: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k [H d, D], or their bias [H d], in the order in which dim i turns with dim i + d/2, of the one in which 2i
    turns with 2i + 1."""
    return weight.view(-1, head_dim // 2, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _short(number: float) -> float:
    """A number that was kept in fp32 as it was written down: 1e-05, and not 9.99999974e-06."""
    return float(f"{number:.6g}")
