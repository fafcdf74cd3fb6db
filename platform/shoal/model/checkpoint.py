"""The model directory: config.json, model.safetensors, tokenizer.json, chat_template.jinja, router.json, README.md and
manifest.json, which lists the others. What can be read of it without torch is read by `described`.

Written aside and renamed, so a directory that exists is whole; safetensors and JSON only, so loading runs no code. How weights
are cut into files, and what is verified when they are read, is decided in `files.py`.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import itertools
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from shoal.config import ModelConfig, dump
from shoal.errors import CheckpointError, ResourceError, first_line
from shoal.inputs.chat import DEFAULT_TEMPLATE
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import write_json
from shoal.model import described, files
from shoal.model.described import OLD
from shoal.model.net import Net
from shoal.model.router import Calibration, Router

LICENCES = "licences"  # of a source in memory: name -> text of the files that travel with its weights
ASIDE = ".tmp"  # end of the name of what is written
LEFT_SECONDS = 3600.0
ROUTER_FILE = "router.json"  # of a model that has a router
ROUTER = "router."  # prefix of the router's tensors among the weights
LATER = "later"  # of the second look's among them, and of its tables in router.json
_HUGGING_FACE = {"model_type": "shoal", "architectures": ["ShoalForCausalLM"]}  # by which vLLM finds `vllm_plugin`

# What other tools need to read the INT8 weights (compressed-tensors, W8A8 with dynamic activations). Ours are rounded to 7 of
# these 8 bits, by the scheme whose version stands beside this in config.json.
_W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["patch_in", "patch_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear", "Embedding"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def save(
    directory: str | Path,
    *,
    config: ModelConfig,
    state: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    tokenizer: Tokenizer,
    name: str,
    chat_template: str = DEFAULT_TEMPLATE,
    router: Router | None = None,
    source: Mapping[str, Any] | None = None,
    base: str = "",
    card: str = "",
    shard_bytes: int = files.SHARD,
) -> None:
    """Write a model directory. `state` is the state of `Net(config)` on the CPU, or its tensors by name as they come, of which
    a file's are held at a time; `source`: what an open model was imported from; `base` as of `described.base` [these weights].
    Replaces an existing model directory.

    Weights of more than `shard_bytes` are cut into several files. Raises CheckpointError when something else is there
    (`require_replaceable`).
    """
    require_replaceable(directory)
    directory = Path(directory).resolve()  # where a link leads, the directory is replaced and not the link
    named = state.items() if isinstance(state, Mapping) else state
    routed = router.state_dict() if router is not None else {}
    also = ((ROUTER + key, value) for key, value in routed.items())
    tensors = ((key, value.detach().contiguous()) for key, value in itertools.chain(named, also))
    with replacing(directory) as aside:
        files.save_weights(aside, tensors, shard_bytes)
        describe(aside, config, name, tokenizer, chat_template, source, base or files.weights_sha256(aside), card)
        if router is not None:
            tables = dataclasses.asdict(router.calibration)
            if router.later is not None:
                tables[LATER] = dataclasses.asdict(router.later.calibration)
            write_json(aside / ROUTER_FILE, tables)
        files.write_manifest(aside)


def describe(
    directory: Path,
    config: ModelConfig,
    name: str,
    tokenizer: Tokenizer,
    chat_template: str,
    source: Mapping[str, Any] | None,
    base: str,
    card: str,
) -> None:
    """Write what a model directory holds beside its weights and its router; the manifest comes last."""
    own = {"format": described.FORMAT, "version": described.VERSION}
    meta: dict[str, Any] = {**own, "name": name, "model": dump(config), described.BASE: base, **_HUGGING_FACE}
    if config.quantization == "w8a8":
        meta |= {"quantization_config": _W8A8, "int8_scheme": described.INT8_SCHEME}
    write_json(directory / described.CONFIG, meta)
    tokenizer.save(directory / described.TOKENIZER)
    (directory / described.TEMPLATE).write_text(chat_template, encoding="utf-8")
    (directory / files.CARD).write_text(card or f"# {name}\n\nA Shoal model.\n", encoding="utf-8")
    if source is not None:
        told = dict(source)
        for licence, text in told.pop(LICENCES, {}).items():
            (directory / licence).write_text(text, encoding="utf-8", errors="surrogateescape")
        write_json(directory / described.SOURCE, told)


def require_replaceable(directory: str | Path) -> None:
    """Raises CheckpointError when `directory` holds anything but a model of ours, which alone may be replaced: its config.json
    is of our format, and its manifest lists whatever lies there. One that is empty, or is not there, may be taken; what a
    killed command has taken away is first put back (`put_back`). The one that this process is in may not."""
    given = Path(directory)
    need_movable(given)
    directory = given.resolve()  # where a link leads is replaced, and is what a killed command took away
    put_back(directory)
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir():
        got = "a file"
    elif not described.is_ours(directory):
        got = f"no {described.CONFIG} of a {described.FORMAT}"
    else:
        got = files.unlisted(directory)
    if got:
        raise CheckpointError(
            f"{given} is not a model directory that may be replaced", got=got,
            do="choose another place, or take out what is not the model's",
        )  # fmt: skip


def need_movable(directory: Path) -> None:
    """Raises CheckpointError for a directory whose place another cannot take: one that this process is in, whose paths would
    lead nowhere, and one that something is mounted on, as of a container; ResourceError for a name that no file can have, and
    for links in a circle."""
    try:
        directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise _unwritten(directory, error) from error
    if os.path.ismount(os.path.realpath(directory)):
        got = "a mount point, which cannot be renamed"
        raise CheckpointError(f"{directory}", got=got, do="give a folder in it")
    with suppress(FileNotFoundError):  # of a process whose own is gone
        if Path.cwd().is_relative_to(os.path.realpath(directory)):
            got = "the folder that the command runs in, or one around it"
            raise CheckpointError(f"{directory}", got=got, do="run it in another, or give another place")


@contextmanager
def replacing(directory: Path, need: Callable[[Path], None] = require_replaceable) -> Iterator[Path]:
    """A directory to write in, which takes the place of `directory` once it is whole and is gone when that fails; and with it
    what those have left that were killed. The one that was there before, which `need` lets be replaced, is put back where the
    new one cannot take its place. Raises ResourceError where the disk is full, or takes nothing by this name."""
    need_movable(directory)
    directory = directory.resolve()
    name = f".{directory.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}"
    aside, before = (directory.with_name(f"{name}{end}") for end in (ASIDE, OLD))
    try:
        aside.mkdir(parents=True)
        held = os.open(aside, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _unwritten(directory, error) from error
    try:
        with suppress(OSError):  # of a file system without locks
            fcntl.flock(held, fcntl.LOCK_EX)
        put_back(directory)
        _sweep(directory, ASIDE)
        yield aside
        need(directory)  # again: writing takes minutes
        with suppress(FileNotFoundError):
            directory.rename(before)
        try:
            aside.rename(directory)
        except OSError as error:
            if not directory.exists() and before.exists():
                before.rename(directory)
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise CheckpointError(
                f"{directory}", got="one that was written meanwhile", do="look which you want"
            ) from error
        _sweep(directory, OLD)
    except (OSError, SafetensorError) as error:
        raise _unwritten(directory, error) from error
    finally:
        if directory.exists():
            shutil.rmtree(before, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
        os.close(held)


def _unwritten(directory: Path, error: OSError | SafetensorError) -> ResourceError:
    """What the system said to writing a directory; safetensors says it in a text of its own."""
    got = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    full = isinstance(error, SafetensorError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    do = "free some disk" if full else "give another place"
    return ResourceError(f"cannot write {directory}", got=got, do=do)


def put_back(directory: Path) -> bool:
    """Gives `directory` back what was there, the newest of it, where there is nothing: one that replaced it was killed between
    its two renames. One that is between them now, which holds what it writes, is left alone. Whether it did."""
    if directory.exists() or not directory.parent.is_dir():
        return False
    for before in sorted(_left(directory, OLD), key=lambda path: path.stat().st_ctime, reverse=True):
        aside = before.with_name(before.name.removesuffix(OLD) + ASIDE)
        with suppress(OSError):  # whoever is quicker has it
            held = os.open(aside if aside.exists() else before, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not directory.exists():
                    before.rename(directory)
                    return True
            finally:
                os.close(held)
    return False


def _left(directory: Path, end: str) -> list[Path]:
    """What lies beside `directory` by a name of ours with this `end`."""
    known = re.compile(rf"{re.escape(f'.{directory.name}.')}\d+\.[0-9a-f]{{8}}{re.escape(end)}")
    return [path for path in directory.parent.iterdir() if known.fullmatch(path.name)]


def _sweep(directory: Path, end: str) -> None:
    """Removes what lies beside `directory` by a name of ours with this `end`, is held by nobody, and was not written to for
    `LEFT_SECONDS`, which tells where a lock does not reach, as between some machines."""
    for path in _left(directory, end):
        with suppress(OSError):
            held = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - max(each.stat().st_mtime for each in (path, *path.rglob("*"))) > LEFT_SECONDS:
                    shutil.rmtree(path)
            finally:
                os.close(held)


@dataclasses.dataclass
class Loaded:
    """The parts of a model directory; `net` holds the weights on the CPU."""

    name: str
    config: ModelConfig
    net: Net
    tokenizer: Tokenizer
    chat_template: str
    router: Router | None
    source: dict[str, Any] | None
    base: str


def read(directory: str | Path, *, verify: bool = False) -> Loaded:
    """A model directory as parts; `verify` as `files.check`. Raises CheckpointError naming the file, and the key or tensor, at
    fault."""
    directory = Path(directory)
    _, config = described.read_config(directory)
    files.check(directory, verify)
    tensors = files.load_weights(directory)
    router_state = {key.removeprefix(ROUTER): tensors.pop(key) for key in list(tensors) if key.startswith(ROUTER)}
    with torch.device("meta"):
        net = Net(config)
    _need_alike(directory, "model", net.state_dict(), tensors)
    net.load_state_dict(tensors, assign=True)
    it = described.read(directory)
    router = _router(directory, config, router_state)
    base = described.base(directory)
    return Loaded(it.name, config, net, it.tokenizer, it.chat_template, router, _source(directory), base)


def _need_alike(directory: Path, of: str, expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError naming a tensor of the model or of its router that is lacking, unknown, or of another shape or
    kind than is expected."""
    for key in sorted(expected.keys() ^ found.keys()):
        what = "lacks" if key in expected else "has an unknown"
        raise CheckpointError(f"{directory}: the {of} {what} tensor {key}", do="export the model again")
    for key, tensor in found.items():
        if tensor.shape != expected[key].shape:
            raise CheckpointError(
                f"tensor {key} of {directory}", got=list(tensor.shape), allowed=str(list(expected[key].shape))
            )
        whole = not expected[key].is_floating_point()
        if tensor.dtype != expected[key].dtype if whole else not tensor.is_floating_point():
            raise CheckpointError(f"tensor {key} of {directory}", got=tensor.dtype, allowed=str(expected[key].dtype))


