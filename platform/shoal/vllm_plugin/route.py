"""Depth "auto" before vLLM sees the request: the router's own features, from the first group run over the prompt.

vLLM allocates memory before any layer runs, so the decision cannot wait for its group 1. This runs that group once more, for
the prompt alone, which costs a quarter of a full prefill; a request that says its depth costs nothing.
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
        del net.groups[1:]

    @classmethod
    def load(cls, directory: str | Path) -> Forerunner | None:
        """None for a model without a router."""
        model = Model.load(directory)
        return None if model.router is None else cls(model.net, model.router)

    @torch.inference_mode()
    def __call__(self, prompt: Encoded, request: Request) -> int:
        """Layers for `prompt`, by the request's tolerance or the router's own."""
        first = self.net.config.exits[0]
        tokens = torch.tensor(prompt.ids)
        hidden = self.net(tokens[None], *_patches(prompt), exits=(first,))[first][0]
        seen = features(page_sums(self.net, hidden, tokens), hidden[-1], len(tokens))
        return self.router.choose(seen, request.quality_tolerance)


def _patches(prompt: Encoded) -> tuple[Tensor | None, Tensor | None]:
    values = prompt.patches
    return (
        (None, None)
        if values is None
        else (torch.from_numpy(values), torch.from_numpy(media.grid(np.array(prompt.ids))))
    )
