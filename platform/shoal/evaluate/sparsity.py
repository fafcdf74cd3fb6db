"""Which dense layers of a model may be sparse, by what that changes of what it says.

Each dense layer is tried alone, and in the order of what that costs as many are sparse together as stay within a tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.data.alone import alone
from shoal.data.chats.whole import read_whole
from shoal.data.models import here
from shoal.data.remote import local
from shoal.errors import DataError, ResourceError, UsageError
from shoal.evaluate import pieces
from shoal.evaluate.pieces import Models, Piece, Run, wherever
from shoal.machine import aside, threads, write_json
from shoal.model import checkpoint, described
from shoal.model.attention import Layout
from shoal.model.block import rope_tables
from shoal.model.net import Net
from shoal.progress import Tell
from shoal.train.plan import fingerprint
from shoal.train.run import COMMAND
from shoal.train.sparse import attentions, dense_, longest, made, with_sparse

ROWS = 2  # that layers are chosen by
TOLERANCE = 0.01  # nats a token
FILE = "sparse.json"  # in the run's folder: what was chosen
_HEADS_AT_ONCE = 512  # tokens whose logits are compared at a time


def chosen(
    model: str,
    data: str,
    run: str,
    *,
    tolerance: float = TOLERANCE,
    dense_length: int = 0,
    tell: Tell | None = None,
    by: Run = pieces.here,
) -> dict[str, Any]:
    """Which layers of the model at `model` may be sparse, measured on rows of `data` that are longer than the dense length, as
    one piece that `by` does: its pattern, and KL(dense || sparse) in nats a token beyond that length, of each layer alone and
    of the chosen ones together. Kept in the folder `run`, and taken from there when asked for the same. Raises UsageError where
    no layer is within `tolerance`, and for a model that has no layers to choose from; DataError where no row is long enough;
    ResourceError where another command trains in `run` by what is kept there."""
    if not 0 < tolerance < math.inf:
        raise UsageError("--tolerance", got=tolerance, allowed="nats a token, above 0")
    directory = here(model, weights=False)
    _, config = described.read_config(directory)
    if config.quantization != "none":
        got, do = config.quantization, "give the fp32 model that it was made from"
        raise UsageError(f"{model} is quantised", got=got, do=do)
    wide = with_sparse(config, dense_length)
    weights, texts = described.known_weights(directory), fingerprint(str(local(data)))
    asked = {"weights": weights, "data": texts, "tolerance": tolerance, "dense_length": wide.dense_length}
    kept = Path(run) / FILE
    if kept.is_file():
        found = described.read_json(kept)
        if found.pop("asked", None) == asked:
            return found
    own = by is pieces.here  # from another process nothing is heard before the end
    args = (wherever(model), wherever(data), wide.dense_length, tolerance, tell if own else None, not own)
    (found,) = by([Piece(of_model, args)])
    busy = ResourceError(f"another command is training in {run}", do="wait for it, stop it, or give another --out")
    with alone(kept.with_name(COMMAND), busy), aside(kept) as beside:
        write_json(beside, {**found, "asked": asked})
    return found


def of_model(
    models: Models, place: str, data: str, dense_length: int, tolerance: float, tell: Tell | None, whole: bool
) -> dict[str, Any]:
    """A piece: `choose` of the model at `place`, in fp32 on CPUs; where it has a `whole` machine, on those of all of it."""
    if whole:
        torch.set_num_threads(threads())
    loaded = checkpoint.read(here(place))
    wide = with_sparse(loaded.config, dense_length)
    rows = long_rows(str(local(data)), loaded, wide)
    return choose(made(loaded.net.float(), wide).requires_grad_(False), rows, tolerance, tell)


def learned(models: Models, place: str, data: str, whole: bool) -> float:
    """A piece: `beyond` of the model at `place`."""
    if whole:
        torch.set_num_threads(threads())
    return beyond(here(place), str(local(data)))


def long_rows(data: str, loaded: checkpoint.Loaded, config: ModelConfig) -> list[Tensor]:
    """The ids of the longest rows of a .jsonl, `ROWS` of them, each longer than the dense length of `config`. Raises DataError
    where there is none."""
    if Path(data).is_dir():
        do = "give a .jsonl of texts, which are not cut into rows as shards are"
        raise DataError(f"{data}", got="a folder", allowed="a .jsonl of texts or chats", do=do)
    longer = config.dense_length
    whole = read_whole(data, loaded.tokenizer, config, template=loaded.chat_template, limit=longest(config))
    order = sorted(range(len(whole)), key=lambda row: (-int(whole.lengths[row]), row))[:ROWS]
    rows = [torch.from_numpy(whole.row(row)[0].astype(np.int64)) for row in order if whole.lengths[row] > longer]
    if not rows:
        got, do = f"{int(whole.lengths.max())} tokens at most", "give longer texts, or a lower --dense-length"
        raise DataError(f"{data} has no row beyond the dense length", got=got, allowed=f"more than {longer}", do=do)
    return rows


@torch.no_grad()
def beyond(directory: str | Path, data: str) -> float:
    """KL(dense || sparse) of a model directory, nats a token beyond its dense length, on `long_rows` of `data`."""
    loaded = checkpoint.read(directory)
    net = loaded.net.float()
    texts = [_Text(net, row) for row in long_rows(data, loaded, net.config)]
    kinds = [attention.kind for attention in attentions(net)]
    dense_(net)
    for text in texts:
        text.said = text.states(0, text.begin())
    for attention, kind in zip(attentions(net), kinds, strict=True):
        attention.kind = kind
    return sum(text.apart(text.states(0, text.begin())) for text in texts) / sum(text.beyond for text in texts)


@torch.no_grad()
def choose(net: Net, rows: Sequence[Tensor], tolerance: float, tell: Tell | None = None) -> dict[str, Any]:
    """What `chosen` gives, of a `net` all of whose dense layers are sparse, and `rows` of ids, each longer than its dense
    length. Leaves the chosen layers of `net` sparse and the others dense."""
    tell = tell or (lambda what, done, total: None)
    layers = attentions(net)
    able = [layer for layer, attention in enumerate(layers) if attention.kind == "S"]
    texts = [_Text(net, row) for row in rows]
    tokens = sum(text.beyond for text in texts)

    def sparse(some: Sequence[int]) -> None:
        for layer in able:
            layers[layer].kind = "S" if layer in some else "D"

    sparse(())
    for text in texts:
        text.said = text.states(0, text.begin())
    alone = dict.fromkeys(able, 0.0)
    for number, text in enumerate(texts):
        x = text.begin()
        for layer in range(len(layers)):
            if layer in alone:
                tell("layers alone", number * len(layers) + layer, len(texts) * len(layers))
                sparse([layer])
                alone[layer] += text.apart(text.states(layer, x)) / tokens
                sparse(())
            x = text.layer(layer, x)
    order = sorted(able, key=lambda layer: (alone[layer], layer))

    def together(count: int) -> float:
        tell(f"{count} layers together", 0, 0)
        sparse(order[:count])
        return sum(text.apart(text.states(0, text.begin())) for text in texts) / tokens

    measured = {0: 0.0}
    low, high = 0, len(order)
    while low < high:  # the largest count within the tolerance, as if more layers always cost more
        middle = (low + high + 1) // 2
        measured[middle] = together(middle)
        low, high = (middle, high) if measured[middle] <= tolerance else (low, middle - 1)
    least = alone[order[0]]
    if not low:
        raise UsageError(
            "sparse layers within the tolerance", got=f"none: the cheapest costs {least:.3g} nats a token",
            allowed=f"{tolerance:g}", do="give a larger --tolerance, or a larger --dense-length",
        )  # fmt: skip
    sparse(order[:low])
    pattern = "".join(attention.kind for attention in layers)
    c = net.config
    told = {"dense_length": c.dense_length, "window": c.window, "top_k": c.top_k, "block": c.block}
    each = {str(layer + 1): kl for layer, kl in alone.items()}
    return {"pattern": pattern, "layers": low, "kl": measured[low], "alone": each, "tokens": tokens, **told}


class _Text:
    """One row of ids [T] on its way through the layers of a net."""

    said: Tensor  # the dense model's states at full depth, [1, T, D]

    def __init__(self, net: Net, ids: Tensor) -> None:
        c = net.config
        self.net, self.ids, self.blocks = net, ids, [block for group in net.groups for block in group.blocks]  # type: ignore[union-attr]
        self.layout = Layout.packed(
            torch.zeros(1, len(ids), dtype=torch.long), window=c.window, block=c.block, sinks=c.sinks
        )
        self.rope = rope_tables(self.layout.positions, c, net.dtype)
        self.beyond = len(ids) - c.dense_length  # tokens that a sparse layer may read otherwise

    def begin(self) -> Tensor:
        """States [1, T, D] before the first layer."""
        return self.net.embed_inputs(self.ids[None])

    def layer(self, layer: int, x: Tensor) -> Tensor:
        """States after one layer."""
        after: Tensor = self.blocks[layer](x, self.layout, self.rope)
        return after

    def states(self, first: int, x: Tensor) -> Tensor:
        """States at full depth of those before layer `first`."""
        for layer in range(first, len(self.blocks)):
            x = self.layer(layer, x)
        return x

    def apart(self, states: Tensor) -> float:
        """KL(dense || states), nats, summed over the tokens beyond the dense length."""
        full, total = self.net.config.layers, 0.0
        start = self.net.config.dense_length
        for at in range(start, len(self.ids), _HEADS_AT_ONCE):
            some = slice(at, at + _HEADS_AT_ONCE)
            theirs, ours = (self.net.head(x[0, some], full).float().log_softmax(-1) for x in (self.said, states))
            total += float((theirs.exp() * (theirs - ours)).sum())
        return total
