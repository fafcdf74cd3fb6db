"""The files of a LoRA adapter, as PEFT writes them, without torch: by these gateways know adapters, and engines read them."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.errors import CheckpointError
from shoal.model.described import BASE, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
FORMAT = {"format": "pt"}  # metadata of the weights, for other tools
PREFIX = "base_model.model."  # of every tensor's name
MOST_RANK = 64
# keys of the config that would change what is computed, or the base beside which it is: the values that mean "off"
_OFF: Mapping[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "use_qalora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class AdapterFiles:
    base: str | None  # what it says that it was trained from
    rank: int
    scale: float  # of B A
    data: bytes  # of the safetensors
    # of its base's weights, as of `described.base`; empty where the tool that wrote it does not say
    base_sha256: str = ""

    @property
    def identity(self) -> str:
        """Equal for equal weights, scale and base, whatever they are called and wherever they lie."""
        return hashlib.sha256(json.dumps(self.scale).encode() + b"\0" + self.data).hexdigest()[:32]


def read(directory: str | Path, most: int | None = None) -> AdapterFiles:
    """The files in `directory`, of at most `most` bytes of weights. Raises CheckpointError naming the file and the key that is
    missing or asks for more than LoRA."""
    path, told = Path(directory) / CONFIG, read_json(Path(directory) / CONFIG)
    if told.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type", got=told.get("peft_type"), allowed="LORA")
    for key, off in _OFF.items():
        if told.get(key) not in off:
            raise CheckpointError(
                f"{path}: {key}", got=told[key], allowed="plain LoRA", do="train without it, or merge it"
            )
    rank, alpha = told.get("r"), told.get("lora_alpha")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= MOST_RANK:
        raise CheckpointError(f"{path}: r", got=rank, allowed=f"1 to {MOST_RANK}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not abs(alpha) <= sys.float_info.max:
        raise CheckpointError(f"{path}: lora_alpha", got=alpha, allowed="a number")
    scale = alpha / (math.sqrt(rank) if told.get("use_rslora") else rank)
    base = told.get("base_model_name_or_path")
    data = _bytes(Path(directory) / WEIGHTS, most)
    return AdapterFiles(None if base is None else str(base), rank, scale, data, _base_sha256(data))


def _base_sha256(data: bytes) -> str:
    """What safetensors' metadata says; nothing where it cannot be read, which who reads the tensors finds."""
    with suppress(ValueError, TypeError, AttributeError):
        end = 8 + int.from_bytes(data[:8], "little")
        return str(json.loads(data[8:end]).get("__metadata__", {}).get(BASE, ""))
    return ""


def _bytes(path: Path, most: int | None) -> bytes:
    try:
        if most is not None and path.stat().st_size > most:
            allowed = f"at most {most} bytes, as of rank {MOST_RANK} beside all linears"
            raise CheckpointError(f"{path}", got=f"{path.stat().st_size} bytes", allowed=allowed)
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}", got=error.strerror, do="give a directory as PEFT writes it"
        ) from None
