"""What LoRA has learned, as an adapter in PEFT's format: of an open model one that PEFT loads beside the checkpoint that was
imported, of a model of our own one by the names of our network, which only we serve.

Our layers join q, k, v and gate, up in one matrix; so their thin matrix A is one and the same, and B's rows are cut.
"""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.machine import write_json
from shoal.model import checkpoint, described
from shoal.model.adapter_files import CONFIG, FORMAT, PREFIX, WEIGHTS
from shoal.open_weights import families


def require_replaceable(to: Path) -> None:
    """Raises CheckpointError where something else than an adapter of ours is in the directory `to`."""
    if to.exists() and (not to.is_dir() or {path.name for path in to.iterdir()} - {CONFIG, WEIGHTS}):
        raise CheckpointError(f"{to}", got="something that is there", do="take it out, or choose another --out")


def write(lora: Path, model: Path, to: Path, *, alpha: float) -> None:
    """Write the adapter `to` a directory, in place of one that is there: `lora` is the file of thin matrices of a run that
    fine-tuned `model`, and `alpha` the scale times the rank. Raises CheckpointError for a directory with something else in
    it."""
    require_replaceable(to)
    base, config = described.read_config(model)
    thin = load_file(str(lora))
    own = sorted(f"{key.removesuffix('.lora_a')}.weight" for key in thin if key.endswith(".lora_a"))
    names: list[tuple[str, tuple[str, ...]]] = [(name, (name,)) for name in own]
    if (model / described.SOURCE).exists():
        told = described.read_json(model / described.SOURCE)
        base, names = told["name"], list(families.names(told["family"], config))
    tensors: dict[str, Tensor] = {}
    targets: set[str] = set()
    for ours, theirs in names:
        name = ours.removesuffix(".weight")
        if f"{name}.lora_a" not in thin:
            continue
        a, b = thin.pop(f"{name}.lora_a"), thin.pop(f"{name}.lora_b")
        pieces = b.split(list(families.rows(config, ours, len(b), len(theirs))))
        for module, piece in zip((each.removesuffix(".weight") for each in theirs), pieces, strict=True):
            tensors[f"{PREFIX}{module}.lora_A.weight"] = a.clone()
            tensors[f"{PREFIX}{module}.lora_B.weight"] = piece.clone()
            targets.add(module.rpartition(".")[2])
            rank = len(a)
    assert tensors and not thin, sorted(thin)
    told = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": alpha, "target_modules": sorted(targets), "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "modules_to_save": None,
    }  # fmt: skip
    with checkpoint.replacing(to, require_replaceable) as aside:
        save_file(tensors, str(aside / WEIGHTS), metadata={**FORMAT, described.BASE: described.base(model)})
        write_json(aside / CONFIG, told)
