"""The depth of each request, where a deployment serves all of them (``{"depth": "per-request"}``).

A request says it in its sampling parameters, ``extra_args={"depth": "middle"}`` (``"vllm_xargs"`` over HTTP); without, it runs
to full depth. vLLM tells a logits processor of every change to its batch before the step runs, which is how the network
knows who stands in which row. A request's rows leave the step at its exit: deeper layers compute the others' alone.

vLLM's prefix cache knows tokens and not depths, and a shallow request leaves no keys in deeper layers: each depth needs a
``cache_salt`` of its own, or no prefix cache (`settings.check`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from shoal.config import FULL, ModelConfig
from shoal.errors import ConfigError
from shoal.model.cache import PagedStep

NAME = f"{__name__}:Depths"


class Depths(LogitsProcessor):  # type: ignore[misc]
    """Remembers the layers of the request in each row of vLLM's batch; changes no logit."""

    shape: ClassVar[ModelConfig | None] = None  # of the model that this process serves
    rows: ClassVar[dict[int, int]] = {}

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        Depths.shape = vllm_config.model_config.hf_config.shape
        Depths.rows = {}

    @classmethod
    def validate_params(cls, params: SamplingParams) -> None:
        """Raises ValueError, which vLLM answers with 400, for a depth that is no exit."""
        try:
            cls._layers(params)
        except ConfigError as error:
            raise ValueError(error.message) from error

    @classmethod
    def _layers(cls, params: SamplingParams) -> int:
        depth = (params.extra_args or {}).get("depth", FULL)
        return 0 if cls.shape is None else cls.shape.depth(depth)

    def is_argmax_invariant(self) -> bool:
        return True

    def apply(self, logits: Tensor) -> Tensor:
        return logits

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        if batch_update is None:
            return
        rows = Depths.rows
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, *_ in batch_update.added:
            rows[row] = self._layers(params)
        for a, b, how in batch_update.moved:
            here, there = rows.pop(a, None), rows.pop(b, None)
            for row, layers in ((b, here), (a, there if how == MoveDirectionality.SWAP else None)):
                if layers is not None:
                    rows[row] = layers


def narrowed(step: PagedStep, stay: Sequence[int]) -> tuple[PagedStep, Tensor]:
    """`step` with the requests `stay` alone, and their rows in it."""
    at = [row for r in stay for row in range(step.starts[r], step.starts[r + 1])]
    starts = [0]
    for r in stay:
        starts.append(starts[-1] + step.starts[r + 1] - step.starts[r])
    rows = torch.tensor(at, device=step.positions.device)
    requests = torch.tensor(list(stay), device=rows.device)
    tables = step.tables[requests].contiguous()
    return PagedStep(step.positions[rows], step.slots[rows], tables, starts, step.page, step.block), rows


def of_step(requests: int, default: int) -> list[int]:
    """Layers of each of a step's requests, in order; `default` for one that nobody told of (vLLM's own trial runs)."""
    return [Depths.rows.get(row, default) for row in range(requests)]
