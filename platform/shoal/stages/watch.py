"""The stage that notices when requests to a served model are no longer what they were."""

from __future__ import annotations

import dataclasses
import getpass
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shoal.errors import UsageError
from shoal.stages.stage import Json, Stage, print_result, say

if TYPE_CHECKING:
    from shoal.loop.tell import Report

CaptureDir = Annotated[str, typer.Option(help="Folder of `shoal serve --capture`, or its s3://BUCKET/PREFIX.")]


@dataclass(frozen=True, kw_only=True)
class Watch(Stage):
    """Say when the requests to a served model are no longer what they were: which numbers moved, since when, how far."""

    action: Annotated[
        str, typer.Argument(help="An action: accept takes the requests since the drift began as the reference.")
    ] = "look"
    capture: CaptureDir
    once: Annotated[bool, typer.Option("--once", help="Look once and end.")] = False
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 30.0
    learn: Annotated[int, typer.Option(help="Sessions of the reference, the first of a version.")] = 2_000
    hours: Annotated[
        float, typer.Option(help="Hours that the reference spans at least; 0 where days and weeks have no rhythm.")
    ] = 336.0
    false_alarm_days: Annotated[
        float,
        typer.Option(help="Days to a false alarm, in the mean, over all signals; 1,200: 5 % have one in 60 days."),
    ] = 1_200.0
    why: Annotated[str, typer.Option(help="With accept: the reason, which is kept. [none]")] = ""
    metrics: Annotated[
        Path | None, typer.Option(help="File for Prometheus (node_exporter's textfile collector), NAME.prom. [none]")
    ] = None
    as_json: Json = False

    def run(self) -> None:
        from shoal.loop import tell, watch

        self._check(watch.LEAST_LEARNED)
        watcher = watch.Watch(self.capture, learn=self.learn, hours=self.hours, days=self.false_alarm_days)
        said = ""
        while True:
            report = watcher.accept(self.why, who=getpass.getuser()) if self.action == "accept" else watcher.look()
            if self.metrics is not None:
                tell.write_metrics(report, self.metrics)
            if self.once or self.action == "accept" or report.sentence != said:
                self._print(report)
            said = report.sentence
            if self.once or self.action == "accept":
                return
            time.sleep(self.every)

    def _check(self, least: int) -> None:
        if self.action not in ("look", "accept"):
            raise UsageError("shoal watch", got=self.action, allowed="accept, or nothing")
        if self.action == "accept" and not self.why.strip():
            raise UsageError("shoal watch accept", do="say --why")
        if self.every <= 0 or self.hours < 0:
            raise UsageError(
                "--every and --hours", got=f"{self.every:g} and {self.hours:g}", allowed="above 0, and 0 or more"
            )
        if self.learn < least:
            raise UsageError("--learn", got=self.learn, allowed=f"{least} or more sessions")
        if not 1 <= self.false_alarm_days < math.inf:
            raise UsageError("--false-alarm-days", got=self.false_alarm_days, allowed="1 or more")

    def _print(self, report: Report) -> None:
        print_result(dataclasses.asdict(report), self.as_json, report.sentence)
        for line in () if self.as_json else report.lines:
            say(line)
