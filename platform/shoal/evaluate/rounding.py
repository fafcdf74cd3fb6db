"""INT8 by rounding alone, as well as it can be done without training."""

from __future__ import annotations

from shoal.data.models import written
from shoal.engine.engine import Engine
from shoal.engine.events import Request, Sampling
from shoal.evaluate.pieces import Models
from shoal.model import checkpoint
from shoal.model.model import Model

ROWS, LENGTH = 8, 256  # of what a model says itself: twice as much moved nothing


def rounded(model: Model) -> Model:
    """The INT8 twin of an fp32 `model`. One that was imported has not learned to live with the rounding: it is smoothed first
    (`model.smooth`), by what it says itself, since the data that it was trained on is not here."""
    return model.quantized(said(model) if model.source is not None else ())


def round_to(models: Models, out: str, place: str) -> None:
    """Write the INT8 twin, by rounding alone, of the fp32 model at `place` as the model at `out`. Raises CheckpointError where
    something else is there."""
    with written(out) as folder:
        checkpoint.require_replaceable(folder)
        rounded(models.read(place)).save(folder)


def said(model: Model, rows: int = ROWS, length: int = LENGTH) -> list[list[int]]:
    """Ids of `rows` texts that `model` makes up, the same ones each time."""
    start = model.tokenizer.prompt("") or model.tokenizer.prompt("\n")
    most = min(length, model.config.context) - len(start)
    requests = [Request(start, Sampling(max_tokens=most, seed=seed, ignore_eos=True)) for seed in range(rows)]
    return [start + answer.tokens for answer in Engine(model).generate(requests)]
