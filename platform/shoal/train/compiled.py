"""Layers by torch.compile: all that is between products and attention in a few launches, in one graph a layer.

What cannot be compiled, or fails when it runs, ends nothing: the layer runs as it is, and so do all of the model from then on;
the log says so in a line. Each compiled layer has a graph of autograd of its own, whose gradients go on once all are there: one
that fails in backward is run again, forward and backward, and nothing of the first time is used. No other rank waits for it:
within a layer nothing is exchanged, and ranks that differ in this differ in rounding alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.autograd import Function

from shoal.errors import first_line

log = logging.getLogger(__name__)
Compile = Literal["auto", True, False]
Forward = Callable[..., Tensor]
T = TypeVar("T")

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

    def either(self, quick: Forward, plain: Forward, parameters: Callable[[], Iterable[Tensor]] = tuple) -> Forward:
        """`quick`, and `plain` where that fails, forward or backward, and from then on. Gradients are those of what they take
        first, and of the layer's `parameters`. What fails both ways is no fault of the compiler's, and is raised; so is a want
        of memory."""

        def layer(x: Tensor, *given: Any) -> Tensor:
            if self.failed:
                return plain(x, *given)
            trained = [each for each in parameters() if each.requires_grad] if torch.is_grad_enabled() else []
            inner = x.detach().requires_grad_(x.requires_grad and torch.is_grad_enabled())
            found = self.tried(lambda: quick(inner, *given))
            if isinstance(found, str):
                return self.given_up(lambda: plain(x, *given), found)
            if not found.requires_grad:
                return found
            read = [each for each in (inner, *trained) if each.requires_grad]
            cast = _autocast(x.device.type)

            def again() -> Tensor:
                with cast():
                    return plain(inner, *given)

            outside = [x, *trained] if x.requires_grad else trained
            joined: Tensor = _Joined.apply(Apart(self, found, read, again), *outside)  # type: ignore[no-untyped-call]
            return joined

        return layer

    def tried(self, run: Callable[[], T]) -> T | str:
        """What `run` gives, or why it failed. Raises for want of memory."""
        try:
            return run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # dynamo's, inductor's and Triton's have no class in common
            return _said(error)

    def given_up(self, run: Callable[[], T], said: str) -> T:
        """What `run` gives without a compiler, which is not used from then on, since it `said` so."""
        found = run()
        if not self.failed:
            self.failed = True
            log.warning("layers go on without torch.compile: %s", said)
        return found


@dataclass
class Apart:
    """A compiled layer's graph, which is apart from that around it: from what it `read` to what it `found`. Its gradients are
    asked for once."""

    compiler: Compiler
    found: Tensor | None
    read: Sequence[Tensor]
    again: Callable[[], Tensor] | None  # without a compiler

    def gradients(self, of: Tensor) -> Sequence[Tensor | None]:
        """Of what it read, for the gradient `of` what it found: all of them by the compiled code, or by `again`."""
        found, read, again = self.found, self.read, self.again
        assert found is not None and again is not None
        self.found, self.read, self.again = None, (), None  # what is around it goes on to the end
        made = self.compiler.tried(partial(torch.autograd.grad, found, read, of, allow_unused=True))
        if not isinstance(made, str):
            return made
        del found  # and with it what it holds

        def anew() -> Sequence[Tensor | None]:
            with torch.enable_grad():
                out = again()
            return torch.autograd.grad(out, read, of, allow_unused=True)

        return self.compiler.given_up(anew, made)


class _Joined(Function):
    """What a graph apart found, within the graph around it."""

    @staticmethod
    def forward(ctx: Any, apart: Apart, *read: Tensor) -> Tensor:
        ctx.apart = apart
        assert apart.found is not None
        return apart.found.detach()

    @staticmethod
    def backward(ctx: Any, of: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.apart.gradients(of)


def _autocast(device: str) -> Callable[[], Any]:
    """What makes it be again as it is now."""
    dtype, on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return lambda: torch.autocast(device, dtype=dtype, enabled=on)


def _said(error: BaseException) -> str:
    """Why, in a line; of what a backend raised, what that was."""
    inner: BaseException = getattr(error, "inner_exception", error)
    return f"{type(inner).__name__}: {first_line(inner)}"
