"""Adapters as PEFT writes them, of random matrices, and the models that they would be merged to."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shoal import Model
from shoal.model.linears import Int8Linear, Linear

ALPHA = 6.0


def linears(model: Model) -> dict[str, torch.nn.Module]:
    """The linears of the layers, by name."""
    return {
        name: module
        for name, module in model.net.named_modules()
        if name.startswith("groups.") and isinstance(module, (Linear, Int8Linear))
    }


def write(
    folder: Path,
    model: Model,
    seed: int = 0,
    *,
    rank: int = 3,
    size: float = 0.5,
    only: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype = torch.float32,
    **told: Any,
) -> Path:
    """An adapter of `model`, by its own names, in a new `folder`: thin matrices beside the linears that `only` says, whose
    products are about `size` times as large as what a row of unit numbers gives."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in linears(model).items():
        outputs, inputs = module.weight.shape  # type: ignore[union-attr,misc]
        if only(name):
            a = torch.randn(rank, inputs, generator=draw) / inputs**0.5
            b = torch.randn(outputs, rank, generator=draw) * size / ALPHA * rank**0.5
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a.to(dtype),
                f"base_model.model.{name}.lora_B.weight": b.to(dtype),
            }
    return save(folder, tensors, **{"r": rank, "base_model_name_or_path": model.name, **told})


def save(folder: Path, tensors: dict[str, torch.Tensor], **told: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, str(folder / "adapter_model.safetensors")
    )
    config = {"peft_type": "LORA", "lora_alpha": ALPHA, "bias": "none", **told}
    (folder / "adapter_config.json").write_text(
        json.dumps({key: value for key, value in config.items() if value is not None})
    )
    return folder


def merged(model: Model, folder: Path, leave: Collection[str] = ()) -> Model:
    """`model` with the adapter of `folder`, of its own names, added to its weights, by the definition of LoRA."""
    from safetensors.torch import load_file

    told = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(str(folder / "adapter_model.safetensors"))
    made = copy.deepcopy(model)
    for name, module in linears(made).items():
        a = tensors.get(f"base_model.model.{name}.lora_A.weight")
        if a is not None and name not in leave:
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            b = tensors[f"base_model.model.{name}.lora_B.weight"]
            with torch.no_grad():
                weight.add_((told["lora_alpha"] / told["r"] * b.double() @ a.double()).to(weight.dtype))
    return made
