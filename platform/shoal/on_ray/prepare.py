"""Raw documents to shards on Ray Data: the plain functions of `shoal.data.parts` and `shoal.data.identities` in tasks.

    a part   evaluation sets, where some are named -> runs of words     a span   these -> each run once
    a part   files -> read, operators -> documents, identities, signatures
    a span   identities               -> documents that equal earlier ones    signatures -> candidates for near copies
    a part   both                     -> what is dropped
    a span   groups                   -> what is held out
    a part   documents                -> a sample -> the tokenizer            encode, pack, write -> index.json

Only counts pass through this process, whatever the corpus holds (`corpus_tasks`). The rest goes through files: into a folder
that all nodes see, or into S3, where tasks put what they make and no folder is shared (`data.place`). Nothing is there under
its final name before it is complete, and ``index.json`` comes last. A run that was killed goes on where it was: each task's
result lies in the work folder, and is taken again while the sources, the request and the code are the same (`data.kept`).
"""

from __future__ import annotations

import json
import secrets
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig, Preset, dump
from shoal.data import card, identities, parts, ranged, remote
from shoal.data.alone import alone
from shoal.data.chats import customer_service
from shoal.data.chats.recipes import FILES, ChatFiles, fits
from shoal.data.documents import SourceSpec
from shoal.data.kept import code_digest, digest, digest_of_list
from shoal.data.lease import leased
from shoal.data.operators import decontaminate
from shoal.data.operators.pipeline import Operators
from shoal.data.order import Mix
from shoal.data.parts import Packed
from shoal.data.place import WORK, Place, put
from shoal.data.publish import NAMED, publish, published, sweep
from shoal.data.shards import INDEX, SPLITS, TOKENIZER, Index, clear, open_index, write_index
from shoal.data.sources import demo
from shoal.data.sources.files import File, list_files, local_path, store_of
from shoal.data.sources.s3 import S3, SCHEME, is_remote
from shoal.data.tables import Parts, spans
from shoal.errors import ConfigError, DataError
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import need_disk, write_aside
from shoal.on_ray.corpus_tasks import Decision, Evaluation, Reader, Sets, chat_files, draw, fit_drawn, fit_whole, pack
from shoal.on_ray.each import Progress, each, everywhere, quiet_data

__all__ = ["SourceSpec", "prepare"]

SOURCES = "sources"  # folder in the corpus folder: what the demo corpus fetched
DISK = 5  # bytes wanted for each byte of source, of one folder: cleaned documents, shards, and room


def prepare(
    out: str | Path,
    *,
    sources: Sequence[SourceSpec] | None,
    mix: Mapping[str, float],
    preset: Preset,
    seed: int,
    tokenizer: str | Path | None = None,
    operators: Operators = Operators(),
    s3: S3 = S3(),
    on_progress: Progress = lambda what, done, total: None,
) -> dict[str, Any]:
    """Make the corpus in `out`, a folder or ``s3://...``, for models of `preset` and return its report; a Ray must be running.

    `sources` None: the demo corpus. `mix`: share of each modality by token; those without a document are left out.
    `tokenizer`: a ``tokenizer.json`` to use (default: one is fitted to a sample). A corpus that was finished for the same
    request is not made again. Raises DataError for a source that is missing, empty or of no
    use, and when `out` holds the corpus of another request; ResourceError when the disk is too small.
    """
    start = time.monotonic()
    place: Path | Place = Path(out).absolute()
    if is_remote(out):
        place = Place(str(out), s3.resolved(), secrets.token_hex(8))
    there = _is_there(place)  # asked first, so that hours of work do not end at a bucket that is not there
    given = Tokenizer.adopt(tokenizer, preset.model.vocab) if tokenizer is not None else None
    specs = list(sources) if sources is not None else demo.sources(_demo_folder(place), on_progress)
    specs = _named_apart(specs)
    sets = [SourceSpec("evaluation", uri) for uri in operators.evaluation]
    left_out: list[File] = []
    files = [file for spec in specs for file in list_files(spec, s3, left_out) if not _made_in(place, file)]
    plan = parts.split_files(files)
    left_out = [file for file in left_out if not _made_in(place, file)]
    evaluation = [file for spec in sets for file in list_files(spec, s3)]
    job = _Job(place, specs, plan, left_out, evaluation, given, mix, preset, seed, operators, s3, demo=sources is None)
    if there:
        return _looked_at(job)
    with _alone(job) as need, quiet_data():
        # Looked at again, since another command may have finished it before it let go of the lock.
        return _finished(job) if _is_there(place) else _make(job, start, on_progress, need)


