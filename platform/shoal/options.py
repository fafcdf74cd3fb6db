"""What the command and all of its groups have in common: a number that is given is one, and a folder is on a disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand
from typer.main import get_command_name
from typer.models import CommandFunctionType, CommandInfo

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

    def only(self, words: Sequence[str]) -> Commands:
        """The group with the command alone that `words` call, or whole where they call none: to build all fifty of ours takes
        an eighth of a second, whichever is called."""
        name = words[0] if words else ""
        commands = [each for each in self.registered_commands if _name(each) == name]
        groups = [copy(each) for each in self.registered_groups if each.name == name]
        if not commands and not groups:
            return self
        for group in groups:
            if isinstance(group.typer_instance, Commands):
                group.typer_instance = group.typer_instance.only(words[1:])
        one = copy(self)
        one.registered_commands, one.registered_groups = commands, groups
        return one


def _name(command: CommandInfo) -> str:
    """As typer has it."""
    return command.name or get_command_name(command.callback.__name__ if command.callback else "")
