"""What a gateway and a replica say to each other about one call, beside the request and its events.

Weights never mix in one answer: a replica says which it answers with (`Begun`), and a call that goes on says which it must be
(`Wanted`). What a gateway encodes, only an engine of the same tokenizer, template and shape may read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal import config
from shoal.api.serve_args import ServeArgs
from shoal.api.served import ServedModel
from shoal.data import models
from shoal.errors import EngineDeadError


@dataclass(frozen=True)
class Wanted:
    """What a replica must be to take a call. The router reads it as well."""

    call: str  # which call this is; no other has the same
    reads: str  # `reads` of the caller
    weights: str | None = None  # `weights` that the answer began with; None: any
    avoid: frozenset[str] = frozenset()  # names of replicas that have refused it
    adapter: tuple[str, str] = ("", "")  # identity, and directory, of the one that it is answered with


@dataclass(frozen=True)
class Begun:
    """In front of the first events of a call: who answers, and with which weights."""

    replica: str
    weights: str


class OtherModelError(EngineDeadError):
    """A replica refuses a call, since it is not what the call wants. Another may be."""

    replica = ""
    taken = False


def reads(served: ServedModel, directory: str | Path) -> str:
    """What tells apart models that are given other tokens for the same request: tokenizer, chat template and shape."""
    told = [json.dumps(config.dump(served.config), sort_keys=True), served.chat_template]
    digest = hashlib.sha256("\0".join(told).encode())
    digest.update((models.here(directory, weights=False) / "tokenizer.json").read_bytes())
    return digest.hexdigest()[:16]


def weights(directory: str | Path, args: ServeArgs) -> str:
    """What tells apart engines that may give other tokens for the same request, seed and place: the weights, and how they are
    computed with. Equal for copies of one model directory. Raises CheckpointError for a manifest that cannot be read."""
    from shoal.model.files import weights_sha256

    return weights_of(weights_sha256(models.here(directory, weights=False)), args)


def weights_of(sha256: str, args: ServeArgs) -> str:
    """As `weights`, of those whose `weights_sha256` is known."""
    how: list[Any] = [args.engine, args.kv_cache_dtype, args.gpus > 0, args.dtype, args.vllm]
    told = json.dumps([sha256, *how], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()[:16]
