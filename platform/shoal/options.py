"""What the command and all of its groups have in common: a number that is given is one, and a folder is on a disk."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand
from typer.models import CommandFunctionType

from shoal.errors import UsageError


class Command(TyperCommand):  # contexts and parameters are of the click that this typer brings, or of click itself
    """Refuses nan and inf, which Python reads as numbers: as a time or a share each compares with nothing, or never ends. And
    addresses in S3 where a path is meant: each would be a folder called ``s3:`` below the present one."""

    def invoke(self, ctx: Any) -> Any:
        options = {each.name: each.opts[0] for each in self.params}
        for name, value in ctx.params.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')}", got=str(value), allowed="a finite number")
            for each in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(each, Path) and str(each).startswith("s3:/"):
                    do = "give a path that all machines see: this is not kept in S3"
                    raise UsageError(options.get(name, name), got=str(each), allowed="a path", do=do)
        return super().invoke(ctx)


class Commands(typer.Typer):
    """A group whose commands are `Command`s."""

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **how: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        return super().command(name, cls=cls or Command, **how)
