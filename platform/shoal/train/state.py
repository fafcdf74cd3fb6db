"""How far a run has come: what a checkpoint keeps beside the weights, and what a resumed run must agree with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.config import load as load_config
from shoal.config import read_file
from shoal.errors import CheckpointError
from shoal.train.manifest import STATE

FORMAT, VERSION = "shoal-training", 1


@dataclass
class TrainState:
    """How far a run has come. The order of the data is a pure function of the cursor, so this is all there is to know."""

    step: int = 0  # updates written
    tokens: int = 0  # trained on, padding left out
    cursor: int = 0  # position in the global order of samples: the first one not yet used
    seconds: float = 0.0  # of training, over all sittings
    world: int = 1  # ranks that wrote it
    parts: int = 0  # micro-batches of a global batch, over all ranks; 0 while that is not known
    limits: dict[str, Any] = field(default_factory=dict)  # how long the run was to be
    schedule: float = 0.0  # share of that length at which the last update took its rates
    code: str = ""  # fingerprint of the code that wrote it
    command: str = ""  # which command's run it is, of one that was begun anew
    trained: dict[str, Any] = field(default_factory=dict)  # what a resumed run must agree with, as plain values
    best: float | None = None  # fewest held-out bits a byte that a checkpoint was written for, mean of what is measured
    best_step: int = 0  # when that was
    measured_on: str = ""  # what `best` was measured on: another set of rows begins anew


def read_state(path: Path) -> TrainState:
    """The state in checkpoint `path`. Raises CheckpointError when it is of another format."""
    return state_of(read_file(path / STATE), path)


def state_of(values: dict[str, Any], path: str | Path) -> TrainState:
    """As `read_state`, of what the file holds."""
    kind = (values.pop("format", None), values.pop("version", None))
    if kind != (FORMAT, VERSION):
        raise CheckpointError(f"{path}", got=f"{kind[0]} version {kind[1]}", allowed=f"{FORMAT} version {VERSION}")
    return load_config(TrainState, values, "state")


def require_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], path: str | Path) -> None:
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


def code_version(package: Path = Path(__file__).parent.parent) -> str:
    """Fingerprint of the package's sources: a bitwise resume is promised to the same code only."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat
