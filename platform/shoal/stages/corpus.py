"""The stages that make what is trained on: prepare, augment, teach, curate."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shoal import presets
from shoal.errors import DataError, UsageError
from shoal.stages.stage import Json, Stage, print_result, say

if TYPE_CHECKING:
    from shoal.loop.earlier import Earlier
    from shoal.loop.labels import Ask

Chats = Annotated[Path, typer.Option(help='JSONL of {"messages": [{"role", "content"}, ...]}.')]


@dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Raw text, code and images to packed shards, with a tokenizer and a report."""

    out: Annotated[str, typer.Option(help="Directory to write, or s3://BUCKET/PREFIX.")]
    source: Annotated[
        list[str] | None, typer.Option(help="NAME=URI of a folder, a file or s3://...; repeat. [the demo corpus]")
    ] = None
    mix: Annotated[str | None, typer.Option(help="Shares by token [text=60,image=20,code=20].")] = None
    preset: Annotated[str | None, typer.Option(help=f"One of: {', '.join(presets.NAMES)} [tiny].")] = None
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML or JSON with any of: source, mix, preset, seed, tokenizer, operators, s3; options override it."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Seed of split, order and packing [0].")] = None
    tokenizer: Annotated[
        str | None, typer.Option(help="A tokenizer.json to use: ours, or any byte-level BPE. [fitted to a sample]")
    ] = None
    as_json: Json = False

    def run(self) -> None:
        from shoal.data import card
        from shoal.data.order import parse_mix
        from shoal.data.settings import prepare_config
        from shoal.on_ray.prepare import prepare
        from shoal.on_ray.resources import local_ray
        from shoal.progress import progress

        named = {name: getattr(self, name) for name in ("source", "mix", "preset", "seed", "tokenizer")}
        asked = prepare_config(self.config, **named)
        mix, preset = parse_mix(asked.mix), presets.get(asked.preset)
        also = {name: getattr(asked, name) for name in ("seed", "tokenizer", "operators", "s3")}
        with local_ray(), progress("prepare") as tell:
            report = prepare(self.out, sources=asked.source or None, mix=mix, preset=preset, **also, on_progress=tell)
        for line in card.left_out(report):
            say(line)
        print_result(report, self.as_json, f"shards in {self.out}")


@dataclass(frozen=True, kw_only=True)
class Augment(Stage):
    """More chats to fine-tune on: some again in other words, with typing slips, or with other names in their code."""

    data: Chats
    out: Annotated[Path, typer.Option(help="JSONL to write: all rows, and the changed copies.")]
    share: Annotated[float, typer.Option(help="Share of the rows that get a changed copy, 0 to 1.")] = 0.3
    synonyms: Annotated[
        Path | None, typer.Option(help="Words of your domain, a line each: WORD = OTHER, OTHER. [general words only]")
    ] = None
    heldout: Annotated[
        Path | None, typer.Option(help="Held-out chats (JSONL): no copy asks what one of them asks. [none]")
    ] = None
    seed: Annotated[int, typer.Option(help="Seed of what is changed, and how.")] = 0
    as_json: Json = False

    def run(self) -> None:
        from shoal.data.chats.augment import Augmenter, augment, questions
        from shoal.data.chats.wording import read_synonyms

        words = read_synonyms(self.synonyms) if self.synonyms is not None else {}
        kept_out = questions(self.heldout) if self.heldout is not None else frozenset[str]()
        result = augment(self.data, self.out, Augmenter(self.share, self.seed, words, kept_out))
        ways = ", ".join(f"{count} {way}" for way, count in result["by_way"].items()) or "nothing could be changed"
        failed = f"; of {result['failed']} rows no copy could be made" if result["failed"] else ""
        line = f"{result['rows']} rows and {result['copies']} copies ({ways}) in {self.out}{failed}"
        print_result(result, self.as_json, line)


@dataclass(frozen=True, kw_only=True)
class Teach(Stage):
    """More chats to fine-tune on: a served model, the teacher, answers the questions of those that you have.

    $SHOAL_TEACHER_KEY is the teacher's API key, if it wants one.
    """

    data: Annotated[Path, typer.Option(help="JSONL of chats; what follows the user's last message in one is left out.")]
    out: Annotated[Path, typer.Option(help="JSONL to write.")]
    url: Annotated[str, typer.Option(help="The teacher's API, ending in /v1.")]
    model: Annotated[str, typer.Option(help="Name of the model there.")]
    temperature: Annotated[float, typer.Option(help="How freely answers are sampled, 0 to 100; 0 is greedy.")] = 0.0
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 512
    seed: Annotated[int, typer.Option(help="Seed of sampled answers.")] = 0
    depth: Annotated[str | None, typer.Option(help="Exit of a Shoal teacher, such as full. [its own choice]")] = None
    concurrency: Annotated[int, typer.Option(help="Questions that are asked at once.")] = 8
    as_json: Json = False

    def run(self) -> None:
        from shoal.clients.teacher import Ask
        from shoal.on_ray.resources import local_ray
        from shoal.on_ray.teach import teach
        from shoal.progress import progress

        ask = Ask(self.url, self.model, self.temperature, self.max_tokens, self.seed, self.depth)
        with local_ray(), progress("teach") as tell:
            counts = teach(
                self.data,
                self.out,
                ask,
                concurrency=self.concurrency,
                on_progress=lambda done, total: tell("answers", done, total),
            )
        told = ", ".join(f"{count} {what.replace('_', ' ')}" for what, count in counts.items() if count)
        print_result({"out": str(self.out), **counts}, self.as_json, f"{told}; in {self.out}")


