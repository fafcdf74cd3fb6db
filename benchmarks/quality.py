"""`shoal bench quality`: what a model says of held-out text at every exit, in INT8 and with keys and values in int8, beside its
full depth in fp32, and beside other servers' own logprobs of the same ids.

All of it is the engine's, as it serves: rows of `evaluate.texts.TextRows`, one after the other. A peer (`peers.py`) gets the
ids of a row, and answers the nats of each that follows and the ids that it finds likeliest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import peers
from benchmarks.turns import show
from shoal.config import FULL
from shoal.data.shards import token_bytes
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.errors import UsageError
from shoal.evaluate.intervals import between, of_part, of_quotient
from shoal.evaluate.texts import TextRows
from shoal.inputs.chat import encode_chat
from shoal.model.model import Model
from shoal.open_weights import proof
from shoal.progress import progress

SCORERS = ("llama.cpp", "llama.cpp-q8_0", "llama.cpp-f32", "transformers")
ANSWER = 24  # tokens of a greedy answer, at most
INT8_KV = "full, int8 K/V"


@dataclass(frozen=True)
class Row:
    """A held-out row: `ids` [T + 1], the places [n] of `ids` that are measured, and the group of the document."""

    ids: Tensor
    places: Tensor
    group: int


@dataclass(frozen=True)
class Said:
    """What somebody said at the n places of a row: nats of what stands there, the likeliest token, KL from the first."""

    nats: np.ndarray
    likeliest: np.ndarray
    kl: np.ndarray | None = None


def quality(
    console: Console, *, model: Path, against: Path | None, data: Path, peer: dict[str, str], gguf: Path | None
) -> None:
    """The table, and all of it as JSON: `model`, in fp32 or bf16, at each of its exits, `against` beside it, which is
    the same in INT8, and each `peer`, on the texts and chats of `data`. Raises UsageError for what does not go together."""
    unknown = [name for name in peer if name not in SCORERS]
    if unknown:
        raise UsageError("--peer", got=unknown, allowed=list(SCORERS))
    peers.need_gguf(peer, gguf)
    if not data.is_file():
        raise UsageError("--data", got=str(data), allowed="a .jsonl of texts and chats")
    models = {"fp32": Model.load(model)}
    models["fp32"].net.float()
    if against is not None:
        models["INT8"] = Model.load(against)
        if models["INT8"].tokenizer.sha256 != models["fp32"].tokenizer.sha256:
            raise UsageError("--against", got=f"{against}, of another tokenizer", allowed=f"a model made from {model}")
    rows = rows_of(models["fp32"], data)
    imported = model if models["fp32"].source is not None else None
    with peers.running(peer, models["fp32"], imported, gguf) as others:
        found = said_of(models, rows, others)
        asked = [peer for peer in others if peer.name == "transformers" and imported]
        chats = same_chats(models["fp32"], Engine(models["fp32"], max_batch=1), asked[0]) if asked else {}
    lengths = token_bytes(models["fp32"].tokenizer)
    table, told = table_of(found, rows, lengths)
    table.title = f"{sum(len(row.places) for row in rows):,} tokens of {data.name}, {models['fp32'].name}"
    result = {"bench": "quality", "data": data.name, "rows": told, "chats": chats}
    for what, (same, of) in chats.items():
        console.print(f"{what} the same as transformers': {same} of {of}", highlight=False)
    show(console, [table], result)


def same_chats(model: Model, engine: Engine, peer: peers.Peer) -> dict[str, tuple[int, int]]:
    """Of the twenty chats by which exports are compared, how many are the same token ids as transformers', those with control
    tokens that a user spells apart, which are not meant to be; and of how many the greedy answers are."""
    found = {"chats": [0, 0], "chats with spelt control tokens": [0, 0], "greedy answers in fp32": [0, 0]}
    greedy = Sampling(temperature=0.0, max_tokens=ANSWER)
    for messages in proof.chats():
        row = encode_chat(messages, model.tokenizer, model.config, template=model.chat_template, answers=False)
        written, answer = peer.answered(messages, row.ids, ANSWER)
        spelt = any(name in message["content"] for message in messages for name in model.tokenizer.specials)
        (ours,) = engine.generate([Request(row, greedy, depth=FULL)])
        for what, same in (
            ("chats with spelt control tokens" if spelt else "chats", written == row.ids),
            ("greedy answers in fp32", ours.tokens == answer),
        ):
            found[what][0] += same
            found[what][1] += 1
    return {what: (same, of) for what, (same, of) in found.items() if of}


def rows_of(model: Model, data: Path) -> list[Row]:
    """The rows of a file as `model` reads them. Raises DataError for one that cannot be read."""
    found = []
    for batch, groups in TextRows(data, model):
        targets = batch.targets[0]
        ids = torch.cat([batch.tokens[0], targets[-1:].clamp_min(0)])
        places = 1 + (targets >= 0).nonzero().flatten()
        found.append(Row(ids[: int(places[-1]) + 1], places, int(groups[0, 0])))
    return found


def said_of(models: dict[str, Model], rows: list[Row], others: list[peers.Peer]) -> dict[tuple[str, str], list[Said]]:
    """What each says of each row, by who and at which depth. The first is the first model's full depth."""
    engines: dict[tuple[str, str], tuple[Engine, str]] = {}
    for label, model in models.items():
        plain = Engine(model, max_batch=1)
        depths = [FULL, *(name for name in model.config.exit_names if name != FULL)]
        engines |= {(label, depth): (plain, depth) for depth in depths}
        engines[label, INT8_KV] = Engine(model, max_batch=1, kv_cache_dtype="int8"), FULL
    found: dict[tuple[str, str], list[Said]] = {key: [] for key in engines}
    found |= {(peer.name, FULL): [] for peer in others}
    with progress("quality") as tell:
        for number, row in enumerate(rows):
            exact = None
            for key, (engine, depth) in engines.items():
                logs = logits(engine, row.ids, depth)[row.places - 1].log_softmax(-1)
                exact = logs if exact is None else exact
                found[key].append(_said(logs, exact, row))
            for peer in others:
                nats, likeliest = peer.said(row.ids.tolist())
                at = row.places.numpy() - 1
                found[peer.name, FULL].append(Said(np.asarray(nats)[at], np.asarray(likeliest)[at]))
            tell("rows", number + 1, len(rows))
    return found


