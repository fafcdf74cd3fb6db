"""What `shoal prepare` and its job are asked for: a config file, and options that override it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.config import load, read_file
from shoal.data.documents import SourceSpec
from shoal.data.operators.pipeline import Operators
from shoal.data.sources.s3 import S3


@dataclass(frozen=True)
class PrepareConfig:
    """The keys of a prepare config."""

    # each NAME=URI, or a mapping with name, uri, license, exclude ...; none: the demo corpus
    source: tuple[SourceSpec, ...] = ()
    mix: str = "text=60,image=20,code=20"  # shares by token
    preset: str = "tiny"
    seed: int = 0  # of split, order and packing
    tokenizer: str | None = None  # a tokenizer.json to use; none: one is fitted to a sample
    operators: Operators = field(default_factory=Operators)
    s3: S3 = field(default_factory=S3)


def prepare_config(path: str | Path | None, **options: Any) -> PrepareConfig:
    """The config in `path`, with the options that are not None in its place. Raises ConfigError or UsageError."""
    values: dict[str, Any] = read_file(path) if path is not None else {}
    values |= {key: value for key, value in options.items() if value is not None}
    named = values.get("source") or []
    sources = [named] if isinstance(named, str) else named
    if isinstance(sources, (list, tuple)):
        values["source"] = [SourceSpec.parse(one) if isinstance(one, str) else one for one in sources]
    return load(PrepareConfig, values)