@dataclass(frozen=True, kw_only=True)
class Curate(Stage):
    """What a served model should learn from what it was asked: texts that were kept, with labels from people or a teacher.

    $SHOAL_TEACHER_KEY is the teacher's API key, if it wants one.
    """

    capture: Annotated[str, typer.Option(help="Folder or s3:// of `shoal serve --capture --capture-texts`.")]
    out: Annotated[Path, typer.Option(help="Cut to write: a folder with train.jsonl, recent.jsonl and cut.json.")]
    imports: Annotated[
        list[Path] | None,
        typer.Option("--import", help="Labels from elsewhere: Label Studio, Argilla, or chats; repeat. [none]"),
    ] = None
    teacher: Annotated[
        str | None, typer.Option(help="API of a teacher, ending in /v1, for what has no label. [none]")
    ] = None
    teacher_model: Annotated[str | None, typer.Option(help="Name of the model there. [required with --teacher]")] = None
    replay: Annotated[
        str | None, typer.Option(help="Chats of the old mix, or s3://... of them, so that it stays learned. [none]")
    ] = None
    suites: Annotated[Path | None, typer.Option(help="Frozen suites, whose questions are left out. [none]")] = None
    never: Annotated[
        list[Path] | None,
        typer.Option(
            help="Chats (JSONL) that are not trained on, such as what an earlier cut held out; repeat. [none]"
        ),
    ] = None
    release: Annotated[
        Path | None,
        typer.Option(
            help="Release that it is for: what cuts of its versions held out is not trained on, and the reverse. [none]"
        ),
    ] = None
    heldout: Annotated[
        float | None, typer.Option(help="Share of the people that are held out. [a fifth, or as many as 200 rows take]")
    ] = None
    liked: Annotated[float, typer.Option(help="Share of the rows that may be the model's own answers, liked.")] = 0.2
    replay_share: Annotated[float, typer.Option(help="Share of old rows: so many for each new one.")] = 10.0
    key_share: Annotated[
        float, typer.Option(help="Largest share of the new rows that one API key may have; 1: all. Of few keys more.")
    ] = 0.25
    user_share: Annotated[
        float, typer.Option(help="Largest share of a key's rows that one `user` may have; 1: all. Of few users more.")
    ] = 0.1
    seed: Annotated[int, typer.Option(help="Seed of the split and of what is replayed.")] = 0
    as_json: Json = False

    def run(self) -> None:
        from shoal.data.remote import local
        from shoal.loop import caps, cut, labels, learned
        from shoal.loop.asked import forbidden
        from shoal.loop.capture import Capture
        from shoal.loop.looked import moved

        shares = caps.Shares(self.key_share, self.user_share)
        settings = cut.Settings(self.heldout, self.liked, self.replay_share, self.seed, shares)
        if self.out.exists():
            raise DataError(f"{self.out} exists", do="choose another --out: a cut is never changed")
        capture, replay = Capture(self.capture), None if self.replay is None else local(self.replay)
        asked, cuts = forbidden(self.suites), self._earlier()
        before, learned_before = cuts.held_out(self.never or ()), cuts.trained_on()
        by_id: dict[str, str] = {}
        more: list[labels.Labelled] = []
        unused = Counter[str]()
        for path in self.imports or ():
            known, chats = labels.read_imports(path, unused)
            by_id |= known
            more += chats
        found = labels.labelled(labels.kept_texts(capture), labels.said(capture), by_id, self._ask())
        found.rows += more
        unused["imported, but no text of that request is kept"] = len(by_id.keys() - found.ids)
        for reason, count in unused.items():
            found.leave(reason, count)
        told = {
            "capture": self.capture,
            "days": capture.days("texts"),
            "imports": len(by_id) + len(more),
            "moved": moved(capture.folder),
        }
        apart: dict[str, Any] = {"never": asked, "before": before, "learned": learned_before}
        made = cut.cut(found, self.out, settings, replay=replay, told=told, **apart)
        # of those who were forgotten meanwhile, by a command that did not find this cut yet
        capture.fresh()
        for line in learned.forget(self.out, capture.forgotten()):
            say(line)
            made = cut.read(self.out)
        say(caps.line(made["caps"]))
        of = ", ".join(f"{count} {label}" for label, count in made["labels"].items())
        line = f"{made['train']} rows ({of}), {made['replay']} replayed, {made['recent']} held out; in {self.out}"
        print_result({"out": str(self.out), **made}, self.as_json, line)

    def _earlier(self) -> Earlier:
        """The earlier cuts of the release. Raises UsageError for a folder that is none."""
        from shoal.loop import earlier
        from shoal.loop.release import Release

        if self.release is None:
            return earlier.NONE
        release = Release(self.release)
        release.state()
        found = earlier.before(release)
        for version in found.lost:
            say(f"version {version.label}: its cut is gone; what it held out is not known: give it as --never")
        return found

    def _ask(self) -> Ask | None:
        """Asks the teacher; None without one."""
        import os

        import httpx

        from shoal.clients.teacher import Ask as Asked
        from shoal.clients.teacher import answered

        if self.teacher is None:
            return None
        if not self.teacher_model:
            raise UsageError("--teacher", do="say which model there: --teacher-model")
        key = os.environ.get("SHOAL_TEACHER_KEY")
        http = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {})
        how = Asked(self.teacher, self.teacher_model)

        def ask(messages: list[dict[str, object]]) -> str | None:
            try:
                return str(answered(http, messages, how)["messages"][-1]["content"])
            except DataError:  # it refused this one, or said nothing that could be learned
                return None

        return ask
