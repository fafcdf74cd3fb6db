"""Checkpoints as transformers writes them, from tests/data/open."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data" / "open"
FAMILIES = sorted(path.name for path in DATA.iterdir() if (path / "config.json").exists())
# of each way to write rotations and norms one: where each family takes half a second, the others are drills
READ = ("llama", "olmo2", "qwen3-yarn", "phi3-longrope")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a folder with the checkpoint of a family, its tokenizer and its chat template."""

    def make(family: str) -> Path:
        folder = tmp_path / f"{family}-source"
        shutil.copytree(DATA / family, folder)
        shutil.copytree(DATA / "tokenizer", folder, dirs_exist_ok=True)
        return folder

    return make


def edit(path: Path, **changes: object) -> None:
    """Set keys of a JSON file; None takes one out."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
