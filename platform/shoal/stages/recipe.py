"""The stage that makes and measures an application: a recipe, by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shoal.stages.stage import Stage, out, print_result, say


@dataclass(frozen=True, kw_only=True)
class Recipe(Stage):
    """An application whole: made-up data, a model that learns it, INT8, and what both are worth beside simple rules. The same
    command goes on where an interrupted one stopped."""

    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Which recipe, by its name: customer-service, medicine, law.")
    ]
    out: Annotated[Path, typer.Option(help="Folder to write; empty, or of the same recipe.")]
    minutes: Annotated[float, typer.Option(help="Minutes of learning in all.")] = 9.0
    seed: Annotated[int, typer.Option(help="Seed of the data and of fresh weights.")] = 0
    workers: Annotated[int, typer.Option(help="Training workers, one process each.")] = 2
    model: Annotated[
        Path | None, typer.Option(help="Imported model directory to tune by thin matrices. [fresh weights]")
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, for programs.")] = False

    def run(self) -> None:
        from shoal.progress import progress
        from shoal.recipes import report
        from shoal.recipes.named import named
        from shoal.recipes.run import Asked, run

        recipe = named(self.name)
        asked = Asked(self.minutes, self.seed, self.workers, str(self.model) if self.model else "")
        with progress(self.name) as tell:
            found = run(recipe, self.out, asked, tell, say)
        if not self.as_json:
            report.show(recipe, found, out)
        print_result(
            found,
            self.as_json,
            f"report in {self.out / 'report.md'}; serve it: "
            f"shoal serve --model {self.out / 'int8'} --policy {self.out / 'policy.yaml'}",
        )
