"""A model directory as the HTTP side reads it: no weights needed, and refused with the file at fault."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shoal import config, presets
from shoal.api.served import ServedModel
from shoal.errors import CheckpointError, ConfigError
from shoal.inputs.tokenizer import Tokenizer


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    card = {"format": "shoal-model", "version": 1, "name": "fish", "model": config.dump(presets.get("test").model)}
    (tmp_path / "config.json").write_text(json.dumps(card))
    Tokenizer.bytes_only().save(tmp_path / "tokenizer.json")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    return tmp_path


def test_a_directory_without_weights_is_enough(directory: Path) -> None:
    served = ServedModel.load(directory)
    assert (served.name, served.config, served.chat_template) == ("fish", presets.get("test").model, "{{ messages }}")
    assert len(served.tokenizer) == 265
    assert ServedModel.load(directory, "shark").name == "shark"
    assert [served.depth_name(layers) for layers in (1, 2, 4, 0)] == ["shallow", "middle", "full", "none"]


def test_a_name_may_be_several(directory: Path) -> None:
    served = ServedModel.load(directory, "shark, big,sea/shark")
    assert (served.name, served.aliases) == ("shark", ("big", "sea/shark"))
    for empty in ("", "shark,", " , "):
        with pytest.raises(ConfigError, match="name"):
            ServedModel.load(directory, empty)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_a_missing_file_is_named(directory: Path, missing: str) -> None:
    (directory / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")):
        ServedModel.load(directory)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "format"),
        ({"version": 2}, "version 1"),
        ({"model": {"vocab": 300, "layrs": 4}}, "did you mean 'layers'"),
        ({"model": {**config.dump(presets.get("test").model), "vocab": 200}}, "vocab"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused(directory: Path, change: dict[str, object], says: str) -> None:
    card = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**card, **change}))
    with pytest.raises(CheckpointError, match=says):
        ServedModel.load(directory)


def test_the_gateway_needs_no_torch(directory: Path) -> None:
    code = f"""
import sys
from shoal.api.app import build_app
from shoal.api.served import ServedModel
from shoal.api.service import Hosted
build_app([Hosted(ServedModel.load({str(directory)!r}), None)])
assert not {{"torch", "ray", "gradio"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
