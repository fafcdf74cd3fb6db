"""The stages between a raw corpus and a service, each a dataclass: its fields are the options of `shoal NAME` and of
``jobs/NAME.py``, and its `run` does the work.

A stage that stands in `STAGES` is a command; a test asks for its script under ``jobs/``, which hands its arguments to the
command.
"""

from __future__ import annotations

from shoal.stages.corpus import Augment, Curate, Prepare, Teach
from shoal.stages.evaluate import Evaluate, Gate
from shoal.stages.recipe import Recipe
from shoal.stages.retrain import Retrain
from shoal.stages.serve import Serve
from shoal.stages.stage import Stage
from shoal.stages.training import Adapt, Finetune, Pretrain, Quantize
from shoal.stages.watch import Watch

STAGES: tuple[type[Stage], ...] = (
    Prepare,
    Augment,
    Teach,
    Pretrain,
    Finetune,
    Adapt,
    Quantize,
    Evaluate,
    Serve,
    Watch,
    Gate,
    Curate,
    Retrain,
    Recipe,
)