def give_router(directory: str | Path, router: Router) -> None:
    """Write a model directory again, with `router` and not the one that it has. Its weights are read as they are written, and
    those of one file are held at a time. Raises CheckpointError as `read` does, and where it may not be replaced."""
    directory = Path(directory).resolve()
    files.check(directory)
    it = described.read(directory)
    save(
        directory,
        config=it.config,
        state=((key, tensor) for key, tensor in files.stream_weights(directory) if not key.startswith(ROUTER)),
        tokenizer=it.tokenizer,
        name=it.name,
        chat_template=it.chat_template,
        router=router,
        source=_source(directory),
        base=described.base(directory),
        card=(directory / files.CARD).read_text(encoding="utf-8"),
    )


def routers(directory: Path) -> tuple[bool, int | None]:
    """Whether the model in `directory` has a router, and after how many tokens of an answer it looks again; None: never."""
    path = directory / ROUTER_FILE
    later = described.read_json(path).get(LATER) if path.exists() else None
    return path.exists(), None if later is None else described.loaded(Calibration, later, path).after


def _source(directory: Path) -> dict[str, Any] | None:
    """What is said of the open model that a directory was imported from, with its licences."""
    if not (directory / described.SOURCE).exists():
        return None
    source = described.read_json(directory / described.SOURCE)
    source[LICENCES] = {
        path.name: path.read_text(encoding="utf-8", errors="surrogateescape") for path in files.licences(directory)
    }
    return source


def _router(directory: Path, config: ModelConfig, state: dict[str, Tensor]) -> Router | None:
    if not state:
        return None
    router = Router(config)
    if any(key.startswith(f"{LATER}.") for key in state):
        router.later = Router(config)
    # torch's own error names the tensor behind its first line
    _need_alike(directory, "router", router.state_dict(), state)
    router.load_state_dict(state)
    path = directory / ROUTER_FILE
    tables = described.read_json(path)
    later = tables.pop(LATER, None)
    router.calibration = described.loaded(Calibration, tables, path)
    if router.later is not None:
        router.later.calibration = described.loaded(Calibration, later or {}, path)
        if router.later.after < 1:
            raise CheckpointError(f"{path}: {LATER}.after", got=router.later.after, allowed="1 or more")
    elif later is not None:
        raise CheckpointError(f"router of {directory} lacks the weights of {LATER}", do="export the model again")
    return router.requires_grad_(False)
