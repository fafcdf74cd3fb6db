"""What the command and all of its groups have in common: a number that is given is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand
from typer.models import CommandFunctionType

from shoal.errors import UsageError


class Command(TyperCommand):  # contexts and parameters are of the click that this typer brings, or of click itself
    """Refuses nan and inf, which Python reads as numbers: as a time or a share each compares with nothing, or is never over."""

    def invoke(self, ctx: Any) -> Any:
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')}", got=str(value), allowed="a finite number")
        return super().invoke(ctx)


class Commands(typer.Typer):
    """A group whose commands are `Command`s."""

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **how: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        return super().command(name, cls=cls or Command, **how)
