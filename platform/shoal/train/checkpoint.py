"""Training checkpoints: all that an exact resume needs, written aside, hashed and renamed.

    RUN/checkpoints/step-00000120/
        shard-0000R-model-*.safetensors   model and optimizer, each rank its own shards (torch.distributed.checkpoint, in
                                          safetensors: nothing is pickled, and any number of ranks can read it back)
        rng-0000R.safetensors             random state of each rank
        state.json                        step, tokens, cursor, seconds trained, what was trained, by which code
        manifest.json                     size and sha256 of every file; written last

A directory named step-* was renamed after its manifest was written, so it is whole unless the disk lies; `newest` reads the
hashes anyway and falls back to the one before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from shoal.config import load as load_config
from shoal.config import read_file
from shoal.errors import CheckpointError, ShoalError
from shoal.train.parallel import Ranks

FORMAT, VERSION = "shoal-training", 1
_MODEL, _OPTIMIZER = "model.", "optimizer."


@dataclass
class TrainState:
    """How far a run has come. The order of the data is a pure function of the cursor, so this is all there is to know."""

    step: int = 0  # updates written
    tokens: int = 0  # trained on, padding left out
    cursor: int = 0  # position in the global order of samples: the first one not yet used
    seconds: float = 0.0  # of training, over all sittings
    world: int = 1  # ranks that wrote it
    code: str = ""  # fingerprint of the code that wrote it
    trained: dict[str, Any] = field(default_factory=dict)  # what a resumed run must agree with, as plain values


class CheckpointStore:
    """The checkpoints of one run, in ``RUN/checkpoints``. `save` and `load` are called by all ranks together."""

    def __init__(self, run: str | Path, keep: int = 2) -> None:
        self.directory = Path(run) / "checkpoints"
        self.keep = keep

    def steps(self) -> list[Path]:
        """Published checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*"))

    def save(self, model: nn.Module, optimizer: Optimizer, state: TrainState, ranks: Ranks) -> Path:
        """Write and publish a checkpoint; the oldest beyond `keep` are removed. Returns its directory."""
        final = self.directory / f"step-{state.step:08d}"
        aside = self.directory / f".{final.name}.tmp"
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        ranks.wait()
        writer = HuggingFaceStorageWriter(path=str(aside), save_distributed=True)
        with _alone(ranks):
            dcp_save(_tensors(model, optimizer), storage_writer=writer, no_dist=ranks.world == 1)
        save_file(_rng(ranks), str(aside / f"rng-{ranks.rank:05d}.safetensors"))
        ranks.wait()
        if ranks.first:
            _write_json(aside / "state.json", {"format": FORMAT, "version": VERSION, **asdict(state)})
            _write_json(aside / "manifest.json", _manifest(aside))
            shutil.rmtree(final, ignore_errors=True)
            aside.rename(final)
            for old in self.steps()[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)
        ranks.wait()
        return final

    def clear(self, ranks: Ranks) -> None:
        """Forget all checkpoints of the run."""
        if ranks.first:
            shutil.rmtree(self.directory, ignore_errors=True)
        ranks.wait()

    def newest(self, ranks: Ranks, warn: Callable[[str], None]) -> Path | None:
        """The newest whole checkpoint, or None, the same on all ranks; damaged ones are passed over, with a warning."""
        found = None
        if ranks.first:
            for path in reversed(self.steps()):
                problem = damage(path)
                if problem is None:
                    found = path
                    break
                warn(f"checkpoint {path} is damaged ({problem}); trying the one before")
        chosen: Path | None = ranks.agree(found)
        return chosen

    def load(self, path: Path, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        """Model, optimizer and random state from `path`, in place, at any number of ranks."""
        try:
            saved = HuggingFaceStorageReader(path=str(path)).read_metadata().state_dict_metadata
            tensors = _tensors(model, optimizer, list(saved))
            with _alone(ranks):
                dcp_load(tensors, storage_reader=HuggingFaceStorageReader(path=str(path)), no_dist=ranks.world == 1)
        except Exception as error:  # DCP wraps whatever went wrong on any rank in its own kinds
            raise CheckpointError(f"cannot load checkpoint {path}", got=str(error).strip().splitlines()[-1]) from error
        rng = path / f"rng-{ranks.rank:05d}.safetensors"
        if rng.exists():
            _set_rng(load_file(str(rng)))


def read_state(path: Path) -> TrainState:
    """The state in checkpoint `path`. Raises CheckpointError when it is of another format."""
    values = read_file(path / "state.json")
    kind = (values.pop("format", None), values.pop("version", None))
    if kind != (FORMAT, VERSION):
        raise CheckpointError(f"{path}", got=f"{kind[0]} version {kind[1]}", allowed=f"{FORMAT} version {VERSION}")
    return load_config(TrainState, values, "state")


def require_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError naming every key in which a checkpoint and the run that would resume it differ."""
    old, new = _flat(saved), _flat(wanted)
    differ = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old | new) if old.get(key) != new.get(key)
    ]
    if differ:
        raise CheckpointError(
            f"checkpoint {path} is of another configuration",
            got=", ".join(differ),
            do="resume with the same values, choose another --out, or pass --resume never",
        )


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, or None."""
    try:
        manifest = read_file(path / "manifest.json")
        for name, entry in manifest.items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
            if _sha256(file) != entry["sha256"]:
                return f"{name} does not match its sha256"
    except (ShoalError, OSError, KeyError, TypeError) as error:
        return str(error)
    return None


def full_state(model: nn.Module) -> dict[str, Tensor]:
    """The whole state of `model` on the CPU, gathered from all ranks; empty on all but rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def code_version(package: Path = Path(__file__).parent.parent) -> str:
    """Fingerprint of the package's sources: a bitwise resume is promised to the same code only."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _tensors(model: nn.Module, optimizer: Optimizer, saved: list[str] | None = None) -> dict[str, Tensor]:
    """Model and optimizer as one flat mapping of live tensors, which DCP reads from or writes into.

    With `saved` (names in a checkpoint) the optimizer's missing state is made first, as zeros. Scalars are given as
    views of one element.
    """
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        prefix = f"{_OPTIMIZER}{name}/"
        state = optimizer.state[parameter] if saved or parameter in optimizer.state else {}
        for key in (k.removeprefix(prefix) for k in saved or () if k.startswith(prefix)):
            shape = torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter.detach())
            state.setdefault(key, shape)
        tensors |= {prefix + key: t.view(1) if t.dim() == 0 else t for key, t in state.items()}
    return tensors


@contextlib.contextmanager
def _alone(ranks: Ranks) -> Iterator[None]:
    """DCP warns at every save and load of a process that is meant to be alone."""
    with warnings.catch_warnings():
        if ranks.world == 1:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _rng(ranks: Ranks) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state(ranks.device)} if ranks.device.type == "cuda" else {})


def _set_rng(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _manifest(directory: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in directory.iterdir() if p.is_file())
    return {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, value: object) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
