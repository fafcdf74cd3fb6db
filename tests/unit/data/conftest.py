"""Small documents, images and parts for the data plane's tests."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from shoal import presets
from shoal.config import ModelConfig
from shoal.data.documents import Document, Modality, Skipped, SourceSpec
from shoal.data.sources.files import list_files
from shoal.data.sources.read import read

PROSE = "The sea was calm, and the boats lay still.\nNobody spoke; the gulls alone were heard that morning.\n"
CODE = "def add(a, b):\n    total = a + b\n    return total\n\n\nprint(add(2, 3))\n"


@pytest.fixture(scope="session")
def config() -> ModelConfig:
    return presets.get("test").model


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    def make(color: str = "red", size: tuple[int, int] = (24, 24)) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", size, color).save(out, "PNG")
        return out.getvalue()

    return make


@pytest.fixture
def data_url(png: Callable[..., bytes]) -> str:
    return "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.fixture
def document() -> Callable[..., Document]:
    def make(text: str = PROSE, modality: Modality = "text", *, id: str = "s/a", **fields: object) -> Document:
        values = {"group": id, "source": "s", "license": "MIT", "origin": id.partition("/")[2], **fields}
        return Document(id=id, modality=modality, text=text, **values)  # type: ignore[arg-type]

    return make


@pytest.fixture
def read_all(tmp_path: Path) -> Callable[..., list[Document | Skipped]]:
    """Everything that the files in the test's folder hold."""

    def read_folder(**options: object) -> list[Document | Skipped]:
        spec = SourceSpec("s", str(tmp_path), **options)  # type: ignore[arg-type]
        return [found for file in list_files(spec) for found in read(file)]

    return read_folder
