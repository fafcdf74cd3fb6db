"""An imported model as the checkpoint of its family that vLLM reads: in a folder for temporary files, while an engine starts.

    TMPDIR/shoal-vllm-UID/NAME.lock     held, with others, by who reads NAME; alone by who writes or removes it
                          NAME/model    the checkpoint; else what one that was killed has left

Notable: NAME follows from the model and the depth. vLLM keeps what it compiles by the path of the weights, and for one that is
new with each start it would compile again, and keep that too. Replicas of a machine that start at the same time share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.config import FULL, ModelConfig
from shoal.errors import ConfigError, ResourceError
from shoal.model import files
from shoal.model.described import SOURCE
from shoal.open_weights import convert, depths, rope
from shoal.vllm_plugin import PER_REQUEST


def is_imported(directory: str | Path) -> bool:
    """Is it a model directory that `shoal import` made, or that follows from one?"""
    return (Path(directory) / SOURCE).exists()


def depth_of(directory: str | Path, config: ModelConfig, given: Mapping[str, Any]) -> str | int:
    """At which depth vLLM is to serve a model directory, by the options `given` (`options.check` has seen them). Raises
    ConfigError for one that it has not, CheckpointError for an imported model that vLLM cannot be given."""
    imported = is_imported(directory)
    depth: str | int = given.get("hf_overrides", {}).get("depth", FULL if imported else PER_REQUEST)
    if depth == PER_REQUEST and not imported:
        return depth
    if depth not in (*config.exit_names, *config.exits) or isinstance(depth, bool):
        more = ", of a model that was imported" if imported else f", {PER_REQUEST}"
        raise ConfigError("args.vllm.hf_overrides.depth", got=depth, allowed=", ".join(config.exit_names) + more)
    if imported:
        convert.need_exportable(Path(directory))
        depths.alone(config, depth)
    return depth


def need_context(directory: str | Path, config: ModelConfig, given: Mapping[str, Any]) -> int:
    """The longest text, in tokens, that vLLM is to take of an imported model: the model's own, where `given` says nothing,
    whatever its source had. Of longrope's two tables a model has the one of its length, and vLLM takes that of what it is told.
    Raises ConfigError for a longer one, and with longrope for a shorter one."""
    longest, own = given.get("max_model_len"), config.context
    if longest is None:
        return own
    least = own if rope.by_length(convert.need_exportable(Path(directory))[1]["config"]) else 1
    if not isinstance(longest, int) or not least <= longest <= own:
        allowed, do = f"{least} to {own}" if least < own else own, "import the model with another --context"
        raise ConfigError("args.vllm.max_model_len", got=longest, allowed=allowed, do=do)
    return longest


@contextmanager
def exported(directory: str | Path, depth: str | int) -> Iterator[Path]:
    """An imported model, or one depth of it, as `shoal export` writes it, for as long as the block runs. Raises as
    `convert.export_model`, and ResourceError where there is no room, or the folder is somebody else's."""
    root = _root()
    _sweep(root)
    name = _name(Path(directory), depth)
    descriptor = os.open(root / f"{name}.lock", os.O_CREAT | os.O_RDWR, 0o600)
    place = root / name / "model"
    try:
        while True:
            if _alone(descriptor):
                shutil.rmtree(root / name, ignore_errors=True)
                convert.export_model(directory, place, depth=depth, check=False)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # who writes it now is waited for
            if place.is_dir():  # else that one could not
                break
        yield place
    finally:
        if _alone(descriptor):
            shutil.rmtree(root / name, ignore_errors=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that vLLM has forked has the same descriptor
        os.close(descriptor)


def _root() -> Path:
    """This user's folder. Raises ResourceError for one that others can write in: what lies there is served."""
    root = Path(tempfile.gettempdir()) / f"shoal-vllm-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    found = root.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ResourceError(f"{root}", got="not this user's alone", do="remove it, or set TMPDIR to another folder")
    return root


def _name(directory: Path, depth: str | int) -> str:
    """Another for each model and depth."""
    known = directory / files.MANIFEST
    if known.exists():
        told = known.read_bytes()
    else:
        each = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in directory.iterdir())
        told = repr((str(directory.resolve()), each)).encode()
    return f"{hashlib.sha256(told).hexdigest()[:16]}-{depth}"


def _alone(descriptor: int) -> bool:
    """Takes a lock for oneself, where nobody else has it; what one had of it is let go in any case."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(root: Path) -> None:
    """Removes what starts that were killed have left: weights, of many GB."""
    for path in root.glob("*.lock"):
        descriptor = os.open(path, os.O_RDWR)
        try:
            if _alone(descriptor):
                shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        finally:
            os.close(descriptor)
