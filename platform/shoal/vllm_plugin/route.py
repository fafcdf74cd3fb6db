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

from shoal.engine.events import Request
from shoal.inputs import media
from shoal.inputs.chat import Encoded
from shoal.model.model import Model
from shoal.model.net import Net
from shoal.model.router import Router, features, page_sums


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
