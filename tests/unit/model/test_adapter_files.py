"""What is read of an adapter's files without torch, at the bounds of what is allowed."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from shoal.errors import CheckpointError
from shoal.model.adapter_files import CONFIG, MOST_RANK, WEIGHTS, AdapterFiles, read
from shoal.model.described import BASE

ROOT = Path(__file__).parents[3]


def written(folder: Path, data: bytes = b"weights", **told: Any) -> Path:
    """An adapter in `folder`, of rank 4 and alpha 8 unless it is `told` otherwise; None takes a key out."""
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **told}
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    (folder / WEIGHTS).write_bytes(data)
    return folder


def test_the_scale_is_alpha_by_the_rank_or_its_root(tmp_path: Path) -> None:
    assert read(written(tmp_path)) == AdapterFiles(None, 4, 2.0, b"weights")
    assert read(written(tmp_path, use_rslora=True, base_model_name_or_path="a")) == AdapterFiles(
        "a", 4, 4.0, b"weights"
    )
    for rank in (1, MOST_RANK):
        assert read(written(tmp_path, r=rank, lora_alpha=-3)).scale == -3 / rank
    assert read(written(tmp_path, lora_alpha=0.5)).scale == 0.125
    most = sys.float_info.max
    assert read(written(tmp_path, lora_alpha=most)).scale == most / 4, "any number that is one"


def test_the_rank_that_users_are_told_of_is_the_most(tmp_path: Path) -> None:
    (told,) = re.findall(r"adapters, of rank (\d+) at most", (ROOT / "docs" / "api.md").read_text("utf-8"))
    assert int(told) == MOST_RANK


def test_whose_weights_it_was_trained_beside_stands_before_its_tensors(tmp_path: Path) -> None:
    data = save({"a": torch.arange(3.0)}, metadata={BASE: "0123"})
    assert read(written(tmp_path, data)) == AdapterFiles(None, 4, 2.0, data, "0123")
    assert read(written(tmp_path, save({"a": torch.arange(3.0)}))).base_sha256 == ""


@pytest.mark.parametrize("rank", [0, -1, MOST_RANK + 1, True, 4.0, "4"])
def test_a_rank_is_a_whole_number_from_one_to_the_most(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"{CONFIG}: r: got .*; allowed: 1 to {MOST_RANK}"):
        read(written(tmp_path, r=rank))


@pytest.mark.parametrize("kind", ["IA3", "lora", None])
def test_what_is_no_lora_is_refused(kind: str | None, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{CONFIG}: peft_type.* allowed: LORA"):
        read(written(tmp_path, peft_type=kind))


@pytest.mark.parametrize("alpha", [True, "8", [8], math.nan, math.inf, -math.inf])
def test_an_alpha_is_a_number_that_is_finite(alpha: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{CONFIG}: lora_alpha: got .*; allowed: a number"):
        read(written(tmp_path, lora_alpha=alpha))


# of each key of PEFT's that would change what is computed: values that mean it is off, and one that is not
MORE: dict[str, tuple[list[Any], Any]] = {
    "bias": (["none"], "lora_only"),
    "fan_in_fan_out": ([False], True),
    "use_dora": ([False], True),
    "lora_bias": ([False], True),
    "modules_to_save": ([[]], ["head"]),
    "rank_pattern": ([{}], {"qkv": 2}),
    "alpha_pattern": ([{}], {"qkv": 2}),
    "target_parameters": ([[]], ["up"]),
    "trainable_token_indices": ([[], {}], [5]),
    "layer_replication": ([[]], [[0, 2]]),
    "alora_invocation_tokens": ([[]], [5]),
    "use_bdlora": ([False], True),
    "use_qalora": ([False], True),
    "arrow_config": ([], {"top_k": 2}),
    "kasa_config": ([], {}),
    "monteclora_config": ([], {}),
    "init_lora_weights": ([True, False, "gaussian", "orthogonal", "eva"], "pissa"),
}


@pytest.mark.parametrize("key", MORE)
def test_what_asks_for_more_than_lora_is_refused_by_its_key(key: str, tmp_path: Path) -> None:
    off, on = MORE[key]
    for value in off:
        assert read(written(tmp_path, **{key: value})).rank == 4
    written(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, key: None}))
    assert read(tmp_path).rank == 4
    with pytest.raises(CheckpointError, match=f"{CONFIG}: {key}: got .*; allowed: plain LoRA"):
        read(written(tmp_path, **{key: on}))


def test_weights_are_read_up_to_the_most_bytes(tmp_path: Path) -> None:
    written(tmp_path, data=b"x" * 100)
    assert len(read(tmp_path, most=100).data) == 100
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: got '100 bytes'; allowed: at most 99 bytes"):
        read(tmp_path, most=99)


def test_it_is_known_by_all_of_its_scale_and_its_weights() -> None:
    """Whatever it says that it was trained from, and whichever rank and alpha make the scale."""
    names = [AdapterFiles(*of).identity for of in (("a", 4, 2.0, b"w"), (None, 8, 2.0, b"w"))]
    others = [AdapterFiles(None, 4, *of).identity for of in ((2.0, b"v"), (2.5, b"w"), (2.0, b""), (2.0, b"w\0"))]
    assert names[0] == names[1] and len({names[0], *others}) == 5 and all(len(name) == 32 for name in [*names, *others])
