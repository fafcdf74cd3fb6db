"""What does not fit the memory is refused with the arithmetic, before it is read."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal import Engine, Model
from shoal.errors import ResourceError
from shoal.open_weights.convert import import_model
from shoal.open_weights.gguf import Gguf
from shoal.open_weights.sources import Folder
from tests.unit.open_weights.test_gguf import gguf_of

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


@pytest.mark.parametrize("of_gguf", [False, True])
def test_tensors_go_through_the_memory_one_at_a_time(
    of_gguf: bool, checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a model may be larger than the memory that imports it: no more than the one that is written and the next."""
    source = checkpoint("smollm2")
    path = gguf_of(source, tmp_path / "tiny.gguf") if of_gguf else source
    kind: Any = Gguf if of_gguf else Folder
    read, held, most = kind.read, list[weakref.ref[Any]](), 0

    def counted(self: Any, name: str) -> Any:
        nonlocal most
        tensor = read(self, name)
        held.append(weakref.ref(tensor))
        most = max(most, sum(each() is not None for each in held))
        return tensor

    monkeypatch.setattr(kind, "read", counted)
    import_model(path, tmp_path / "model")
    assert len(held) > 50 and 1 <= most <= 2