@dataclass(frozen=True)
class _Job:
    """What is asked for, and the files that it is made of, as they are now."""

    place: Path | Place
    specs: list[SourceSpec]
    plan: list[list[File]]  # the files in parts
    left_out: list[File]
    evaluation: list[File]
    given: Tokenizer | None
    mix: Mapping[str, float]
    preset: Preset
    seed: int
    operators: Operators
    s3: S3
    demo: bool

    @property
    def out(self) -> Path:
        """The folder of the corpus; where it is made in S3, this machine's."""
        return self.place if isinstance(self.place, Path) else self.place.folder

    @property
    def name(self) -> str:
        """What people call it."""
        return str(self.place) if isinstance(self.place, Path) else self.place.uri

    @property
    def parts(self) -> Parts:
        """Where the parts lie."""
        return Parts(self.place / WORK if isinstance(self.place, Path) else self.place, len(self.plan))

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [sum(file.size for file in files) for files in self.plan]

    @cached_property
    def keys(self) -> list[str]:
        """What each part follows from."""
        code = digest(code_digest(), dump(self.operators), [*_stamps(self.evaluation)], self.seed)
        return [digest(code, [*_stamps(files)]) for files in self.plan]

    @cached_property
    def request(self) -> dict[str, Any]:
        """What a finished corpus says that it was made of. The demo corpus is what its lock file says, whenever it was
        fetched."""
        stamps = _stamps(file for part in self.plan for file in part)
        asked = {
            "sources": demo.request() if self.demo else [dump(spec) for spec in self.specs],
            "files": sum(map(len, self.plan)) if self.demo else digest_of_list(stamps),
            "bytes": sum(self.sizes),
            "mix": dict(self.mix),
            "model": dump(self.preset.model),
            "seed": self.seed,
            "tokenizer": self.given.sha256 if self.given else None,
            "operators": dump(self.operators),
        }
        return asked | ({"evaluation sets": digest_of_list(_stamps(self.evaluation))} if self.evaluation else {})


def _make(job: _Job, start: float, on_progress: Progress, need: Callable[[], None]) -> dict[str, Any]:
    """The corpus itself, and its report; `start`: when it was asked for. `need`: raises where another command took over."""
    out, model = job.out, job.preset.model
    packed, named, keys, text_bytes = Packed(), defaultdict[str, dict[str, str]](dict), [], Counter[str]()
    places, documents = job.parts, 0
    for skipped in (file.skipped(file.fault, operator="list") for file in job.left_out):
        packed.dropped({"list": Counter([skipped.reason])}, {"list": {skipped.reason: skipped.place}})
    sets = _sets(job, places, on_progress) if job.evaluation else None
    reads = zip(job.plan, range(len(places)), job.keys, strict=True)
    reader = Reader(job.operators, places, job.seed, sets)
    for key, files, found in zip(
        job.keys, job.plan, each(reader, reads, job.sizes, "read and clean", on_progress), strict=True
    ):
        documents += found.documents
        text_bytes.update(found.text_bytes)
        packed.dropped(found.drops, found.first)
        packed.changed(found.changes)
        keys.append(digest(key, found.named))
        for number, of in found.named.items():
            named[files[number].spec.name].update(of)
    decision = Decision(places, digest(keys), job.operators, documents)
    besides = decide(decision, job.sizes, packed, on_progress)
    used = job.given or _tokenizer(decision, besides, text_bytes, job, on_progress)
    write_aside(out / TOKENIZER, used.json)
    put(out / TOKENIZER)
    packs = [(decision, number, besides, model, job.seed, digest(key, used.sha256)) for number, key in enumerate(keys)]
    for part in each(pack, packs, job.sizes, "encode and pack", on_progress):
        packed.add(part)
    chats = _chats(job, places, used, on_progress)
    index = _index(packed, job.request, model, used)
    if isinstance(job.place, Place):
        ranged.write_origin(out, job.place.uri, job.s3)  # its shards, which the report shows some of, are there
    report = card.report(out, index, packed, used, chats, time.monotonic() - start)
    card.write(out, report, out.name if isinstance(job.place, Path) else job.name)
    (out / NAMED).unlink(missing_ok=True)
    if named and not job.demo:
        write_aside(out / NAMED, json.dumps(named, sort_keys=True) + "\n")
    if isinstance(job.place, Place):
        publish(job.place, index, [FILES[split] for split in chats], need)
    else:
        clear(out, keep={shard.file for shard in index.shards})  # of other requests, and what was half written
        write_index(out, index)
    return report


