"""The stage that says what a model is worth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shoal.stages.stage import ModelDir, Stage, out


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Quality, speed and size of one model or two, on what neither was trained on."""

    model: ModelDir
    data: Annotated[Path, typer.Option(help="Directory of shards with held-out rows, made by `shoal prepare`.")]
    against: Annotated[Path | None, typer.Option(help="A second model directory, shown beside the first.")] = None
    runs: Annotated[
        list[Path] | None,
        typer.Option(
            "--run",
            help="Folder of a run that made the model; repeat. Baselines are fitted to what these read. [all of DATA]",
        ),
    ] = None
    report: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file, and a page beside it.")
    ] = None

    def run(self) -> None:
        from shoal.evaluate.evaluation import compare, leave_a_core
        from shoal.evaluate.report import write_report
        from shoal.evaluate.tables import print_tables
        from shoal.progress import progress

        leave_a_core()
        models = {self.model.name: self.model}
        if self.against is not None:
            same = self.against.name == self.model.name
            models[str(self.against) if same else self.against.name] = self.against
        with progress("evaluate") as tell:
            found = compare(models, self.data, runs=self.runs or (), on_progress=tell)
        print_tables(found, out)
        if self.report is not None:
            write_report(self.report, {"title": " and ".join(models), "corpus": {}, "stages": [], **found})
            out.print(f"report in {self.report} and {self.report.with_suffix('.html')}", highlight=False)
