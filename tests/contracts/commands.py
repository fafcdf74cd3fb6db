"""The command line as its functions declare it, for tests to hold help, README and documentation against."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.models import OptionInfo

from shoal import cli


@dataclass(frozen=True)
class Option:
    """One option, or one argument (whose name has no dashes)."""

    names: tuple[str, ...]  # --no-NAME of a switch included
    help: str
    kind: type
    default: Any  # `inspect.Parameter.empty` when it must be given

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


def commands() -> dict[str, list[Option]]:
    """The words of each command -> its options."""
    return {words: list(_options(function)) for words, function in _functions(cli.app)}


def _functions(app: typer.Typer, words: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for command in app.registered_commands:
        assert command.callback is not None
        yield f"{words}{command.name or command.callback.__name__.lower().replace('_', '-')}", command.callback
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from _functions(group.typer_instance, f"{words}{group.name} ")


def _options(function: Callable[..., Any]) -> Iterator[Option]:
    hints = typing.get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints[name]
        assert get_origin(hint) is Annotated, f"{function.__name__} {name} has no help"
        kind, info = get_args(hint)[:2]
        kinds = [each for each in get_args(kind) or (kind,) if each is not type(None)]
        dashed = name.replace("_", "-")
        # beside Annotated, what is given to Option first is its name, though typer keeps it where a default would be
        given = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]
        names = tuple(name for switch in given for name in switch.split("/"))
        if isinstance(info, OptionInfo):
            names = names or ((f"--{dashed}", f"--no-{dashed}") if kinds == [bool] else (f"--{dashed}",))
        else:
            names = (dashed,)
        yield Option(names, info.help or "", kinds[0], parameter.default)