def _sets(job: _Job, places: Parts, on_progress: Progress) -> Sets:
    """What evaluation sets hold. Raises DataError where that is nothing, and for a file that cannot be read."""
    plan = parts.split_files(job.evaluation, least=1)
    evaluation = Evaluation(places, digest(code_digest(), [*_stamps(job.evaluation)]))
    counts, tables, collects = Counter[int](), list[int](), list(enumerate(plan))
    sizes = [sum(file.size for file in files) for files in plan]
    for found in each(evaluation.collect, collects, sizes, "read evaluation sets", on_progress):
        counts.update(found.counts)
        tables.append(found.tables)
    decontaminate.need_texts(job.evaluation, counts.total())
    some = spans(counts.total())
    merges = [(span, tables) for span in some]
    for _ in each(evaluation.merge, merges, [1] * len(some), "merge evaluation sets", on_progress):
        pass
    return Sets(evaluation, len(some), tuple(sorted(counts)))


def decide(decision: Decision, sizes: list[int], packed: Packed, on_progress: Progress) -> list[int]:
    """Which documents are dropped, counted in `packed`, and which are held out; the groups held out besides."""
    looks, numbers = decision.looks, [(number,) for number in range(len(decision.parts))]
    for _ in each(decision.look, looks, [1] * len(looks), "find copies", on_progress):
        pass
    for drops in each(decision.settle, numbers, sizes, "compare near copies", on_progress):
        packed.dropped(drops)
    spans = [(span,) for span in decision.spans]
    sides = each(decision.hold_out, spans, [1] * len(spans), "draw the held-out side", on_progress)
    return identities.drawn_besides(list(sides))


def _tokenizer(
    decision: Decision, besides: list[int], text_bytes: Counter[str], job: _Job, on_progress: Progress
) -> Tokenizer:
    """Fitted to a sample of the training documents, which the tasks draw. `text_bytes`: what they may draw of each modality."""
    vocab = job.preset.model.vocab
    if len(decision.parts) <= parts.SAMPLED_WHOLE:
        (text,) = each(fit_whole, [(decision, besides, vocab)], [1], "fit the tokenizer", on_progress)
        return Tokenizer.from_json(text)
    shares = parts.shares(text_bytes, vocab)
    draws = [(decision, number, besides, shares, job.seed) for number in range(len(decision.parts))]
    drawn = sum(each(draw, draws, job.sizes, "draw a sample", on_progress))
    key = digest(decision.key, besides, shares, job.seed, drawn)
    (text,) = each(fit_drawn, [(decision, vocab, key)], [1], "fit the tokenizer", on_progress)
    return Tokenizer.from_json(text)


def _chats(job: _Job, places: Parts, used: Tokenizer, on_progress: Progress) -> dict[str, dict[str, int]]:
    """Write the fine-tuning files, out of what the parts drew; split -> task -> rows."""
    besides = ["templates"] if job.demo else []
    for name in besides:
        templates = ChatFiles(job.seed)
        for split in SPLITS:
            templates.add(split, (chat for chat in customer_service.chats(split) if fits(chat, used, job.preset.model)))
        for file in templates.save(places.folder / name):
            put(file)
    (counts,) = each(chat_files, [(places, besides)], [1], "draw chats", on_progress)
    return counts


def _is_there(place: Path | Place) -> bool:
    """Whether a complete corpus is. Raises DataError where that cannot be found out."""
    return (place / INDEX).exists() if isinstance(place, Path) else remote.exists(place.uri, place.service)


