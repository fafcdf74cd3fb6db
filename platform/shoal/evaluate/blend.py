"""Between a model and what was fine-tuned from it: a mean of their weights, as near to the tuned one as what was known stays.

On the way from one to the other what was known is lost slowly at first, and what is new comes soon (WiSE-FT, arXiv
2109.01903). It costs no training, and how far to go is chosen on rows that nobody is judged by.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

from shoal.data.shards import open_index, token_bytes
from shoal.errors import DataError
from shoal.evaluate import measures
from shoal.evaluate.measures import HeldoutRows
from shoal.model.model import Model

WAYS = (1.0, 0.8, 0.6, 0.4)  # shares of the way from the parent
MOST_RISE = 0.005  # of bits per byte of each modality: half of what the gate lets pass
ROWS = 64  # packed rows of a modality


@dataclass(frozen=True)
class Blend:
    """The model, the share of the way that it went, and the rise of bits per byte, as a share, at each that was tried."""

    model: Model
    way: float
    rises: dict[float, dict[str, float]] = field(default_factory=dict)


def blended(parent: Model, tuned: Model, data: str | Path) -> Blend:
    """As near to `tuned` as bits per byte of text and code in the corpus `data` rise by at most `MOST_RISE`; the nearest to
    `parent` of `WAYS` where they always rise by more. Raises DataError for a corpus of another tokenizer."""
    index = open_index(data)
    if index.tokenizer_sha256 != parent.tokenizer.sha256:
        raise DataError(f"{data} was made with another tokenizer", do="give the corpus of the stable version")
    # of the rows to train on: those held out are the gate's
    rows = {
        name: HeldoutRows(Path(data), name, ROWS, split="train")
        for name in ("text", "code")
        if index.total("rows", "train", name)
    }
    found, lengths = Blend(tuned, 1.0), token_bytes(parent.tokenizer)
    for way in WAYS:
        model = between(parent, tuned, way)
        rises = {
            name: measures.beside([parent.net, model.net], some, lengths)[1].rise.value for name, some in rows.items()
        }
        found = Blend(model, way, {**found.rises, way: rises})
        if all(math.isfinite(rise) and rise <= MOST_RISE for rise in rises.values()):
            break
    return found


def between(parent: Model, tuned: Model, way: float) -> Model:
    """`tuned` with weights at the share `way` of the way to it from `parent`, and without a router."""
    ours, theirs = parent.net.state_dict(), tuned.net.state_dict()
    net = copy.deepcopy(tuned.net)
    net.load_state_dict({
        name: ours[name].lerp(tensor, way) if tensor.is_floating_point() else tensor for name, tensor in theirs.items()
    })  # fmt: skip
    named = {"name": tuned.name, "chat_template": tuned.chat_template, "source": tuned.source}
    return Model(tuned.config, net, tuned.tokenizer, **named)  # type: ignore[arg-type]
