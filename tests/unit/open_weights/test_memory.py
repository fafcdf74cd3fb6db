"""What does not fit the memory is refused with the arithmetic, before it is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal import Engine, Model
from shoal.errors import ResourceError
from shoal.open_weights.convert import import_model

Make = Callable[[str], Path]


def test_weights_beyond_the_memory_are_refused_with_the_arithmetic(checkpoint: Make, tmp_path: Path) -> None:
    import_model(checkpoint("qwen2"), tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    with (tmp_path / "model" / "model.safetensors").open("r+b") as weights:
        weights.truncate(10**13)  # a hole in a file: no disk holds so much
    says = r"weights of .*model do not fit the memory: got '10000.0 GB'; allowed: [0-9.]+ GB that are free"
    with pytest.raises(ResourceError, match=says), pytest.warns(UserWarning):
        Model.load(tmp_path / "model")


def test_keys_and_values_beyond_the_memory_are_refused_with_the_arithmetic(checkpoint: Make, tmp_path: Path) -> None:
    import_model(checkpoint("qwen2"), tmp_path / "model")
    model = Model.load(tmp_path / "model")
    model.config = dataclasses.replace(model.config, max_length=2**40)
    with pytest.raises(
        ResourceError, match=r"one text of 1099511627776 tokens in 5 layers do not fit .*shorter --context"
    ):
        Engine(model)
    Engine(model, units=50)  # as many as one says