def _said(logs: Tensor, exact: Tensor, row: Row) -> Said:
    """Of logprobs [n, V] beside the first's, `exact`."""
    nats = -logs.gather(1, row.ids[row.places][:, None])[:, 0]
    kl = (exact.exp() * (exact - logs)).sum(-1)
    return Said(nats.double().numpy(), logs.argmax(-1).numpy(), kl.double().numpy())


def logits(engine: Engine, ids: Tensor, depth: str) -> Tensor:
    """Logits [T, V] after each of `ids` [T + 1] but the last, as `engine` computes them for a prompt at `depth`."""
    kept: list[Tensor] = []
    score = engine.runner.sampler.score

    def keep(given: Tensor, targets: Any, count: int) -> Any:
        kept.append(given.float().clone())  # `score` changes it
        return score(given, targets, count)

    engine.runner.sampler.score = keep  # type: ignore[method-assign, assignment]
    try:
        asked = Sampling(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=0)
        engine.generate([Request(ids.tolist(), asked, depth=depth)])
    finally:
        del engine.runner.sampler.score
    return torch.cat(kept)


def table_of(
    found: dict[tuple[str, str], list[Said]], rows: list[Row], lengths: np.ndarray
) -> tuple[Table, list[dict[str, Any]]]:
    """A line for each who said something, with 95 % intervals over documents; all beside the first."""
    groups = np.concatenate([np.full(len(row.places), row.group) for row in rows])
    n_bytes = np.concatenate([lengths[row.ids[row.places].numpy()] for row in rows]).astype(float)
    kinds, inverse = np.unique(groups, return_inverse=True)

    def sums(values: np.ndarray) -> np.ndarray:
        return np.bincount(inverse, values, minlength=len(kinds))

    table = Table("", "depth", "bits a byte", "beside the first", "KL, nats a token", "same likeliest token")
    told: list[dict[str, Any]] = []
    first: np.ndarray | None = None
    for (who, depth), each in found.items():
        nats, likeliest = (np.concatenate([getattr(said, name) for said in each]) for name in ("nats", "likeliest"))
        if first is None:
            first, their = nats, likeliest
        bits = of_quotient(sums(nats / math.log(2)), sums(n_bytes), len(nats))
        rise = of_quotient(sums(nats), sums(first), len(nats))
        same = of_part(sums((likeliest == their).astype(float)), sums(np.ones(len(their))))
        kl = (
            float(np.mean(np.concatenate([said.kl for said in each if said.kl is not None])))
            if each[0].kl is not None
            else None
        )
        low, high = (end - 1 for end in rise.interval)
        table.add_row(
            who, depth, f"{bits.value:.4f}{_behind(bits.ends, '.3f')}",
            f"{rise.value - 1:+.2%}{_behind([low, high] if math.isfinite(low + high) else None, '+.2%')}",
            "" if kl is None else f"{kl:.4f}", f"{same.value:.1%}",
        )  # fmt: skip
        told.append(
            {"what": who, "depth": depth, "bits": bits.value, "interval": bits.ends, "rise": rise.value - 1, "kl": kl,
             "same": same.value, "places": len(nats)}
        )  # fmt: skip
    return table, told


def _behind(interval: list[float] | None, form: str) -> str:
    """A 95 % interval as it stands behind its value."""
    return f" [{between(interval, form)}]"
