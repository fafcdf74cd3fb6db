"""The stage that makes a candidate for a release: its router alone, or a fine-tuning of its fp32 parent, on a cut."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from shoal.errors import DataError, ResourceError, UsageError
from shoal.stages.stage import Stage, print_result, say
from shoal.stages.training import Finetune, Quantize, Replay

if TYPE_CHECKING:
    from shoal.loop.release import Release
    from shoal.loop.versions import Version

KINDS = ("auto", "router", "finetune")
LORA_BYTES, LORA_RANK = 120_000_000, 8  # from fp32 weights of this size on thin matrices are trained, of this rank
# against forgetting: half of the rate of a first fine-tuning, and of the tokens of an update ...
RATE, ROWS = 7e-4, 8  # rows of the training length
NEW_SHARE = 0.25  # ... of what chats are read, by characters, is new ...
REPLAY_EVERY = 3  # ... and of so many updates the last reads packed rows of the old corpus
MIX = "mix.jsonl"  # of its work: what it reads of chats
ROUNDING = 1 / 3  # of --minutes, at most, for what is rounded again: 100 updates take as long as the machine makes them


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """What stops a job ends this block as Ctrl-C does, where nothing in it knows better."""

    def end(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stops(kind: str) -> list[Callable[[], None]]:
    """What is called where a training is asked to stop: it has three seconds then, and uses them."""
    if kind == "router":
        return []
    from shoal.on_ray.train import STOPS

    return STOPS


@dataclass(frozen=True, kw_only=True)
class Retrain(Stage):
    """A candidate for a release, of its stable version and a cut of new rows: the router alone where only that lags, else
    a fine-tuning of the fp32 parent, rounded again. The same command goes on where an interrupted one stopped."""

    release: Annotated[Path, typer.Option(help="Folder of the release.")]
    cut: Annotated[Path, typer.Option(help="What to learn from: a folder of `shoal curate`.")]
    kind: Annotated[str, typer.Option(help="auto, router or finetune.")] = "auto"
    minutes: Annotated[
        float, typer.Option(help="Minutes of the fine-tuning; learning to be rounded takes a third more, at most.")
    ] = 3.0
    budget: Annotated[float, typer.Option(help="Most minutes of all retrainings in 24 hours.")] = 60.0
    cooldown: Annotated[float, typer.Option(help="Least minutes between two candidates.")] = 360.0
    replay: Replay = None
    workers: Annotated[str, typer.Option(help="Training workers, one process each.")] = "1"
    suites: Annotated[
        Path | None,
        typer.Option(help="Frozen suites, by which the gate judges it beside the stable version. [not judged]"),
    ] = None
    data: Annotated[
        str | None,
        typer.Option(
            help="Corpus, or s3://... of one, on whose held-out rows the gate measures bits per byte. [not measured]"
        ),
    ] = None
    why: Annotated[str, typer.Option(help="The reason, for the audit log.")] = "retrained"
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, for programs.")] = False

    def run(self) -> None:
        from shoal.data.alone import alone
        from shoal.loop.learned import LOCK
        from shoal.loop.release import Release

        if self.kind not in KINDS:
            raise UsageError("--kind", got=self.kind, allowed=KINDS)
        for name in ("minutes", "budget", "cooldown"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name}", got=getattr(self, name), allowed="a number of minutes, 0 or more")
        Release(self.release).state()  # else a folder is made that is none
        do = "wait for it: two at once would answer the same question twice"
        with alone(self.release / LOCK, ResourceError(f"another retraining of {self.release} runs", do=do)):
            self._make()

    def _make(self) -> None:
        from shoal.evaluate.evaluation import leave_a_core
        from shoal.loop import retrainings, suites
        from shoal.loop.learned import WORK
        from shoal.loop.release import Release
        from shoal.loop.versions import cut_lineage

        leave_a_core()  # the service that this is for may run beside
        release = Release(self.release)
        stable = release.stable()
        told = cut_lineage(self.cut)
        if self.suites is not None:
            suites.read(self.suites)  # what cannot judge is said before it is trained
        lost = release.left()  # of one that was killed at its end, which this command makes again
        spent = self._need_room([each for each in release.versions() if each.directory not in lost])
        kind = self._chosen()
        self._need_unknown(release)
        if kind == "finetune":
            self._need_new()
        if gone := retrainings.tidy(self.release / WORK, stable.number):
            say(f"{self.release / WORK}: {gone} removed, with which nobody goes on")
        with _ended_by_sigterm(), retrainings.one(self.release, self.minutes, _stops(kind)) as ended:
            made, minutes = self._made(release, stable, told, kind, ended)
        result: dict[str, Any] = {"version": made.number, "label": made.label, "kind": kind, "minutes": minutes}
        result |= {"passed": made.passed, "removed": gone, "left_out": made.lineage.get("left_out", 0)}
        next_ = "it was not judged: give --suites" if made.verdict is None else made.verdict["sentence"]
        left = f"{minutes:.1f} min of it, {max(0.0, self.budget - spent - minutes):.0f} left today"
        print_result(result, self.as_json, f"version {made.label} is the candidate ({kind}, {left}); {next_}")

    def _made(
        self,
        release: Release,
        stable: Version,
        told: dict[str, Any],
        kind: str,
        ended: Callable[[bool | None], None],
    ) -> tuple[Version, float]:
        """The candidate, and the minutes that it took. `ended` is called with the gate's word once it is one."""
        from shoal.loop import retrainings
        from shoal.loop.learned import WORK
        from shoal.loop.versions import cut_lineage

        began, left_out = time.monotonic(), 0
        work = self.release / WORK / f"{told['cut']['sha256'][:12]}-{kind}-{stable.number}"
        if kind == "router":
            model, fp32 = self._router(stable.served, work), stable.parent if stable.parent != stable.served else None
        else:
            from shoal.on_ray.resources import local_ray

            left_out = self._mix(release, work)
            with local_ray():  # one for both trainings: each start costs twenty seconds of a busy machine
                model, fp32 = self._finetune(stable.parent, stable.served, work)
        minutes = (time.monotonic() - began) / 60
        lineage = {**told, "kind": kind, "minutes": round(minutes, 2), "parent": stable.number, "workers": self.workers}
        lineage["left_out"] = left_out
        verdict = self._judged(model, stable.served)
        if cut_lineage(self.cut)["cut"]["sha256"] != told["cut"]["sha256"]:
            retrainings.remove(work)
            what = f"{self.cut}: somebody was forgotten while it was learned from"
            raise DataError(what, do="give the same command again: no version was made")
        made = release.add(model, fp32=fp32, lineage=lineage, verdict=verdict, why=self.why)
        ended(made.passed)
        try:
            retrainings.remove(work)
        except ResourceError as error:  # the version is made; the next retraining removes it
            say(str(error))
        return made, minutes

    def _need_room(self, versions: list[Any]) -> float:
        """Minutes that the retrainings of the last day took, of those too that made no version. Raises UsageError for one too
        soon, or too much."""
        from shoal.loop import retrainings

        now, trained = datetime.now(UTC), [each for each in versions if "kind" in each.lineage]
        retrainings.settled(self.release, {each.made: each.passed for each in trained})
        known = retrainings.seen(self.release, [each.made for each in trained], now)
        made = [(known.age(each.made, now), each.lineage) for each in trained]
        since = min((age for age, _ in made), default=timedelta.max)
        if since < timedelta(minutes=self.cooldown):
            got = f"one {since.total_seconds() / 60:.0f} minutes ago"
            raise UsageError(
                "the cooldown of retraining", got=got, allowed=f"after {self.cooldown:g}", do="wait, or set --cooldown"
            )
        spent = sum(float(lineage["minutes"]) for age, lineage in made if age < timedelta(days=1))
        spent += known.spent(now)
        if spent + self.minutes > self.budget:
            got = f"{spent:.0f} spent, {self.minutes:g} asked for"
            raise UsageError(
                "the budget of retraining",
                got=got,
                allowed=f"{self.budget:g} minutes a day",
                do="wait, or set --budget",
            )
        return spent

    def _judged(self, model: Path, stable: Path) -> dict[str, Any] | None:
        """The gate's verdict on `model`; None where there are no suites to ask."""
        if self.suites is None:
            return None
        from shoal.api.requests import guide_of
        from shoal.loop.gate import gate
        from shoal.progress import progress

        with progress("gate") as tell:
            return gate(
                model, stable, self.suites, cut=self.cut, data=self.data, on_progress=tell, guides=guide_of
            ).told()

    def _chosen(self) -> str:
        """The kind that is asked for; of "auto" by which signals the cut says to have moved. Raises DataError for a cut without
        rows to learn from."""
        from shoal.loop import cut
        from shoal.loop.watched import for_router

        told = cut.read(self.cut)
        kind = self.kind
        if kind == "auto":
            kind = "router" if for_router(told["of"].get("moved", ())) else "finetune"
        for name in [cut.RECENT] if kind == "router" else [cut.TRAIN, cut.RECENT]:
            path = self.cut / name
            if not path.exists() or not path.read_text(encoding="utf-8").strip():
                do = "collect corrections, votes or a teacher's answers first (shoal curate)"
                raise DataError(f"{path}: rows with labels", got="none", do=do)
        return kind

    def _need_unknown(self, release: Release) -> None:
        """Raises DataError where earlier cuts trained on what this one holds out, as of one that was made without them."""
        from shoal.loop import cut, earlier

        if count := cut.known_of(self.cut, earlier.before(release, self.cut).trained_on()):
            do = f"curate again with --release {self.release}: what a model has learned measures nothing"
            raise DataError(
                f"{self.cut} holds out what earlier cuts trained on", got=f"{count} rows", allowed="none", do=do
            )

    def _need_new(self) -> None:
        """Raises DataError where the suites ask what the cut trains on, as of one that was made without them."""
        from shoal.loop import cut
        from shoal.loop.asked import forbidden

        if self.suites is not None and (count := cut.asked(self.cut, forbidden(self.suites))):
            do = "curate again with these --suites: a candidate that knows the questions passes for that"
            raise DataError(f"{self.cut} trains on what a suite asks", got=f"{count} rows", allowed="none", do=do)

    def _mix(self, release: Release, work: Path) -> int:
        """Writes what is learned from; how many rows were left out of it. Raises DataError where none is left."""
        from shoal.loop import earlier
        from shoal.loop.cut import mixed

        cuts = earlier.before(release, self.cut)
        for version in cuts.lost:
            what = f"version {version.label}: its cut is not at {version.lineage['cut'].get('path')} any more"
            say(f"{what}; what it held out is not known, and may be learned")
        work.mkdir(parents=True, exist_ok=True)
        times, left_out = mixed(self.cut, work / MIX, NEW_SHARE, cuts.held_out())
        say(f"mix: each new row {times} times among the old ones of the cut")
        if left_out:
            say(f"mix: {left_out} rows left out, which ask what an earlier cut of this release held out")
        return left_out

    def _router(self, served: Path, work: Path) -> Path:
        """A copy of what is served, with a router of rows that are held out."""
        from shoal.evaluate import routing
        from shoal.on_ray.measure import measuring

        shutil.rmtree(work, ignore_errors=True)
        model = work / "model"
        shutil.copytree(served, model, copy_function=shutil.copyfile)  # versions are read-only, copies are not
        with measuring(model) as run:
            report = routing.refit(model, self._asked(work), whole=True, run=run)
        say(f"router: it runs {report['depth_share']:.0%} of the layers and loses {report['regret']:.3f} nats a token")
        return model

    def _finetune(self, parent: Path, served: Path, work: Path) -> tuple[Path, Path | None]:
        """The model to serve, and its fp32 parent where it was rounded."""
        from shoal.evaluate import routing
        from shoal.model.described import read_config
        from shoal.model.files import weight_bytes
        from shoal.on_ray.measure import measuring
        from shoal.train.plan import QUANTIZE_STEPS

        config = read_config(served)[1]
        rounded = config.quantization != "none"
        if rounded and parent == served:
            raise UsageError(
                "the stable version has no fp32 parent", do="add it with its parent: shoal release add --fp32 DIR"
            )
        mix = work / MIX
        more: dict[str, Any] = (
            {} if config.of_open_models else {"learning_rate": RATE, "batch_tokens": ROWS * config.train_length}
        )
        given = [f"lora_rank={LORA_RANK}"] if weight_bytes(parent) > LORA_BYTES else []
        given += [f"replay_every={REPLAY_EVERY}"] if self.replay else []
        shared: dict[str, Any] = {"replay": self.replay, "workers": self.workers, "settings": given}
        Finetune(model=str(parent), data=str(mix), out=str(work / "run"), minutes=self.minutes, **shared, **more).run()
        tuned = self._blended(parent, work / "run" / "model", work / "fp32")
        model = tuned
        if rounded:
            model, shared["settings"] = work / "int8", given[-1:] if self.replay else []
            length: dict[str, Any] = {"steps": QUANTIZE_STEPS, "minutes": self.minutes * ROUNDING}  # what comes first
            Quantize(model=str(tuned), data=str(mix), out=str(model), **length, **shared).run()
        with measuring(model) as run:
            fitted = routing.finish(model, self._asked(work), say, whole=True, run=run)
        if fitted is None:
            routing.take_over(model, served, say)
        return model, tuned if rounded else None

    def _asked(self, work: Path) -> Path:
        """What depth "auto" is fitted to, as a file in `work`."""
        from shoal.data.chats.rows import HELDOUT
        from shoal.data.remote import local
        from shoal.loop.asked import forbidden
        from shoal.loop.cut import asked_of_both
        from shoal.loop.suites import tasks

        held, of = local(self.replay) / HELDOUT if self.replay else None, tasks(self.suites) if self.suites else ()
        asked_of_both(self.cut, work / "asked.jsonl", held=held, never=forbidden(self.suites), tasks=of)
        return work / "asked.jsonl"

    def _blended(self, parent: Path, tuned: Path, out: Path) -> Path:
        """Where the model is that is as near to `tuned` as what `parent` knew allows, by the corpus that is replayed."""
        if not self.replay:
            say("weights: as they were trained; with --replay they would go as far as text and code allow")
            return tuned
        from shoal.data.remote import local
        from shoal.evaluate.blend import blended
        from shoal.model.model import Model

        found = blended(Model.load(parent), Model.load(tuned), local(self.replay))
        rises = ", ".join(f"{name} {rise:+.1%}" for name, rise in found.rises[found.way].items())
        say(f"weights: {found.way:.0%} of the way from the parent to what was trained; bits per byte {rises}")
        found.model.save(out)
        return out
