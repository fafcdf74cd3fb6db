"""What all stages have in common: how a dataclass becomes a command, options that several take, how a result is printed.

Notable: typer reads the options off the dataclass itself, inherited fields included, so options that stages share are a base
class. Heavy imports wait in `run`: `shoal --help` is quick.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from shoal.options import Command
from shoal.progress import results

out = results()

ModelDir = Annotated[Path, typer.Option("--model", help="Model directory.")]
ModelOut = Annotated[
    str, typer.Option("--out", help="Directory to write, or s3://BUCKET/PREFIX; there when it is complete.")
]
ModelPlace = Annotated[str, typer.Option("--model", help="Model directory, or s3://BUCKET/PREFIX of one.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")]


@dataclass(frozen=True, kw_only=True)
class Stage(ABC):
    """A stage as it was asked for. The docstring of a subclass is what `shoal NAME --help` says of it."""

    @abstractmethod
    def run(self) -> None:
        """Do the work and print what came of it. Raises a ShoalError, before work begins where it can be known then."""


def command_of(stage: type[Stage]) -> type[TyperCommand]:
    """The class of the command that typer makes of `stage`: it runs what it has made of the options, and its help shows those
    that are `stage`'s own before those that it shares with others."""
    shared = {field.name for base in stage.__bases__ for field in dataclasses.fields(base)} | {"help"}

    class OfStage(Command):
        def get_params(self, ctx: Any) -> list[Any]:
            return sorted(super().get_params(ctx), key=lambda option: option.name in shared)

        def invoke(self, ctx: Any) -> None:
            super().invoke(ctx).run()

    return OfStage


def print_result(result: Any, as_json: bool, line: str) -> None:
    """`result` as JSON for programs, or `line` for people."""
    if as_json:
        print(json.dumps(result, default=str))
    else:
        out.print(line, highlight=False)


def say(line: str) -> None:
    """A line for people, beside the result."""
    print(line, file=sys.stderr, flush=True)
