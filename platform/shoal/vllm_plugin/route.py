"""Depth "auto" before vLLM sees the request: the router's own features, from the first group run over the prompt.

vLLM allocates memory before any layer runs, so the decision cannot wait for its group 1. This runs that group once more, for
the prompt alone, which costs a quarter of a full prefill; a request that says its depth costs nothing. It runs on a GPU where
the replica has one, in bf16 as vLLM does, whose memory for keys and values must then leave room for a quarter of the weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shoal.config import Exits
from shoal.engine.events import Request
from shoal.errors import RequestError
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.model.router import Router, features, page_sums


def asked(shape: Exits, request: Request, fixed: int | None) -> int | None:
    """Layers for `request` by what it says itself; None where the router is to decide. `fixed`: layers that a deployment runs
    for all [each request says its own]. Raises RequestError for another depth than that, and for depth "auto" with a tolerance
    where that is an early exit: nobody knows what it loses, and nothing looks."""
    layers = shape.asked(request.depth)
    if fixed is None or layers == fixed:
        return layers
    if layers is not None:
        allowed = "the depth that this deployment fixes"
        raise RequestError("depth", param="depth", got=request.depth, allowed=allowed)
    if request.quality_tolerance is not None and fixed < shape.exits[-1]:
        do = f"leave it out: this deployment runs {fixed} of {shape.exits[-1]} layers for every request"
        raise RequestError("quality_tolerance", param="quality_tolerance", got=request.quality_tolerance, do=do)
    return fixed


class Forerunner:
    """The first group and the router of a model directory that has one."""

    def __init__(self, net: Net, router: Router) -> None:
        self.net, self.router = net, router

    @classmethod
    def load(cls, directory: str | Path) -> Forerunner | None:
        """Where torch sees a GPU, on it. None for a model without a router."""
        model = Model.load(directory)
        if model.router is None:
            return None
        del model.net.groups[1:]
        if torch.cuda.is_available():
            model.on_gpu()
        return cls(model.net, model.router)

    @torch.inference_mode()
    def __call__(self, prompt: Encoded, request: Request) -> int:
        """Layers for `prompt`, by the request's tolerance or the router's own."""
        first = self.net.config.exits[0]
        device = self.net.device
        tokens = torch.tensor(prompt.ids, device=device)
        patches, grid = (None if part is None else part.to(device) for part in _patches(prompt))
        hidden = self.net(tokens[None], patches, grid, exits=(first,))[first][0]
        seen = features(page_sums(self.net, hidden, tokens, self.router.reads_nll), hidden[-1], len(tokens))
        return self.router.choose(seen, request.quality_tolerance)


def _patches(prompt: Encoded) -> tuple[Tensor | None, Tensor | None]:
    values = prompt.patches
    return (
        (None, None)
        if values is None
        else (torch.from_numpy(values), torch.from_numpy(media.grid(np.array(prompt.ids))))
    )
