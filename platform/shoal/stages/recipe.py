"""The stage that makes and measures an application: a recipe, by name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from shoal import repository
from shoal.errors import UsageError
from shoal.stages.stage import Stage, out, print_result, say

NEW = "new"  # what stands in place of a name to begin one of a user's own data


@dataclass(frozen=True, kw_only=True)
class Recipe(Stage):
    """An application whole: made-up data, a model that learns it, INT8, and what both are worth beside simple rules. The same
    command goes on where an interrupted one stopped."""

    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Which recipe, by its name: customer-service, code, medicine, law; a folder of new; or new.",
        ),
    ]
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="With NAME new: a .jsonl of chats, or a folder of .txt and .md. [none is begun]"),
    ] = None
    out: Annotated[Path, typer.Option(help="Folder to write; empty, or of the same recipe.")]
    minutes: Annotated[float, typer.Option(help="Minutes of learning in all.")] = 8.0
    seed: Annotated[int, typer.Option(help="Seed of the data and of fresh weights.")] = 0
    workers: Annotated[int, typer.Option(help="Training workers, one process each.")] = 2
    model: Annotated[
        Path | None, typer.Option(help="Imported model directory to tune by thin matrices. [fresh weights]")
    ] = None
    beside: Annotated[
        Path | None,
        typer.Option(
            help="With --model: folder of a run from fresh weights, reported beside it on the same rows. [none]"
        ),
    ] = None
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON, for programs.")] = False

    def run(self) -> None:
        from shoal.progress import progress

        if (self.name == NEW) != (self.from_ is not None):
            raise UsageError(
                "--from", do=f"give it with {NEW}, and only there: shoal recipe {NEW} --from FILE --out DIR"
            )
        repository.need("recipes")
        if self.from_ is not None:
            self._begin(self.from_)
            return
        from recipes import report
        from recipes.named import named
        from recipes.run import Asked, run

        recipe = named(self.name)
        model, beside = (str(given) if given else "" for given in (self.model, self.beside))
        asked = Asked(self.minutes, self.seed, self.workers, model, beside)
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

    def _begin(self, source: Path) -> None:
        from recipes.own import begun

        of_runs = [each for each in fields(self) if each.name in ("minutes", "seed", "workers", "model", "beside")]
        if given := [f"--{each.name}" for each in of_runs if getattr(self, each.name) != each.default]:
            raise UsageError(", ".join(given), do=f"give it to the run: shoal recipe {self.out} --out {self.out}-run")
        found = begun(source, self.out)
        said = ", ".join(f"{count} {name}" for name, count in found.items() if name != "left_out")
        for reason, count in found["left_out"].items():
            say(f"left out: {count}, {reason}")
        print_result(found, self.as_json, f"rows: {said}; run it: shoal recipe {self.out} --out {self.out}-run")
