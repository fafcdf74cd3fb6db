"""Where the tensors of an open model come from, one at a time: a folder of Hugging Face's, or a GGUF (`gguf`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shoal.errors import CheckpointError
from shoal.inputs.tokenizer import Tokenizer
from shoal.model import files
from shoal.open_weights.vocabulary import of_folder, read_json

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them


class Seen:
    """Files as they were when they were first looked at: of one that is written meanwhile, parts of two would be read."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._was = {path: _stamp(path) for path in paths}

    def need_same(self) -> None:
        """Raises CheckpointError for a file that was changed, replaced or taken away since."""
        for path, was in self._was.items():
            if _stamp(path) != was:
                raise CheckpointError(
                    f"{path} was changed while it was read", do="wait until it is whole, and run it again"
                )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def read_of(directory: Path) -> Seen:
    """The files in a directory that a checkpoint is made of."""
    return Seen(path for path in directory.iterdir() if path.suffix in files.READ)


class Source(Protocol):
    """A checkpoint under Hugging Face's names."""

    name: str
    config: Mapping[str, Any]  # its config.json
    generation: Mapping[str, Any]  # its generation_config.json
    extra: Mapping[str, Any]  # of its tokenizer_config.json and such, to be kept as it is

    def tensors(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of every tensor. Raises CheckpointError for a dtype that is none of `DTYPES`."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor. Raises as `need_same`."""
        ...

    def need_same(self) -> None:
        """Raises CheckpointError where a file of it was changed since it was opened."""
        ...

    def vocabulary(self, template: str | None) -> tuple[Tokenizer, str]:
        """Tokenizer and chat template; `template` in place of the source's. Raises CheckpointError where one is missing."""
        ...

    def licences(self) -> Sequence[Path]:
        """Files that must travel with the weights."""
        ...


class Folder:
    """A directory with config.json, safetensors and tokenizer.json."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError when it is not one, or when its files of weights cannot be read."""
        self._directory, self.name = directory, directory.resolve().name
        if not (directory / "config.json").is_file():
            raise CheckpointError(f"{directory} is no checkpoint of Hugging Face's form", got="no config.json")
        self._seen = read_of(directory)
        self.config: Mapping[str, Any] = read_json(directory / "config.json")
        if self.config.get("format"):
            raise CheckpointError(f"{directory}", got="a model directory of ours", do="it needs no import")
        self.generation: Mapping[str, Any] = read_json(directory / "generation_config.json", missing=True)
        self.extra: Mapping[str, Any] = {
            "tokenizer_config": read_json(directory / "tokenizer_config.json", missing=True)
        }
        self._files = {path: opened_weights(path) for path in self._weights()}
        self._at: dict[str, Any] = {}
        for path, opened in self._files.items():
            for name in opened.keys():  # noqa: SIM118, no mapping
                if self._at.setdefault(name, opened) is not opened:
                    raise CheckpointError(f"tensor {name} is in two files", got=path.name, do="take one of them out")

    def _weights(self) -> list[Path]:
        if (self._directory / files.INDEX).exists() or (self._directory / files.WEIGHTS).exists():
            named = files.weight_files(self._directory)
            return list(named)
        found = sorted(self._directory.glob("*.safetensors"))
        if not found:
            pickled = next((path.name for path in self._directory.glob("*.bin")), None)
            got = f"{pickled}, which is a pickle and would run code" if pickled else "no *.safetensors"
            raise CheckpointError(f"weights of {self._directory}", got=got, do="give a checkpoint in safetensors")
        return found

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        found = {}
        for name, opened in self._at.items():
            piece = opened.get_slice(name)
            kind = piece.get_dtype()
            if kind not in DTYPES:
                do = "give the checkpoint that it was quantised from"
                raise CheckpointError(f"tensor {name}", got=kind, allowed=list(DTYPES), do=do)
            found[name] = DTYPES[kind], tuple(piece.get_shape())
        return found

    def need_same(self) -> None:
        self._seen.need_same()

    def read(self, name: str) -> Tensor:
        self.need_same()
        made: Tensor = self._at[name].get_tensor(name)
        return made

    def vocabulary(self, template: str | None) -> tuple[Tokenizer, str]:
        return of_folder(self._directory, self.config, self.generation, self.extra["tokenizer_config"], template)

    def licences(self) -> list[Path]:
        return files.licences(self._directory)


def opened_weights(path: Path) -> Any:
    """A file of safetensors. Raises CheckpointError when it cannot be read."""
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"cannot read {path}", got="no file", allowed="a file of safetensors")
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot read {path}: it was cut short or is no safetensors", got=str(error)[:160]
        ) from error