def _demo_folder(place: Path | Place) -> Path:
    """Where what the demo corpus fetches comes to lie."""
    folder = (place if isinstance(place, Path) else ranged.cache()) / SOURCES
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _made_in(place: Path | Place, file: File) -> bool:
    """Whether a file is of the corpus itself, which may lie inside a source."""
    if isinstance(place, Path):
        return Path(file.path).is_relative_to(place) and not Path(file.spec.uri).is_relative_to(place)
    own = f"{place.uri.rstrip('/')}/"
    return f"{SCHEME}{file.path}".startswith(own) and not f"{file.spec.uri}/".startswith(own)


def _stamps(files: Iterable[File]) -> Iterator[list[Any]]:
    """What tells whether files, and the captions beside them, are still what was read."""
    said: dict[int, Any] = {}  # of each source once: there may be millions of files
    for file in files:
        spec = said.get(id(file.spec)) or said.setdefault(id(file.spec), dump(file.spec))
        yield [spec, file.name, file.stamp, *([file.start] if file.end else [])]


@contextmanager
def _alone(job: _Job) -> Iterator[Callable[[], None]]:
    """Raises DataError while another prepare works there: the shards of two requests would be mixed. In the block, what raises
    where another took over; nothing of the work is left after it, or on machines where S3 has it."""
    place = job.place
    if isinstance(place, Path):
        need_disk(place, DISK * sum(job.sizes))
        busy = DataError(f"another prepare is writing to {place}", do="wait for it, or stop it")
        with alone(place / WORK / "lock", busy):
            yield lambda: None
            shutil.rmtree(place / WORK, ignore_errors=True)
        return
    with leased(place.bucket, place.run) as lease:
        try:
            yield lease.need
        finally:
            everywhere(place.leave)
            place.leave()


def _named_apart(specs: Sequence[SourceSpec]) -> list[SourceSpec]:
    """The sources with absolute paths, since workers have folders of their own. Raises ConfigError when two share a name."""
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            raise ConfigError(f"source {name} is given {count} times", do="give each source a name of its own")
    here = {spec.uri: str(local_path(spec.uri).absolute()) for spec in specs if "://" not in spec.uri}
    return [replace(spec, uri=here.get(spec.uri, spec.uri)) for spec in specs]


def _looked_at(job: _Job) -> dict[str, Any]:
    """`_finished`, and what a command that was killed at the very end left in S3 goes."""
    if isinstance(job.place, Path):
        return _finished(job)
    try:
        report = _finished(job)
        sweep(job.place, held=False)
        return report
    finally:
        job.place.leave()


def _finished(job: _Job) -> dict[str, Any]:
    """The report of the corpus in `out`, which must be of the same request and of the same files."""
    if isinstance(job.place, Place):
        published(job.place)
    had = open_index(job.out).request
    asked = json.loads(json.dumps(job.request))
    other = sorted(key for key in asked.keys() | had.keys() if asked.get(key) != had.get(key))
    try:
        named = json.loads((job.out / NAMED).read_bytes()) if (job.out / NAMED).exists() else {}
        report: dict[str, Any] = json.loads((job.out / card.REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{job.name} is not whole", got=str(error)[:160], do="remove it and prepare again") from error
    stores = {spec.name: store_of(spec, job.s3) for spec in job.specs}
    if not other and any(stores[name].stamp(path) != was for name, of in named.items() for path, was in of.items()):
        other = ["files that rows name"]
    if other:
        raise DataError(
            f"{job.name} holds a corpus of another request",
            got=f"other {', '.join(other)}",
            do="give another --out, or remove it",
        )
    return report


def _index(packed: Packed, request: dict[str, Any], model: ModelConfig, tokenizer: Tokenizer) -> Index:
    documents: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for (split, modality, _, _), count in sorted(packed.documents.items()):
        documents[split][modality] = documents[split].get(modality, 0) + count
    mix = {name: share for name, share in request["mix"].items() if name in documents["train"]}
    if not any(mix.values()):
        raise DataError(
            "no document could be used for the mix", got={name: dict(d) for name, d in packed.drops.items()},
            allowed=f"training documents of {', '.join(request['mix'])}",
        )  # fmt: skip
    return Index.made_for(
        model,
        tokenizer,
        Mix(mix).shares,
        sorted(packed.shards, key=lambda shard: shard.file),
        seed=request["seed"],
        request=request,
        documents=documents,
        drops={operator: dict(sorted(reasons.items())) for operator, reasons in sorted(packed.drops.items())},
    )
