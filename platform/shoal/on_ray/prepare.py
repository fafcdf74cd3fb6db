"""Raw documents to shards on Ray Data: two passes of the plain functions of `shoal.data.parts`, one task a part.

    files -> read, operators -> identities, signatures -> what is kept, and where -> encode, pack, write -> index.json
                             -> a sample               -> the tokenizer           ->

Only identities and counts pass through this process. Documents go through files, so on several nodes the corpus folder must
be on a file system that all of them share. Nothing is there under its final name before it is complete, and ``index.json``
comes last. A run that was killed goes on where it was: each task's result lies in the work folder, and is taken again while
the sources, the request and the code are the same (`data.kept`).
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import ray.data
from ray.exceptions import RayError

from shoal.config import ModelConfig, Preset, dump
from shoal.data import card, parts, remote
from shoal.data.alone import alone
from shoal.data.chats import customer_service
from shoal.data.chats.recipes import ChatFiles, fits
from shoal.data.documents import SourceSpec
from shoal.data.kept import code_digest, digest, kept
from shoal.data.operators import decontaminate, near
from shoal.data.operators.pipeline import Operators, Pipeline
from shoal.data.order import Mix
from shoal.data.parts import Found, Packed
from shoal.data.shards import INDEX, SPLITS, TOKENIZER, Index, clear, open_index, write_index
from shoal.data.sources import demo
from shoal.data.sources.files import File, list_files, local_path, store_of
from shoal.data.sources.s3 import S3
from shoal.errors import ConfigError, DataError, ShoalError
from shoal.inputs.tokenizer import Tokenizer
from shoal.machine import aside, need_disk, write_aside

__all__ = ["SourceSpec", "prepare"]

SOURCES = "sources"  # folder in the corpus folder: what the demo corpus fetched
# folder there, until the corpus is finished: the cleaned documents, and the results of finished tasks
WORK = ".prepare"
NAMED = "named.json"  # file there: the files that rows name, with their stamps; an edited one is noticed
SIGNATURES = ".near.npy"  # suffix of a part's file beside its documents
TASKS_OF_BANDS = 8
DISK = 5  # bytes wanted for each byte of source: cleaned documents, shards, and room

Progress = Callable[[str, int, int], None]  # what, done, total


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
    """Make the corpus in `out` for models of `preset` and return its report; a Ray must be running.

    `sources` None: the demo corpus. `mix`: share of each modality by token; those without a document are left out.
    `tokenizer`: a ``tokenizer.json`` to use (default: one is fitted to a sample). A corpus that was finished for the same
    request is not made again. Raises DataError for a source that is missing, empty or of no
    use, and when `out` holds the corpus of another request; ResourceError when the disk is too small.
    """
    if remote.is_remote(out):
        ask = {"sources": sources, "mix": mix, "preset": preset, "seed": seed, "operators": operators,
               "tokenizer": tokenizer}  # fmt: skip
        return _prepare_remote(str(out), s3, ask, on_progress)
    out, start = Path(out).absolute(), time.monotonic()
    given = Tokenizer.adopt(tokenizer, preset.model.vocab) if tokenizer is not None else None
    if sources is None:
        out.mkdir(parents=True, exist_ok=True)
    specs = list(sources) if sources is not None else demo.sources(out / SOURCES, on_progress)
    specs = _named_apart(specs)
    sets = [SourceSpec("evaluation", uri) for uri in operators.evaluation]
    plan = parts.split_files([file for spec in specs for file in list_files(spec, s3) if not _made_in(out, file)])
    evaluation = [file for spec in sets for file in list_files(spec, s3)]
    job = _Job(out, specs, plan, evaluation, given, mix, preset, seed, operators, s3, demo=sources is None)
    if (out / INDEX).exists():
        return _finished(job)
    need_disk(out, DISK * sum(job.sizes))
    with _alone(out / WORK), _quiet_data():
        # Looked at again, since another command may have finished it before it let go of the lock.
        report = _finished(job) if (out / INDEX).exists() else _make(job, start, on_progress)
        shutil.rmtree(out / WORK, ignore_errors=True)
    return report


@dataclass(frozen=True)
class _Job:
    """What is asked for, and the files that it is made of, as they are now."""

    out: Path
    specs: list[SourceSpec]
    plan: list[list[File]]  # the files in parts
    evaluation: list[File]
    given: Tokenizer | None
    mix: Mapping[str, float]
    preset: Preset
    seed: int
    operators: Operators
    s3: S3
    demo: bool

    @cached_property
    def sizes(self) -> list[int]:
        """Bytes of each part."""
        return [sum(file.size for file in files) for files in self.plan]

    @cached_property
    def keys(self) -> list[str]:
        """What each part follows from."""
        code = digest(code_digest(), dump(self.operators), _stamps(self.evaluation))
        return [digest(code, _stamps(files)) for files in self.plan]

    @cached_property
    def request(self) -> dict[str, Any]:
        """What a finished corpus says that it was made of. The demo corpus is what its lock file says, whenever it was
        fetched."""
        files = [file for part in self.plan for file in part]
        asked = {
            "sources": demo.request() if self.demo else [dump(spec) for spec in self.specs],
            "files": len(files) if self.demo else digest(_stamps(files)),
            "bytes": sum(self.sizes),
            "mix": dict(self.mix),
            "model": dump(self.preset.model),
            "seed": self.seed,
            "tokenizer": self.given.sha256 if self.given else None,
            "operators": dump(self.operators),
        }
        return asked | ({"evaluation sets": digest(_stamps(self.evaluation))} if self.evaluation else {})


def _make(job: _Job, start: float, on_progress: Progress) -> dict[str, Any]:
    """The corpus itself, and its report; `start`: when it was asked for."""
    out, work, model, sizes = job.out, job.out / WORK, job.preset.model, job.sizes
    packed, named, identities, keys = Packed(), defaultdict[str, dict[str, str]](dict), [], []
    paths = [work / f"{number:05}.arrow" for number in range(len(job.plan))]
    reads = zip(job.plan, paths, job.keys, strict=True)
    reader = _Reader(job.operators, _evaluation(job.evaluation, work))
    for key, files, found in zip(
        job.keys, job.plan, _each(reader, reads, sizes, "read and clean", on_progress), strict=True
    ):
        identities.append(found.identities)
        packed.dropped(found.drops)
        packed.changed(found.changes)
        keys.append(digest(key, found.named))
        for number, of in found.named.items():
            named[files[number].spec.name].update(of)
    copies = _copies(paths, on_progress) if job.operators.near_dedup else []
    splits, drops = parts.choose(identities, job.seed, copies, job.operators)
    packed.dropped(drops)
    on_progress("fit the tokenizer", 0, 0)
    used = job.given or _tokenizer(paths, splits, model.vocab, work, digest(keys, splits, model.vocab))
    write_aside(out / TOKENIZER, used.json)
    chats = ChatFiles(job.seed)
    packs = [
        (path, of, out, model, number, digest(key, of, used.sha256, dump(model)))
        for number, (path, of, key) in enumerate(zip(paths, splits, keys, strict=True))
    ]
    for part in _each(_pack, packs, sizes, "encode and pack", on_progress):
        packed.add(part)
        for split, chat in part.chats:
            chats.add(split, [chat])
    if job.demo:
        for split in SPLITS:
            chats.add(split, (chat for chat in customer_service.chats(split) if fits(chat, used, model)))
    index = _index(packed, job.request, model, used)
    report = card.report(out, index, packed, used, chats.write(out), time.monotonic() - start)
    card.write(out, report)
    clear(out, keep={shard.file for shard in index.shards})  # of other requests, and what was half written
    (out / NAMED).unlink(missing_ok=True)
    if named and not job.demo:
        write_aside(out / NAMED, json.dumps(named, sort_keys=True) + "\n")
    write_index(out, index)
    return report


def _prepare_remote(out: str, s3: S3, ask: Mapping[str, Any], on_progress: Progress) -> dict[str, Any]:
    """Made in a local folder, then copied; one that is there is looked at as a local one would be."""
    there = remote.exists(out, s3)  # asked first, so that hours of work do not end at a bucket that is not there
    folder = remote.local(out, s3) if there else remote.staging(out)
    report = prepare(folder, **ask, s3=s3, on_progress=on_progress)
    if not there:
        remote.upload(folder, out, s3, on_progress)
        shutil.rmtree(folder, ignore_errors=True)
    return report


class _Reader:
    """`parts.read_part`, unless it is done. What its operators hold, a model or a set, each process loads once."""

    def __init__(self, operators: Operators, evaluation: Path | None) -> None:
        self._operators, self._evaluation = operators, evaluation
        self.holds_state = bool(operators.languages or evaluation)

    @cached_property
    def _pipeline(self) -> Pipeline:
        return Pipeline(self._operators, self._evaluation)

    def __call__(self, files: Sequence[File], path: Path, key: str) -> Found:
        signatures = path.with_suffix(SIGNATURES) if self._operators.near_dedup else None
        made = [path, signatures] if signatures else [path]

        def read() -> Found:
            with ExitStack() as stack:
                beside = [stack.enter_context(aside(file)) for file in made]
                return parts.read_part(files, beside[0], self._pipeline, beside[1] if signatures else None)

        def holds(found: Found) -> bool:
            return found.holds(files)

        return kept(path.with_suffix(".read.json"), key, Found, read, lambda _: made, holds)


def _evaluation(files: Sequence[File], work: Path) -> Path | None:
    """A file with what the evaluation sets hold; None where none is named."""
    if not files:
        return None
    path = work / "evaluation.npz"
    decontaminate.collect(files, path)
    return path


def _copies(paths: Sequence[Path], on_progress: Progress) -> list[tuple[int, int]]:
    """Part and row of the documents that are near copies of earlier ones, some bands a task."""
    pairs = [(path, path.with_suffix(SIGNATURES)) for path in paths]
    jobs = [(pairs, bands) for bands in near.shares(TASKS_OF_BANDS)]
    found = _each(near.copies, jobs, [1] * len(jobs), "find near copies", on_progress)
    return sorted({(int(part), int(row)) for some in found for part, row in some})


def _tokenizer(paths: list[Path], splits: list[list[str | None]], vocab: int, work: Path, key: str) -> Tokenizer:
    """Fitted to a sample of the training documents, unless it is done."""

    def fit() -> str:
        return Tokenizer.train(parts.sample(paths, splits), vocab).json

    return Tokenizer.from_json(kept(work / "tokenizer.json", key, str, fit, lambda _: []))


def _pack(path: Path, splits: Sequence[str | None], out: Path, model: ModelConfig, number: int, key: str) -> Packed:
    """`parts.pack_part`, unless it is done."""

    def pack() -> Packed:
        return parts.pack_part(path, splits, out, model, number)

    return kept(path.with_suffix(".pack.json"), key, Packed, pack, lambda part: [out / s.file for s in part.shards])


def _made_in(out: Path, file: File) -> bool:
    """Whether a file is of the corpus itself, which may lie inside a source."""
    return Path(file.path).is_relative_to(out) and not Path(file.spec.uri).is_relative_to(out)


def _stamps(files: Iterable[File]) -> list[list[Any]]:
    """What tells whether files, and the captions beside them, are still what was read."""
    return [[dump(file.spec), file.name, file.stamp] for file in files]


@contextmanager
def _alone(work: Path) -> Iterator[None]:
    """Raises DataError while another prepare works there: the shards of two requests would be mixed."""
    with alone(work / "lock", DataError(f"another prepare is writing to {work.parent}", do="wait for it, or stop it")):
        yield


def _each(
    task: Callable[..., Any],
    jobs: Iterable[tuple[Any, ...]],
    sizes: list[int],
    what: str,
    on_progress: Progress,
) -> Iterator[Any]:
    """What `task` gives for the arguments of each job, in order, from as many processes as there are CPUs for.

    A task that holds state goes to a pool of actors, so that each process builds it once.
    """

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": task(*row["job"])}

    class Worker:
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return run(row)

    rows = [{"job": job} for job in jobs]
    done, total = 0, sum(sizes)
    on_progress(what, done, total)
    try:
        data = ray.data.from_items(rows, override_num_blocks=len(rows))
        pool = ray.data.ActorPoolStrategy(size=max(1, min(len(rows), _cpus())))
        actors = getattr(task, "holds_state", False)
        results = data.map(Worker, compute=pool) if actors else data.map(run)  # type: ignore[arg-type]
        for row, size in zip(results.iter_rows(), sizes, strict=True):
            done += size
            on_progress(what, done, total)
            yield row["result"]
    except RayError as error:  # of a task, or of a process that was killed too often
        cause = getattr(error, "cause", None)
        if isinstance(cause, ShoalError):
            raise cause from error
        said = str(cause or error).strip() or type(cause or error).__name__
        raise DataError(f"cannot {what}", got=said.splitlines()[-1][:200]) from error


def _cpus() -> int:
    """Of the whole cluster; 0 where an autoscaler has yet to start its nodes."""
    return int(ray.cluster_resources().get("CPU", 0))  # type: ignore[no-untyped-call]


@contextmanager
def _quiet_data() -> Iterator[None]:
    """Ray Data in the order of its input, so that equal requests give equal corpora, and without its own reports."""
    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.execution_options.preserve_order, context.enable_progress_bars, logger.level
    context.execution_options.preserve_order, context.enable_progress_bars = True, False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.execution_options.preserve_order, context.enable_progress_bars, level = before
        logger.setLevel(level)


def _named_apart(specs: Sequence[SourceSpec]) -> list[SourceSpec]:
    """The sources with absolute paths, since workers have folders of their own. Raises ConfigError when two share a name."""
    for name, count in Counter(spec.name for spec in specs).items():
        if count > 1:
            raise ConfigError(f"source {name} is given {count} times", do="give each source a name of its own")
    here = {spec.uri: str(local_path(spec.uri).absolute()) for spec in specs if "://" not in spec.uri}
    return [replace(spec, uri=here.get(spec.uri, spec.uri)) for spec in specs]


def _finished(job: _Job) -> dict[str, Any]:
    """The report of the corpus in `out`, which must be of the same request and of the same files."""
    had = open_index(job.out).request
    asked = json.loads(json.dumps(job.request))
    other = sorted(key for key in asked.keys() | had.keys() if asked.get(key) != had.get(key))
    try:
        named = json.loads((job.out / NAMED).read_bytes()) if (job.out / NAMED).exists() else {}
        report: dict[str, Any] = json.loads((job.out / card.REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{job.out} is not whole", got=str(error)[:160], do="remove it and prepare again") from error
    stores = {spec.name: store_of(spec, job.s3) for spec in job.specs}
    if not other and any(stores[name].stamp(path) != was for name, of in named.items() for path, was in of.items()):
        other = ["files that rows name"]
    if other:
        raise DataError(
            f"{job.out} holds a corpus of another request",
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
