"""The stages that say what a model is worth, and whether it may take another's place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from shoal.errors import UsageError
from shoal.stages.stage import Json, ModelPlace, Stage, out, print_result, say


@dataclass(frozen=True, kw_only=True)
class Evaluate(Stage):
    """Quality, speed and size of one model or two, on what neither was trained on."""

    model: ModelPlace
    data: Annotated[
        str,
        typer.Option(
            help="Directory of shards with held-out rows, made by `shoal prepare`, or s3://BUCKET/PREFIX of one; or a .jsonl"
            " of texts and chats, as imported models read it."
        ),
    ]
    against: Annotated[str | None, typer.Option(help="A second model, shown beside the first.")] = None
    runs: Annotated[
        list[str] | None,
        typer.Option(
            "--run",
            help="Folder of a run that made the model, or its s3://BUCKET/PREFIX; repeat. Baselines are fitted to what these"
            " read. [all of DATA]",
        ),
    ] = None
    gpu: Annotated[
        bool | None, typer.Option("--gpu/--no-gpu", help="Measure on GPUs, a worker each [where the cluster has them].")
    ] = None
    report: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file, and a page beside it.")
    ] = None

    def run(self) -> None:
        from shoal.evaluate.evaluation import compare, leave_a_core
        from shoal.evaluate.report import write_report
        from shoal.evaluate.tables import print_tables
        from shoal.on_ray.measure import measuring, need_gpus
        from shoal.progress import progress

        need_gpus(self.gpu)
        leave_a_core()
        models = {Path(self.model).name: self.model}
        if self.against is not None:
            name = Path(self.against).name
            models[self.against if name in models else name] = self.against
        with measuring(*models.values(), gpus=self.gpu) as run, progress("evaluate") as tell:
            found = compare(models, self.data, runs=self.runs or (), on_progress=tell, run=run)
        print_tables(found, out)
        if self.report is not None:
            write_report(self.report, {"title": " and ".join(models), "corpus": {}, "stages": [], **found})
            out.print(f"report in {self.report} and {self.report.with_suffix('.html')}", highlight=False)


@dataclass(frozen=True, kw_only=True)
class Gate(Stage):
    """Whether a candidate may take the place of the stable version: asked the same, compared question by question. Exits with 1
    where it may not."""

    suites: Annotated[
        Path, typer.Option(help="Folder of frozen suites: *.jsonl of chats, safety-*.jsonl, recent-*.jsonl.")
    ]
    model: Annotated[
        str | None,
        typer.Option(help="Candidate's model directory, or s3://BUCKET/PREFIX of one. [required, but with --freeze]"),
    ] = None
    against: Annotated[
        str | None,
        typer.Option(help="Stable version's model directory, or s3://... of one. [required, but with --freeze]"),
    ] = None
    freeze: Annotated[bool, typer.Option("--freeze", help="Freeze the files in the folder as they are, and end.")] = (
        False
    )
    most_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="With --freeze: most tokens of an answer to them [64, or as tasks of `prepare` have]."
        ),
    ] = None
    cut: Annotated[
        Path | None, typer.Option(help="Cut of `shoal curate` whose held-out rows must be won. [recent-*.jsonl]")
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Corpus, or s3://... of one, whose held-out rows bits per byte are measured on. [not measured]"
        ),
    ] = None
    margin: Annotated[float, typer.Option(help="Share of right answers that each task may lose.")] = 0.03
    recent: Annotated[bool, typer.Option(help="Must it be better at a recent suite?")] = True
    out: Annotated[Path | None, typer.Option(help="File for the verdict as JSON. [none]")] = None
    as_json: Json = False

    def run(self) -> None:
        from shoal.loop import suites

        if self.most_tokens is not None and not self.freeze:
            raise UsageError("--most-tokens", do="give it with --freeze: what is frozen stays as it is")
        if self.freeze:
            made = suites.freeze(self.suites, self.most_tokens)
            told = {"suites": [{"name": suite.name, "kind": suite.kind, "sha256": suite.sha256} for suite in made]}
            names = ", ".join(f"{suite.name} ({suite.kind})" for suite in made)
            print_result(told, self.as_json, f"frozen in {self.suites}: {names}")
            return
        if self.model is None or self.against is None:
            raise UsageError("shoal gate", do="give --model and --against, or --freeze")
        if not 0 < self.margin < 1:
            raise UsageError("--margin", got=self.margin, allowed="above 0, below 1")
        self._judge(self.model, self.against)

    def _judge(self, model: str, against: str) -> None:
        import json

        from shoal.api.requests import guide_of
        from shoal.evaluate.evaluation import leave_a_core
        from shoal.loop.gate import gate, lines
        from shoal.machine import write_aside
        from shoal.progress import progress

        leave_a_core()
        with progress("gate") as tell:
            found = gate(
                model, against, self.suites,
                cut=self.cut, data=self.data, margin=self.margin, need_recent=self.recent, on_progress=tell,
                guides=guide_of,
            )  # fmt: skip
        told = found.told()
        if self.out is not None:
            write_aside(self.out, json.dumps(told, indent=1, allow_nan=False) + "\n")
        print_result(told, self.as_json, found.sentence)
        for line in () if self.as_json else lines(told):
            say(line)
        if not found.passed:
            raise typer.Exit(1)
