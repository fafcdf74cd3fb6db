"""Layers by torch.compile: all that is between products and attention in a few launches, in one graph a layer.

What cannot be compiled ends nothing: the layer runs as it is, and so do all of the model from then on; the log says so in a
line. Backward is compiled with forward. So a failure is met where the layer can be run again, and where no other rank waits:
within a layer nothing is exchanged, and ranks that differ in this differ in rounding alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from shoal.errors import first_line

log = logging.getLogger(__name__)
Compile = Literal["auto", True, False]
Forward = Callable[..., Tensor]

# graphs of a layer's code, beyond which it is not compiled any more: nine for rows of many lengths (of one, of any, and of
# those that a window or all chosen blocks hold), for each kind of attention, with gradients and without, rounded or not.
# Torch's own limit is 8
MOST_GRAPHS = 128


def compiles(how: Compile, device: torch.device) -> bool:
    """Are layers compiled where `how` is asked for on `device`? By themselves on a GPU alone: on a CPU that takes a minute and
    gains nothing."""
    return device.type == "cuda" if how == "auto" else how


class Compiler:
    """torch.compile for the layers of a run, until it fails."""

    def __init__(self) -> None:
        self.failed = False

    def graph(self, forward: Forward) -> Forward:
        """`forward` of a layer, compiled at its first call; raises what then goes wrong."""
        from torch._dynamo import config as dynamo  # a second to import, for those who compile alone
        from torch._functorch import config as functorch

        quick = torch.compile(forward, fullgraph=True)

        def compiled(*given: Any) -> Tensor:
            with dynamo.patch(recompile_limit=MOST_GRAPHS), functorch.patch(force_non_lazy_backward_lowering=True):
                return quick(*given)

        return compiled

    def either(self, quick: Forward, plain: Forward) -> Forward:
        """`quick`, and `plain` where that fails and from then on. What fails both ways is no fault of the compiler's, and is
        raised; so is a want of memory."""

        def layer(*given: Any) -> Tensor:
            if self.failed:
                return plain(*given)
            try:
                return quick(*given)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # dynamo's, inductor's and Triton's have no class in common
                said = _said(error)
            found = plain(*given)  # outside of the handler, which holds all that the failed call held
            self.failed = True
            log.warning("layers go on without torch.compile: %s", said)
            return found

        return layer


def _said(error: BaseException) -> str:
    """Why, in a line; of what a backend raised, what that was."""
    inner: BaseException = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {first_line(inner)}"
